"""The command line's own behaviour: names, suggestions, help, and what goes to stdout and stderr."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import click
import pytest

from vlmedge import __version__
from vlmedge.cli import VERBS, group, main
from vlmedge.cli.options import FLAVOURS, FORMATS, chosen_profile
from vlmedge.exporters import EXPORTERS
from vlmedge.quant_profiles import profile_names


def test_unknown_verb(refused):
    assert refused("exprot", code=2) == "vlmedge: unknown command 'exprot'; did you mean 'export'? (vlmedge --help)\n"


def test_unknown_model(refused):
    line = refused("export", "moondream", "--format", "gguf", code=2)
    assert "unknown model 'moondream'; did you mean 'moondream2'?" in line
    assert "there is no folder ./moon" in refused("export", "./moon", "--format", "gguf", code=2)


def test_unknown_demo(refused):
    assert "there is no demo checkpoint 'moondram'" in refused("export", "demo:moondram", "--format", "gguf", code=2)


def test_unknown_profile(refused, golden, tmp_path):
    words = ("export", golden, "--format", "gguf", "--quant")
    assert "unknown profile 'q4_o'; did you mean 'q4_0'?" in refused(*words, "q4_o", code=2)
    assert "the profile x.toml cannot be read: No such file" in refused(*words, "x.toml", code=2)
    (tmp_path / "mine.toml").write_text('summary = "x"\nrulez = []\n')
    assert "mine.toml has the unknown key 'rulez'; did you mean 'rules'?" in refused(
        *words, tmp_path / "mine.toml", code=2
    )


def test_unknown_profile_flag(refused, golden):
    assert "--q7" in refused("export", golden, "--format", "gguf", "--q7", code=2)


def test_two_profiles(refused, golden):
    words = ("export", golden, "--format", "gguf")
    assert "choose one profile, not q4 and q8" in refused(*words, "--q4", "--q8", code=2)
    assert "choose one profile, not q4 and q8" in refused(*words, "--q4", "--quant", "q8", code=2)


def test_unknown_format(refused, golden):
    assert "unknown format 'gguff'; did you mean 'gguf'?" in refused("export", golden, "--format", "gguff", code=2)
    assert "unknown format 'gguff'; did you mean 'gguf'?" in refused("plan", golden, "--format", "gguff", code=2)


def test_unknown_runtime(refused, golden, bundle, photo):
    for source in (golden, bundle):
        line = refused("run", source, photo, "What?", "--runtime", "lamacpp", code=2)
        assert "unknown runtime 'lamacpp'; did you mean 'llamacpp'?" in line


def test_a_runtime_for_something_else(refused, golden, bundle, photo):
    assert "export it first" in refused("run", golden, photo, "What?", "--runtime", "llamacpp", code=2)
    line = refused("run", bundle, photo, "What?", "--runtime", "torch", code=2)
    assert line == f"vlmedge: the runtime 'torch' runs checkpoints; {bundle} has the format gguf\n"


def test_unknown_skill(refused, bundle, photo):
    assert "unknown word 'detekt'; did you mean 'detect'?" in refused("run", bundle, photo, "--skill", "detekt", code=2)


def test_unknown_length(refused, bundle, photo):
    assert "no 'caption/shrt'; did you mean 'caption/short'?" in refused("run", bundle, photo, "--length", "shrt")


@pytest.mark.parametrize("words", [("export",), ("run",), ("run", "x"), ("plan",), ("inspect",)])
def test_missing_arguments(refused, words):
    line = refused(*words, code=2)
    assert line.startswith("vlmedge: Missing argument")
    assert f"(vlmedge {words[0]} --help)" in line


def test_missing_format(refused, golden):
    assert "Missing option '--format'" in refused("export", golden, code=2)


@pytest.mark.parametrize(
    "words",
    [
        ("--threads", "0"),
        ("--threads", "many"),
        ("--max-tokens", "0"),
        ("--temperature", "-1"),
        ("--temperature", "inf"),
        ("--seed", "-1"),
        ("--bogus",),
        ("--skill", "query"),
        ("--skill", "gaze"),
        ("--skill", "gaze", "--eye", "0.1"),
        ("--skill", "gaze", "--eye", "0.1,nan"),
        ("--skill", "detect"),
        ("--skill", "point"),
        ("What?", "--ref", "1,2,3"),
        ("What?", "--ref", "0.5,1.5"),
        ("What?", "--json", "--stream"),
        ("What?", "extra"),
    ],
)
def test_run_words_that_cannot_be_meant(refused, photo, words):
    """All before anything is opened: the bundle does not exist."""
    refused("run", "nowhere", photo, *words, code=2)


@pytest.mark.parametrize("words", [("-",), ("-", "--skill", "detect", "--object", "x"), ("-", "x", "--draw", "x.png")])
def test_skills_that_need_a_picture(refused, words):
    assert "picture" in refused("run", "nowhere", *words, code=2)


def test_help_of_every_verb(succeed):
    top = succeed("--help")
    assert top.err == ""
    assert succeed("-h").out == top.out == succeed().out
    for verb in VERBS:
        assert verb in top.out
        done = succeed(verb, "--help")
        assert done.out.startswith(f"Usage: vlmedge {verb}")
        assert done.err == ""


def test_every_parameter_is_explained():
    """Options say what they are; arguments are named in their verb's help."""
    context = click.Context(group)
    for verb in VERBS:
        command = group.get_command(context, verb)
        assert command is not None
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                told = parameter.help or parameter.metavar or parameter.show_default
                assert told, f"{verb} {parameter.opts}"


