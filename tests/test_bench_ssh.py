"""A machine behind ssh: a real sshd on this one, with a folder whose name has everything that a shell would read."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from threading import Thread

import pytest

from tests.bench_hosts import ask, check_reply, gone, real_job, wait_for
from vlmedge import __version__
from vlmedge.device_bench.device import Device
from vlmedge.device_bench.hosts import wheel
from vlmedge.device_bench.hosts.ssh import SshHost
from vlmedge.device_bench.job import Job, Variant, Work
from vlmedge.errors import RuntimeFailedError, UsageError

FOLDER = "its $(touch no) \"bench\" 'folder'; é"
SSHD = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/me.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
"""
SSH = """
Host far wrong
  HostName 127.0.0.1
  Port {port}
  User {user}
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known
  GlobalKnownHostsFile none
Host far
  IdentityFile {folder}/me
Host wrong
  IdentityFile {folder}/other
Host stranger
  HostName 127.0.0.1
  Port {port}
  UserKnownHostsFile none
  GlobalKnownHostsFile none
Host nobody
  HostName 127.0.0.1
  Port 1
"""
WORKER = """
import json, os, sys, time
if sys.argv[1:] == ["--units"]:
    print(json.dumps({"fake": {"cpu": ""}}))
    sys.exit()
import vlmedge
job = json.loads(sys.stdin.read())
if job["work"]["scenario"] != "hang":
    facts = {"job": job, "vlmedge": vlmedge.__file__, "files": os.listdir(job["variant"]["source"])}
    print(json.dumps({"status": "ok", "environment": facts}))
    sys.exit()
with open(os.environ.get("NOTE", job["device"]), "w") as note:
    note.write(str(os.getpid()))
time.sleep(60)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A running sshd; the folder with its keys and with ssh's `config`, and its process."""
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "me", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where root's sshd puts what it does not trust
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    user = subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()
    (folder / "sshd_config").write_text(SSHD.format(port=port, folder=folder))
    (folder / "config").write_text(SSH.format(port=port, folder=folder, user=user))
    key = (folder / "host.pub").read_text().split()[:2]
    (folder / "known").write_text(f"[127.0.0.1]:{port} {' '.join(key)}\n")
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin") or "sshd"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([program, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
        try:
            wait_for(lambda: answers(port) or process.poll() is not None)
            yield folder, process
        finally:
            process.terminate()
            process.wait(10)


@pytest.fixture(scope="module")
def far(server, tmp_path_factory):
    """How a host behind it is made, with the fake worker unless told."""
    folder, _ = server
    script = folder / "fake worker.py"
    script.write_text(WORKER)
    home = tmp_path_factory.mktemp("far")

    def made(address="far", command=(sys.executable, str(script)), **options):
        options = {"python": sys.executable, "folder": str(home / FOLDER), "install": "no", **options}
        given = {"address": address, "config": str(folder / "config"), **options}
        return SshHost(Device("board", "Board", "ssh", options=given), command)

    return made


@pytest.fixture(scope="module")
def opened(far):
    """One that is connected, and has this vlmedge."""
    host = far()
    host.open()
    return host


@pytest.fixture
def job(bundle, photo, tmp_path):
    """A job whose model has a name that is hard to quote."""
    source = tmp_path / 'it\'s "a" $model'
    source.symlink_to(bundle)
    (tmp_path / "truth.json").write_text("{}")
    variant = Variant("m", str(source), "d1", "gguf", "q8", 1, 8.0, "llamacpp")

    def made(scenario="echo", device="board"):
        work = Work(scenario, (ask(photo),), 1)
        return Job("measure", device, work, variant=variant, truth=str(tmp_path / "truth.json"))

    return made


def answers(port):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def sessions(process) -> list[int]:
    """The processes that serve connections."""
    listed = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True, check=False
    )
    return [int(number) for number in listed.stdout.split()]


def refused(host) -> str:
    with pytest.raises(RuntimeFailedError) as caught:
        host.open()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_job_runs_there_and_files_go_once(opened, job, bundle, photo):
    host = opened
    assert host.name == "ssh far"
    assert host.units() == {"fake": {"cpu": ""}}
    reply = host.run(job(), 30)
    assert reply.status == "ok", reply.reason
    facts = reply.environment
    there = facts["job"]
    root = Path(host._folder)
    assert root.name == FOLDER
    assert Path(facts["vlmedge"]).is_relative_to(root)  # this very code, not what is installed
    source, picture = Path(there["variant"]["source"]), Path(there["work"]["asks"][0]["picture"])
    assert source == root / 'files/d1/it\'s "a" $model'
    assert sorted(facts["files"]) == sorted(path.name for path in bundle.iterdir())
    for path in (path for path in bundle.rglob("*") if path.is_file()):
        assert (source / path.relative_to(bundle)).read_bytes() == path.read_bytes()
    assert picture.read_bytes() == photo.read_bytes()
    assert Path(there["truth"]).read_text() == "{}"

    def stamps():
        return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.suffix != ".pyc" and path.is_file()}

    before = stamps()
    assert not [path for path in before if path.suffix == ".part"]
    picture.write_bytes(b"cut off")
    host._known.clear()  # as a new one
    assert host.run(job(), 30).status == "ok"
    after = stamps()
    assert picture.read_bytes() == photo.read_bytes()
    assert {path for path in after if after[path] != before[path]} == {picture}
    host.close()


