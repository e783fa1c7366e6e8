"""`--sustained MINUTES`: each variant answers without a pause, because a warm machine is another one."""

from __future__ import annotations

from dataclasses import replace

from vlmedge.device_bench.job import Job, Variant, Work


def sustain_job(device: str, variant: Variant, work: Work, minutes: float, truth: str = "") -> Job:
    """A job that answers the asks over and over for so many minutes."""
    return Job("sustain", device, replace(work, minutes=minutes), 1, variant, truth)
