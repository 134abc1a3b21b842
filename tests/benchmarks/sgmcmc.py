"""Samplers by stochastic gradients beside a hand-written loop and the package ``posteriors`` (extra ``bench``).

python tests/benchmarks/sgmcmc.py steps         milliseconds a step, side by side, and their ratios
python tests/benchmarks/sgmcmc.py memory        peak memory beside that of the states
python tests/benchmarks/sgmcmc.py bias          variance of a normal target against the step size
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.func import functional_call
from vae import peak

from pyro_ae import batch_plate, bayesian, fit, sghmc, sgld
from pyro_ae.data import Call
from pyro_ae.energy import Energy
from pyro_ae.engines.stacked import StackedEnergy
from pyro_ae.engines.stochastic import Now
from pyro_ae.plates import Scaled

N = 10_000
NETWORKS = {
    "784-200-200-10": ([784, 200, 200, 10], 100),
    "20-50-50-10": ([20, 50, 50, 10], 100),
}
LR, FRICTION = 1e-7, 0.05


def mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def rows(sizes: list[int]) -> tuple[Tensor, Tensor]:
    return torch.randn(N, sizes[0]), torch.randint(sizes[-1], (N,))


def batches(x: Tensor, y: Tensor, size: int, steps: int) -> Any:
    done = 0
    while done < steps:
        order = torch.randperm(N)
        for start in range(0, N, size):
            index = order[start : start + size]
            yield x[index], y[index]
            done += 1
            if done == steps:
                return


def by_hand(kind: str, network: nn.Module, x: Tensor, y: Tensor, size: int, steps: int) -> None:
    """One chain: the loss as one writes it, and the update tensor by tensor, in place."""
    params = [p.detach().clone().requires_grad_() for p in network.parameters()]
    names = [n for n, _ in network.named_parameters()]
    momenta = [torch.zeros_like(p) for p in params]
    inverse = [torch.ones_like(p) for p in params]
    for a, b in batches(x, y, size, steps):
        logits = functional_call(network, dict(zip(names, params, strict=True)), (a,))
        energy = nn.functional.cross_entropy(logits, b, reduction="sum") * (N / size)
        energy = energy + 0.5 * sum(p.square().sum() for p in params)
        gradients = torch.autograd.grad(energy, params)
        with torch.no_grad():
            for p, m, g, i in zip(params, momenta, gradients, inverse, strict=True):
                if kind == "sgld":
                    p.add_(g, alpha=-LR / N).add_(torch.randn_like(p), alpha=(2 * LR / N) ** 0.5)
                else:
                    m.mul_(1 - FRICTION).addcmul_(g, i, value=-LR)
                    m.addcmul_(torch.randn_like(m), (i * (2 * FRICTION * LR)).sqrt_())
                    p.add_(m)


def by_posteriors(kind: str, network: nn.Module, x: Tensor, y: Tensor, size: int, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensordict, at the import
        import posteriors

    def log_posterior(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        logits = functional_call(network, params, (batch[0],))
        likelihood = -nn.functional.cross_entropy(logits, batch[1]) * N
        return likelihood - 0.5 * sum(p.square().sum() for p in params.values()), torch.zeros(())

    make = {"sgld": posteriors.sgmcmc.sgld, "sghmc": posteriors.sgmcmc.sghmc}[kind]
    options = {} if kind == "sgld" else {"alpha": FRICTION}
    transform = make.build(log_posterior, lr=LR / N, **options)
    state = transform.init({n: p.detach().clone() for n, p in network.named_parameters()})
    for batch in batches(x, y, size, steps):
        state, _ = transform.update(state, batch, inplace=True)


def model_of(network: nn.Module) -> Any:
    net = bayesian(network, start="module")

    def model(x: Tensor, y: Tensor | None = None) -> None:
        logits = net(x)
        with batch_plate(x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return model


def ours(kind: str, network: nn.Module, x: Tensor, y: Tensor, size: int, steps: int, chains: int) -> float:
    """Seconds a step from the first tenth of the run on; what comes before is set-up."""
    make = {"sgld": sgld, "sghmc": sghmc}[kind]
    engine = make(lr=LR, chains=chains, warmup=steps // 5, draws=1, thinning=steps - steps // 5)
    marks: list[tuple[int, float]] = []
    fit(
        model_of(network),
        (x, y),
        method=engine,
        batch_size=size,
        progress=False,
        device="cpu",
        callbacks=[lambda event: marks.append((event.step, time.perf_counter()))],
    )
    (first, begun), (last, ended) = marks[len(marks) // 5], marks[-1]
    return (ended - begun) / (last - first)


def steps(repeats: int, count: int) -> None:
    print(
        f"{'network':>15} {'kind':>6} {'by hand':>8} {'posteriors':>11} {'1 chain':>8} {'8 chains':>9} (ms a step)",
        end="",
    )
    print("   1 chain/hand   posteriors/1 chain   8 chains/1   a chain of 8/hand")
    for name, (sizes, size) in NETWORKS.items():
        for kind in ("sgld", "sghmc"):
            table = []
            for _ in range(repeats):
                network, (x, y) = mlp(sizes), rows(sizes)
                times = []
                for run in (by_hand, by_posteriors):
                    run(kind, network, x, y, size, 10)
                    start = time.perf_counter()
                    run(kind, network, x, y, size, count)
                    times.append((time.perf_counter() - start) / count)
                times += [ours(kind, network, x, y, size, count, chains) for chains in (1, 8)]
                table.append([1e3 * t for t in times])
            a, b, c, d = (statistics.median(column) for column in zip(*table, strict=True))
            ratios = [[r[2] / r[0], r[1] / r[2], r[3] / r[2], r[3] / 8 / r[0]] for r in table]
            shown = [
                f"{statistics.median(q):.2f} ({min(q):.2f}-{max(q):.2f})" for q in map(list, zip(*ratios, strict=True))
            ]
            print(
                f"{name:>15} {kind:>6} {a:>8.2f} {b:>11.2f} {c:>8.2f} {d:>9.2f}             ",
                "   ".join(shown),
                flush=True,
            )


def memory() -> None:
    """Of steps once the graph is captured, as the most that torch held at once; and of the capture itself."""
    heads = ["3 states", "step", "ratio", "by hand", "capture"]
    print(f"{'network':>15} {'kind':>6} {'chains':>6} " + " ".join(f"{h:>8}" for h in heads) + "   (MiB)")
    for name, (sizes, size) in NETWORKS.items():
        network, (x, y) = mlp(sizes), rows(sizes)
        batch = Call((x[:size], y[:size]))
        energy = StackedEnergy(Energy(Scaled(model_of(network), "data", N), batch))
        energy.settle()
        for engine in (sgld(lr=LR), sghmc(lr=LR, adaptive=False), sghmc(lr=LR)):
            kind = type(engine).__name__ + ("" if getattr(engine, "adaptive", False) or type(engine) is sgld else "-")
            for chains in (1, 8):
                unit = chains * energy.size * 4 / 2**20
                state = engine.start(0.05 * torch.randn(chains, energy.size))
                held = len(state) - 3 * getattr(engine, "adaptive", False)  # what adapts is dropped after the warm-up

                def step() -> None:
                    _, gradient = energy(state["position"], batch)  # noqa: B023
                    engine.step(state, gradient, Now(LR, N, 1.0, False, True))  # noqa: B023

                energy._graphs.clear()
                captured = peak(step) + held * unit
                found = peak(step) + held * unit
                hand = float("nan")
                if chains == 1:
                    hand = peak(lambda: by_hand(kind.strip("-"), network, x, y, size, 3))  # noqa: B023
                values = [3 * unit, found, found / unit / 3, hand, captured]
                print(f"{name:>15} {kind:>6} {chains:>6} " + " ".join(f"{v:>8.2f}" for v in values), flush=True)


def bias() -> None:
    print("variance of draws from N(0, 1), whose energy has curvature 1; sghmc with friction 0.05, not adaptive")
    print(f"{'lr':>8} {'sgld':>7} {'1/(1-lr/2)':>11} {'sghmc':>7}")

    def target() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    shared = {"chains": 20_000, "draws": 4, "init": "prior"}
    for lr in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0):
        warmup = int(6 / lr) + 100
        found = []
        for engine in (
            sgld(lr=lr, warmup=warmup, thinning=int(2 / lr) + 1, **shared),
            sghmc(lr=lr, adaptive=False, warmup=warmup + 200, thinning=100, **shared),
        ):
            draws = fit(target, None, method=engine, seed=0, progress=False).draws
            assert draws is not None
            found.append(float(draws["z"].var()))
        print(f"{lr:>8} {found[0]:>7.3f} {1 / (1 - lr / 2):>11.3f} {found[1]:>7.3f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "memory", "bias"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--count", type=int, default=300, help="steps a run")
    options = parser.parse_args()
    if options.what == "steps":
        steps(options.repeats, options.count)
    else:
        {"memory": memory, "bias": bias}[options.what]()
