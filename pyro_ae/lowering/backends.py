"""What runs a tape quicker than op by op: torch's compiler, and CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .tape import Tape, Values


def inductor(tape: Tape, inputs: list[Tensor]) -> Callable[..., Values]:
    """A tape compiled by torch's inductor, drawing the random numbers that torch itself draws."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    with torch.no_grad(), config.patch(fallback_random=True):
        run: Any = compile_fx(tape.module, [*inputs, *tape.held])

    def replay(*inputs: Tensor) -> Values:
        with torch.no_grad():
            return list(run(*inputs, *tape.held))

    return replay


def cuda_graph(tape: Tape, inputs: list[Tensor]) -> Callable[..., Values]:
    """A tape as a CUDA graph: one launch for all of its kernels.

    The first value is the caller's to keep; the others are written to anew by the next replay.
    """
    static = [t.clone() for t in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what libraries set up when they are first called must not be a part of it
        for _ in range(3):
            tape(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = tape(*static)

    def replay(*inputs: Tensor) -> Values:
        for mine, theirs in zip(static, inputs, strict=True):
            mine.copy_(theirs)
        graph.replay()
        return [None if values[0] is None else values[0].clone(), *values[1:]]

    return replay


def seconds(run: Callable[..., Values], inputs: list[Tensor]) -> float:
    """Of the quickest of a few runs."""
    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        run(*inputs)
        if inputs and inputs[0].is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
