"""What became of a task that a page was given: its reply, or a reply that says why there is none."""

from __future__ import annotations

import re
import time
from typing import Final

from vlmedge.device_bench.hosts.chromium import Browser
from vlmedge.device_bench.hosts.served import Task
from vlmedge.device_bench.hosts.web_task import PageReply, read_page
from vlmedge.device_bench.outcome import excerpt
from vlmedge.device_bench.result import Reply
from vlmedge.errors import RuntimeFailedError

START: Final = 60.0  # seconds for a browser to start and load the page
_POLL = 0.25
_KILLED = (137, -9)  # as `guard` tells it, and itself
_LAST_WORDS = 0.5  # seconds for what a page that died still writes
# V8 (fetched bytes, JavaScript, WebAssembly), Emscripten and C++, ONNX Runtime, Chromium's log, Dawn.
_MEMORY = re.compile(
    r"allocation failed|out of memory|OOM\b|bad_alloc|could not allocate|failed to allocate|Memory\.grow|"
    r"invalid (typed )?array (buffer )?length",
    re.IGNORECASE,
)


def outcome(task: Task, browser: Browser | None, timeout: float, visit: float = START) -> PageReply | Reply:
    """Wait for what a page makes of a task, `timeout` seconds from when it takes it, `visit` until then.

    `browser`: the one that was started for it, None where a person opens the page.
    """
    end, taken = time.monotonic() + visit, False
    while (left := end - time.monotonic()) > 0:
        event = task.wait(min(left, _POLL))
        if event is None:
            if browser is not None and browser.code is not None:
                return _dead(browser)
        elif event.what == "taken":
            end, taken = time.monotonic() + timeout, True
        elif event.what == "reply":
            return _read(event.reply)
        elif event.what == "rubbish":
            return Reply("rubbish", "what the page sent is not JSON")
        else:
            return Reply("lost", "the page was closed, or its browser went away") if browser is None else _dead(browser)
    if taken:
        return Reply("hung", f"the page was ended because it took more than {timeout:g} s")
    return _never_came(browser, visit)


def refused(page: PageReply) -> Reply:
    """The reply of a page that says why it could not do its task."""
    status = "out_of_memory" if page.status == "failed" and _MEMORY.search(page.reason) else page.status
    return Reply(status, excerpt(page.reason), environment=page.environment)


def _read(data: object) -> PageReply | Reply:
    try:
        page = read_page(data)
    except RuntimeFailedError as error:
        return Reply("rubbish", excerpt(str(error)))
    if page.status == "ok" and page.load is None and not page.units:
        return Reply("rubbish", "the page sent an empty reply")
    return page


def _dead(browser: Browser) -> Reply:
    """The browser, or the process of its page, is gone."""
    time.sleep(_LAST_WORDS)
    told = next((line for line in reversed(browser.said().splitlines()) if _MEMORY.search(line)), "")
    if told:
        return Reply("out_of_memory", f"the page's process ran out of memory: {excerpt(told)}")
    if browser.code is None:
        return Reply(
            "crashed", "the page's process ended, the browser's did not; a model too large for a page does that"
        )
    if browser.code in _KILLED:
        return Reply("out_of_memory", "the browser was killed by the system (SIGKILL), most likely for memory")
    return Reply("crashed", f"the browser ended with the code {browser.code}: {browser.last_words()}")


def _never_came(browser: Browser | None, visit: float) -> Reply:
    if browser is None:
        return Reply("lost", f"nobody opened the page within {visit:g} s; open the address that was told")
    return Reply("failed", f"the browser did not open the page within {visit:g} s: {browser.last_words()}")
