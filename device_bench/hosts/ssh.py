"""A machine behind ssh as a host: vlmedge and the models are copied into a folder of its own, nothing else changes.

There must be Python 3.11 or newer, on Linux or macOS, and a login without a password. Where that Python lacks what
vlmedge needs, a virtual environment in the folder gets it. The folder may be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from io import BufferedReader, BytesIO
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from vlmedge.device_bench.hosts import guard, remote
from vlmedge.device_bench.hosts.connection import LOST, Connection, LostError
from vlmedge.device_bench.hosts.files import Stored, parcels, renamed
from vlmedge.device_bench.hosts.host import Units, machine_at
from vlmedge.device_bench.hosts.local import UNITS, UNITS_TIME, WORKER, job_line
from vlmedge.device_bench.hosts.wheel import NAME, build_wheel
from vlmedge.device_bench.job import Job
from vlmedge.device_bench.outcome import last_line, read_reply, read_units
from vlmedge.device_bench.result import Reply
from vlmedge.errors import RuntimeFailedError, UsageError, VlmedgeError, nearest

if TYPE_CHECKING:
    from vlmedge.device_bench.device import Device

DEFAULTS: Final[Mapping[str, str]] = {
    "address": "",  # user@host, or a Host of ~/.ssh/config
    "port": "",
    "config": "",  # a file for ssh -F
    "python": "python3",
    "folder": "~/.vlmedge-bench",
    "install": "auto",  # "no": install nothing, say what is missing
    "extras": "",  # of vlmedge, as "llamacpp,torch": what else is needed there
}
_OLDEST = (3, 11)
_NEEDED = ("numpy", "PIL", "tokenizers")
_KINDS = {"probe": dict, "missing": list, "put": bool, "unpack": bool, "lacks": list}  # of `remote`'s answers
_RUNTIMES = ("onnxruntime", "llama_cpp", "torch")  # one at least; the first comes with vlmedge
_EXTRAS = {"llamacpp": "llama_cpp", "torch": "torch"}
_GRACE = 5.0  # seconds after which the guard there ends what a lost connection did not
_ANSWER = 120.0  # seconds for a question about files
_INSTALL = 7200.0  # seconds for pip: a small board may have to compile


class SshHost:
    """Runs jobs there in fresh processes, with the worker of this vlmedge or another `command`."""

    def __init__(self, device: Device, command: Sequence[str] | None = None) -> None:
        options = _options(device.options)
        self._connection = Connection(options["address"], options["port"], os.path.expanduser(options["config"]))
        self._options = options
        self._command = command
        self._python = _expanded(options["python"])
        self._folder = options["folder"]
        self._extras = _extras(options["extras"])
        self._library = ""
        self._known: set[str] = set()  # files that are there

    @property
    def name(self) -> str:
        """As it stands in records."""
        return f"ssh {self._connection.address}"

    @property
    def machine(self) -> str:
        """By its address, whoever logs in."""
        address = self._connection.address.rpartition("@")[2].lower()
        return machine_at(address, f"ssh {address}")

    def open(self) -> None:
        """Connect, copy this vlmedge there, and see to what it needs.

        Raises RuntimeFailedError where it cannot be reached, or lacks something.
        """
        found = self._ask("probe", self._folder)
        if tuple(found["version"]) < _OLDEST:
            version = ".".join(map(str, found["version"]))
            raise RuntimeFailedError(f"{self.name} has Python {version}, 3.11 is the oldest; give the option python")
        self._folder = found["folder"]
        wheel = self._send_vlmedge()
        self._see_to_needs(wheel, bool(found["venv"]))

    def units(self) -> Units:
        """What can compute there. Raises RuntimeFailedError where the worker does not tell."""
        words = (*self._guarded(UNITS_TIME), UNITS)
        output = self._connection.call(words, "\n", UNITS_TIME, hold=True)
        if output.code == LOST:
            raise LostError(self._connection.failure(output.stderr))
        return read_units(output, timeout=UNITS_TIME)

    def run(self, job: Job, timeout: float) -> Reply:
        """Bring the job's files there, unless they are, and run it; it ends there when the connection does."""
        try:
            line = job_line(renamed(job, self._bring(job)))
            output = self._connection.call(self._guarded(timeout), line, timeout, hold=True)
        except LostError as error:
            return Reply("lost", str(error))
        except VlmedgeError as error:
            return Reply("failed", str(error))
        except OSError as error:
            return Reply("failed", f"{error.filename} cannot be read: {error.strerror}")
        reply = read_reply(output, timeout=timeout)
        broken = output.code == LOST and reply.status in ("crashed", "out_of_memory")
        return Reply("lost", self._connection.failure(last_line(output.stderr))) if broken else reply

    def close(self) -> None:
        """Nothing is held; the folder stays, for the next run."""

    def _guarded(self, timeout: float) -> tuple[str, ...]:
        worker = self._command or (self._python, *WORKER)
        return ("env", f"PYTHONPATH={self._library}", *_guard(self._python, timeout), *worker)

    def _bring(self, job: Job) -> dict[str, str]:
        """Copy what is not there; the names that the job's files have there."""
        names: dict[str, str] = {}
        wanted: dict[str, Stored] = {}
        for parcel in parcels(job):
            place = f"files/{parcel.key}"
            names[parcel.name] = f"{self._folder}/{place}/{parcel.top}"
            wanted |= {f"{place}/{stored.name}": stored for stored in parcel.files}
        new = {name: stored for name, stored in wanted.items() if name not in self._known}
        if new:
            sizes = [[name, stored.path.stat().st_size] for name, stored in new.items()]
            for name in self._ask("missing", self._folder, stdin=json.dumps(sizes)):
                with new[name].path.open("rb") as file:
                    self._put(name, file, new[name].sha256)
            self._known |= set(new)
        return names

    def _send_vlmedge(self) -> str:
        """Put the wheel there and unpack it; its name there."""
        wheel = build_wheel()
        digest = hashlib.sha256(wheel).hexdigest()
        name, place = f"vlmedge/{digest[:16]}/{NAME}", f"vlmedge/{digest[:16]}/lib"
        if self._ask("missing", self._folder, stdin=json.dumps([[name, len(wheel)]])):
            self._put(name, BytesIO(wheel), digest)
        self._ask("unpack", self._folder, name, place)
        self._library = f"{self._folder}/{place}"
        return f"{self._folder}/{name}"

    def _see_to_needs(self, wheel: str, has_venv: bool) -> None:
        """Choose a Python that has everything: the one there, else the folder's own environment."""
        lacking = self._lacks()
        if not lacking:
            return
        if self._options["install"] == "no":
            raise RuntimeFailedError(
                f"{self._python} on {self.name} lacks {', '.join(lacking)}; install it there, or leave out install = no"
            )
        base, self._python = self._python, f"{self._folder}/venv/bin/python"
        if not has_venv:
            self._install(base, "-m", "venv", "--system-site-packages", f"{self._folder}/venv")
        if self._lacks():
            pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
            self._install(self._python, *pip, wheel + (f"[{','.join(self._extras)}]" if self._extras else ""))
            if still := self._lacks():
                raise RuntimeFailedError(
                    f"{self._python} on {self.name} lacks {', '.join(still)} after pip; install it"
                )

    def _lacks(self) -> list[str]:
        """What the Python there cannot import, and should."""
        wanted = {_EXTRAS[extra] for extra in self._extras}
        absent: list[str] = self._ask("lacks", *_NEEDED, *_RUNTIMES)
        if not set(_RUNTIMES) - set(absent):
            wanted.add(_RUNTIMES[0])
        return [name for name in absent if name in _NEEDED or name in wanted]

    def _put(self, name: str, file: BufferedReader | BytesIO, digest: str) -> None:
        digest = digest or hashlib.file_digest(file, "sha256").hexdigest()
        size = file.seek(0, 2)
        file.seek(0)
        self._ask("put", self._folder, name, str(size), digest, stdin=file, timeout=None)

    def _ask(self, verb: str, *arguments: str, stdin: str | BinaryIO = "", timeout: float | None = _ANSWER) -> Any:
        """Let `remote` do something there; what it answers."""
        words = (self._python, "-P" if verb == "lacks" else "-I", "-c", _text(remote), verb, *arguments)
        said = self._say(words, stdin, timeout, verb)
        try:
            answer = json.loads(said.splitlines()[-1])
        except (ValueError, IndexError):
            answer = None
        if not isinstance(answer, _KINDS[verb]):
            raise RuntimeFailedError(f"{self.name} answers '{verb}' with something else: {last_line(said)}")
        return answer

    def _install(self, *words: str) -> None:
        """Let the first word, a Python there, run a module; it ends with the connection."""
        try:
            self._say((*_guard(words[0], _INSTALL), *words), "\n", _INSTALL, "installing what vlmedge needs", hold=True)
        except LostError:
            raise
        except RuntimeFailedError as error:
            remedy = f"see that Python there has venv and pip (python3-venv), remove {self._folder}/venv, and run again"
            raise RuntimeFailedError(f"{error}; {remedy}") from None

    def _say(
        self, words: Sequence[str], stdin: str | BinaryIO, timeout: float | None, what: str, *, hold: bool = False
    ) -> str:
        output = self._connection.call(words, stdin, timeout, hold=hold)
        if output.code == LOST:
            raise LostError(self._connection.failure(output.stderr))
        if output.code == 127:
            raise RuntimeFailedError(f"{self.name} has no '{words[0]}'; give the option python, a path to Python 3.11")
        if output.code != 0:
            said = last_line(output.stderr) or last_line(output.stdout)
            raise RuntimeFailedError(
                f"{what} failed on {self.name}: {said}" if output.code else f"{what} took too long"
            )
        return output.stdout


def _guard(python: str, timeout: float) -> tuple[str, ...]:
    """The words before a command that is to end with the connection."""
    return (python, "-I", "-c", _text(guard), str(timeout + _GRACE))


def _options(given: Mapping[str, str]) -> dict[str, str]:
    for key in given:
        if key not in DEFAULTS:
            raise UsageError(f"an ssh device has no option '{key}'{nearest(key, DEFAULTS)}")
    options = {**DEFAULTS, **given}
    if options["install"] not in ("auto", "no"):
        raise UsageError(f"the option install is auto or no, not '{options['install']}'")
    return options


def _extras(text: str) -> tuple[str, ...]:
    chosen = tuple(text.replace(",", " ").split())
    for extra in chosen:
        if extra not in _EXTRAS:
            raise UsageError(f"no extra '{extra}' of vlmedge helps an ssh device{nearest(extra, _EXTRAS)}")
    return chosen


def _expanded(program: str) -> str:
    """A path below the home folder as seen from there, where every command starts: no shell expands what is quoted."""
    return f"./{program[2:]}" if program.startswith("~/") else program


def _text(module: ModuleType) -> str:
    """The module's own text."""
    return Path(str(module.__file__)).read_text(encoding="utf-8")
