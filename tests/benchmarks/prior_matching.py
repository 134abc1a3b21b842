"""Where the time of ``match_prior`` goes in the setting of a paper, and how much of that setting is needed.

python tests/benchmarks/prior_matching.py speed     milliseconds of the parts of one iteration
python tests/benchmarks/prior_matching.py study     one part of the setting at a time, from a reference (20 minutes)

The paper is Model Selection for Bayesian Autoencoders (Tran et al., 2021): 2000 iterations, in each of which a network
of directions takes 30 steps of 1000 projections over 32 networks of the prior, for 64 images of 784 pixels. Needs MNIST
in the folder that ``PYRO_AE_DATA`` names.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, normalize

from pyro_ae import datasets, fit, match_prior, sghmc
from pyro_ae.divergences import energy_distance, sliced_wasserstein, wasserstein_1d
from pyro_ae.models.bayesian_autoencoder import BayesianAutoencoder
from pyro_ae.nn import MLP
from pyro_ae.priors import learnable, normal
from pyro_ae.runtime import seeded
from pyro_ae.slices import _along, _sorted, distributional_sliced_wasserstein

PIXELS, LATENT = 14 * 14, 10


@dataclass(frozen=True)
class Setting:
    """Of one matching. Without inner steps, directions are drawn at random and not learned."""

    iterations: int = 200
    inner: int = 5
    projections: int = 100
    networks: int = 16
    images: int = 64
    lr: float = 1e-2
    log_variance: float = -6.0

    def __str__(self) -> str:
        return ", ".join(f"{n} {v:g}" for n, v in vars(self).items() if v != getattr(REFERENCE, n)) or "reference"


# A tenth of the paper's iterations with ten times its learning rate; what can be afforded of the rest.
REFERENCE = Setting()
REDUCED = {"inner": 0, "projections": 50, "networks": 8}
OF_THE_REDUCED: list[dict[str, Any]] = [
    *({"iterations": 100}, {"networks": 4}, {"lr": 3e-2}, {"log_variance": -3.0}),
    {"iterations": 600, "lr": 1e-2 / 3},
]
CHANGES: list[dict[str, Any]] = [
    *({"inner": 1}, {"inner": 0}, {"projections": 25}, {"networks": 8}, {"networks": 4}, {"images": 16}),
    *({"iterations": 100, "lr": 2e-2}, {"iterations": 50, "lr": 4e-2}, {"lr": 3e-2}, {"log_variance": -3.0}),
    *({"inner": 30}, {"networks": 32}, {"iterations": 600, "lr": 1e-2 / 3}, {"projections": 400}),
]


class Images(NamedTuple):
    """Zeros to tune the prior on and to judge it by; other digits for the posterior, and to test it."""

    zeros: Tensor
    held_zeros: Tensor
    digits: Tensor
    test: Tensor


def images() -> Images:
    data = datasets.load("mnist")
    parts = []
    for part, counts in ((data.train, (100, 200)), (data.test, (None, 500))):
        x = avg_pool2d(part["x"].reshape(-1, 1, 28, 28), 2).flatten(1)
        zero = part["y"] == 0
        parts += [x[zero][: counts[0]], x[~zero][: counts[1]]]
    zeros, digits, held_zeros, test = parts
    return Images(zeros, held_zeros, digits, test)


def networks() -> tuple[nn.Module, nn.Module]:
    return MLP(PIXELS, [64], LATENT, activation=nn.Tanh), MLP(LATENT, [64], PIXELS, activation=nn.Tanh)


def pretrained(x: Tensor) -> tuple[nn.Module, nn.Module]:
    """A plain autoencoder's, whose weights are the means that the prior starts with."""
    with seeded(0):
        encoder, decoder = networks()
        descent = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
        for _ in range(200):
            for batch in x[torch.randperm(len(x))].split(64):
                descent.zero_grad()
                (decoder(encoder(batch)).sigmoid() - batch).square().mean().backward()
                descent.step()
    return encoder, decoder


class Found(NamedTuple):
    seconds: float
    model: nn.Module
    energy: float
    sliced: float
    log_likelihood: float


def tuned(setting: Setting, model: nn.Module, data: Images, seed: int) -> float:
    """Seconds of the processor that it took."""
    directions = distributional_sliced_wasserstein(setting.projections, setting.inner or 1, sum=True)
    start = time.process_time()
    match_prior(
        *(model, data.zeros, directions if setting.inner else sliced_wasserstein(setting.projections)),
        steps=setting.iterations + 5,
        warmup=5 if setting.inner else 0,
        samples=setting.networks,
        batch_size=setting.images,
        lr=setting.lr,
        optimizer=torch.optim.Adam,
        seed=seed,
        progress=False,
    )
    return time.process_time() - start


