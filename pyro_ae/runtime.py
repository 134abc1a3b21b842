"""Where a fit computes, and how it is made repeatable."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def find_device(device: str | torch.device) -> torch.device:
    """A GPU for ``"auto"`` where there is one, else what was asked for; an error where it is not there."""
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        return torch.zeros(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot compute on device {device!r}: {str(error).splitlines()[0]}") from None


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed torch, NumPy and random, and put their states back afterwards; do nothing without a seed."""
    if seed is None:
        yield
        return
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
