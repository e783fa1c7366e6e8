"""Train the demo checkpoint: `python -m vlmedge.demo.train --out DIR`; seeded, and it goes on where it was stopped."""

from __future__ import annotations

import argparse
import ctypes
import logging
import math
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.multiprocessing.spawn import spawn

from vlmedge import families
from vlmedge.demo.attention import TrainingAttention
from vlmedge.demo.batch import Batch, batch, step_batch
from vlmedge.demo.network import Dense, Losses, initialise, losses
from vlmedge.demo.recipe import open_recipe, write_recipe
from vlmedge.demo.scene import scene
from vlmedge.demo.team import Team
from vlmedge.reference.model import Reference

HELD_OUT = 1_000_003  # the seed of the pictures that training never sees
LATE = 0.5  # of the schedule: words are learnt by then, and finding things gets more weight and more questions
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how fast to learn. `minutes` (0: no limit) ends the schedule early where the machine is slow."""

    steps: int = 5300
    minutes: float = 0.0
    seed: int = 0
    pictures: int = 48
    length: int = 256
    rate: float = 1.5e-3
    warmup: int = 100
    dense: float = 1.0
    save_seconds: float = 180.0
    check_every: int = 250
    check_pictures: int = 192


class Trainer:
    """Model, optimizer and clock; `save` and `load` keep all of it."""

    def __init__(self, folder: Path, plan: Plan, team: Team | None = None) -> None:
        """Start from seeded weights, or from `folder`'s state where there is one."""
        self.folder, self.plan, self.team = folder, plan, team or Team(0, 1)
        known = (folder / "recipe" / "config.json").is_file()
        checkpoint = (open_recipe if known else write_recipe)(folder / "recipe")
        self.spec = families.family_of(checkpoint).spec(checkpoint)
        self.words = Tokenizer.from_file(str(folder / "recipe" / "tokenizer.json"))
        torch.manual_seed(plan.seed)
        self.model = Reference(self.spec)
        initialise(self.model)
        self.dense = Dense(self.spec.decoder.width)
        self.optimizer = torch.optim.AdamW(self._groups(), lr=plan.rate, betas=(0.9, 0.98))
        self.step, self.seconds = 0, 0.0
        if self.state.is_file():
            self.load()

    @property
    def state(self) -> Path:
        """The file that holds everything."""
        return self.folder / "state.pt"

    @property
    def progress(self) -> float:
        """How far the schedule is, 0..1."""
        by_clock = self.seconds / (60 * self.plan.minutes) if self.plan.minutes else 0.0
        return min(1.0, max(self.step / self.plan.steps, by_clock))

    def save(self) -> None:
        """Write the state beside its place, then move it there."""
        part = self.state.with_suffix(".part")
        everything = {
            "model": self.model.state_dict(), "dense": self.dense.state_dict(),
            "optimizer": self.optimizer.state_dict(), "step": self.step, "seconds": self.seconds,
            "random": torch.get_rng_state(),
        }  # fmt: skip
        torch.save(everything, part)
        os.replace(part, self.state)

    def load(self) -> None:
        """Read the state back."""
        everything = torch.load(self.state, weights_only=True)
        self.model.load_state_dict(everything["model"])
        self.dense.load_state_dict(everything["dense"])
        self.optimizer.load_state_dict(everything["optimizer"])
        self.step, self.seconds = everything["step"], everything["seconds"]
        torch.set_rng_state(everything["random"])

    def draw(self) -> Batch:
        """This process's share of the next step's pictures."""
        share, turn = self.plan.pictures // self.team.size, self.step * self.team.size + self.team.rank
        extra = 3 if self.progress > LATE else 0
        return step_batch(self.spec, self.words, self.plan.seed, turn, share, self.plan.length, extra)

    def learn(self) -> Losses:
        """One step, together with the other processes."""
        started, progress = time.monotonic(), self.progress
        drawn = self.draw()
        rate = self.plan.rate * min(1.0, (self.step + 1) / self.plan.warmup)
        rate *= 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with TrainingAttention(), torch.autocast("cpu", torch.bfloat16):
            found = losses(self.model, self.dense, drawn)
            total = found.total(progress > LATE, self.plan.dense * (1 - progress))
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        self.team.average(self.parameters())
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.seconds = self.team.agree(self.seconds + time.monotonic() - started)
        return found

    def parameters(self) -> list[torch.nn.Parameter]:
        """The model's and the auxiliary head's."""
        return [*self.model.parameters(), *self.dense.parameters()]

    def _groups(self) -> list[dict[str, object]]:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim <= 1]
        return [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]