def judged(seconds: float, model: nn.Module, data: Images, seed: int) -> Found:
    """By held-out zeros beside what the prior makes of the others, and by the likelihood of digits' posterior."""
    with seeded(0), torch.no_grad():
        drawn = torch.cat([draw(model, data.zeros[torch.randperm(100)[:20]]) for _ in range(100)])
        energy = float(energy_distance()(drawn, data.held_zeros))
        sliced = float(sliced_wasserstein(500)(drawn, data.held_zeros))
    sampler = sghmc(lr=3e-3, chains=2, warmup=600, draws=20, thinning=10, init="prior")
    posterior = fit(model, data.digits, method=sampler, batch_size=64, seed=seed, progress=False, check=False)
    log_p = posterior.log_likelihood(data.test)["x"]
    return Found(seconds, model, energy, sliced, float((log_p.logsumexp(0) - math.log(len(log_p))).mean()))


def draw(model: nn.Module, x: Tensor) -> Tensor:
    """What networks from the prior make of rows."""
    import pyro

    sites = pyro.poutine.trace(pyro.poutine.uncondition(model)).get_trace(x)
    return sites.nodes["x"]["value"]


def divergence(a: nn.Module, b: nn.Module) -> float:
    """The mean over weights of KL(a, b), in nats."""
    total, count = 0.0, 0
    for p, q in zip(priors(a), priors(b), strict=True):
        for key in p.loc:
            (m, v), (n, w) = ((r.loc[key], r.log_variance[key]) for r in (p, q))
            kl = 0.5 * ((v - w).exp() + (m - n).square() / w.exp() - 1.0 + w - v)
            total, count = total + float(kl.sum()), count + kl.numel()
    return total / count


def priors(model: nn.Module) -> list[learnable]:
    return [m for m in model.modules() if isinstance(m, learnable)]


def study(seeds: int) -> None:
    data = images()
    parts = pretrained(data.zeros)

    def learned(log_variance: float = -6.0) -> nn.Module:
        return BayesianAutoencoder(*parts, LATENT, prior=learnable("module", log_variance, "weight"))

    def run(setting: Setting, seed: int) -> Found:
        model = learned(setting.log_variance)
        return judged(tuned(setting, model, data, seed), model, data, seed)

    heads = ["seconds", "energy distance", "sliced Wasserstein", "KL to the reference", "test log-likelihood"]
    print(" | ".join(["setting", *heads]), flush=True)
    reference = [run(REFERENCE, seed) for seed in range(seeds)]
    show("reference", reference, reference)
    reduced = replace(REFERENCE, **REDUCED)
    show(f"reduced: {reduced}", [run(reduced, seed) for seed in range(seeds)], reference)
    show("not tuned", [judged(0.0, learned().requires_grad_(False), data, 0)], reference)
    show("not tuned, log_variance -3", [judged(0.0, learned(-3.0).requires_grad_(False), data, 0)], reference)
    show("standard normal", [judged(0.0, BayesianAutoencoder(*parts, LATENT, prior=normal()), data, 0)], [])
    for base, several in ((reduced, OF_THE_REDUCED), (REFERENCE, CHANGES)):
        for changes in several:
            setting = replace(base, **changes)
            show(str(setting), [run(setting, 0)], reference)


def show(name: str, found: list[Found], reference: list[Found]) -> None:
    # of different seeds, so that the reference is as far from itself as from another setting that is as good
    pairs = [(a.model, b.model) for i, a in enumerate(found) for j, b in enumerate(reference) if i != j]
    columns = [[getattr(f, n) for f in found] for n in ("seconds", "energy", "sliced")]
    columns += [[divergence(a, b) for a, b in pairs], [f.log_likelihood for f in found]]
    cells = [f"{statistics.mean(c):.4g} ({min(c):.4g}-{max(c):.4g})" if c and any(c) else "" for c in columns]
    print(" | ".join([name, *cells]), flush=True)


# ------------------------------------------------------------------------------------------------ speed


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Of the processor: with one thread, other work on the machine counts less than for a clock on the wall."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)


def speed(repeats: int) -> None:
    torch.manual_seed(0)
    ours, theirs = torch.rand(32 * 64, 784), torch.rand(64, 784)
    directions = normalize(torch.randn(784, 1000), dim=0).requires_grad_()
    values = (directions.T @ ours.T).detach()

    def gradient(distance: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(distance(), directions)

    rows: dict[str, Callable[[], object]] = {
        "sort of the projections, by torch": lambda: values.sort(-1),
        "sort of the projections, as here": lambda: _sorted(values),
        "distance and gradient, by wasserstein_1d": gradient(
            lambda: wasserstein_1d(ours @ directions, theirs @ directions, 2.0).mean()
        ),
        "distance and gradient, as here": gradient(lambda: _along(directions, 2.0)(ours, theirs)),
        "projection of 2048 images": lambda: directions.T @ ours.T,
        "cosines of the directions": lambda: directions.T @ directions,
    }
    distance = distributional_sliced_wasserstein(steps=1)
    rows["one inner step"] = lambda: distance.fitted(ours, theirs)
    for name, run in rows.items():
        print(f"{name:>42} {milliseconds(run, repeats):>9.1f} ms", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "study"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3, help="of the reference and the reduced setting")
    options = parser.parse_args()
    if options.what == "speed":
        speed(options.repeats)
    else:
        study(options.seeds)
