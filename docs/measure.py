"""What the gallery shows, measured anew: minutes to an hour. The site itself is built from the files that this writes.

python docs/measure.py papers [NAME ...]     docs/measured/NAME.csv of each paper, at its small scale, seed 0
python docs/measure.py guides                docs/measured/guides.csv, a picture of each guide, and the README's
python docs/measure.py models                a picture of what each model generates
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from pyro_ae import Posterior, datasets, elbo, fit, importance, iwae, log_weights, svi
from pyro_ae.diagnostics import plots
from pyro_ae.diagnostics.importance import pareto_k
from pyro_ae.diagnostics.plots.style import BLUE, INK
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.bottom_up import BottomUp
from pyro_ae.guides.full_rank import FullRank
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.models.deep_vae import DeepVAE
from pyro_ae.models.ppca import PPCA
from pyro_ae.models.vae import VAE
from pyro_ae.nn import MLP
from pyro_ae.reproduce import names, reproduce

MEASURED = Path(__file__).parent / "measured"
PICTURES = Path(__file__).parent / "_static"

# Guides that the benchmark compares, to the class whose card shows them.
SHOWN = {
    "mean-field": "MeanField",
    "full-rank": "FullRank",
    "low-rank": "LowRank",
    "mixture of 4": "Mixture",
    "planar": "Planar",
    "radial": "Radial",
    "Sylvester": "Sylvester",
    "NSF": "Flow",
    "mean-field, 10 steps": "SemiAmortized",
    "mean-field, 20 resampled": "ImportanceWeighted",
}


def papers(chosen: list[str]) -> None:
    for name in chosen or names():
        report = reproduce(name)
        report.table.to_csv(MEASURED / f"{name}.csv", index=False)
        print(f"{name}: {report.seconds:.0f} s{', fails: ' + str(report.failed) if report.failed else ''}", flush=True)


def benchmark() -> Any:
    """The benchmark of guides, for its posteriors and its settings."""
    path = Path(__file__).parents[1] / "tests" / "benchmarks" / "guides.py"
    spec = importlib.util.spec_from_file_location("guides_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def guides(steps: int = 1500) -> None:
    """Fit each guide to a posterior of two crescents, whose density is known, and draw it for one row."""
    bench = benchmark()
    model, x, evidence = bench.posteriors(0)["moons"]
    row = int((x[:, 1] - 1.2).abs().argmin())  # |z1| seen as about 1.2: two crescents well apart
    table: list[dict[str, Any]] = []
    draws: dict[str, Tensor] = {}
    for kind, make in bench.guides(model, x.shape[1]).items():
        if kind not in SHOWN:
            continue
        torch.manual_seed(0)
        loss = importance(elbo, 8)
        method = svi(loss=loss, lr=3e-3, schedule="cosine", steps=steps)
        posterior = fit(model, x, guide=make(), method=method, seed=0, progress=False, check=False)
        draws[kind] = drawn(posterior, x[row : row + 1])
        with torch.no_grad():
            weights, _ = log_weights(model, posterior.guide, x, particles=1000)
        k = pareto_k(weights)
        gap, poor = float((evidence - weights.mean(0)).mean()), float((k > 0.7).float().mean())
        table.append({"guide": SHOWN[kind], "as": kind, "gap": gap, "k-hat over 0.7": poor})
        print(table[-1], flush=True)
        figure = Figure(figsize=(3, 3), layout="constrained", facecolor="white")
        panel(figure.subplots(), x[row], draws[kind], f"{gap:.2f} nats short")
        figure.savefig(PICTURES / f"{SHOWN[kind]}.png", dpi=90)
    pd.DataFrame(table).to_csv(MEASURED / "guides.csv", index=False)
    figure = Figure(figsize=(6, 7), layout="constrained", facecolor="white")  # two by two, to be read on a phone
    chosen = ["mean-field", "full-rank", "NSF", "mean-field, 20 resampled"]
    titles = ["mean-field", "full-rank", "spline flow", "mean-field, resampled"]
    by_kind = {line["as"]: line for line in table}
    for axes, kind, title in zip(figure.subplots(2, 2).flat, chosen, titles, strict=True):
        line = by_kind[kind]
        text = f"{title}\n{line['gap']:.1f} nats short\nk-hat poor: {line['k-hat over 0.7']:.0%} of rows"
        panel(axes, x[row], draws[kind], text)
    figure.savefig(PICTURES / "guides.png", dpi=130, bbox_inches="tight")


def models() -> None:
    """Digits of 8 x 8 pixels that each model generates."""
    grey = datasets.load("digits").train["x"].flatten(1)
    binary = (grey > 0.5).float()
    torch.manual_seed(0)
    head = MeanField
    fitted = {
        "PPCA": (PPCA(64, 16, noise=0.2), Amortized(MLP(64, [100]), FullRank(100, 16)), grey),
        "VAE": (VAE(MLP(16, [200], 64), latent=16), Amortized(MLP(64, [200]), head(200, 16)), binary),
        "DeepVAE": (
            DeepVAE(MLP(16, [200], 64), nn.Sequential(MLP(8, [100]), head(100, 16)), latent=8),
            BottomUp((MLP(64, [200]), head(200, 16)), (MLP(16, [100]), head(100, 8))),
            binary,
        ),
    }
    for name, (model, guide, x) in fitted.items():
        method = svi(loss=importance(iwae, 8), lr=2e-3, epochs=60)
        posterior = fit(model, x, guide=guide, method=method, batch_size=128, seed=0, progress=False, check=False)
        made = posterior.generate(30, mean=True).unflatten(1, (8, 8)).clamp(0, 1)
        plots.images(made, columns=10).figure.savefig(PICTURES / f"{name}.png", dpi=90)
        print(name, flush=True)


def drawn(posterior: Posterior, x: Tensor, number: int = 400) -> Tensor:
    return posterior.sample(number, x)["z"][:, 0]


def panel(axes: Axes, x: Tensor, z: Tensor, title: str) -> None:
    """Draws over the posterior of a row."""
    grid = np.linspace(-3, 3, 200)
    a, b = np.meshgrid(grid, grid)
    distance, side = float(x[0]), float(x[1])
    log_p = -((np.hypot(a, b) - distance) ** 2) / (2 * 0.15**2) - (abs(a) - side) ** 2 / (2 * 0.4**2)
    log_p -= (a**2 + b**2) / 2
    axes.contourf(a, b, np.exp(log_p - log_p.max()), levels=[0.02, 0.1, 0.3, 0.6, 1.0], cmap="Oranges", alpha=0.8)
    axes.plot(*z.T, ".", color=BLUE, markersize=3, alpha=0.5)
    axes.set_title(title, fontsize=11, color=INK)
    axes.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["papers", "guides", "models"])
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    if options.what == "papers":
        papers(options.names)
    elif options.what == "guides":
        guides()
    else:
        models()


if __name__ == "__main__":
    main()