def train(folder: Path, plan: Plan, workers: int = 1) -> Trainer:
    """Train to the end of the plan in `workers` processes of one thread each, saving on the way.

    Processes that meet once a step slow down gently where other programs want the cores; threads, which meet
    after every operation, become ten times slower.
    """
    if workers == 1:
        return work(0, folder, plan, Team(0, 1))
    numbers = sum(p.numel() for p in Trainer(folder, plan).parameters())
    spawn(_join, (folder, plan, Team.of(workers, numbers)), workers)  # type: ignore[no-untyped-call]
    return Trainer(folder, plan)


def _join(rank: int, folder: Path, plan: Plan, team: Team) -> None:
    keep_memory()
    torch.set_num_threads(1)
    _show_progress(logging.INFO if rank == 0 else logging.ERROR)
    work(rank, folder, plan, team.as_rank(rank))


def work(rank: int, folder: Path, plan: Plan, team: Team) -> Trainer:
    """What one process does; the first one saves, checks and tells."""
    trainer = Trainer(folder, plan, team)
    _log.info("step %d of %d, %.1f minutes so far", trainer.step, plan.steps, trainer.seconds / 60)
    saved = time.monotonic()
    while trainer.progress < 1.0:
        found = trainer.learn()
        if rank != 0:
            continue
        if trainer.step % 25 == 0:
            _log.info("%s", _line(trainer, found))
        if trainer.step % plan.check_every == 0:
            _log.info("%s", check(trainer))
        if time.monotonic() - saved > plan.save_seconds:
            trainer.save()
            saved = time.monotonic()
    if rank == 0:
        trainer.save()
        _log.info("done: %s", check(trainer))
    return trainer


def _show_progress(level: int) -> None:
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")


@torch.no_grad()
def check(trainer: Trainer) -> str:
    """Exact answers per kind of question on held-out pictures (teacher forced, which is the same for greedy)."""
    met: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    far: list[float] = []
    for start in range(0, trainer.plan.check_pictures, 48):
        stop = min(start + 48, trainer.plan.check_pictures)
        drawn = batch(trainer.spec, trainer.words, [scene(HELD_OUT, i) for i in range(start, stop)], 512)
        with TrainingAttention(), torch.autocast("cpu", torch.bfloat16):
            found = losses(trainer.model, trainer.dense, drawn)
        far.append(float(found.coordinate))
        owners, right = found.owners.numpy(), found.right.numpy()
        for owner in np.unique(owners):
            kind = drawn.questions[owner // 64][owner % 64 - 1].kind
            asked[kind] += 1
            met[kind] += bool(right[owners == owner].all())
    kinds = "  ".join(f"{kind} {met[kind] / asked[kind]:.3f}" for kind in sorted(asked))
    return f"held out: exact {met.total() / asked.total():.4f}  coordinate loss {np.mean(far):.3f}  {kinds}"


def keep_memory() -> None:
    """Let glibc keep freed memory: fresh pages for every activation make a step 5 times slower. Elsewhere: nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        mallopt(option, value)


def _line(trainer: Trainer, found: Losses) -> str:
    parts = ("language", "coordinate", "size", "dense")
    shown = "  ".join(f"{name} {float(getattr(found, name).detach()):.3f}" for name in parts)
    right = float(found.right.float().mean())
    return f"step {trainer.step}  {trainer.seconds / 60:.1f} min  {shown}  tokens right {right:.3f}"


def main() -> None:
    """Read the command line and train."""
    defaults = Plan()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the state and the checkpoint")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--minutes", type=float, default=defaults.minutes, help="end the schedule after so long")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--rate", type=float, default=defaults.rate)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    given = parser.parse_args()
    keep_memory()
    _show_progress(logging.INFO)
    train(given.out, Plan(given.steps, given.minutes, given.seed, rate=given.rate), given.workers)


if __name__ == "__main__":
    main()
