"""A browser as a host: onnxruntime-web in a page that this machine serves, one fresh page for each job.

Options of the device: `program` (Chromium, Chrome or Edge; else the first that is found), `flags` (more of its
switches), `onnxruntime_web` (the npm package's `dist` folder; else npm fetches it once), `software` = "yes" (WebGPU on
the processor too), `url` = "wait" (any browser, a phone's too, opens the address that is told), `listen` (an ADDRESS or
ADDRESS:PORT of this machine; else loopback, where only this machine's browsers reach the page), `weigh` = "yes" (a page
that was opened by hand asks its browser for its memory, which takes Chromium 40 seconds a job).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vlmedge.device_bench.environment import environment
from vlmedge.device_bench.hosts import web_task
from vlmedge.device_bench.hosts.chromium import Browser, find_browser, version
from vlmedge.device_bench.hosts.host import Units
from vlmedge.device_bench.hosts.onnxruntime_web import onnxruntime_web
from vlmedge.device_bench.hosts.page_outcome import START, outcome, refused
from vlmedge.device_bench.hosts.process_tree import Tree
from vlmedge.device_bench.hosts.seen import Seen
from vlmedge.device_bench.hosts.served import Content, Served, Task
from vlmedge.device_bench.hosts.web_task import PageReply, WebTask, Weighed
from vlmedge.device_bench.job import Job, Variant
from vlmedge.device_bench.page_cache import drop
from vlmedge.device_bench.result import Memory, Reply
from vlmedge.errors import RuntimeFailedError, UnsupportedError, UsageError, VlmedgeError
from vlmedge.runtimes.cores import physical_cores

if TYPE_CHECKING:
    from vlmedge.device_bench.device import Device

OPTIONS: Final = frozenset(("program", "flags", "onnxruntime_web", "software", "url", "listen", "weigh"))
RUNTIME: Final = "onnxruntime"
_UNITS_TIME = 60.0  # seconds for a browser's start and a look at its adapters
_VISIT = 600.0  # seconds in which a person opens the page
_GRACE = 10.0  # seconds after which the guard ends what this process should have ended
_log = logging.getLogger(__name__)


class BrowserHost:
    """Runs jobs in a page. `tell` is given the address where a person is to open it; it is logged else."""

    def __init__(self, device: Device, tell: Callable[[str], None] | None = None) -> None:
        unknown = sorted(set(device.options) - OPTIONS)
        if unknown:
            raise UsageError(f"a browser has no option '{unknown[0]}'; it has {', '.join(sorted(OPTIONS))}")
        if device.options.get("url", "wait") != "wait":
            raise UsageError("the option url of a browser is 'wait', or left out")
        self._options: Mapping[str, str] = device.options
        self._threads = device.threads
        self._tell = tell or _log.warning
        self._served: Served | None = None
        self._program = self._version = ""

    @property
    def name(self) -> str:
        """As it stands in records: "browser chromium", or "browser" where any may open the page."""
        return "browser" if self._waits else f"browser {Path(self._program or 'not found').stem}"

    @property
    def machine(self) -> str:
        """This one."""
        return ""

    def open(self) -> None:
        """Find the browser and onnxruntime-web, and serve the page. Raises RuntimeFailedError, UsageError."""
        if not self._waits:
            self._program = find_browser(self._options.get("program", ""))
            self._version = version(self._program)
        modules = onnxruntime_web(self._options.get("onnxruntime_web", ""))
        self._served = Served(modules, self._options.get("listen", "127.0.0.1"))
        if self._waits:
            self._tell(f"open {self._served.address} in the browser that is to be measured, and leave it in front")

    def units(self) -> Units:
        """What a real page says: "wasm" and "webgpu". Raises RuntimeFailedError where no page answers."""
        data = {"does": "units", "title": "what can compute here"}
        found, _ = self._page(data, _UNITS_TIME)
        if isinstance(found, Reply) or found.status != "ok":
            raise RuntimeFailedError(f"the browser does not tell its units: {found.reason}")
        return {RUNTIME: found.units}

    def run(self, job: Job, timeout: float) -> Reply:
        """Run the job in a fresh page (and a fresh browser, where this starts it)."""
        variant = job.variant
        if variant is None or job.kind not in ("measure", "sustain"):
            return Reply("unavailable", "a browser measures bundles only: no ceilings, and no original to agree with")
        if variant.runtime != RUNTIME or variant.format != "onnx":
            return Reply("unavailable", f"a browser runs ONNX bundles (runtime {RUNTIME}), not {variant.format}")
        try:
            task = web_task.prepare(job, variant, self._thread_count(variant))
        except UnsupportedError as error:
            return Reply("unavailable", str(error))
        except VlmedgeError as error:
            return Reply("failed", str(error))
        return self._measured(job, task, timeout)

    def close(self) -> None:
        """Stop serving; what npm fetched stays."""
        if self._served is not None:
            self._served.close()
            self._served = None

    # ---- inside -----------------------------------------------------------------------------------------------

    @property
    def _waits(self) -> bool:
        return "url" in self._options

    def _thread_count(self, variant: Variant) -> int | None:
        """With WebGPU one, for what runs beside it; None: the page takes what it has."""
        if variant.threads is not None or self._threads is not None:
            return variant.threads or self._threads
        if variant.unit == "webgpu":
            return 1
        return None if self._waits else physical_cores()

    def _measured(self, job: Job, task: WebTask, timeout: float) -> Reply:
        files = ""
        if job.cold:
            dropped = drop(file for file in task.files.values() if isinstance(file, Path))
            files = "cold" if dropped else ""
        page, seen = self._page(task.data, timeout, task)
        if isinstance(page, Reply):
            return page
        if page.status != "ok":
            return refused(page)
        try:
            reply = web_task.reply(task, page, files or ("" if job.cold else "warm"))
        except VlmedgeError as error:
            return Reply("failed", str(error), environment=page.environment)
        return self._completed(reply, page, seen)

    def _completed(self, reply: Reply, page: PageReply, seen: Seen | None) -> Reply:
        """With what was seen from outside, or else with what the page said of itself."""
        if seen is None:
            weighed = page.weighed or Weighed()
            memory = Memory(_mb(weighed.empty), _mb(weighed.loaded), None, None, None, None)
            return replace(reply, memory=memory)
        facts = environment() | {"browser": self._version, "memory": "sums over the browser's processes"}
        return replace(
            reply,
            memory=seen.memory,
            energy=seen.energy(len(reply.samples)),
            others=seen.taken,
            environment=facts | reply.environment,
        )

    def _page(
        self, data: dict[str, Any], timeout: float, task: WebTask | None = None
    ) -> tuple[PageReply | Reply, Seen | None]:
        """Let a page do something: what it replies, or a reply that says why it does not; and what was seen of it."""
        assert self._served is not None, "a host is opened before it is used"
        data |= {"software": self._options.get("software") == "yes", "weigh": self._options.get("weigh") == "yes"}
        files: Mapping[str, Content] = task.files if task else {}
        with ExitStack() as stack:
            stack.callback(self._served.withdraw)
            if self._waits:
                given = Task(data, files)
                self._served.give(given)
                return outcome(given, None, timeout, _VISIT), None
            unit = task.variant.unit if task else ""
            browser = stack.enter_context(self._browser(unit, timeout))
            seen = stack.enter_context(closing(Seen(Tree(browser.pid), unit)))
            given = Task(data, files, seen.mark)
            self._served.give(given)
            return outcome(given, browser, timeout), seen

    def _browser(self, unit: str, timeout: float) -> Browser:
        assert self._served is not None, "a host is opened before it is used"
        flags = [*(["--disable-gpu"] if unit == "wasm" else []), *self._options.get("flags", "").split()]
        return Browser(self._program, self._served.address, START + timeout + _GRACE, flags)


def _mb(size: float | None) -> float | None:
    return None if size is None else round(size / 1e6, 3)
