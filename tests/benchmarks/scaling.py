"""What a step costs against the rows of the data, the particles and the batch, beside the loop by hand.

python tests/benchmarks/scaling.py                  a table, in five minutes on two cores
python tests/benchmarks/scaling.py --out FOLDER     draws FOLDER/scaling.png as well

Rows are in a file that is mapped into memory. ``fit`` replays its steps, and its set-up is left out.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from statistics import linear_regression, median
from typing import Any, NamedTuple

import numpy as np
import torch
from handwritten import PIXELS, Networks, mlp, normal, perceptrons
from table import by_fit, by_hand, same
from torch import nn
from watch import machine

from pyro_ae.diagnostics.plots.style import BLUE, INK, dress, grid, legend

ROWS = [10**4, 10**5, 10**6, 10**7]
PARTICLES = [1, 4, 16, 64, 256]
BATCHES = [20, 128, 512, 2048, 8192]
COLUMNS = 16
LARGE = 3
"""Points of which the slope is fitted, the largest."""

CHECKED = 1200
"""Steps of ``fit`` after which all is recorded and checked, however many rows there are."""


class Panel(NamedTuple):
    """One axis: milliseconds a step at each size, of each repeat."""

    name: str
    sizes: list[int]
    hand: list[list[float]]
    ours: list[list[float]]

    def slopes(self) -> tuple[float, float]:
        """Of the logarithm of the time in that of the size, at the large end: by hand, and ours."""
        x = [math.log(size) for size in self.sizes[-LARGE:]]
        by_hand, ours = ([math.log(median(t)) for t in times[-LARGE:]] for times in (self.hand, self.ours))
        return linear_regression(x, by_hand).slope, linear_regression(x, ours).slope

    def lines(self) -> Iterator[str]:
        for size, hand, ours in zip(self.sizes, self.hand, self.ours, strict=True):
            ratios = [mine / theirs for mine, theirs in zip(ours, hand, strict=True)]
            ratio = f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            yield f"| {self.name} | {size:,} | {median(hand):.2f} | {median(ours):.2f} | {ratio} |"


def timed(
    start: Networks, given: tuple[Any, Any], batch: int, particles: int, steps: int, set_up: int, repeats: int
) -> tuple[list[float], list[float]]:
    """Milliseconds a step by hand and ours, in turn, on the data as it is given to each."""
    theirs, mine = given
    pairs = []
    for _ in range(repeats):
        hand = by_hand(start, theirs, batch, particles, steps)
        ours = by_fit("replay", start, mine, batch, particles, steps, set_up)
        pairs.append((hand.milliseconds, ours.milliseconds))
    hands, all_ours = zip(*pairs, strict=True)
    return list(hands), list(all_ours)


def against_rows(repeats: int) -> Panel:
    """A small network, 16-32-4, on rows of a file, at a batch of 128."""
    encoder = nn.Sequential(*mlp(COLUMNS, 32), nn.Linear(32, 2 * 4))
    start = Networks([encoder], nn.Sequential(*mlp(4, 32), nn.Linear(32, COLUMNS)), likelihood=normal)
    same(start, torch.randn(128, COLUMNS), 1)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        for size in ROWS:
            file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(size, COLUMNS))
            rng = np.random.default_rng(0)
            for part in np.array_split(file, math.ceil(size / 10**6)):
                rng.standard_normal(out=part, dtype=np.float32)
            file.flush()
            given = torch.from_numpy(np.load(path, mmap_mode="c")), np.load(path, mmap_mode="r")
            found.append(timed(start, given, 128, 1, 500, CHECKED, repeats))
            del file, given
    return Panel("rows N", ROWS, *map(list, zip(*found, strict=True)))


def against(name: str, sizes: list[int], repeats: int) -> Panel:
    """The networks of ``table.py``, at a batch of 20 where K varies, and one particle where the batch does."""
    start, found = perceptrons(), []
    same(start, torch.empty(20, PIXELS).bernoulli_(0.2), sizes[0])
    for size in sizes:
        batch, particles = (20, size) if name == "particles K" else (size, 1)
        steps = min(80, max(10, 4000 // size))
        a_pass = steps + 15  # recorded and checked at the beginning of the second, and timed to its end
        x = torch.empty(a_pass * batch, PIXELS).bernoulli_(0.2)
        found.append(timed(start, (x, x), batch, particles, steps, a_pass + 15, repeats))
    return Panel(name, sizes, *map(list, zip(*found, strict=True)))


def draw(panels: list[Panel], path: Path) -> None:
    labels = ["rows N of the data, on disk", "particles K of a row, batch of 20", "rows of a batch, K = 1"]
    axes = grid(len(panels), 1, 2.7 * len(panels))[:, 0]
    for part, panel, label in zip(axes, panels, labels, strict=True):
        for times, color, style, name in ((panel.hand, INK, "--", "by hand"), (panel.ours, BLUE, "-", "fit")):
            part.fill_between(panel.sizes, [*map(min, times)], [*map(max, times)], color=color, alpha=0.2, linewidth=0)
            part.plot(panel.sizes, [*map(median, times)], style, color=color, marker="o", markersize=4, label=name)
        every = [t for point in panel.hand + panel.ours for t in point]
        flat = max(every) < 10 * min(every)  # a logarithm would show noise
        part.set(xscale="log", **({"ylim": (0, 1.5 * max(every))} if flat else {"yscale": "log"}))
        dress(part, x=label, y="ms a step")
    legend(axes[0])
    axes[0].figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for scaling.png")
    options = parser.parse_args()
    print(f"{machine(torch.device('cpu'))}, {date.today()}, {options.repeats} repeats.\n")
    print("| against | size | by hand, ms | fit, ms | ratio |\n|---|---:|---:|---:|---:|")
    panels: list[Panel] = []
    for make in (against_rows, lambda n: against("particles K", PARTICLES, n), lambda n: against("batch", BATCHES, n)):
        torch.manual_seed(0)
        panels.append(make(options.repeats))
        print("\n".join(panels[-1].lines()), flush=True)
    print(f"\nSlope of the logarithm of the time in that of the size, over the {LARGE} largest sizes:\n")
    for panel in panels:
        by_hand, ours = panel.slopes()
        print(f"- {panel.name}: by hand {by_hand:.2f}, fit {ours:.2f}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        draw(panels, options.out / "scaling.png")


if __name__ == "__main__":
    main()
