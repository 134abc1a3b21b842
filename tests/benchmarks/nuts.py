"""``nuts`` beside Pyro's own sampler and beside the same models written in NumPyro.

python tests/benchmarks/nuts.py                             all models
python tests/benchmarks/nuts.py --models schools hmm        some of them
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pyro
import pyro.distributions as dist
import torch
from jax.scipy.special import logsumexp
from numpy.typing import NDArray
from numpyro import distributions as ndist
from torch import Tensor

from pyro_ae import fit, nuts

Draws = dict[str, NDArray]
"""Site to values ``[chains, draws, *shape]``."""

rng = np.random.default_rng(0)


def schools(y: Tensor, s: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, s), obs=y)


def schools_numpyro(y: Any, s: Any) -> None:
    mu = numpyro.sample("mu", ndist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", ndist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(y)):
        z = numpyro.sample("z", ndist.Normal(0.0, 1.0))
        numpyro.sample("y", ndist.Normal(mu + tau * z, s), obs=y)


def schools_data() -> Draws:
    y = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
    return {"y": np.array(y), "s": np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])}


def logistic(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(20), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w + b), obs=y)


def logistic_numpyro(x: Any, y: Any) -> None:
    w = numpyro.sample("w", ndist.Normal(jnp.zeros(20), 1.0).to_event(1))
    b = numpyro.sample("b", ndist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", ndist.Bernoulli(logits=x @ w + b), obs=y)


def logistic_data() -> Draws:
    x = rng.normal(size=(1000, 20))
    chance = 1 / (1 + np.exp(-x @ rng.normal(size=20)))
    return {"x": x, "y": (rng.random(1000) < chance).astype(float)}


def hierarchical(x: Tensor, group: Tensor, y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    spread = pyro.sample("spread", dist.HalfNormal(torch.ones(2)).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("groups", 30):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    effect = (mean + spread * z)[group]
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(effect[:, 0] + effect[:, 1] * x, sigma), obs=y)


def hierarchical_numpyro(x: Any, group: Any, y: Any) -> None:
    mean = numpyro.sample("mean", ndist.Normal(jnp.zeros(2), 2.0).to_event(1))
    spread = numpyro.sample("spread", ndist.HalfNormal(jnp.ones(2)).to_event(1))
    sigma = numpyro.sample("sigma", ndist.HalfNormal(1.0))
    with numpyro.plate("groups", 30):
        z = numpyro.sample("z", ndist.Normal(jnp.zeros(2), 1.0).to_event(1))
    effect = (mean + spread * z)[group]
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", ndist.Normal(effect[:, 0] + effect[:, 1] * x, sigma), obs=y)


def hierarchical_data() -> Draws:
    group, x = np.repeat(np.arange(30), 10), rng.normal(size=300)
    effect = np.array([1.0, -0.5]) + 0.5 * rng.normal(size=(30, 2))
    return {"x": x, "group": group, "y": effect[group, 0] + effect[group, 1] * x + 0.5 * rng.normal(size=300)}


def gp(x: Tensor, y: Tensor) -> None:
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    kernel = scale**2 * torch.exp(-0.5 * ((x[:, None] - x) / length) ** 2) + (noise**2 + 1e-4) * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), kernel), obs=y)


def gp_numpyro(x: Any, y: Any) -> None:
    length = numpyro.sample("length", ndist.LogNormal(0.0, 1.0))
    scale = numpyro.sample("scale", ndist.HalfNormal(1.0))
    noise = numpyro.sample("noise", ndist.HalfNormal(1.0))
    kernel = scale**2 * jnp.exp(-0.5 * ((x[:, None] - x) / length) ** 2) + (noise**2 + 1e-4) * jnp.eye(len(x))
    numpyro.sample("y", ndist.MultivariateNormal(jnp.zeros(len(x)), kernel), obs=y)


def gp_data() -> Draws:
    x = np.linspace(-3, 3, 100)
    return {"x": x, "y": np.sin(2 * x) + 0.3 * rng.normal(size=100)}


def hmm(y: Tensor) -> None:
    rows = pyro.sample("rows", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.ordered_vector, (), (2,)))
    pyro.factor("prior", dist.Normal(torch.tensor([0.0, 3.0]), 2.0).log_prob(mu).sum())
    pyro.sample("y", dist.DiscreteHMM(torch.zeros(2), rows.log(), dist.Normal(mu, 1.0), duration=len(y)), obs=y)


def hmm_numpyro(y: Any) -> None:
    """NumPyro has no such distribution, so the forward algorithm is a scan; the first state is one before ``y[0]``."""
    rows = numpyro.sample("rows", ndist.Dirichlet(jnp.ones((2, 2))).to_event(1))
    mu = numpyro.sample("mu", ndist.ImproperUniform(ndist.constraints.ordered_vector, (), (2,)))
    numpyro.factor("prior", ndist.Normal(jnp.array([0.0, 3.0]), 2.0).log_prob(mu).sum())
    seen = ndist.Normal(mu, 1.0).log_prob(y[:, None])

    def step(alpha: Any, now: Any) -> tuple[Any, None]:
        return logsumexp(alpha[:, None] + jnp.log(rows), axis=0) + now, None

    numpyro.factor("y", logsumexp(jax.lax.scan(step, jnp.log(jnp.full(2, 0.5)), seen)[0]))


def hmm_data() -> Draws:
    switches = rng.random(100) < 0.2
    return {"y": 3.0 * (switches.cumsum() % 2) + rng.normal(size=100)}


def network(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3, 8), 1.0).to_event(2))
    b = pyro.sample("b", dist.Normal(torch.zeros(8), 1.0).to_event(1))
    v = pyro.sample("v", dist.Normal(torch.zeros(8), 0.5).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(torch.tanh(x @ w + b) @ v, sigma), obs=y)


def network_numpyro(x: Any, y: Any) -> None:
    w = numpyro.sample("w", ndist.Normal(jnp.zeros((3, 8)), 1.0).to_event(2))
    b = numpyro.sample("b", ndist.Normal(jnp.zeros(8), 1.0).to_event(1))
    v = numpyro.sample("v", ndist.Normal(jnp.zeros(8), 0.5).to_event(1))
    sigma = numpyro.sample("sigma", ndist.HalfNormal(1.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", ndist.Normal(jnp.tanh(x @ w + b) @ v, sigma), obs=y)


def network_data() -> Draws:
    x = rng.normal(size=(100, 3))
    return {"x": x, "y": np.sin(x[:, 0]) + 0.5 * x[:, 1] + 0.2 * rng.normal(size=100)}


def predictions(draws: Draws) -> Draws:
    """What a network says at five points: its units can be exchanged, so that chains need not agree on weights."""
    x = np.random.default_rng(1).normal(size=(5, 3))
    hidden = np.tanh(x @ draws["w"] + draws["b"][..., None, :])
    return {"f": (hidden @ draws["v"][..., None])[..., 0], "sigma": draws["sigma"]}


class Entry(NamedTuple):
    """A model twice over, its data, and the quantities whose effective sample sizes count."""

    ours: Callable[..., None]
    numpyro: Callable[..., None]
    data: Callable[[], Draws]
    look: Callable[[Draws], Draws] = lambda draws: draws


MODELS = {
    "schools": Entry(schools, schools_numpyro, schools_data),
    "logistic": Entry(logistic, logistic_numpyro, logistic_data),
    "hierarchical": Entry(hierarchical, hierarchical_numpyro, hierarchical_data),
    "gp": Entry(gp, gp_numpyro, gp_data),
    "hmm": Entry(hmm, hmm_numpyro, hmm_data),
    "network": Entry(network, network_numpyro, network_data, predictions),
}


compiled: list[float] = []
"""Seconds that XLA took to compile, one entry a program."""


def note(event: str, seconds: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        compiled.append(seconds)


class Timed(NamedTuple):
    draws: Draws
    seconds: float
    compiling: float


class Result(NamedTuple):
    cold: float
    warm: float
    compiling: float
    """Seconds of the warm run in which XLA compiled."""
    bulk: float
    """Effective draws of the warm run, of the worst quantity."""
    tail: float


def timed(run: Callable[[], Draws]) -> Timed:
    compiled.clear()
    start = time.perf_counter()
    draws = run()
    return Timed(draws, time.perf_counter() - start, sum(compiled))


def effective(draws: Draws, method: str) -> float:
    series = [v.reshape(*v.shape[:2], -1).astype(float) for v in draws.values()]
    return min(float(arviz.ess(v[..., i], method=method)) for v in series for i in range(v.shape[-1]))


def result(cold: Timed, warm: Timed, look: Callable[[Draws], Draws]) -> Result:
    found = look(warm.draws)
    return Result(cold.seconds, warm.seconds, warm.compiling, effective(found, "bulk"), effective(found, "tail"))


def by_fit(entry: Entry, data: Draws, method: nuts, runs: int) -> Result:
    def run(seed: int) -> Draws:
        posterior = fit(entry.ours, data, method=method, seed=seed, progress=False, device="cpu")
        return {name: draws.numpy() for name, draws in posterior.draws.items()}

    times = [timed(lambda s=seed: run(s)) for seed in range(runs)]  # type: ignore[misc]
    return result(times[0], times[-1], entry.look)


def by_numpyro(entry: Entry, data: Draws, draws: int, warmup: int, chains: int) -> Result:
    kernel = numpyro.infer.NUTS(entry.numpyro, init_strategy=numpyro.infer.init_to_median)
    options: dict[str, Any] = {"num_warmup": warmup, "num_samples": draws, "num_chains": chains}
    mcmc = numpyro.infer.MCMC(kernel, chain_method="vectorized", progress_bar=False, **options)
    arrays = {n: jnp.asarray(v) for n, v in data.items()}

    def run(seed: int) -> Draws:
        mcmc.run(jax.random.PRNGKey(seed), **arrays)
        return {n: np.asarray(v) for n, v in mcmc.get_samples(group_by_chain=True).items()}

    return result(timed(lambda: run(0)), timed(lambda: run(1)), entry.look)


def race(names: list[str], draws: int, warmup: int, chains: int, short: int) -> None:
    columns = ["model", "sampler", "cold, s", "warm, s", "compiling, s", "bulk ESS/s", "tail ESS/s"]
    columns += [f"ours to it: {what}" for what in ("bulk", "tail", "bulk, not compiling")]
    print(f"| {' | '.join(columns)} |\n|---|---|{'---:|' * 8}", flush=True)
    for name in names:
        entry = MODELS[name]
        data = entry.data()
        pyros = nuts(draws=short, warmup=short, chains=1, backend="pyro")
        ours = by_fit(entry, data, nuts(draws=draws, warmup=warmup, chains=chains), 2)
        rows = {
            "ours": ours,
            "NumPyro": by_numpyro(entry, data, draws, warmup, chains),
            "Pyro": by_fit(entry, data, pyros, 1),
        }
        for sampler, row in rows.items():
            speeds = [(r.bulk / r.warm, r.tail / r.warm, r.bulk / (r.warm - r.compiling)) for r in (ours, row)]
            ratios = ["" if row is ours else f"{a / b:.2f}" for a, b in zip(*speeds, strict=True)]
            cold = "" if sampler == "Pyro" else f"{row.cold:.1f}"  # it compiles nothing
            times = [cold, f"{row.warm:.1f}", f"{row.compiling:.1f}", *(f"{x:.1f}" for x in speeds[1][:2])]
            print(f"| {' | '.join([name, sampler, *times, *ratios])} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--warmup", type=int, default=1000)
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--short", type=int, default=100, help="draws, and as many of warm-up, of Pyro's one chain")
    options = parser.parse_args()
    jax.monitoring.register_event_duration_secs_listener(note)
    race(options.models, options.draws, options.warmup, options.chains, options.short)
