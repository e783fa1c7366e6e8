"""macOS' powermetrics: the power of a Mac's processor, GPU and neural engine, as the system estimates it.

With `-f plist` each sample is one property list with `elapsed_ns`, and in `processor` either `combined_power` in
mW (Apple's chips) or `package_joules` (Intel's); samples are separated by a zero byte (powermetrics(1), whose
long options have changed their names). Apple says there: estimates, not for comparing devices.
"""

from __future__ import annotations

import os
import plistlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from vlmedge.device_bench.energy.meter import Meter
from vlmedge.errors import RuntimeFailedError

COMMAND = ("powermetrics", "-s", "cpu_power,gpu_power", "-i", "100", "-f", "plist", "-b", "0")
_PATIENCE = 5.0  # seconds until a process that was asked to end is killed


def find(platform: str = sys.platform) -> Meter | str:
    """The meter on a Mac for root; what to do for others; "" elsewhere."""
    if platform != "darwin" or shutil.which(COMMAND[0]) is None:
        return ""
    if os.geteuid():
        return "macOS lets only root read the energy: run the command with sudo"
    return PowerMetrics()


class PowerMetrics:
    """A `Meter` that runs powermetrics beside what is measured and reads what it wrote: mean watts times seconds."""

    name = "powermetrics: cpu, gpu, ane"

    def __init__(self, command: Sequence[str] = COMMAND, clock: Callable[[], float] = time.perf_counter) -> None:
        self._command, self._clock, self._started = command, clock, 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None

    def start(self) -> None:
        """Start it; its first sample comes a moment later, which the mean makes good."""
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (closed by stop)
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=self._output, stderr=subprocess.DEVNULL
        )
        self._started = self._clock()

    def stop(self) -> float:
        """End it: joules. Raises RuntimeFailedError where it gave no sample."""
        seconds, process, output = self._clock() - self._started, self._process, self._output
        if process is None or output is None:
            raise RuntimeFailedError("powermetrics was not started; call start() first")
        self._process = self._output = None
        _end(process)
        with output:
            output.seek(0)
            samples = list(parsed(output.read()))
        if not (covered := sum(duration for duration, _ in samples)):
            raise RuntimeFailedError("powermetrics gave no sample; run it by hand to see why")
        return sum(joules for _, joules in samples) / covered * seconds


def parsed(output: bytes) -> Iterator[tuple[float, float]]:
    """Seconds and joules of every whole sample; the last may be cut."""
    for part in output.split(b"\0"):
        if not part.rstrip().endswith(b"</plist>"):
            continue
        sample: dict[str, Any] = plistlib.loads(part.strip())
        seconds, processor = sample.get("elapsed_ns", 0) / 1e9, sample.get("processor", {})
        if "combined_power" in processor:
            yield seconds, processor["combined_power"] / 1e3 * seconds
        elif "package_joules" in processor:
            yield seconds, float(processor["package_joules"])


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
