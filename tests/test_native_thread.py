"""llama.cpp computes in a thread of its own, so that PyTorch cannot take its tile registers away."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import vlmedge
from vlmedge.runtimes.native_thread import natively


@natively
def name():
    return threading.current_thread().name


def test_always_the_same_thread_and_never_the_callers():
    with ThreadPoolExecutor(3) as callers:
        names = set(callers.map(lambda _: name(), range(9))) | {name()}
    assert len(names) == 1
    assert names != {threading.current_thread().name}


def test_what_it_raises_comes_back():
    with pytest.raises(ZeroDivisionError):
        natively(lambda: 1 / 0)()


def test_a_call_from_within_runs_where_it_is():
    assert natively(lambda: name())() == name()


def test_a_forked_child_has_a_thread_of_its_own():
    code = (
        "import os, sys\nfrom tests.test_native_thread import name\nname()\npid = os.fork()\n"
        "if pid == 0:\n    os._exit(0 if name() else 1)\nsys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


BY_TURNS = """
import sys, torch, vlmedge
product = lambda: float((torch.ones(512, 512, dtype=torch.bfloat16) @ torch.ones(512, 512, dtype=torch.bfloat16)).sum())
product()
with vlmedge.load(sys.argv[1], threads=1) as model:
    for picture in sys.argv[2:]:
        print(model.query(picture, "How many shapes are there?").text)
        product()
"""


def test_pytorch_and_llama_cpp_by_turns(tmp_path):
    """Quantized products after bf16 products of PyTorch: an illegal instruction on AMX, were it one thread."""
    from vlmedge.demo import demo_picture

    bundle = vlmedge.export("demo:moondream2", "gguf", "q8", tmp_path / "out", verify=False, threads=1)
    pictures = [str(demo_picture(n)) for n in ("small", "shapes", "square")]
    command = [sys.executable, "-W", "ignore", "-c", BY_TURNS, str(bundle.path), *pictures]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-500:]}"
    assert len(done.stdout.split()) == 3
