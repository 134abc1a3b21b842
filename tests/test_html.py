"""What notebooks show of a posterior and of its report: complete, escaped, and readable on any background."""

import math
import re
from html.parser import HTMLParser

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ae import Posterior, fit, sgld, svi
from pyro_ae.diagnostics.report import Report
from pyro_ae.html import STYLE, badge, card, curve, listing, table
from pyro_ae.models import ppca


class Reader(HTMLParser):
    """The tags of a page, which must close, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.open.append(tag)
        self.tags.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] != ["style"] else ""


def with_tags_for_names(x: Tensor) -> None:
    mean = pyro.sample("<b>", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x & y", dist.Normal(mean, 1.0), obs=x)


@pytest.fixture
def trained() -> Posterior:
    model, guide, x = ppca.example()
    method = svi(epochs=3)
    return fit(model, x, guide=guide, method=method, validation=x, seed=0, progress=False, check=False)


def test_a_posterior_shows_what_it_is_and_how_the_loss_went(trained: Posterior) -> None:
    page = Reader(trained._repr_html_())
    size = sum(p.numel() for p in [*trained.model.parameters(), *trained.guide.parameters()])
    for part in ("Posterior of PPCA", "svi(", "entry 0 [16, 5]", "z [2] for each row", f"parameters{size}", "3 steps"):
        assert part in page.text, part
    for name in ("loss", "validation"):
        values = trained.history[name]
        assert f"{name}{values[0]:.4g} to {values[-1]:.4g}" in page.text
    assert page.tags.count("polyline") == 2


def test_names_are_escaped() -> None:
    posterior = fit(with_tags_for_names, torch.zeros(4), method=sgld(draws=5, warmup=5, chains=2), progress=False)
    for shown in (posterior, posterior.report()):
        page = Reader(shown._repr_html_())
        assert "<b>" in page.text and page.tags.count("b") == 1  # the heading, or the verdict
        assert "script" not in page.tags
    assert "2 chains of 5 draws" in Reader(posterior._repr_html_()).text
    hostile = '</td><script>alert("1")</script>&amp;'
    page = Reader(card(table({hostile: hostile}), listing([hostile]), badge(hostile), curve([1.0, 2.0], hostile)))
    assert "script" not in page.tags and page.text.count(hostile) == 4


def test_a_report_shows_its_verdict_reasons_and_figures(trained: Posterior) -> None:
    report = trained.report()
    page = Reader(report._repr_html_())
    assert f"This posterior is {'✓~✗'[('good', 'usable', 'poor').index(report.verdict)]} {report.verdict}" in page.text
    assert page.tags.count("li") == len(report.reasons) > 0 and page.tags.count("tr") == len(report.figures) > 0
    assert all(reason in page.text for reason in report.reasons)
    assert "median Pareto k-hat of a row" in page.text and f"{report.figures['elbo']:.4g}" in page.text
    assert "li" not in Reader(Report("good", (), {})._repr_html_()).tags


def contrast(one: str, other: str) -> float:
    """Of two colours such as #ffffff, by the web's guidelines (WCAG 2)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) + 0.05

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return high / low


def test_text_is_readable_on_any_background() -> None:
    assert set(re.findall(r"[{ ;]color: ([^;]+);", STYLE)) == {"inherit", "#000000"}  # black on badges alone
    backgrounds = re.findall(r"\.(good|usable|poor) \{ background: (#\w{6})", STYLE)
    assert [name for name, _ in backgrounds] == ["good", "usable", "poor"]
    assert all(contrast("#000000", colour) >= 4.5 for _, colour in backgrounds)
    assert 'stroke="currentColor"' in curve([1.0, 2.0], "loss")


def test_a_curve_leaves_out_what_is_not_finite() -> None:
    drawn = curve([3.0, math.nan, math.inf, 1.0], "loss", width=34, height=14)
    assert 'points="2.0,2.0 32.0,12.0"' in drawn and drawn.startswith("3 to 1<svg")
    assert curve([1.0, math.nan], "loss") == "" and curve([], "loss") == ""
    assert 'points="2.0,2.0 32.0,2.0"' in curve([1.0, 1.0], "loss", width=34, height=14)
