"""``fit`` beside a hand-written PyTorch loop with the same networks.

python tests/benchmarks/vae.py steps            milliseconds a step, side by side, and their ratio
python tests/benchmarks/vae.py memory           peak memory of a step, side by side
python tests/benchmarks/vae.py mnist            test bounds after 20 epochs on statically binarised MNIST
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from handwritten import Networks, evaluate, train
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pyro_ae import Posterior, datasets, fit, importance, iwae, svi
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.models.vae import VAE


def ours(
    networks: Networks,
    x: Tensor,
    method: svi,
    batch_size: int,
    seed: int | None = None,
    compile: bool | str = "auto",
) -> Posterior:
    head = MeanField(200, 50)
    head.linear = networks.head
    model, guide = VAE(networks.decoder, 50), Amortized(networks.encoder, head)
    options = {"batch_size": batch_size, "seed": seed, "progress": False, "device": "cpu", "compile": compile}
    return fit(model, x, guide=guide, method=method, **options)


def milliseconds(run: Callable[[], object], steps: int) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start) / steps


def race(x: Tensor, batch_size: int, particles: int, count: int) -> list[float]:
    """Milliseconds a step: by hand, by hand with a fused optimiser, and ours as it is and replayed, with all set-up."""
    start = Networks()

    def by_hand(fused: bool) -> None:
        train(copy.deepcopy(start), x, batch_size=batch_size, steps=count, particles=particles, lr=1e-3, fused=fused)

    def fitted(compile: bool | str) -> None:
        method = svi(loss=importance(iwae, particles), steps=count)
        ours(copy.deepcopy(start), x, method, batch_size, compile=compile)

    runs = [partial(by_hand, False), partial(by_hand, True), partial(fitted, False), partial(fitted, "replay")]
    return [milliseconds(run, count) for run in runs]


def steps(repeats: int) -> None:
    x = torch.bernoulli(torch.full((2000, 784), 0.2))
    print(f"{'batch':>5} {'K':>3} {'by hand':>9} {'fused':>9} {'as it is':>9} {'replayed':>9}   (ms a step)", end="")
    print(f" {'as it is':>17} {'replayed':>17}   (to by hand, fused)")
    for batch_size, particles, count in ((128, 1, 600), (20, 1, 1000), (128, 16, 200), (20, 50, 200)):
        rows = [race(x, batch_size, particles, count) for _ in range(repeats)]
        times = " ".join(f"{statistics.median(column):>9.2f}" for column in zip(*rows, strict=True))
        ratios = [[row[i] / row[1] for row in rows] for i in (2, 3)]
        spread = [f"{statistics.median(r):.2f} ({min(r):.2f}-{max(r):.2f})" for r in ratios]
        print(f"{batch_size:>5} {particles:>3} {times}                {spread[0]:>17} {spread[1]:>17}", flush=True)


def peak(run: Callable[[], object]) -> float:
    """The most that was allocated at once by torch, in MiB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0)
    return float(live.max()) / 2**20


def memory() -> None:
    x, start = torch.bernoulli(torch.full((400, 784), 0.2)), Networks()
    print(f"{'batch':>5} {'K':>3} {'by hand':>9} {'fit':>9} {'ratio':>6}   (MiB)")
    for batch_size, particles in ((128, 1), (20, 1), (128, 16), (20, 50)):
        method = svi(loss=importance(iwae, particles), steps=25)
        networks = [copy.deepcopy(start) for _ in range(2)]
        options = {"batch_size": batch_size, "steps": 25, "particles": particles, "lr": 1e-3, "fused": True}
        runs = [partial(train, networks[0], x, **options), partial(ours, networks[1], x, method, batch_size)]
        by_hand, fitted = (peak(run) for run in runs)
        print(f"{batch_size:>5} {particles:>3} {by_hand:>9.2f} {fitted:>9.2f} {fitted / by_hand:>6.2f}", flush=True)


def mnist(epochs: int, seeds: int, particles: int) -> None:
    data = datasets.load("mnist_static_binarized")
    x, test = data.train["x"].flatten(1), data.test["x"].flatten(1)[::5]
    print(f"test bound in nats (K=100, every fifth test image) after {epochs} epochs, trained with K={particles}")
    print(f"{'seed':>4} {'by hand':>9} {'fit':>9}")
    for seed in range(seeds):
        torch.manual_seed(seed)
        start = Networks()
        by_hand = copy.deepcopy(start)
        total = epochs * -(-len(x) // 128)
        train(by_hand, x, batch_size=128, steps=total, particles=particles, lr=1e-3, fused=True)
        mine = copy.deepcopy(start)
        posterior = ours(mine, x, svi(loss=importance(iwae, particles), epochs=epochs), 128, seed=seed + 100)
        # one evaluation for both, and ours once more through the library
        bounds = [evaluate(n, test, 100) for n in (by_hand, mine)]
        library = posterior.log_evidence(test, particles=100).mean().item()
        print(f"{seed:>4} {bounds[0]:>9.2f} {bounds[1]:>9.2f}   by log_evidence {library:.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "memory", "mnist"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--particles", type=int, default=1)
    options = parser.parse_args()
    if options.what == "steps":
        steps(options.repeats)
    elif options.what == "memory":
        memory()
    else:
        mnist(options.epochs, options.seeds, options.particles)
