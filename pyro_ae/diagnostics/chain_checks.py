"""The checks of draws that a posterior holds: whether chains agree, and how much their draws say."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from . import plots
from .entries import columns, label
from .findings import GOOD, POOR, USABLE, Findings

if TYPE_CHECKING:
    from ..posterior import Posterior

ENTRIES = 500
"""Numbers of a model, at most, whose R-hat and ESS are worked out."""
MOVING = 10
"""Times as many are looked at for being fixed by their support, which are not judged."""
WORST = 3
"""Numbers that are drawn, those that mix worst."""

INDEPENDENT = {
    "map_": (POOR, "The posterior is a single point, without uncertainty: use laplace, sghmc or nuts for a spread."),
    "ensemble": (
        USABLE,
        "The draws are modes that were found from several starts, and their spread is no posterior's: judge them by "
        "predictions for rows that were held out (pyro_ae.diagnostics.scores), or compare them with sghmc or nuts.",
    ),
    "mc_dropout": (
        USABLE,
        "The draws are one fit with units left out at random, and whether the posterior is like it cannot be seen from "
        "them: compare them with sghmc or nuts (pyro_ae.diagnostics.comparison).",
    ),
    "laplace": (
        USABLE,
        "The draws are of a normal about one mode, and whether the posterior is like it cannot be seen from them: "
        "compare them with nuts or sghmc (pyro_ae.diagnostics.comparison).",
    ),
    "swag": (
        USABLE,
        "The draws are of a normal fitted to the path of an optimiser, and whether the posterior is like it cannot be "
        "seen from them: compare them with nuts or sghmc (pyro_ae.diagnostics.comparison).",
    ),
}
"""Methods whose draws are independent, so that there is no mixing to judge, and what is to be said of them."""


def check_chains(found: Findings, posterior: Posterior, entries: int = ENTRIES) -> None:
    """Judge a posterior by the draws that it holds.

    Arguments:
        found: is added to.
        posterior: with draws.
        entries: numbers, at most, whose mixing is judged.
    """
    assert posterior.draws is not None
    chains, draws = next(iter(posterior.draws.values())).shape[:2]
    found.figures |= {"chains": chains, "draws": draws}
    method = posterior.method.split("(")[0]
    if method in INDEPENDENT:
        found.add(*INDEPENDENT[method])
        return
    worst = _mixing(found, posterior.draws, entries)
    stats = posterior.stats
    if "diverging" in stats:
        divergences = int(stats["diverging"].sum())
        found.figures["divergences"] = divergences
        if divergences:
            found.add(
                POOR if divergences > 0.01 * chains * draws else USABLE,
                f"{divergences} of {chains * draws} draws diverged, so a region of high curvature was not explored: "
                "raise target_accept (0.95 or 0.99), or reparameterise (a non-centred hierarchy).",
            )
    if "energy" in stats and draws > 1:
        energy = stats["energy"].double()
        bfmi = float((energy.diff(dim=1).square().mean(1) / energy.var(1, correction=0)).min())
        found.figures["e_bfmi"] = bfmi
        if not bfmi >= 0.3:
            found.add(
                USABLE,
                f"E-BFMI is {bfmi:.2f} in the worst chain, below 0.3, so the chain changes its energy too slowly for "
                "the tails: reparameterise, or use a longer warmup.",
            )
    deepest = re.search(r"max_tree_depth=(\d+)", posterior.method)
    if "tree_depth" in stats and deepest:
        share = float((stats["tree_depth"] >= int(deepest[1])).double().mean())
        found.figures["tree_depth_saturated"] = share
        if share > 0:
            found.add(
                USABLE if share > 0.01 else GOOD,
                f"{share:.1%} of the trajectories were cut off at max_tree_depth={deepest[1]}, which is slow: raise "
                "it, reparameterise, or use dense_mass=True.",
            )
    _pictures(found, posterior, worst)


def _mixing(found: Findings, sites: dict[str, Tensor], entries: int) -> list[str]:
    """R-hat, effective sample sizes and errors of the sites' numbers; which of them mix worst, in order."""
    chains, draws = next(iter(sites.values())).shape[:2]
    if draws < 4:
        found.add(POOR, f"Each chain has {draws} draws, too few to judge: draw more.")
        return []
    rhat, bulk, tail, error = {}, {}, {}, {}
    for name, value in sites.items():
        share = max(1, entries // len(sites))
        some = torch.randperm(value.shape[2:].numel())[: MOVING * share]
        flat = columns(value.reshape(chains, draws, -1)[..., some])  # not all of a large network, nor of draws on disk
        moves = ~(flat == flat[:1, :1]).all(0).all(0)  # others are fixed by the support, as in a Cholesky factor
        if not torch.isfinite(value).all():
            found.add(POOR, f"Site '{name}' has draws that are not finite: look at its prior and its support.")
            continue
        if not moves.any():
            found.add(
                POOR, f"The draws of site '{name}' are all the same: the chains never moved. Lengthen the warmup."
            )
            continue
        for i in moves.nonzero().squeeze(-1)[:share].tolist():
            called = label(name, value.shape[2:], int(some[i]))
            rhat[called], bulk[called], tail[called], error[called] = _measure(flat[..., i].numpy())
    if not rhat:
        return []
    found.figures["entries"] = len(rhat)
    if chains == 1:
        found.add(
            USABLE, "There is a single chain, and R-hat needs two or more: it cannot be told whether chains agree."
        )
    else:
        worst = max(rhat, key=lambda n: rhat[n])
        found.figures["r_hat"] = rhat[worst]
        if rhat[worst] <= 1.01:
            found.add(GOOD, f"R-hat is at most {rhat[worst]:.3f} ({worst}): the {chains} chains agree.")
        else:
            found.add(
                USABLE if rhat[worst] <= 1.05 else POOR,
                f"R-hat is {rhat[worst]:.4g} for {worst}, above 1.01, so the {chains} chains have not come to agree: "
                "use a longer warmup and more draws; if it stays, reparameterise, or look for several modes.",
            )
    for kind, values in (("bulk", bulk), ("tail", tail)):
        worst = min(values, key=lambda n: values[n])
        size = values[worst]
        found.figures[f"ess_{kind}"] = size
        text = f"The {kind} effective sample size is {size:.0f} for {worst}"
        if size >= 100 * chains:
            found.add(GOOD, f"{text}, at least 100 a chain: enough draws.")
        else:
            found.add(
                USABLE if size >= 25 * chains else POOR,
                f"{text}, fewer than 100 a chain: take {min(100, math.ceil(100 * chains / max(size, 1.0)))} times as "
                "many draws, or reparameterise.",
            )
    found.figures["mcse_mean_in_sd"] = max(error.values())
    return sorted(bulk, key=lambda n: bulk[n])


def _measure(draws: np.ndarray) -> tuple[float, float, float, float]:
    """Rank-normalised R-hat, effective sample sizes of bulk and tail, and the mean's standard error in sds.

    Arguments:
        draws: ``[chains, draws]``.
    """
    import arviz

    with np.errstate(all="ignore"):
        rhat = float(arviz.rhat(draws)) if len(draws) > 1 else math.nan
        bulk, tail = float(arviz.ess(draws, method="bulk")), float(arviz.ess(draws, method="tail", prob=(0.05, 0.95)))
        error = float(arviz.mcse(draws, method="mean")) / float(draws.std())
    # what cannot be worked out, of a chain that stands still, is as bad as can be
    rhat, error = (math.inf if math.isnan(value) else value for value in (rhat, error))
    bulk, tail = (0.0 if math.isnan(value) else value for value in (bulk, tail))
    return rhat, bulk, tail, error


def _pictures(found: Findings, posterior: Posterior, worst: list[str]) -> None:
    some = worst[:WORST]
    if some:
        which = "the number that mixes" if len(some) == 1 else f"the {len(some)} numbers that mix"
        found.show(
            "Trace",
            f"Draws of {which} worst, chain by chain: chains that agree lie over one another. Strokes at the lower "
            "edge are draws that diverged.",
            partial(plots.trace, posterior, some),
        )
        found.show(
            "Ranks",
            "How the draws of each chain rank among all. Where chains agree, every rank is as frequent in each.",
            partial(plots.rank, posterior, some),
        )
    if len(some) > 1 and posterior.stats.get("diverging", torch.zeros(1)).any():
        found.show(
            "Where draws diverged",
            "Draws that diverged gather where the posterior is too narrow for the step.",
            partial(plots.pair, posterior, some),
        )
    if "energy" in posterior.stats:
        found.show(
            "Energy",
            "Where the changes of the energy are spread much less than the energy itself, the tails are explored too "
            "slowly.",
            partial(plots.energy, posterior),
        )
