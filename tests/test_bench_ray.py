"""The nodes of a Ray cluster run jobs, each alone on its node, also when one dies in the middle of it."""

import json
import socket
import sys
from threading import Thread
from typing import ClassVar

import pytest

from tests.bench_hosts import ask, check_reply, gone, real_job, wait_for
from vlmedge.device_bench.hosts.host import Output
from vlmedge.device_bench.hosts.local import job_line
from vlmedge.device_bench.hosts.ray import ray_hosts, run_there
from vlmedge.device_bench.job import Job, Variant, Work
from vlmedge.errors import RuntimeFailedError, UsageError
from vlmedge.raycluster import cancel

STORE = 80 * 2**20  # bytes of shared memory a node
WORKER = """
import json, os, sys, time
if sys.argv[1:] == ["--units"]:
    print(json.dumps({"fake": {"cpu": ""}}))
    sys.exit()
job = json.loads(sys.stdin.read())
if job["work"]["scenario"] == "hang":
    with open(job["device"], "w") as note:
        note.write(str(os.getpid()))
    time.sleep(60)
facts = {"job": job, "threads": os.environ.get("OMP_NUM_THREADS", ""), "truth": open(job["truth"]).read()}
print(json.dumps({"status": "ok", "environment": facts}))
"""
COMMAND = [sys.executable, "-c", WORKER]


@pytest.fixture
def job(photo, tmp_path):
    truth = tmp_path / "truth.json"
    truth.write_text("[1]")

    def made(scenario="echo", source="demo:moondream2", device="here"):
        variant = Variant("m", source, "d1", "checkpoint", "", 1, None, "torch")
        work = Work(scenario, (ask(photo),), 1)
        return Job("measure", device, work, variant=variant, truth=str(truth))

    return made


@pytest.mark.slow
def test_each_node_is_a_host(job, bundle, photo, tmp_path):
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
    machines = Cluster(initialize_head=True, head_node_args=head)
    doomed_note, replies = tmp_path / "note", []
    try:
        for _ in range(2):
            machines.add_node(num_cpus=1, object_store_memory=STORE)
        with ray_hosts(machines.address, COMMAND) as hosts:
            assert len({host.name for host in hosts}) == len(hosts) == 2
            assert all(host.name.startswith("ray ") for host in hosts)
            mine = ray.get_runtime_context().get_node_id()  # this process ends with the raylet that it is connected to
            other, doomed = sorted(hosts, key=lambda host: not host.name.endswith(mine[:8]))
            doomed.open()
            assert doomed.units() == {"fake": {"cpu": ""}}
            reply = doomed.run(job(), 30)
            assert reply.status == "ok", reply
            assert (reply.environment["truth"], reply.environment["threads"]) == ("[1]", "")
            absent = doomed.run(job(source=str(tmp_path / "model.gguf")), 30)
            assert (absent.status, "in a folder that all nodes share" in absent.reason) == ("failed", True)
            with ray_hosts(machines.address) as real:  # connected already
                check_reply(real[0].run(real_job(bundle, photo), 60))
            assert doomed.run(job("hang", device=str(doomed_note)), 1.5).status == "hung"
            assert gone(doomed_note.read_text())

            doomed_note.unlink()
            thread = Thread(target=lambda: replies.append(doomed.run(job("hang", device=str(doomed_note)), 60)))
            thread.start()
            wait_for(doomed_note.exists)
            node = next(node for node in machines.worker_nodes if doomed.name.endswith(node.node_id[:8]))
            machines.remove_node(node, allow_graceful=False)
            thread.join(60)
            assert [reply.status for reply in replies] == ["lost"]
            assert replies[0].reason.startswith(f"{doomed.name} was lost: ")
            assert gone(doomed_note.read_text(), 15)
            assert other.run(job(), 30).status == "ok"
    finally:
        machines.shutdown()


def test_what_runs_on_a_node(job, tmp_path, photo):
    moved = {str(photo): b"\x89PNG", job().truth: b"{}"}
    output = Output(**json.loads(run_there(job_line(job()), 20, COMMAND, moved)))
    facts = json.loads(output.stdout)["environment"]
    assert facts["truth"] == "{}"
    assert facts["job"]["work"]["asks"][0]["picture"] != str(photo)
    absent = str(tmp_path / "model.gguf")
    reply = json.loads(run_there(job_line(job(source=absent)), 20, COMMAND, {}))
    assert reply["text"] == (
        f"on the node {socket.gethostname()}: there is no {absent}; put it in a folder that all nodes share under the "
        "same path, or name a hub or demo source"
    )


def test_what_has_replied_is_not_cancelled():
    class Ray:
        """As far as `cancel` uses it; the real one ends this process over a task that has just replied."""

        cancelled: ClassVar[list[str]] = []

        def wait(self, tasks, num_returns, timeout):
            assert (num_returns, timeout) == (len(tasks), 0)
            return [task for task in tasks if task == "done"], [task for task in tasks if task != "done"]

        def cancel(self, task, force):
            self.cancelled.append(task)

    cancel(Ray(), ["one", "done", "other"])
    cancel(Ray(), [])
    assert Ray.cancelled == ["one", "other"]


def test_addresses_that_are_none():
    with pytest.raises(UsageError, match="--ray takes HOST:PORT"), ray_hosts("nonsense"):
        pass
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RuntimeFailedError, match="no Ray cluster answers"), ray_hosts(address):
            pass
