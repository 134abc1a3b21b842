"""Whether a posterior can be trusted, in a word, with the reasons and the figures."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .. import html
from ..program import validation
from . import page, plots
from .chain_checks import ENTRIES, check_chains
from .findings import USABLE, Findings, Picture
from .guide_checks import check_guide
from .importance import FEWEST

if TYPE_CHECKING:
    from ..posterior import Posterior

Verdict = Literal["good", "usable", "poor"]
LEVELS: tuple[Verdict, ...] = ("good", "usable", "poor")

MEANING = {
    "chains": "chains",
    "draws": "draws of each chain",
    "entries": "numbers whose mixing was judged",
    "r_hat": "largest R-hat (1 where chains agree)",
    "ess_bulk": "smallest effective sample size of the bulk",
    "ess_tail": "smallest effective sample size of the tails",
    "mcse_mean_in_sd": "largest standard error of a posterior mean, in posterior sds",
    "divergences": "draws that diverged",
    "e_bfmi": "E-BFMI of the worst chain (at least 0.3)",
    "tree_depth_saturated": "share of trajectories cut off",
    "rows": "rows that were looked at",
    "particles": "draws of the guide for each",
    "k_hat_median": "median Pareto k-hat of a row (at most 0.5)",
    "k_hat_above_0.7": "share of rows with k-hat above 0.7",
    "ess_share": "what a weighted draw is worth, median over rows",
    "elbo": "ELBO of a row (nats)",
    "iwae": "importance-weighted bound of a row (nats)",
    "gap": "gap between the two (nats)",
    "amortisation_gap": "of the gap to log p(x), what is the encoder's (nats)",
    "approximation_gap": "and what is its family's (nats)",
    "joint_particles": "draws of all latents together",
    "joint_k_hat": "Pareto k-hat of all latents together",
    "joint_ess_share": "what a jointly weighted draw is worth",
    "joint_gap": "gap from ELBO to IWAE, all latents together (nats)",
    "units": "dims of the latents of a row",
    "active_units": "dims that move with the rows",
    "kl": "KL of a row's posterior to the prior (nats)",
    "mutual_information": "mutual information of row and latent (nats)",
}
"""What a report's figures are."""


@dataclass(frozen=True)
class Report:
    """A verdict on a posterior.

    Attributes:
        verdict: ``"good"``, ``"usable"`` (with the reasons in mind) or ``"poor"``.
        reasons: sentences with the number and what to do next, the worst first.
        figures: name to number.
        rows: of a guide, values of each row that was looked at: its number ``row``, and ``k_hat``, ``ess_share`` and
            ``gap`` (nats).
        pictures: what :meth:`to_html` shows.
        about: what was fitted, in words.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    figures: dict[str, float]
    rows: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    pictures: tuple[Picture, ...] = field(default=(), repr=False, compare=False)
    about: str = field(default="", repr=False, compare=False)

    def __str__(self) -> str:
        lines = [f"This posterior is {self.verdict}."]
        for reason in self.reasons:
            lines += textwrap.wrap(reason, 100, initial_indent="  - ", subsequent_indent="    ")
        width = max(map(len, self.figures), default=0)
        return "\n".join([*lines, *(f"  {name:<{width}}  {_show(value)}" for name, value in self.figures.items())])

    def _repr_html_(self) -> str:
        verdict = f"<p>This posterior is {html.badge(self.verdict)}</p>"
        return html.card(verdict, html.listing(self.reasons), html.table(self._explained()))

    def to_dict(self) -> dict[str, Any]:
        """Verdict, reasons, figures and rows, of numbers, strings and lists alone."""
        return {
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "figures": dict(self.figures),
            "rows": {name: values.tolist() for name, values in self.rows.items()},
        }

    def to_html(self, path: str | Path | None = None, *, title: str = "Can this posterior be trusted?") -> str:
        """One page with the verdict, the figures and pictures, which needs nothing from anywhere.

        Arguments:
            path: of the file to write; none by default.
            title: of the page.

        Returns:
            The page.
        """
        text = page.page(title, [self._verdict(), *self.sections()])
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def _verdict(self) -> str:
        return page.verdict(self.verdict, self.reasons, on="Posterior")

    def sections(self) -> list[str]:
        """The parts of the page below the verdict, as HTML."""
        parts = [page.section("What was fitted", page.code(self.about, wrap=True))] if self.about else []
        if self.figures:
            parts.append(page.section("Figures", page.table(self._explained())))
        return [*parts, *(page.section(p.title, page.picture(p.draw(), p.caption)) for p in self.pictures)]

    def _explained(self) -> dict[str, str]:
        return {MEANING.get(name, name): _show(value) for name, value in self.figures.items()}


def _show(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def report(posterior: Posterior, data: Any = None, *, rows: int = 200, particles: int = 1000, seed: int = 0) -> Report:
    r"""Whether a posterior can be trusted, and why.

    Chains are judged by R-hat, effective sample sizes, divergences, E-BFMI and the depth of their trees. A guide is
    judged by the weights that would turn its draws into the posterior's, row by row where rows share no latent: k-hat,
    the effective sample size, and the gap from ELBO to IWAE; and by what its latents say about the rows. Shared latents
    tie all rows together, so that they are judged jointly, and the rows' own given one draw of them. Weights cannot
    show a part of the posterior that no draw fell in, such as a second mode.

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
        check(found, posterior, data, rows, particles)
    if posterior.history.get("loss"):
        found.show(
            "Training",
            "The loss, and below it what each site adds, by one draw: has it come to rest?",
            partial(plots.history, posterior.history),
        )
    ordered = sorted(found.sentences, key=lambda sentence: -sentence[0])
    return Report(
        LEVELS[found.worst],
        tuple(text for _, text in ordered),
        found.figures,
        found.rows,
        tuple(found.pictures),
        repr(posterior),
    )


def check(
    found: Findings,
    posterior: Posterior,
    data: Any,
    rows: int,
    particles: int,
    *,
    entries: int = ENTRIES,
    latents: bool = True,
) -> None:
    """Judge a posterior by its draws, or by its guide.

    Arguments:
        found: is added to.
        posterior: of any engine.
        data: as for :func:`report`.
        rows: as for :func:`report`.
        particles: as for :func:`report`.
        entries: numbers of chains, at most, whose mixing is judged.
        latents: whether to look at what the latents of rows say about them.
    """
    if posterior.draws is not None:
        check_chains(found, posterior, entries)
    elif not posterior.program.layout.names("latent"):
        found.add(USABLE, "The model has no latent site: this is maximum likelihood, with no posterior to judge.")
    else:
        with torch.no_grad(), posterior.program.active(), validation(False):
            check_guide(found, posterior, data, rows, particles, latents=latents)
