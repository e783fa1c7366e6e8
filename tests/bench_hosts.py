"""What the tests of hosts share: waiting, is a process gone, and a job for the real worker."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

from vlmedge.device_bench.job import Ask, Job, Variant, Work
from vlmedge.device_bench.result import Reply
from vlmedge.subject import examine


def alive(number: str) -> bool:
    """Does the process run? One that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(number: str, seconds: float = 5.0) -> bool:
    """Does it end within so many seconds?"""
    end = time.monotonic() + seconds
    while alive(number) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(number)


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Until it is true; fails where it is not within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def ask(picture: Path) -> Ask:
    return Ask("photo", str(picture), hashlib.sha256(picture.read_bytes()).hexdigest(), 1, 1, "")


def real_job(bundle: Path, picture: Path) -> Job:
    """Three tokens of a caption, by llama.cpp on one thread."""
    found = examine(str(bundle), "golden")
    variant = Variant(
        "golden", str(bundle), found.digest, found.format, found.profile, found.bytes, 32.0, "llamacpp", threads=1
    )
    return Job("measure", "here", Work("one", (ask(picture),), 3, warmup=0, repeat=1), variant=variant)


def check_reply(reply: Reply) -> None:
    """Hold it against what `real_job` asks for."""
    assert reply.status == "ok", reply.reason
    assert [(counts.ask, counts.generated) for counts in reply.counts] == [("photo", 3)]
    assert len(reply.samples) == 1
    assert reply.threads == 1
