"""The table and the pictures of the tutorial at full size.

``python tutorials/bayesian_autoencoder/full.py mnist --seeds 4 --workers 2 --out tutorials/bayesian_autoencoder`` runs
the comparison of ``pyro_ae.papers.bayesian_autoencoder`` for each seed and method, and writes its table
(``mnist.csv``), a summary (``mnist.md``, the table in README.md) and pictures (``mnist_*.png``). What is there of an
earlier, interrupted call is not run again.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import torch
from pyro.infer import Predictive
from pyro.poutine import uncondition

from pyro_ae.diagnostics import plots
from pyro_ae.latent_densities import flow, gaussian, mixture, nearest
from pyro_ae.papers import bayesian_autoencoder as paper
from pyro_ae.runtime import seeded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scale", choices=paper.SCALES)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=Path("."))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    matplotlib.use("Agg")
    began = time.perf_counter()
    methods = paper.SCALES[given.scale].methods
    jobs = [(given.scale, seed, method, given.out) for seed in range(given.seeds) for method in methods]
    with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
        table = pd.concat(pool.map(run, *zip(*jobs, strict=True)))
    order = {method: i for i, method in enumerate(methods)}
    table = table.sort_values(["seed", "size", "method"], key=lambda c: c.map(order) if c.name == "method" else c)
    table.round(4).to_csv(given.out / f"{given.scale}.csv", index=False)
    for data in paper.SCALES[given.scale].data:
        (given.out / f"{data}.md").write_text(summary(table[table["data"] == data]), encoding="utf-8")
        if table[table["data"] == data]["size"].nunique() > 1:
            _save(against_size(table[table["data"] == data]), given.out / f"{data}_size.png")
        pictures(given.scale, data, given.out)
    print(f"{time.perf_counter() - began:.0f} s")


def run(scale: str, seed: int, method: str, out: Path) -> pd.DataFrame:
    """One method's rows of one seed's table, from a file if it was run before."""
    torch.set_num_threads(1)
    file = out / f"{scale}_{seed}_{re.sub('[^a-z0-9]+', '_', method.lower())}.csv"
    if not file.exists():
        paper.run(scale, seed, progress=True, methods=[method]).to_csv(file, index=False)
    return pd.read_csv(file).assign(seed=seed)


def summary(table: pd.DataFrame) -> str:
    """Mean and standard error over seeds, and the seconds of the quickest, as a table in Markdown."""
    columns = {
        "ll": ("log-likelihood of the mean image", 0),
        "ll_mixture": ("of the mixture of draws", 0),
        "error": ("squared error", 1),
        "frechet": ("Frechet distance", 1),
    }
    names = ["images", "method", *(name for name, _ in columns.values()), "seconds"]
    lines = ["| " + " | ".join(names) + " |", "|---:|---|" + "---:|" * (len(columns) + 1)]
    for (size, method), part in table.groupby(["size", "method"], sort=False):
        cells = [f"{part[c].mean():.{d}f} ± {part[c].sem():.{d}f}" for c, (_, d) in columns.items()]
        lines.append("| " + " | ".join([str(size), method, *cells, f"{part['seconds'].min():.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def against_size(table: pd.DataFrame) -> plt.Figure:
    """Log-likelihood for each number of training images, with standard errors over seeds."""
    sizes, methods = sorted(table["size"].unique()), list(dict.fromkeys(table["method"]))
    figure, panels = plt.subplots(1, len(sizes), figsize=(10, 4), sharey=True, layout="constrained")
    for axes, size in zip(panels, sizes, strict=True):
        by = table[table["size"] == size].groupby("method")["ll"]
        for place, method in enumerate(methods):
            colour = "#0072b2" if method.startswith("BAE") else "#555555"
            form = "D" if method == paper.TUNED else "s" if method == paper.WIDE else "o"
            mean, error = by.mean()[method], by.sem()[method]
            axes.errorbar(mean, place, xerr=error, fmt=form, color=colour, capsize=3)
        axes.set_title(f"{size} images to learn")
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].invert_yaxis()
    figure.supxlabel("log-likelihood of the mean image [nats per test image]")
    return figure


def pictures(scale: str, data: str, out: Path) -> None:
    """Images of the prior before and after, reconstructions with their uncertainty, and new images by density."""
    settings = paper.SCALES[scale]
    part = paper.split(data, settings, 0)
    x = part.train[: min(200, len(part.train))]
    with seeded(0):
        start = paper.pretrained(settings, data, part.tuning, True)
        untuned, tuned = (
            paper.tune(about, start, part.tuning, -6.0, True)
            for about in (replace(settings.matching, steps=0), settings.matching)
        )
        some = part.tuning[:5]
        drawn = [
            Predictive(uncondition(m), num_samples=4, return_sites=["decoded"])(some)["decoded"]
            .flatten(0, 1)
            .squeeze(1)
            for m in (paper.autoencoder(settings.networks(data)), untuned, tuned)
        ]
        names = ["tuned on", "N(0, 1)", "before", "after"]
        _save(plots.images(part.tuning[:20], *drawn, names=names, columns=20).figure, out / f"{data}_prior.png")
        posterior = paper.fitted(settings, data, paper.TUNED, start, {paper.TUNED: tuned}, x, True)
        _save(plots.uncertainty(posterior, part.test, n=10)[0].figure, out / f"{data}_uncertainty.png")
        densities = {
            "normal": gaussian(),
            "mixture": mixture(10),
            "Dirichlet process": mixture(20, dirichlet_process=True, steps=2000),
            "neighbours": nearest(),
            "flow": flow(),
        }
        made = [posterior.generate(20, density=d, mean=True, sites=["decoded"]) for d in densities.values()]
        _save(
            plots.images(part.test[:20], *made, names=["test", *densities], columns=20).figure,
            out / f"{data}_densities.png",
        )


def _save(figure: plt.Figure, file: Path) -> None:
    figure.savefig(file, dpi=110, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