def test_the_worker_itself(opened, bundle, photo, monkeypatch):
    monkeypatch.setattr(opened, "_command", None)
    check_reply(opened.run(real_job(bundle, photo), 60))


def test_a_job_ends_there_with_its_time_or_its_connection(opened, job, server, tmp_path):
    _, process = server
    host = opened
    note = tmp_path / "note"
    reply = host.run(job("hang", str(note)), 3)
    assert reply.status == "hung"
    assert gone(note.read_text())

    note.unlink()
    replies = []
    thread = Thread(target=lambda: replies.append(host.run(job("hang", str(note)), 30)))
    thread.start()
    wait_for(lambda: note.exists() and note.read_text())
    for session in sessions(process):
        os.kill(session, signal.SIGKILL)
    thread.join(20)
    assert [reply.status for reply in replies] == ["lost"]
    assert replies[0].reason.startswith("ssh far fails: ")
    assert gone(note.read_text())
    assert host.run(job(), 30).status == "ok"  # the machine is there again


def test_a_file_that_changed_is_not_sent(opened, job, photo):
    changed = job()
    wrong = replace(changed.work.asks[0], sha256="0" * 64)
    reply = opened.run(replace(changed, work=replace(changed.work, asks=(wrong,))), 30)
    assert reply.status == "failed"
    assert reply.reason.endswith(f"{photo.name} arrived changed or cut off")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("nobody", "ssh nobody fails: nothing listens there; check the port, and that sshd runs"),
        ("wrong", "ssh wrong fails: the login is refused; put your key there (ssh-copy-id wrong) or load it (ssh-add)"),
        ("stranger", "ssh stranger fails: its host key is not known here; connect once by hand and confirm it:"),
        ("nowhere.invalid", "ssh nowhere.invalid fails: its name is not known; check the address"),
    ],
)
def test_machines_that_cannot_be_reached(far, job, address, reason):
    assert refused(far(address)).startswith(reason)
    reply = far(address).run(job(), 5)
    assert (reply.status, reply.reason.startswith(reason)) == ("lost", True)


def test_a_python_that_does_not_do(far, tmp_path):
    assert refused(far(python="python9")).startswith("ssh far has no 'python9'; give the option python")
    old = tmp_path / "old python"
    old.write_text('#!/bin/sh\necho Welcome; echo \'{"version": [3, 9, 2], "folder": "/x", "venv": false}\'\n')
    old.chmod(0o755)
    assert refused(far(python=str(old))) == "ssh far has Python 3.9.2, 3.11 is the oldest; give the option python"
    old.write_text("#!/bin/sh\necho Welcome\n")
    assert refused(far(python=str(old))) == "ssh far answers 'probe' with something else: Welcome"
    old.write_text("#!/bin/sh\necho 5\n")
    assert refused(far(python=str(old))) == "ssh far answers 'probe' with something else: 5"
    assert refused(far(folder="/dev/null/x")).startswith("probe failed on ssh far: Not a directory")


def test_a_python_that_lacks_packages(far, tmp_path):
    for name in ("bare", "auto/venv"):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / name], check=True)
    bare = str(tmp_path / "bare/bin/python")
    assert "lacks numpy, PIL, tokenizers, onnxruntime; install it there" in refused(far(python=bare))
    text = refused(far(python=bare, install="auto", folder=str(tmp_path / "auto")))
    assert text.startswith("installing what vlmedge needs failed on ssh far: ")
    assert "No module named pip; see that Python there has venv and pip" in text  # its environment was taken


def test_options_and_addresses_that_are_none(far):
    for address in ("", "-oProxyCommand=touch no", "a b"):
        with pytest.raises(UsageError, match="an ssh device has an address"):
            far(address)
    with pytest.raises(UsageError, match="did you mean 'python'"):
        far(pyton="x")
    with pytest.raises(UsageError, match="no extra 'coreml' of vlmedge helps"):
        far(extras="coreml")
    with pytest.raises(UsageError, match="a port is a number"):
        far(port="ssh")


def test_the_wheel(tmp_path):
    data = wheel.build_wheel()
    assert data == wheel.build_wheel.__wrapped__()
    with zipfile.ZipFile(BytesIO(data)) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"vlmedge-{__version__}.dist-info/METADATA").decode()
    assert "Requires-Dist: tokenizers" in metadata
    assert "Provides-Extra: llamacpp" in metadata
    info = f"vlmedge-{__version__}.dist-info"
    assert {"vlmedge/__init__.py", "vlmedge/exporters/base.py", "vlmedge/device_bench/job.py"} <= names
    assert {"vlmedge/bundle.schema.json", f"{info}/METADATA", f"{info}/RECORD"} <= names
    assert any(name.endswith(".toml") for name in names)
    assert not [name for name in names if "__pycache__" in name]
    (tmp_path / wheel.NAME).write_bytes(data)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*command, "--target", tmp_path / "site", tmp_path / wheel.NAME], check=True)
    assert json.dumps(sorted(path.name for path in (tmp_path / "site").iterdir())) == json.dumps(["vlmedge", info])
