"""What a step costs: ``fit`` beside a loop by hand, Pyro's SVI and pythae (extra ``bench``), with the same networks.

python tests/benchmarks/table.py                            all rows, in 20 minutes on two cores
python tests/benchmarks/table.py --rows mlp-20 iwae-50      some of them
python tests/benchmarks/table.py --out FILE.md              writes the tables as well, after each row

Three tables: milliseconds a step and their ratio to the loop by hand, peak memory of a step, and seconds of set-up.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import math
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import pyro
import sgmcmc
import torch
from handwritten import (
    PIXELS,
    Networks,
    batches,
    binary,
    convolutional,
    graphed,
    perceptrons,
    stepper,
    train,
    two_layers,
)
from pyro.infer import SVI
from torch import Tensor, nn
from vae import of_pyro, of_pythae, plain, program
from watch import Watch, machine, peak, watched

from pyro_ae import fit, importance, iwae, sghmc, svi
from pyro_ae.data import Call
from pyro_ae.energy import Energy
from pyro_ae.engines.stacked import StackedEnergy
from pyro_ae.lowering.capture import CaptureError
from pyro_ae.plates import Scaled

AUTO = "auto"
MODES: dict[str, bool | str] = {
    "fit, compile=False": False,
    "fit, replay": "replay",
    "fit, inductor": "inductor",
    "fit, CUDA graph": True,
    AUTO: "auto",
}
WAYS = ["by hand", "by hand, CUDA graph", "Pyro", "pythae", *MODES]
BAR = 3.0
"""Seconds until the first step that ``compile="auto"`` may take in a run of less than a minute."""

STEPS = {
    "mlp-20": 300,
    "mlp-128": 150,
    "mlp-1000": 50,
    "conv-128": 50,
    "iwae-50": 80,
    "iwae-2-layers": 150,
    "sghmc-1": 100,
    "sghmc-8": 40,
}
"""Steps that are timed, of each way in each repeat."""

WARMUP = 60
"""Steps of samplers before those that are timed; they record at the first."""


def a_pass(batch: int, particles: int) -> int:
    """Batches in a pass over the data: ``fit`` evaluates after each, at the price of one to three steps."""
    return 100 if batch * particles <= 100 else 50


def set_up_for(batches: int, steps: int) -> int:
    """Steps of ``fit`` before those that are timed: a pass in which distributions are checked, the recording, and 10
    replays, or 100, after which there is a comparison with the program that would else be among those timed."""
    return batches + (15 if steps <= 80 else 110)


def modes(device: torch.device) -> dict[str, bool | str]:
    return {name: mode for name, mode in MODES.items() if device.type == "cuda" or "graph" not in name}


class Skipped(Exception):
    """Why there is no such cell."""


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """No cell where ``fit`` says that it cannot capture or compile something."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f"{what} (is no|cannot be)")
        try:
            yield
        except (UserWarning, CaptureError) as reason:
            raise Skipped(str(reason)) from reason


Ways = dict[str, Callable[[int], Watch]]
"""By way, what is seen of a run of so many timed steps."""


# ------------------------------------------------------------------------------------------------ autoencoders


def in_turn(step: Callable[[Tensor], object], watch: Watch, x: Tensor, batch: int) -> Watch:
    rows = batches(x, batch)
    train(step, rows, 10)
    watch.mark()
    train(step, rows, watch.steps)
    watch.mark()
    return watch


def by_hand(start: Networks, x: Tensor, batch: int, particles: int, steps: int) -> Watch:
    networks = copy.deepcopy(start)
    with watched(Watch(steps)) as watch:
        return in_turn(stepper(networks, particles), watch, x, batch)


def by_graph(start: Networks, x: Tensor, batch: int, particles: int, steps: int) -> Watch:
    networks = copy.deepcopy(start)
    with watched(Watch(steps)) as watch:
        return in_turn(graphed(networks, particles, x[:batch]), watch, x, batch)


