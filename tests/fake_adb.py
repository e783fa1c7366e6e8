#!/usr/bin/python3 -IS
"""An adb with a fake phone: a folder named by $FAKE_PHONE, whose files stand for the phone's and whose shell is sh.

What the tests set lies in it: `devices` (lines as `adb devices` has them), `full` (a push of more bytes than it says
fails as on a full disk), `unplug` (the phone goes when a shell command holds it), `bin` (the phone's own programs),
`power_supply` and `thermal_zone0` (its /sys). `log` lists every call. Messages and exit codes are those of adb 1.0.41.
Imports little: it is started for every call.
"""

import os
import sys
import time

PHONE = os.environ["FAKE_PHONE"]
TMP = "/data/local/tmp"


def main(arguments: list[str]) -> int:
    with open(f"{PHONE}/log", "a") as log:
        log.write(" ".join(arguments) + "\n")
    if arguments[0] == "devices":
        return say("List of devices attached\n" + read("devices") + "\n")
    serial = ""
    if arguments[0] == "-s":
        serial, arguments = arguments[1], arguments[2:]
    state = dict(line.split()[:2] for line in read("devices").splitlines() if line.strip()).get(serial)
    if state is None and arguments[0] in ("push", "pull"):
        return fail(f"adb: error: failed to get feature set: device '{serial}' not found")
    if state is None:
        return fail(f"adb: device '{serial}' not found")
    if state != "device":
        return fail(f"error: device {state}")
    return {"get-state": get_state, "push": push, "pull": pull, "shell": shell}[arguments[0]](*arguments[1:])


def read(name: str) -> str:
    try:
        with open(f"{PHONE}/{name}") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def say(text: str) -> int:
    sys.stdout.write(text + "\n")
    return 0


def fail(text: str) -> int:
    sys.stderr.write(text + "\n")
    return 1


def here(remote: str) -> str:
    assert remote.startswith(TMP + "/"), f"outside of {TMP}: {remote}"
    return PHONE + remote


def copy(source: str, target: str) -> int:
    with open(source, "rb") as old, open(target, "wb") as new:
        return new.write(old.read())


def get_state() -> int:
    return say("device")


def push(local: str, remote: str) -> int:
    target, failed = here(remote), f"adb: error: failed to copy '{local}' to '{remote}': "
    if not os.path.isdir(os.path.dirname(target)):
        return fail(f"{failed}remote couldn't create file: No such file or directory")
    size = copy(local, target)
    if read("full") and size > int(read("full")):
        os.truncate(target, 100)
        return fail(f"{failed}remote write failed: No space left on device")
    return say(f"{local}: 1 file pushed, 0 skipped. 30.1 MB/s ({size} bytes in 0.001s)")


def pull(remote: str, local: str) -> int:
    source, target = here(remote), f"{local}/{os.path.basename(remote)}"
    if not os.path.exists(source):
        return fail(f"adb: error: failed to stat remote object '{remote}': No such file or directory")
    os.mkdir(target)
    for name in os.listdir(source):
        copy(f"{source}/{name}", f"{target}/{name}")
    return say(f"{remote}: {len(os.listdir(source))} files pulled, 0 skipped.")


def shell(*words: str) -> int:
    """As shell_v2: output and error apart, the command's own exit code, 255 where the phone goes meanwhile."""
    command = " ".join(words)
    if command.startswith("exec sh "):
        script = here(command.split()[2])
        with open(script) as file:
            text = file.read()
        if PHONE not in text:
            with open(script, "w") as file:
                file.write(mounted(text))
    environment = {"PATH": f"{PHONE}/bin:/usr/bin:/bin", "FAKE_PHONE": PHONE}
    unplug = read("unplug").strip()
    if unplug and unplug in command:
        if os.fork():
            time.sleep(0.3)
            os.remove(f"{PHONE}/devices")
            return 255
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    sys.stdout.flush()
    os.execve("/bin/sh", ["sh", "-c", mounted(command)], environment)


def mounted(text: str) -> str:
    """Paths of the phone as paths of the folder."""
    moved = text.replace(TMP, PHONE + TMP).replace("/sys/class/power_supply/battery", f"{PHONE}/power_supply")
    return moved.replace("/sys/class/thermal", PHONE)


sys.exit(main(sys.argv[1:]))
