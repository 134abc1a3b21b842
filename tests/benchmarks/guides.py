"""What each family of guides buys on posteriors that are known, and what it costs.

python tests/benchmarks/guides.py               a table for each posterior, over several seeds
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from truth import banana, moons, on_a_grid, ppca

from pyro_ae import elbo, fit, importance, log_weights, svi
from pyro_ae.diagnostics.importance import pareto_k
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.flow import Flow
from pyro_ae.guides.full_rank import FullRank
from pyro_ae.guides.importance_weighted import ImportanceWeighted
from pyro_ae.guides.low_rank import LowRank
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.guides.mixture import Mixture
from pyro_ae.guides.planar import Planar
from pyro_ae.guides.radial import Radial
from pyro_ae.guides.semi_amortized import SemiAmortized
from pyro_ae.guides.structured import Structured
from pyro_ae.guides.sylvester import Sylvester
from pyro_ae.nn import MLP

HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "mean-field": MeanField,
    "full-rank": FullRank,
    "low-rank": partial(LowRank, rank=1),
    "mixture of 4": partial(Mixture, components=4),
    "planar": partial(Planar, layers=8),
    "radial": partial(Radial, layers=8),
    "Sylvester": partial(Sylvester, layers=8),
    "NSF": partial(Flow, flow="NSF", transforms=2, hidden_features=(64, 64)),
    "MAF (IAF)": partial(Flow, flow="MAF", transforms=4, hidden_features=(64, 64)),
    "NAF": partial(Flow, flow="NAF", transforms=2, hidden_features=(64, 64)),
}


def posteriors(seed: int) -> dict[str, tuple[Any, Tensor, Tensor]]:
    """Model, rows and the rows' evidence."""
    torch.manual_seed(seed)
    linear, x = ppca(rows=200)
    found: dict[str, tuple[Any, Tensor, Tensor]] = {"PPCA": (linear, x, linear.marginal().log_prob(x))}
    for name, model in {"banana": banana, "moons": moons}.items():
        with torch.no_grad():
            x = model(size=200)
        found[name] = (model, x, on_a_grid(model, x))
    return found


def guides(model: Any, width: int) -> dict[str, Callable[[], nn.Module]]:
    def amortized(head: Callable[[int, int], nn.Module]) -> Amortized:
        return Amortized(MLP(width, [64, 64]), head(64, 2))

    return {name: partial(amortized, head) for name, head in HEADS.items()} | {
        "mean-field, 10 steps": lambda: SemiAmortized(model, amortized(MeanField), steps=10, lr=0.05, particles=4),
        "mean-field, 20 resampled": lambda: ImportanceWeighted(model, amortized(MeanField), 20),
        "structured": lambda: Structured(model, MLP(width, [64, 64]), FullRank(64, 2)),
    }


def measure(model: Any, guide: nn.Module, x: Tensor, evidence: Tensor, steps: int, seed: int) -> list[float]:
    """Gap of the ELBO, error of IWAE with 1000 particles, median k-hat, share of rows above 0.7, ms a step."""
    method = svi(loss=importance(elbo, 8), lr=3e-3, schedule="cosine", steps=steps)
    start = time.perf_counter()
    posterior = fit(model, x, guide=guide, method=method, seed=seed, progress=False)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        log_w, _ = log_weights(model, posterior.guide, x, particles=1000)
        k = pareto_k(log_w)
        iwae = log_w.logsumexp(0) - torch.tensor(1000.0).log()
        gap = (evidence - log_w.mean(0)).mean()
    return [
        float(gap),
        float((evidence - iwae).abs().mean()),
        float(k.median()),
        float((k > 0.7).float().mean()),
        1e3 * seconds / steps,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="a posterior: PPCA, banana or moons")
    options = parser.parse_args()
    rows: dict[tuple[str, str], list[list[float]]] = {}
    for seed in range(options.seeds):
        for name, (model, x, evidence) in posteriors(seed).items():
            if options.only in (None, name):
                for kind, make in guides(model, x.shape[1]).items():
                    torch.manual_seed(seed)
                    found = measure(model, make(), x, evidence, options.steps, seed)
                    rows.setdefault((name, kind), []).append(found)
                    print(seed, name, kind, [round(v, 4) for v in found], file=sys.stderr, flush=True)
    print("| posterior | guide | log p - ELBO | abs(log p - IWAE) | median k-hat | k-hat > 0.7 | ms a step | ratio |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for (name, kind), found in rows.items():
        gap, error, k, bad, _ = (statistics.mean(column) for column in zip(*found, strict=True))
        spread = max(f[0] for f in found) - min(f[0] for f in found)
        ratios = [f[4] / base[4] for f, base in zip(found, rows[name, "mean-field"], strict=True)]
        time_ = f"{statistics.median(f[4] for f in found):.1f} | {statistics.median(ratios):.1f}"
        print(f"| {name} | {kind} | {gap:.3f} ({spread:.3f}) | {error:.3f} | {k:.2f} | {bad:.0%} | {time_} |")


if __name__ == "__main__":
    main()