def test_every_profile_has_its_flag(succeed):
    text = succeed("export", "--help").out
    assert all(f"--{name.replace('_', '-')} " in text for name in profile_names())


def test_version(succeed):
    assert succeed("--version").out == f"vlmedge, version {__version__}\n"


def test_profiles(succeed):
    found = succeed("profiles", "--json").data["profiles"]
    assert [p["name"] for p in found] == list(profile_names())
    table = succeed("profiles").out
    assert all(p["summary"] in table for p in found)
    formats = {p["name"]: p["formats"] for p in found}
    assert formats["q3"] == ["gguf"]
    assert formats["q4"] == list(FORMATS)


def test_models(succeed):
    found = {m["name"]: m for m in succeed("models", "--json").data["models"]}
    assert found["moondream2"]["repo"] == "vikhyatk/moondream2"
    assert found["moondream2"]["licence"] == "Apache-2.0"
    table = succeed("models").out
    assert all(name in table for name in found)


def test_doctor(succeed):
    """On a machine with the development tools everything of this version works."""
    found = succeed("doctor", "--json").data
    assert set(found) == {"machine", "packages", "usable", "units", "problems"}
    assert found["machine"]["vlmedge"] == __version__
    assert found["packages"]["numpy"]
    assert found["usable"]["run checkpoint (torch)"] is True
    assert found["usable"]["export gguf"] is True
    table = succeed("doctor").out
    assert "run gguf (llamacpp)" in table
    assert "export gguf" in table


def test_interruption_is_one_line(cli, monkeypatch, golden):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vlmedge.pipeline.describe", interrupted)
    done = cli("plan", golden, "--format", "gguf")
    assert (done.code, done.out, done.err) == (130, "", "vlmedge: interrupted; nothing was left behind\n")


def test_no_memory_is_one_line(cli, monkeypatch, golden):
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("vlmedge.pipeline.describe", exhausted)
    done = cli("plan", golden, "--format", "gguf")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("vlmedge: out of memory")


@pytest.mark.parametrize("words", [("profiles",), ("inspect", "nowhere"), ("--help",)])
def test_as_a_program(words):
    """`python -W error -m vlmedge`: no warning anywhere, the same exit codes."""
    environment = os.environ | {"NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "vlmedge", *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == (1 if "nowhere" in words else 0)
    assert bool(done.stderr) == bool(done.returncode)
    assert done.stderr.count("\n") == done.returncode


def test_a_reader_that_goes_away(golden):
    """`vlmedge plan ... | head -1` ends quietly."""
    words = [sys.executable, "-W", "error", "-m", "vlmedge", "plan", golden, "--format", "gguf", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) in (0, 1)  # click's own way


def test_main_returns_through_exit(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["profiles", "--json"])
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out)


def test_a_terminal_sees_progress(golden, tmp_path):
    """On a terminal bars are drawn on stderr; stdout carries the JSON object alone."""
    master, slave = pty.openpty()
    out = tmp_path / "x"
    words = ["export", golden, "--format", "gguf", "--f32", "--no-verify", "--threads", "1", "--out", out, "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vlmedge", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=slave,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(slave)
    shown = b""
    try:
        while block := os.read(master, 1 << 16):
            shown += block
    except OSError:
        pass  # Linux says so when the other end is closed
    stdout, _ = process.communicate(timeout=120)
    os.close(master)
    assert process.returncode == 0
    assert json.loads(stdout)["bundle"] == str(out)
    assert b"writing weights" in shown
    assert Path(out).is_dir()


def test_the_formats_in_the_help_are_those_that_exist():
    assert {name: EXPORTERS[name].default_profile for name in EXPORTERS} == FORMATS
    for name in EXPORTERS:
        assert EXPORTERS[name].flavours == FLAVOURS.get(name, ("",))


def test_every_flag_stands_for_its_profile():
    for name in profile_names():
        flags = {f"profile_{name.replace('-', '_')}": True}
        assert chosen_profile(None, flags) == name
    assert chosen_profile(None, {}) is None


def test_profiles_and_flavours_of_other_formats(refused, golden):
    words = ("plan", golden, "--format", "gguf")
    line = refused(*words, "--q4-fast", code=2)
    assert "profile q4-fast is for onnx, not gguf; for gguf there are: f16, f32, " in line
    assert "gguf has no flavours; leave 'ort' out" in refused(*words, "--flavour", "ort", code=2)
    words = ("plan", golden, "--format", "onnx")
    assert "profile q3 is for gguf, not onnx; for onnx there are: " in refused(*words, "--q3", code=2)
    line = refused(*words, "--flavour", "portible", code=2)
    assert "onnx has no flavour 'portible'; did you mean 'portable'?" in line
