"""The picture of a table: a line for each row, a panel for each of its first measures."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from pyro_ae.diagnostics.plots.style import CLASSES, GREY, INK

MARKERS = "osD^vPX*"


def draw(table: pd.DataFrame, path: Path, most: int = 3) -> str:
    """Draw the first measures of a table, and say in words what is to be seen.

    Arguments:
        table: a row for each method and setting, named by the fewest of its first columns that tell rows apart.
        path: of the picture.
        most: panels at most.

    Returns:
        Text that can stand in place of the picture.
    """
    keys = naming(table)
    numeric = table.drop(columns=keys).select_dtypes("number")
    measures = [c for c in numeric if numeric[c].notna().sum() > 1 and numeric[c].nunique() > 1][:most]
    names = [", ".join(word(v) for v in row) for row in table[keys].astype(object).itertuples(index=False)]
    # One colour and marker for each value of the column that says the method, the first of text.
    kind = next((k for k in keys if table[k].dtype == object or table[k].dtype.name.startswith("str")), keys[0])
    kinds = list(dict.fromkeys(table[kind].astype(str)))
    figure = Figure(figsize=(1.9 + 2.2 * len(measures), 1.0 + 0.27 * len(table)), layout="constrained")
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        for y, (value, of) in enumerate(zip(table[measure], table[kind].astype(str), strict=True)):
            i = kinds.index(of)
            if not pd.isna(value):
                axes.plot(value, y, MARKERS[i % len(MARKERS)], color=CLASSES[i % len(CLASSES)], markersize=7)
        axes.set_yticks(range(len(names)), names, fontsize=10)
        axes.invert_yaxis() if axes is panels[0] else None
        axes.grid(axis="y", color=GREY, linewidth=0.5)
        axes.set_title(measure, fontsize=11, color=INK)
        axes.tick_params(axis="x", labelsize=9)
        axes.locator_params(axis="x", nbins=4)
        axes.margins(x=0.12)
        axes.spines[["top", "right", "left"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, facecolor="white")
    return f"{', '.join(measures)} of " + "; ".join(dict.fromkeys(names))


def naming(table: pd.DataFrame) -> list[str]:
    """The fewest of the first columns that tell the rows apart."""
    for n in range(1, len(table.columns)):
        keys = list(table.columns[:n])
        if not table.duplicated(keys).any():
            return keys
    return list(table.columns[:1])


def word(value: object) -> str:
    if pd.isna(value):  # type: ignore[call-overload]
        return "-"
    return f"{value:g}" if isinstance(value, float) and not math.isnan(value) else str(value)
