"""What the diagnostics cost: k-hat of many rows, calibration by simulation, the report, annealed importance sampling.

Run from the top of the repository: ``python tests/benchmarks/diagnostics.py``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import arviz
import torch

from pyro_ae import PosteriorWarning, datasets, fit, importance, iwae, svi
from pyro_ae.diagnostics.evidence import annealed_importance_sampling
from pyro_ae.diagnostics.importance import pareto_k
from pyro_ae.diagnostics.latents import latent_summary
from pyro_ae.diagnostics.simulation import simulation_based_calibration
from pyro_ae.quickstart import LEVELS, build


def timed(run: Callable[[], Any], repeats: int) -> tuple[float, float, float]:
    """Median, least and most seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return median(seconds), min(seconds), max(seconds)


def show(what: str, seconds: tuple[float, float, float], bar: str = "") -> None:
    print(f"| {what} | {seconds[0]:.2f} | {seconds[1]:.2f} to {seconds[2]:.2f} | {bar} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    warnings.simplefilter("ignore", PosteriorWarning)
    torch.manual_seed(0)
    print("| what | seconds, median | range | bar |\n|---|---:|---:|---:|")
    log_w = 1.5 * torch.randn(1000, 10_000)
    show("k-hat of 10,000 rows, 1000 draws each", timed(lambda: pareto_k(log_w), options.repeats), "10")
    thousand = log_w[:, :1000].double().T.numpy()
    show("ArviZ's psislw on a tenth of them", timed(lambda: arviz.psislw(thousand), 1))
    x = datasets.load("digits").train["x"] * LEVELS
    model, guide = build()
    method = svi(loss=importance(iwae, 4), lr=1e-2, epochs=options.epochs)
    posterior = fit(model, x, guide=guide, method=method, batch_size=128, seed=0, progress=False)
    calibrate = lambda: simulation_based_calibration(posterior, replications=200, draws=1000)
    show("SBC, 200 replications of 1000 draws", timed(calibrate, options.repeats), "30")
    show("`report()`, 200 rows of 1000 draws", timed(posterior.report, options.repeats))
    show("`latent_summary`, 1000 rows", timed(lambda: latent_summary(posterior), options.repeats))
    anneal = lambda: annealed_importance_sampling(posterior, rows=50, chains=16, temperatures=200)
    show("AIS, 50 rows, 16 chains, 200 temperatures", timed(anneal, 1))


if __name__ == "__main__":
    main()
