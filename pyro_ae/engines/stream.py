"""Minibatches without end, where in them a fit stands, and files of what it goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..data import Call, LoadedRows, Rows


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators that a fit on this device draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser has gathered, for ``set_optimizer_state``."""
    gathered = optimizer.state_dict()["state"]
    return {f"{i}.{n}": torch.as_tensor(v) for i, part in gathered.items() for n, v in part.items() if v is not None}


def set_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    gathered: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        index, _, key = name.partition(".")
        gathered.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": gathered})


def write_state(file: Path, parts: Mapping[str, Mapping[str, Tensor]], about: Mapping[str, Any]) -> None:
    """Tensors by part and name, and what JSON can hold; the file before stays until this one is whole."""
    tensors = {f"{part}.{n}": v.cpu().contiguous() for part, named in parts.items() for n, v in named.items()}
    made = file.with_suffix(".new")
    save_file(tensors, made, metadata={"run": json.dumps(about)})
    os.replace(made, file)


def read_state(file: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What :func:`write_state` wrote."""
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["run"])
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in load_file(file).items():
        part, _, key = name.partition(".")
        parts.setdefault(part, {})[key] = value
    return parts, about


class Stream(Iterator[Call]):
    """Batch after batch, pass after pass over the data, each in a new order.

    Arguments:
        data: the rows.
        batch_size: rows of a batch, or None for all.
        device: where to put them.
        chains: how many batches at once, in a dim before the rows, each chain's in an order of its own; or None for
            one batch for all chains.
    """

    def __init__(
        self, data: Rows | LoadedRows, batch_size: int | None, device: torch.device, chains: int | None = None
    ) -> None:
        self.data, self.batch_size, self.device, self.chains = data, batch_size, device, chains
        self.taken = 0
        self.begun: dict[str, Tensor] = {}
        self._batches: Iterator[Call] = iter(())

    def __next__(self) -> Call:
        try:
            batch = next(self._batches)
        except StopIteration:
            self._begin()
            batch = next(self._batches)
        self.taken += 1
        return batch

    def _begin(self) -> None:
        self.begun, self.taken = random_state(self.device), 0
        if self.chains is None or self.batch_size is None:
            self._batches = self.data.batches(self.batch_size, device=self.device)
        else:
            self._batches = self._own_batches(self.chains, self.batch_size)

    def _own_batches(self, chains: int, batch_size: int) -> Iterator[Call]:
        assert isinstance(self.data, Rows)
        size = self.data.need_size()
        order = torch.rand(chains, size, device=next(iter(self.data.rows.values())).device).argsort(1)
        for start in range(0, size, batch_size):
            yield self.data.take(order[:, start : start + batch_size]).to(self.device).call()

    def state(self) -> dict[str, Tensor]:
        """Where the stream stands, for :meth:`resume`."""
        return {f"begun.{n}": s for n, s in self.begun.items()} | {"taken": torch.tensor(self.taken)}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on where a :meth:`state` was; the random state is afterwards that of the middle of a pass."""
        begun = {n.removeprefix("begun."): s for n, s in state.items() if n.startswith("begun.")}
        if not begun:
            return
        set_random_state(begun, self.device)
        self._begin()
        for _ in range(int(state["taken"])):
            next(self)
