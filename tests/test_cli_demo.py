"""vlmedge demo: the whole way in one command, and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import urllib.request

import pytest
from PIL import Image

from vlmedge.bundle import open_bundle
from vlmedge.cli.demo_report import EXPORTS, ORIGINAL_RIGHT, check_answers
from vlmedge.errors import VerificationError


def test_a_demo_that_answers_worse_fails():
    check_answers({"gguf q4": 20, "original": 22}, 24)
    check_answers({"gguf q4": ORIGINAL_RIGHT - 2}, 46)
    with pytest.raises(VerificationError, match="gguf q4 answers 19 of 24 right and the original 22"):
        check_answers({"onnx w8a8": 22, "gguf q4": 19, "original": 22}, 24)
    with pytest.raises(VerificationError, match=f"gguf q4 answers 3 of 46 right and the original {ORIGINAL_RIGHT}"):
        check_answers({"gguf q4": 3}, 46)


def test_options_that_go_together(refused, tmp_path):
    assert "--port goes with --serve" in refused("demo", "--port", 8000, code=2)
    assert "--source goes with --serve" in refused("demo", "--bundle", tmp_path, code=2)
    assert "--out is for a bundle that is made" in refused(
        "demo", "--serve", "--out", tmp_path, "--source", "x", code=2
    )
    assert "is not a bundle" in refused("demo", "--serve", "--bundle", tmp_path)


@pytest.mark.slow
def test_the_demo(succeed, tmp_path):
    """Export, then the same questions to the bundles and to the original; a detection is drawn."""
    done = succeed("demo", "--threads", 1, "--out", tmp_path / "kept")
    assert done.err == ""
    line = re.search(r"^right: (.*)$", done.out, re.MULTILINE)
    assert line is not None
    counts = {name: (int(c), int(of)) for name, c, of in re.findall(r"([a-z0-9 ]+?) (\d+) of (\d+)", line[1])}
    names = [f"{format_} {profile}" for format_, profile in EXPORTS]
    assert [name.strip() for name in counts] == [*names, "original"]
    assert all(count >= of * 0.9 for count, of in counts.values())
    assert counts[" original"][0] == ORIGINAL_RIGHT
    assert "first answer" in done.out
    assert "3 of 'green shape' in landscape.png" in done.out
    with Image.open(tmp_path / "kept/demo-detection.png") as drawn:
        assert (255, 214, 0) in [color for _, color in drawn.getcolors(1 << 20)]
    for format_, profile in EXPORTS:
        bundle = open_bundle(tmp_path / f"kept/moondream2-{profile}.{format_}")
        assert bundle.manifest.verification["verified"]


@pytest.mark.slow
def test_the_demo_of_the_base_install(tmp_path):
    """Without PyTorch nothing is verified, without llama.cpp GGUF is not asked: one line each; answers are judged."""
    code = "import sys; sys.modules.update(torch=None, llama_cpp=None); "
    code += "from vlmedge.cli import main; main(['demo', '--threads', '1'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert "gguf q4 was written but not asked: llama-cpp-python is not installed" in done.stdout
    assert "not verified (onnx w8a8): nothing was computed anew: PyTorch is not installed" in done.stdout
    assert done.stdout.count("not verified") == 1
    assert re.search(r"^right: onnx w8a8 \d+ of 46$", done.stdout, re.MULTILINE)
    assert [path.name for path in tmp_path.iterdir()] == ["vlmedge-demo.png"]


def test_the_page_ends_with_ctrl_c(bundle, tmp_path):
    """A process of its own is interrupted, as Ctrl-C does it; a second server on the port is refused."""
    code = "import sys; from vlmedge.cli import main; main(sys.argv[1:])"
    words = [sys.executable, "-u", "-c", code, "demo", "--serve", "--source", str(bundle), "--threads", "1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        assert found is not None, line
        assert "(gguf f32, " in line
        with urllib.request.urlopen(found[0], timeout=30) as page:
            assert b"<title>vlmedge demo</title>" in page.read()
        second = subprocess.run([*words, "--port", found[1]], capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert f"port {found[1]} cannot be used" in second.stderr
        process.send_signal(2)
        start = time.monotonic()
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "\nended\n", "")
    assert time.monotonic() - start < 10
