"""Whether a posterior can be trusted, in a word, with the reasons and the figures."""

from __future__ import annotations

import html
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..program import validation
from .checks import GOOD, USABLE, Findings, check_chains, check_guide
from .importance import FEWEST

if TYPE_CHECKING:
    from ..posterior import Posterior

Verdict = Literal["good", "usable", "poor"]
LEVELS: tuple[Verdict, ...] = ("good", "usable", "poor")


@dataclass(frozen=True)
class Report:
    """A verdict on a posterior.

    Attributes:
        verdict: ``"good"``, ``"usable"`` (with the reasons in mind) or ``"poor"``.
        reasons: sentences with the number and what to do next, the worst first.
        figures: name to number.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    figures: dict[str, float]

    def __str__(self) -> str:
        lines = [f"This posterior is {self.verdict}."]
        for reason in self.reasons:
            lines += textwrap.wrap(reason, 100, initial_indent="  - ", subsequent_indent="    ")
        width = max(map(len, self.figures), default=0)
        return "\n".join([*lines, *(f"  {name:<{width}}  {_show(value)}" for name, value in self.figures.items())])

    def _repr_html_(self) -> str:
        reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in self.reasons)
        cells = "".join(f"<tr><td>{html.escape(n)}</td><td>{_show(v)}</td></tr>" for n, v in self.figures.items())
        return f"<p>This posterior is <b>{self.verdict}</b>.</p><ul>{reasons}</ul><table>{cells}</table>"


def _show(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def report(posterior: Posterior, data: Any = None, *, rows: int = 200, particles: int = 1000, seed: int = 0) -> Report:
    r"""Whether a posterior can be trusted, and why.

    Chains are judged by R-hat, effective sample sizes, divergences, E-BFMI and the depth of their trees. A guide is
    judged by the weights that would turn its draws into the posterior's, row by row where rows share no latent: k-hat,
    the effective sample size, and the gap from ELBO to IWAE. Shared latents tie all rows together, so that they are
    judged jointly, and the rows' own given one draw of them. Weights cannot show a part of the posterior that no draw
    fell in, such as a second mode.

    References:
        Rank-Normalization, Folding, and Localization: An Improved R-hat for Assessing Convergence of MCMC
        (Vehtari, Gelman, Simpson, Carpenter and Buerkner, 2021) https://arxiv.org/abs/1903.08008
        Pareto Smoothed Importance Sampling (Vehtari, Simpson, Gelman, Yao and Gabry, 2024)
        https://arxiv.org/abs/1507.02646
        Yes, but Did It Work?: Evaluating Variational Inference (Yao, Vehtari, Simpson and Gelman, 2018)
        https://arxiv.org/abs/1802.02538

    Arguments:
        posterior: of any engine.
        data: rows to judge the guide on; those of the fit by default.
        rows: how many of them, spread evenly.
        particles: draws for each row, at least 50.
        seed: of these draws; the global random states stay as they were.

    Raises:
        ValueError: for too few rows or particles; where data is needed and not there.

    Example:
        >>> from pyro_ae import fit, svi
        >>> from pyro_ae.models import ppca
        >>> model, guide, x = ppca.example()
        >>> posterior = fit(model, x, guide=guide, method=svi(steps=10), seed=0, progress=False)
        >>> report(posterior, particles=200).figures["rows"]
        16
    """
    from ..runtime import seeded

    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    if particles < FEWEST:
        raise ValueError(f"particles must be at least {FEWEST}, which k-hat needs, got {particles}")
    found = Findings()
    if posterior.interrupted:
        found.add(USABLE, "The fit was interrupted by hand: run it to its end.")
    with seeded(seed):
        if posterior.draws is not None:
            check_chains(found, posterior)
        elif not posterior.program.layout.names("latent"):
            found.add(USABLE, "The model has no latent site: this is maximum likelihood, with no posterior to judge.")
        else:
            with torch.no_grad(), posterior.program.active(), validation(False):
                check_guide(found, posterior, data, rows, particles)
    worst = max((level for level, _ in found.sentences), default=GOOD)
    ordered = sorted(found.sentences, key=lambda sentence: -sentence[0])
    return Report(LEVELS[worst], tuple(text for _, text in ordered), found.figures)
