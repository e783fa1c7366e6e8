"""Android's debug bridge: one phone, its shell and its files, through the program `adb` (Android 7 or newer)."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

from vlmedge.device_bench.hosts.host import Output
from vlmedge.device_bench.hosts.process import run_guarded
from vlmedge.errors import RuntimeFailedError

INSTALL = "install Android's platform-tools (https://developer.android.com/tools/releases/platform-tools)"
_QUICK = 60.0  # seconds for what only asks
_SLOWEST = 2e6  # bytes per second of a push: USB 2 with a bad cable
# As adb says it: "adb: device 'X' not found", "error: device offline", "error: no devices/emulators found", ...
_GONE = re.compile(r"device '[^']*' not found|device offline|no devices/emulators found|error: closed|device still")
_STATES = {
    "unauthorized": "has not allowed this computer; unlock it and accept its dialog, then try again",
    "offline": "is offline; unplug it and plug it in again, or 'adb reconnect'",
    "no": "cannot be opened by this user; see https://developer.android.com/studio/run/device about udev rules",
}


class PhoneLostError(RuntimeFailedError):
    """The phone was there and is not any more."""


def find_phone(serial: str) -> str:
    """The serial number of the one phone that can be used; `serial` "" for whichever is plugged in.

    Raises RuntimeFailedError where adb is not installed, or there is no such phone, more than one, or one that has not
    allowed this computer or does not answer.
    """
    if shutil.which("adb") is None:
        raise RuntimeFailedError(f"adb is not installed; {INSTALL}")
    found = _listed(_adb(["devices", "-l"], _QUICK))
    if serial and serial not in found:
        raise RuntimeFailedError(f"adb lists no phone '{serial}', {_names(found)}; plug it in or 'adb connect' it")
    if not found:
        raise RuntimeFailedError("adb lists no phone; plug one in and allow USB debugging in its developer options")
    if not serial and len(found) > 1:
        raise RuntimeFailedError(f"adb lists several phones, {_names(found)}; say which: --device NAME@SERIAL")
    serial = serial or next(iter(found))
    if found[serial] != "device":
        state = _STATES.get(found[serial], f"is in the state '{found[serial]}', not started; let it start Android")
        raise RuntimeFailedError(f"the phone '{serial}' {state}")
    return serial


class Phone:
    """One phone, by its serial number."""

    def __init__(self, serial: str) -> None:
        self.serial = serial

    def shell(self, *words: str, timeout: float = _QUICK) -> Output:
        """Run one command there, each word as it stands; the code is its own, None where it took too long."""
        return self.script(shlex.join(words), timeout)

    def script(self, text: str, timeout: float = _QUICK) -> Output:
        """Run a line of shell there. Raises PhoneLostError where the phone has gone."""
        return self._checked(_adb(["-s", self.serial, "shell", text], timeout))

    def watch(self, text: str, timeout: float) -> Output:
        """As `script`, for what may take long: it ends with this process too, also where that is killed."""
        return self._checked(run_guarded(["adb", "-s", self.serial, "shell", text], "", timeout))

    def push(self, local: Path, remote: str) -> None:
        """Copy one file there, whole or not at all: under another name first, its size compared, then renamed.

        Raises RuntimeFailedError where it cannot be written (no space left) or arrives in another size.
        """
        size, part = local.stat().st_size, f"{remote}.part"
        done = self._checked(_adb(["-s", self.serial, "push", str(local), part], _QUICK + size / _SLOWEST))
        if done.code == 0:
            wanted, old, new = str(size), shlex.quote(part), shlex.quote(remote)
            if self.script(f'[ "$(stat -c %s {old})" = {wanted} ] && mv -f {old} {new}').code == 0:
                return
        self.shell("rm", "-f", part)
        reason = last_line(done) or "it did not arrive whole"
        raise RuntimeFailedError(f"{local} cannot be copied to the phone: {reason}")

    def pull(self, remote: str, local: Path) -> None:
        """Copy a folder from there into the existing folder `local`, under its own name."""
        done = self._checked(_adb(["-s", self.serial, "pull", remote, str(local)], _QUICK))
        if done.code != 0:
            raise RuntimeFailedError(f"{remote} cannot be copied from the phone: {last_line(done)}")

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every file below a folder, by its path from there; none where it does not exist."""
        done = self.script(f"cd {shlex.quote(folder)} 2>/dev/null && find . -type f -exec stat -c '%s %n' {{}} +")
        lines = (line.strip().partition(" ") for line in done.stdout.splitlines())
        return {name.removeprefix("./"): int(size) for size, _, name in lines if size.isdigit()}

    def properties(self) -> dict[str, str]:
        """What `getprop` lists: ro.product.model and so on."""
        return dict(re.findall(r"^\[([^\]]+)\]: \[(.*)\]\s*$", self.shell("getprop").stdout, re.MULTILINE))

    def check(self) -> None:
        """Raise PhoneLostError where it is not there any more."""
        state = _adb(["-s", self.serial, "get-state"], _QUICK)
        if state.code != 0 or state.stdout.strip() != "device":
            why = last_line(state) or state.stdout.strip() or "it does not answer"
            raise PhoneLostError(f"the phone '{self.serial}' has gone: {why}")

    def _checked(self, done: Output) -> Output:
        """A failure that could be the phone's leaving: adb says 255 (`guard` 254) of a shell whose end it missed."""
        if done.code not in (0, None) and (done.code in (254, 255) or _GONE.search(done.stderr)):
            self.check()
        return done


def last_line(done: Output) -> str:
    """What a program said last, the last 200 characters of it: adb puts long names before its reason."""
    lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    text = lines[-1].removeprefix("adb: ").removeprefix("error: ") if lines else ""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= 200 else f"...{text[-197:]}"


def _adb(arguments: list[str], timeout: float) -> Output:
    try:
        done = subprocess.run(
            ["adb", *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return Output(None, "", f"adb {arguments[0]} took longer than {timeout:.0f} s")
    except OSError as error:
        raise RuntimeFailedError(f"adb cannot be run: {error.strerror}; {INSTALL}") from None
    return Output(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def _listed(done: Output) -> dict[str, str]:
    """Serial -> state ("device", "unauthorized", "offline", "no" for "no permissions", ...)."""
    if done.code != 0:
        raise RuntimeFailedError(f"adb does not start: {last_line(done)}; 'adb kill-server' may help")
    rows = (line.split() for line in done.stdout.splitlines() if not line.startswith(("List of", "*")))
    return {row[0]: row[1] for row in rows if len(row) > 1}


def _names(found: dict[str, str]) -> str:
    return ", ".join(f"{serial} ({state})" for serial, state in found.items()) or "none at all"
