"""The command line: one file per verb, each the parser of one library function."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Any

import click

from vlmedge import __version__
from vlmedge.errors import VlmedgeError, nearest

_LONGEST = 1000  # characters of an error; names out of damaged files can be enormous
VERBS = {
    "export": "vlmedge.cli.export:command",
    "run": "vlmedge.cli.run:command",
    "verify": "vlmedge.cli.verify:command",
    "selftest": "vlmedge.cli.selftest:command",
    "eval": "vlmedge.cli.eval:command",
    "bench": "vlmedge.cli.bench:command",
    "fit": "vlmedge.cli.fit:command",
    "plan": "vlmedge.cli.plan:command",
    "inspect": "vlmedge.cli.inspect:command",
    "models": "vlmedge.cli.models:command",
    "profiles": "vlmedge.cli.profiles:command",
    "doctor": "vlmedge.cli.doctor:command",
    "demo": "vlmedge.cli.demo:command",
}


class Verbs(click.Group):
    """The verbs, imported when they are named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one verb."""
        if cmd_name not in VERBS:
            return None
        module, _, attribute = VERBS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Suggest the nearest verb for an unknown one."""
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            raise click.UsageError(f"unknown command '{args[0]}'{nearest(args[0], VERBS)}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Keep Ctrl-C from click, which would print an empty line of its own."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _InterruptedError from None


class _InterruptedError(Exception):
    """Ctrl-C."""


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="vlmedge")
def group() -> None:
    """Small vision-language models from a PyTorch checkpoint to a phone, a board, a laptop or a browser."""


def main(arguments: list[str] | None = None) -> None:
    """Run a command line; every expected failure is one line on stderr and exit code 1, wrong usage 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        result = group.main(arguments or ["--help"], prog_name="vlmedge", standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except VlmedgeError as error:
        _fail(str(error), error.exit_code)
    except click.UsageError as error:
        more = f" ({error.ctx.command_path} --help)" if error.ctx is not None else ""
        _fail(f"{error.format_message()}{more}", 2)
    except click.ClickException as error:
        _fail(error.format_message(), 1)
    except (click.Abort, KeyboardInterrupt, _InterruptedError):
        if sys.stderr.isatty():
            click.echo(err=True)  # after the terminal's own ^C
        _fail("interrupted; nothing was left behind", 130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE, errno.EIO):
            raise
        if error.errno != errno.EPIPE:  # whoever read the output wants no more of it: nothing to be told
            _fail(f"the output cannot be written: {error.strerror}", 1)
        os._exit(1)  # Python would try to write the rest
    except MemoryError:
        _fail("out of memory; a smaller profile or fewer --threads needs less", 1)


def _fail(message: str, code: int) -> None:
    print(f"vlmedge: {' '.join(message.split())[:_LONGEST]}", file=sys.stderr)
    sys.exit(code)