def by_pyro(start: Networks, x: Tensor, batch: int, particles: int, steps: int) -> Watch:
    networks = copy.deepcopy(start)
    pyro.clear_param_store()
    with watched(Watch(steps)) as watch, pyro.validation_enabled(False):
        svi = SVI(*plain(networks), pyro.optim.Adam({"lr": 1e-3}), of_pyro(particles))
        return in_turn(svi.step, watch, x, batch)


def pythae_of(networks: Networks, particles: int) -> Any:
    if networks.likelihood is not binary:
        raise Skipped("of binary data only")
    if len(networks.encoders) > 1:
        raise Skipped("it has no model with two layers of latents")
    try:
        return of_pythae(networks, particles)
    except ImportError as error:
        raise Skipped(f"it is not installed: {error}") from error


def by_pythae(start: Networks, x: Tensor, batch: int, particles: int, steps: int) -> Watch:
    model = pythae_of(copy.deepcopy(start), particles)
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    logging.disable()
    with (
        tempfile.TemporaryDirectory() as folder,
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        watched(Watch(steps, ready=len(x) // batch)) as watch,
    ):
        options = {"num_epochs": 1 + math.ceil(steps / (len(x) // batch)), "per_device_train_batch_size": batch}
        config = BaseTrainerConfig(output_dir=folder, learning_rate=1e-3, no_cuda=x.device.type == "cpu", **options)
        BaseTrainer(model, BaseDataset(x, torch.zeros(len(x))), training_config=config).train()
    logging.disable(logging.NOTSET)
    return watch


def by_fit(
    compile: bool | str, start: Networks, x: Any, batch: int, particles: int, steps: int, set_up: int | None = None
) -> Watch:
    set_up = set_up or set_up_for(len(x) // batch, steps)
    model, guide = program(copy.deepcopy(start))
    method = svi(loss=importance(iwae, particles), steps=set_up + steps)
    device = next(model.parameters()).device
    options = {"batch_size": batch, "progress": False, "check": False, "device": device, "compile": compile}
    stop = [lambda event: True] if compile == "auto" else []  # of its run only the first step is looked at
    with refused("the loss"), watched(Watch(steps, ready=set_up)) as watch:
        fit(model, x, guide=guide, method=method, callbacks=stop, **options)
    return watch


def same(start: Networks, x: Tensor, particles: int, draws: int = 100) -> None:
    """Refuse to go on unless all ways minimise the same loss: of the same weights and rows, over draws of the noise."""
    networks = copy.deepcopy(start)
    with torch.no_grad():
        for network in (*networks.encoders, *networks.priors):  # so that no part of the loss is near zero
            network[-1].weight.mul_(3.0)
            network[-1].bias.sub_(1.0)

    def hand() -> Tensor:
        return -networks.bound(x, particles).mean()

    def weighted() -> Tensor:
        """What pythae shows of an IWAE: its gradient is the bound's, its value is not."""
        log_w = networks.log_weights(x, particles)
        return -(log_w.softmax(0) * log_w).sum(0).mean()

    ours, theirs, bound = program(networks), plain(networks), of_pyro(particles)
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "fit": (hand, lambda: importance(iwae, particles)(*ours, x) / len(x)),
        "Pyro": (hand, lambda: bound.loss(*theirs, x) / len(x)),
    }
    with contextlib.suppress(Skipped):
        model = pythae_of(networks, particles).to(x.device)
        pairs["pythae"] = (hand if particles == 1 else weighted, lambda: model({"data": x}).loss)
    with torch.no_grad():
        for name, pair in pairs.items():
            means = []
            for loss in pair:
                torch.manual_seed(0)
                means.append(sum(float(loss()) for _ in range(draws)) / draws)
            expected, found = means
            if abs(found / expected - 1) > 0.01:
                raise AssertionError(f"the loss of {name} is {found:.2f}, and {expected:.2f} by hand")


def autoencoder(make: Callable[[], Networks], batch: int, particles: int, device: torch.device) -> Ways:
    start = make().to(device)
    x = torch.bernoulli(torch.full((a_pass(batch, particles) * batch, PIXELS), 0.2, device=device))
    same(start, x[:20], particles)
    given = start, x, batch, particles
    ways: dict[str, Callable[..., Watch]] = {"by hand": by_hand, "Pyro": by_pyro, "pythae": by_pythae}
    if device.type == "cuda":
        ways["by hand, CUDA graph"] = by_graph
    ways |= {name: partial(by_fit, mode) for name, mode in modes(device).items()}
    return {name: partial(way, *given) for name, way in ways.items()}


# ------------------------------------------------------------------------------------------------------ chains


def chains(count: int, device: torch.device) -> Ways:
    """SGHMC over the weights of a network; by hand one chain after the other."""
    sizes, batch = sgmcmc.NETWORKS["784-200-200-10"]
    network = sgmcmc.mlp(sizes).to(device)
    x, y = (t.to(device) for t in sgmcmc.rows(sizes))
    same_gradient(network, x, y, batch)

    def hand(steps: int) -> Watch:
        watch = Watch(steps)
        run = partial(sgmcmc.by_hand, "sghmc", network, x, y, batch)
        run(1)
        watch.step()
        run(9)
        watch.mark()
        for _ in range(count):
            run(steps)
        watch.mark()
        return watch

    def ours(compile: bool | str, steps: int) -> Watch:
        assert WARMUP + steps < 200, "it tells of each step only in a run of less than 200"
        watch = Watch(steps, ready=WARMUP)
        method = sghmc(lr=sgmcmc.LR, chains=count, warmup=WARMUP, draws=1, thinning=steps)
        options = {"batch_size": batch, "progress": False, "check": False, "device": device, "compile": compile}
        with refused("the model's energy"):
            fit(sgmcmc.model_of(network), (x, y), method=method, callbacks=[watch.step], **options)
        return watch

    return {"by hand": hand} | {name: partial(ours, mode) for name, mode in modes(device).items()}


def same_gradient(network: nn.Module, x: Tensor, y: Tensor, batch: int) -> None:
    """Refuse to go on unless the energy by hand and that of the model have the same gradient at these weights."""
    rows, n = (x[:batch], y[:batch]), len(x)
    energy = Energy(Scaled(sgmcmc.model_of(network), "data", n), Call(rows))
    stacked = StackedEnergy(energy)
    ours = stacked(stacked.pack(energy.init("start")).unsqueeze(0), Call(rows))[1]
    by_hand = nn.functional.cross_entropy(network(rows[0]), rows[1]) * n
    by_hand = by_hand + 0.5 * sum(p.square().sum() for p in network.parameters())
    theirs = torch.autograd.grad(by_hand, list(network.parameters()))
    for power in (1, 2, 3):  # in another order, so by moments
        a, b = ours.abs().pow(power).sum(), sum(g.abs().pow(power).sum() for g in theirs)
        if abs(float(a / b) - 1) > 0.01:
            raise AssertionError(f"the gradient's moment {power} is {a:.4g}, and {b:.4g} by hand")


# ------------------------------------------------------------------------------------------------------ tables

ROWS: dict[str, tuple[str, Callable[[torch.device], Ways]]] = {
    "mlp-20": ("VAE, 784-200-200-50, batch 20", partial(autoencoder, perceptrons, 20, 1)),
    "mlp-128": ("VAE, 784-200-200-50, batch 128", partial(autoencoder, perceptrons, 128, 1)),
    "mlp-1000": ("VAE, 784-200-200-50, batch 1000", partial(autoencoder, perceptrons, 1000, 1)),
    "conv-128": ("convolutional VAE, batch 128", partial(autoencoder, convolutional, 128, 1)),
    "iwae-50": ("IWAE, 784-200-200-50, K = 50, batch 20", partial(autoencoder, perceptrons, 20, 50)),
    "iwae-2-layers": ("IWAE of two layers, K = 5, batch 20", partial(autoencoder, two_layers, 20, 5)),
    "sghmc-1": ("SGHMC, 784-200-200-10, batch 100, 1 chain", partial(chains, 1)),
    "sghmc-8": ("SGHMC, 784-200-200-10, batch 100, 8 chains", partial(chains, 8)),
}


class Row(NamedTuple):
    """What was measured, by way."""

    name: str
    runs: dict[str, list[Watch]]
    memory: dict[str, float]
    skipped: dict[str, str]


def race(name: str, repeats: int, device: torch.device) -> Row:
    title, make = ROWS[name]
    torch.manual_seed(0)
    row, ways = Row(title, {}, {}, {}), make(device)
    for repeat in range(repeats):
        for way, run in ways.items():
            if way in row.skipped:
                continue
            print(f"{name}: {way}, {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
            try:
                row.runs.setdefault(way, []).append(run(STEPS[name]))
            except Skipped as reason:
                row.skipped[way] = str(reason)
                del row.runs[way]
    row.memory.update({way: peak(partial(ways[way], 20)) for way in row.runs if way != AUTO})
    return row


def speed(row: Row, way: str) -> str:
    times = [watch.milliseconds for watch in row.runs[way]]
    if way == "by hand":
        return f"{median(times):.2f}"
    ratios = [t / watch.milliseconds for t, watch in zip(times, row.runs["by hand"], strict=True)]
    return f"{median(times):.2f}, {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def memory(row: Row, way: str) -> str:
    return f"{row.memory[way]:.1f}"


def set_up(row: Row, way: str) -> str:
    """The most of all repeats: the first of them compiles, and those after it find that done."""
    first = max(watch.first for watch in row.runs[way])
    if way not in MODES:
        return f"{first:.2f}"
    if way == AUTO:
        return f"{first:.2f}" if first < BAR else f"**{first:.2f}**"
    return f"{first:.2f}, {max(watch.before for watch in row.runs[way]):.1f}"


TABLES: list[tuple[str, Callable[[Row, str], str], bool]] = [
    ("Milliseconds a step, and the ratio to the loop by hand: median (smallest to largest)", speed, False),
    ("Peak memory of a step in MiB, the networks included and the data not", memory, False),
    (f"Seconds until the first step is done, and until the timed steps begin; bar of auto: {BAR:g} s", set_up, True),
]


def lines(rows: list[Row], title: str, cell: Callable[[Row, str], str], auto: bool, device: torch.device) -> list[str]:
    """One table."""
    ways = [way for way in WAYS if (device.type == "cuda" or "graph" not in way) and (auto or way != AUTO)]
    head = [f"\n{title}\n", "| row | " + " | ".join(ways) + " |", "|---|" + "---:|" * len(ways)]
    cells = ([cell(row, way) if way in row.runs else "" for way in ways] for row in rows)
    return head + [f"| {row.name} | " + " | ".join(c) + " |" for row, c in zip(rows, cells, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device.type == "cuda":
        torch.cuda.init()
    cold = by_hand(perceptrons().to(options.device), torch.zeros(20, PIXELS, device=options.device), 20, 1, 1).first
    about = [
        f"`{shlex.join(['python', *sys.argv])}`: {machine(options.device)}, {date.today()}, {options.repeats} repeats. "
        f"The first step of a process takes {cold:.1f} s, by hand too, as torch then imports more; it is left out."
    ]
    print(*about)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
        for name in options.rows:
            rows.append(race(name, options.repeats, options.device))
            first, *others = [lines(rows, *table, options.device) for table in TABLES]
            print("\n".join(first if len(rows) == 1 else first[-1:]), flush=True)
            rest = [line for table in others for line in table]
            rest += ["", *(f"- {row.name}, {way}: {why}" for row in rows for way, why in row.skipped.items())]
            if options.out:
                options.out.write_text("\n".join([*about, *first, *rest]) + "\n")
    print("\n".join(rest))


if __name__ == "__main__":
    main()
