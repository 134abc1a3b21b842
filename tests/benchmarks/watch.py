"""What is measured of a run: when its first step was done, what a step takes, and its memory."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile, record_function


class Watch:
    """What is seen of one run: when it began, took its first step, was set up, and was done.

    Arguments:
        ready: steps of an optimiser that are set-up; None where the run itself says when it is ready and done.
        steps: that are timed.
    """

    def __init__(self, steps: int, ready: int | None = None) -> None:
        self.steps, self.ready, self.count = steps, ready, 0
        self.begun, self.first, self.marks = now(), math.nan, list[float]()

    def step(self, *_: Any) -> None:
        self.count += 1
        if self.count == 1:
            self.first = now() - self.begun
        if self.ready is not None and self.count in (self.ready, self.ready + self.steps):
            self.mark()

    def mark(self) -> None:
        self.marks.append(now())
        with record_function("mark"):
            pass

    @property
    def milliseconds(self) -> float:
        ready, done = self.marks
        return 1e3 * (done - ready) / self.steps

    @property
    def before(self) -> float:
        """Seconds from the call to the timed steps."""
        return self.marks[0] - self.begun


def now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def watched(watch: Watch) -> Iterator[Watch]:
    """Have it see each step of each of torch's optimisers."""
    handle = register_optimizer_step_post_hook(watch.step)
    try:
        yield watch
    finally:
        handle.remove()


def peak(run: Callable[[], object]) -> float:
    """The most that a run has torch hold at once, in MiB.

    On a CPU it is that between the first and the last ``record_function("mark")``, if there are any, of all that was
    allocated since the run began. On a GPU it is that of the whole run, as a replayed CUDA graph allocates nothing: its
    memory is the capture's.
    """
    gc.collect()  # what earlier runs left would be freed meanwhile
    if torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = sorted(found.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    changes = [e for e in events if e.name() == "[memory]"]
    live, times = torch.tensor([[e.nbytes(), e.start_ns()] for e in changes]).T
    marks = [e.start_ns() for e in events if e.name() == "mark"] or times.tolist()
    return float(live.cumsum(0)[(times >= marks[0]) & (times <= marks[-1])].max()) / 2**20


def machine(device: torch.device) -> str:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        told = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = told[0].partition(":")[2].strip() if told else name
    gpu = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    return f"{gpu}{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
