"""What notebooks show: small tables and a verdict, in HTML that takes a notebook's colours, dark or light."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .posterior import Posterior

STYLE = """
.pyro-ae { max-width: 48rem; font-size: 0.95em; line-height: 1.45; color: inherit; }
.pyro-ae table { border-collapse: collapse; margin: 0.5em 0; font-size: inherit; }
.pyro-ae tr { background: transparent; }
.pyro-ae th, .pyro-ae td { text-align: left; vertical-align: top; padding: 0.15em 1.2em 0.15em 0; color: inherit;
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums; border: 0; }
.pyro-ae th { font-weight: normal; opacity: 0.75; white-space: nowrap; }
.pyro-ae ul { margin: 0.5em 0; padding-left: 1.3em; }
.pyro-ae svg { display: block; max-width: 100%; margin: 0.2em 0 0.6em; }
.pyro-ae .badge { padding: 0.1em 0.6em; border-radius: 0.8em; color: #000000; background: #cccccc; }
.pyro-ae .good { background: #56b4e9; }
.pyro-ae .usable { background: #f0e442; }
.pyro-ae .poor { background: #d55e00; }
"""
"""Colours of text are the notebook's; those of verdicts are told apart by the colour-blind (Okabe and Ito, 2008)."""

SIGNS = {"good": "&#10003;", "usable": "~", "poor": "&#10007;"}


def card(*parts: str) -> str:
    """HTML to show in a notebook, with its style.

    Arguments:
        parts: HTML.
    """
    return f'<div class="pyro-ae"><style>{STYLE}</style>' + "\n".join(parts) + "</div>"


def badge(word: str) -> str:
    """A verdict, as a sign, a word and a colour.

    Arguments:
        word: ``good``, ``usable`` or ``poor``.
    """
    return f'<span class="badge {escape(word)}">{SIGNS.get(word, "")} <b>{escape(word)}</b></span>'


def table(rows: Mapping[str, Any], curves: Mapping[str, str] | None = None) -> str:
    """Names and values, one pair a line, but for those that are empty.

    Arguments:
        rows: name to value, both as plain text.
        curves: name to HTML.
    """
    shown = {n: escape(str(v)) for n, v in rows.items()} | dict(curves or {})
    cells = (f'<tr><th scope="row">{escape(n)}</th><td>{v}</td></tr>' for n, v in shown.items() if v)
    return f"<table>{''.join(cells)}</table>"


def listing(items: Iterable[str]) -> str:
    """A list of plain texts.

    Arguments:
        items: the texts.
    """
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def curve(values: Sequence[float], label: str, *, width: int = 320, height: int = 60) -> str:
    """A line through values, and where it begins and ends; nothing where there is no line to draw.

    Arguments:
        values: at even distances; those that are not finite are left out.
        label: what they are, as plain text.
        width: in pixels.
        height: in pixels.

    Example:
        >>> curve([1.0], "loss")
        ''
    """
    finite = [(i, v) for i, v in enumerate(values) if math.isfinite(v)]
    if len(finite) < 2:
        return ""
    low, high = min(v for _, v in finite), max(v for _, v in finite)
    across, up = (width - 4) / (len(values) - 1), (height - 4) / ((high - low) or 1.0)
    points = " ".join(f"{2 + across * i:.1f},{2 + up * (high - v):.1f}" for i, v in finite)
    ends = f"{finite[0][1]:.4g} to {finite[-1][1]:.4g}"
    return (
        f'{ends}<svg role="img" aria-label="{escape(label)}: {ends}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">'
        f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/></svg>'
    )


def of_posterior(posterior: Posterior) -> str:
    """What was fitted, to what, how, and the course of the loss.

    Arguments:
        posterior: of any engine.
    """
    from .describe import describe

    heading, *lines = describe(posterior).split("\n  ")
    name, _, method = heading.partition(" by ")
    named = [line for line in lines if line.startswith(("data: ", "latents: "))]
    others = [line for line in lines if line not in named]
    size = sum(p.numel() for p in posterior.program.parameters.named().values())
    rows = {"method": method, **dict(line.split(": ", 1) for line in named)}
    rows |= {"parameters": f"{size:,}" if size else "", "fit": "; ".join(others)}
    curves = {n: curve(posterior.history.get(n, ()), n) for n in ("loss", "validation")}
    return card(f"<b>{escape(name)}</b>", table(rows, curves))
