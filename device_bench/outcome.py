"""What a process that has ended says: its reply, or what became of it."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from typing import Any, Final

from vlmedge.device_bench.hosts.host import Output, Units
from vlmedge.device_bench.result import Reply, Status
from vlmedge.errors import RuntimeFailedError, VlmedgeError
from vlmedge.records import decode

EXCERPT: Final = 200  # characters of what a process said
_KILLED = 9  # SIGKILL, on every system
_TAIL = 20  # lines at the end of stderr that may tell why
# Python, PyTorch and CUDA, C++, the C library, ONNX Runtime, ggml: their words for it.
_MEMORY = re.compile(
    r"MemoryError|out of memory|bad_alloc|bad allocation|cannot allocate memory|"
    r"(failed|unable) to allocate (memory|buffer|.*buffer)",
    re.IGNORECASE,
)
_WINDOWS = {0xC0000005: "an access violation", 0xC0000409: "a stack check", 0xC00000FD: "a stack overflow"}


def read_reply(output: Output, *, timeout: float) -> Reply:
    """The reply in the last line of a worker's output, or one that says why there is none.

    `timeout`: seconds that the process was given. A process that replied and then crashed, or did not end, has done its
    work: the reply stands, and its reason says so.
    """
    try:
        reply = decode(Reply, _last(output.stdout), "the reply", RuntimeFailedError)
    except VlmedgeError as error:
        return _without(output, timeout, str(error))
    ending = "" if output.code == 0 else f"after its reply it {_ending(output, timeout)[1]}"
    return replace(reply, reason="; ".join(filter(None, (reply.reason, ending))))


def read_units(output: Output, *, timeout: float) -> Units:
    """What `--units` printed. Raises RuntimeFailedError where it is none."""
    try:
        return decode(dict[str, dict[str, str]], _last(output.stdout), "the list of units", RuntimeFailedError)
    except VlmedgeError as error:
        reason = _without(output, timeout, str(error)).reason
        raise RuntimeFailedError(f"the worker does not tell its units: {reason}") from None


def excerpt(text: str) -> str:
    """One printable line of at most 200 characters."""
    line = "".join(c if c.isprintable() else " " for c in text[: 4 * EXCERPT])
    line = " ".join(line.split())
    return line if len(line) <= EXCERPT else line[: EXCERPT - 3] + "..."


def last_line(text: str) -> str:
    """The last line that is not blank, made printable; "" where there is none."""
    lines = text[-64 * 1024 :].splitlines()
    return next((line for line in map(excerpt, reversed(lines)) if line), "")


def told_memory(said: str) -> str:
    """The line at the end of what a program said that tells that it got no memory; "" where none does."""
    lines = said[-64 * 1024 :].splitlines()[-_TAIL:]
    return next((excerpt(line) for line in reversed(lines) if _MEMORY.search(line)), "")


def signal_name(number: int) -> str:
    """SIGSEGV and so on; "the signal 64" for one that has no name here."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"the signal {number}"


def _last(stdout: str) -> Any:
    """The last line's JSON."""
    text = stdout.rstrip()
    line = text[max(text.rfind("\n"), text.rfind("\r")) + 1 :]
    if not line:
        raise RuntimeFailedError("it printed nothing")
    try:
        return json.loads(line, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise RuntimeFailedError("its last line is not JSON") from None


def _no_number(name: str) -> float:
    raise ValueError(name)  # NaN and infinities are no JSON


def _without(output: Output, timeout: float, why: str) -> Reply:
    if output.code == 0:
        said = last_line(output.stdout)
        return Reply("rubbish", f"{excerpt(why)}: {said}" if said else excerpt(why))
    status, ending = _ending(output, timeout)
    return Reply(status, f"it {ending}")


def _ending(output: Output, timeout: float) -> tuple[Status, str]:
    """How it ended, as a status and the words after "it"."""
    code = output.code
    if code is None:
        return "hung", f"was ended because it took more than {timeout:g} s"
    number = _signal(code)
    memory = told_memory(output.stderr)
    if memory:
        return "out_of_memory", f"ran out of memory: {memory}"
    if number == _KILLED:
        return "out_of_memory", "was killed by the system (SIGKILL), most likely for memory"
    how = f"was ended by {signal_name(number)}" if number else f"ended with {_code(code)}"
    said = last_line(output.stderr)
    return "crashed", f"{how}: {said}" if said else how


def _signal(code: int) -> int:
    """The signal that ended it, also as shells write it (128 + the signal); 0 where none did."""
    if code < 0:
        return -code
    return code - 128 if 128 < code < 128 + 65 else 0


def _code(code: int) -> str:
    if code < 1 << 16:
        return f"the code {code}"
    return f"{_WINDOWS[code]} (0x{code:X})" if code in _WINDOWS else f"the code 0x{code:X}"
