"""The shell scripts, with a `python` that pretends to install."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHELLS = [shell for shell in ("sh", "dash") if shutil.which(shell)]
PYTHON = """#!/bin/sh
case "$*" in
    *verbose*) echo "Collecting x"; echo "the last words"; exit {pip} ;;
    *llama_cpp*) exit {llama} ;;
esac
"""


def install(shell, folder, *what, pip=0, llama=0):
    (folder / "python").write_text(PYTHON.format(pip=pip, llama=llama))
    (folder / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "VIRTUAL_ENV": str(folder)}
    words = [shell, "-c", '. scripts/environment; install "$@"; echo done', "scripts/x", *what]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_failing_pip_fails_the_script(shell, tmp_path):
    done = install(shell, tmp_path, ".", pip=3)
    assert done.returncode == 1
    assert done.stdout.endswith("the last words\nthe installation failed (pip: 3); the lines above say why\n")
    assert "done" not in done.stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_what_was_installed_must_import(shell, tmp_path):
    assert install(shell, tmp_path, ".").stdout.endswith("done\n")
    assert install(shell, tmp_path, ".", llama=1).stdout.endswith("done\n")
    done = install(shell, tmp_path, ".[llamacpp,torch]", llama=1)
    assert done.returncode == 1
    assert "llama_cpp was installed and cannot be imported" in done.stdout
