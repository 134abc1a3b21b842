"""A page of results in one HTML file: figures, tables and code, with nothing to be fetched from anywhere."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import numpy as np

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --back: #ffffff; --card: #f3f5f7; --line: #d5dae0;
  --link: #0a5fb4; --good: #00694a; --usable: #8a5a00; --poor: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a3acb6; --back: #15181c; --card: #21262c;
  --line: #3a424b; --link: #79b8ff; --good: #4fd1a5; --usable: #f0b95b; --poor: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 44rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.5rem; }
p, ul, ol, table, pre, figure { margin: 0.75rem 0; }
a { color: var(--link); overflow-wrap: anywhere; }
li { overflow-wrap: anywhere; }
pre, .verdict, table { background: var(--card); border-radius: 8px; }
pre { padding: 0.8rem 1rem; overflow-x: auto; font: 0.85rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
code { font: 0.9em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
pre code { font: inherit; overflow-wrap: normal; }
pre.wrapped { white-space: pre-wrap; }
pre.wrapped code { overflow-wrap: anywhere; }
figure { padding: 0.75rem; background: #ffffff; border: 1px solid var(--line); border-radius: 8px; text-align: center; }
figure img { max-width: 100%; height: auto; }
figcaption { color: #444c56; font-size: 0.92rem; text-align: left; margin-top: 0.4rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 0.4rem 0.8rem; vertical-align: top; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
th { font-weight: 500; color: var(--soft); width: 100%; }
tr + tr > * { border-top: 1px solid var(--line); }
@media (max-width: 30rem) { figure { padding: 0.3rem; } figcaption { padding: 0 0.3rem; } }
.verdict { padding: 0.8rem 1rem; border-left: 6px solid var(--soft); }
.verdict strong { font-size: 1.15rem; }
.verdict ul { margin: 0.4rem 0 0; padding-left: 1.2rem; }
.good { border-color: var(--good); } .good strong { color: var(--good); }
.usable { border-color: var(--usable); } .usable strong { color: var(--usable); }
.poor { border-color: var(--poor); } .poor strong { color: var(--poor); }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page.

    Arguments:
        title: as plain text; it heads the page too.
        parts: HTML that the other functions of this file make.

    Example:
        >>> page("A fit", [section("Loss", paragraph("0 < 1"))]).count("0 &lt; 1")
        1
    """
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{body}
</main>
</body>
</html>
"""


def section(heading: str, *parts: str) -> str:
    """A heading and what stands under it.

    Arguments:
        heading: as plain text.
        parts: HTML.
    """
    return "\n".join([f"<h2>{escape(heading)}</h2>", *parts])


def paragraph(text: str) -> str:
    """A paragraph of plain text, in which \\`code\\` between backquotes is set as such.

    Arguments:
        text: as plain text.
    """
    return f"<p>{_inline(text)}</p>"


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def code(text: str, *, wrap: bool = False) -> str:
    """A block of code or of other text whose lines are to stay as they are.

    Arguments:
        text: as plain text.
        wrap: whether long lines go on below, rather than being scrolled to.
    """
    kind = ' class="wrapped"' if wrap else ""
    return f"<pre{kind}><code>{escape(text)}</code></pre>"


def table(rows: Mapping[str, Any]) -> str:
    """Names and values, one pair a line.

    Arguments:
        rows: name to value, both shown as plain text.
    """
    lines = (f'<tr><th scope="row">{_inline(n)}</th><td>{escape(str(v))}</td></tr>' for n, v in rows.items())
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def listing(items: Iterable[str]) -> str:
    """A list of plain texts, in which `code` is set as such and addresses are links.

    Arguments:
        items: the texts.
    """
    link = r'<a href="\g<0>">\g<0></a>'
    lines = (f"<li>{re.sub(r'https?://[^ <]+', link, _inline(item))}</li>" for item in items)
    return "<ul>\n" + "\n".join(lines) + "\n</ul>"


def verdict(word: str, reasons: Iterable[str], *, on: str = "Verdict") -> str:
    """A judgement and its reasons, with a colour for ``good``, ``usable`` and ``poor``.

    Arguments:
        word: the judgement.
        reasons: as plain texts.
        on: what is judged.
    """
    kind = word if word in ("good", "usable", "poor") else "other"
    return f'<div class="verdict {kind}"><strong>{escape(on)}: {escape(word)}</strong>\n{listing(reasons)}\n</div>'


def picture(drawn: Any, caption: str, *, alt: str = "") -> str:
    """A figure as an image inside the page; it is closed then.

    Arguments:
        drawn: axes of Matplotlib, an array of them, or their figure.
        caption: under it, as plain text.
        alt: for who cannot see it; the caption by default.
    """
    from matplotlib import pyplot

    first = next(iter(np.ravel(drawn)))
    figure = getattr(first, "figure", first)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)  # twice what a screen shows, for sharp text
    pyplot.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    size = round(figure.get_figwidth() * 96)
    return (
        f'<figure><img src="data:image/png;base64,{data}" width="{size}" alt="{escape(alt or caption)}">\n'
        f"<figcaption>{_inline(caption)}</figcaption></figure>"
    )
