"""What is seen of a browser from outside while it works: memory of its processes, energy, what others took."""

from __future__ import annotations

from contextlib import ExitStack

from vlmedge.device_bench.energy import Reading, meter, metered
from vlmedge.device_bench.hosts.process_tree import Tree
from vlmedge.device_bench.memory import Usage
from vlmedge.device_bench.others import Others, own_cpu_seconds
from vlmedge.device_bench.result import Energy, Memory


class Seen:
    """Told of a page's marks: "baseline" (library here, no model), "loaded", "began", "ended" (of the samples)."""

    def __init__(self, tree: Tree, unit: str) -> None:
        self._tree, self._unit = tree, unit
        self._usage: dict[str, Usage] = {}
        self._running = ExitStack()
        self._reading: Reading | None = None
        self._others: Others | None = None
        self.taken: float | None = None

    def mark(self, name: str) -> None:
        """One mark; an unknown one is let pass."""
        if name == "baseline":
            self._tree.reset_peaks()
        if name == "began":
            self._others = Others(own=lambda: own_cpu_seconds() + self._tree.cpu_seconds())
            self._reading = self._running.enter_context(metered(meter("cpu" if self._unit == "wasm" else self._unit)))
        if name == "ended":
            self.close()
            self.taken = self._others.mean() if self._others else None
        self._usage[name] = self._tree.usage()

    @property
    def memory(self) -> Memory:
        """Sums over the browser's processes."""
        baseline, loaded, end = (self._usage.get(name, Usage()) for name in ("baseline", "loaded", "ended"))
        return Memory(baseline.resident, loaded.resident, end.peak, end.anonymous, end.mapped, None)

    def energy(self, answers: int) -> Energy | None:
        """Of the samples; None where they did not end."""
        return self._reading.energy(answers) if self._reading and "ended" in self._usage else None

    def close(self) -> None:
        """Stop what still measures."""
        self._running.close()
