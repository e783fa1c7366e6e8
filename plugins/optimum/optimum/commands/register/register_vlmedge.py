"""Found by optimum-cli because of where it lies: adds `optimum-cli export edge`, which is `vlmedge export`."""

from __future__ import annotations

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class EdgeExportCommand(BaseOptimumCLICommand):
    """Every word after `optimum-cli export edge` goes to `vlmedge export`: one parser, one help, one set of errors."""

    COMMAND = CommandInfo(
        name="edge", help="Export a small vision-language model to a verified GGUF or ONNX bundle (vlmedge)."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Take all words as they are, `--help` too."""
        parser.prefix_chars = "\0"  # which no word can begin with: argparse must not read options that are not its own
        parser.add_argument("words", nargs=REMAINDER)

    def run(self) -> None:
        """Run the export; ends the process with vlmedge's exit code, after one line on stderr if it fails."""
        from vlmedge.cli import main

        main(["export", *self.args.words])


REGISTER_COMMANDS = [(EdgeExportCommand, ExportCommand)]
