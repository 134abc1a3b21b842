"""The checks of a guide: whether its draws, weighted or as they are, can stand for the posterior's."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from ..bounds import elbo, iwae
from ..data import Call, LoadedRows
from ..density import weigh
from ..draws import encode
from ..particles import part_sizes
from ..sites import Layout, inspect_sites, quote
from ..types import Guide, Model
from . import plots
from .amortisation import amortisation_gap
from .findings import GOOD, POOR, USABLE, Findings
from .groups import View, at_draws, look
from .importance import effective_sample_size, pareto_k
from .latents import latent_summaries
from .rows import Sample, first, numbers, samples
from .units import active_units

if TYPE_CHECKING:
    from ..posterior import Posterior

GAP = 0.5
"""Nats from the ELBO to IWAE up to which draws can be used as they are."""
BUDGET = 2**32
"""Elements of the largest site, over all particles, that a joint check may take."""
RICHER = (
    "use a richer guide (the head FullRank, Mixture or Flow in Amortized or Shared), train it with more particles "
    "(importance(iwae, 10)) or for longer, or sample with nuts"
)
REFINE = (
    "refine the encoder's answer for each row (the guide SemiAmortized, in posterior.with_guide), or use a larger "
    "encoder, more rows or longer training; another head alone will not do"
)
REFINED_ROWS = 20
"""Rows on which the encoder's part of a gap is told from its family's."""

T = TypeVar("T")


def check_guide(
    found: Findings, posterior: Posterior, data: Any, rows: int, particles: int, *, latents: bool = True
) -> None:
    """Weights that would turn the guide's draws into the posterior's, on ``rows`` of the rows where they can be.

    Arguments:
        found: is added to.
        posterior: with a guide.
        data: rows; those of the fit where it is None.
        rows: how many of them.
        particles: draws for each.
        latents: whether to look at what the latents say about the rows, too.
    """
    program = posterior.program
    assert program.guide is not None
    held = posterior._rows(data)
    found_rows = samples(held, rows, program.device)
    some, index, view = first(found_rows, lambda batch: look(program, batch), lambda view: bool(view.common))
    if view.undrawn:
        what = f"The latents {quote(view.undrawn)} are enumerated and have no draws"
        found.add(USABLE, f"{what}, so the guide cannot be weighed: compare it with another fit.")
        return
    if view.subsampled:
        plate = next(iter(view.subsampled.values()))
        what = f"Plate '{plate}' takes a new subsample in each run, so the guide cannot be weighed"
        found.add(USABLE, f"{what}: write pyro.plate('{plate}', len(x)) and pass batch_size to fit.")
        return
    if isinstance(held, LoadedRows) and not view.common:
        what = "The rows share latents, and a DataLoader brings them in batches, so the guide cannot be weighed"
        found.add(USABLE, f"{what}: pass all rows at once, as report(data).")
        return
    pair = at_draws(program, some, view, ["posterior"], None, 2)["posterior"]
    points = [n for n, v in pair.items() if v.is_floating_point() and v.numel() and torch.equal(v[0], v[1])]
    if points:
        what = f"The guide draws the same value of {quote(points)} each time: a point, without uncertainty"
        found.add(POOR, f"{what}. Use a guide with a spread, such as AutoNormal, or nuts.")
        found.point = True
        return
    model, guide = program.model.fn, program.guide.fn
    if view.common:
        log_w = _take(_log_weights(model, guide, some, view.layout, particles), index)
        cure, blame = _blame(found, posterior, data, log_w) if posterior.local and latents else (RICHER, {})
        _rows_findings(found, log_w, numbers(held, rows), "", cure)
        found.figures |= blame
    else:
        most = max(100, BUDGET // view.largest)
        _joint_findings(
            found, _log_weights(model, guide, some, view.layout, min(particles, most)), local=bool(posterior.local)
        )
        if posterior.local:
            _given_shared(found, posterior, found_rows, some, view, particles, numbers(held, rows))
    if posterior.local and latents:
        means = _information(found, posterior, data, rows)
        _units(found, posterior, some, view, index, means)


def _take(values: Tensor, index: Tensor | None) -> Tensor:
    return values if index is None else values[:, index]


def _log_weights(model: Model, guide: Guide, batch: Call, layout: Layout, particles: int) -> Tensor:
    """Log-weights ``[K, rows]``, or ``[K, 1]`` where they are joint."""
    parts = []
    for size in part_sizes(particles, layout):
        part = weigh(model, guide, batch, size, layout=layout).log_weights
        parts.append(part.reshape(len(part), -1).cpu())
    return torch.cat(parts)


def _blame(found: Findings, posterior: Posterior, data: Any, log_w: Tensor) -> tuple[str, dict[str, float]]:
    """What to do about the gap of the rows, which is the encoder's or that of its family, and how large each is."""
    if not float((iwae(log_w) - elbo(log_w)).mean()) > GAP or not hasattr(posterior.guide, "site_heads"):
        return RICHER, {}  # nothing to blame, or no encoder whose answers could be refined at little cost
    try:
        gaps = amortisation_gap(posterior, data, rows=REFINED_ROWS, steps=200)
    except ValueError:  # a guide that cannot be refined
        return RICHER, {}
    encoder, family = float(gaps.amortisation.mean()), float(gaps.approximation.mean())
    figures = {"amortisation_gap": encoder, "approximation_gap": family}
    of = f"Of the gap from ELBO to log p(x), {encoder:.2f} nats a row are the encoder's and {family:.2f} its family's"
    if encoder > family:
        found.add(USABLE, f"{of}: the best distributions of that family are much nearer to the posterior than its own.")
        return REFINE, figures
    found.add(USABLE, f"{of}: no encoder can do much better with this family of distributions.")
    return RICHER, figures


def _rows_findings(found: Findings, log_w: Tensor, numbers: Tensor | None, given: str, cure: str = RICHER) -> None:
    """What the weights say of rows that are weighed one by one."""
    particles, rows = log_w.shape
    if not _finite(found, log_w):
        return
    k, gaps, shares = pareto_k(log_w), iwae(log_w) - elbo(log_w), effective_sample_size(log_w) / particles
    gap, share = float(gaps.mean()), float(shares.median())
    numbers = torch.arange(rows) if numbers is None or len(numbers) != rows else numbers
    found.rows = {"row": numbers, "k_hat": k, "ess_share": shares, "gap": gaps}
    found.show(
        "Can the guide be trusted, row by row?",
        f"Pareto k-hat of the importance weights of each row{given}. Up to 0.7, draws of the guide can be weighted to "
        "stand for the true posterior; above it they cannot.",
        partial(plots.pareto_k, k),
    )
    found.show(
        "Which rows is it wrong on?",
        "The same k-hat by row: `report.rows` has the numbers.",
        partial(plots.pareto_k_by_row, k, numbers),
    )
    bad, median = float((~(k <= 0.7)).double().mean()), float(k.median())
    found.figures |= {"rows": rows, "particles": particles, "k_hat_median": median, "k_hat_above_0.7": bad}
    found.figures |= {
        "ess_share": share,
        "elbo": float(elbo(log_w).mean()),
        "iwae": float(iwae(log_w).mean()),
        "gap": gap,
    }
    text = f"k-hat is above 0.7 in {bad:.0%} of {rows} rows, with a median {_of(median)}{given}"
    if bad <= 0.05 and median <= 0.5:
        found.add(GOOD, f"{text}: the guide reaches the tails of the posterior.")
    else:
        level = USABLE if bad <= 0.25 and median <= 0.7 else POOR
        found.add(level, f"{text}, where the guide is too narrow or misplaced: {cure}.")
    _worth(found, share, gap, given=given)


def _joint_findings(found: Findings, log_w: Tensor, local: bool) -> None:
    """What the weights say of all latents together."""
    particles = len(log_w)
    if not _finite(found, log_w):
        return
    k, share = float(pareto_k(log_w)), float(effective_sample_size(log_w) / particles)
    gap = float(iwae(log_w) - elbo(log_w))
    found.figures |= {"joint_particles": particles, "joint_k_hat": k, "joint_ess_share": share, "joint_gap": gap}
    text = f"The joint k-hat of all latents is {_of(k).removeprefix('of ')}"
    if k <= 0.5:
        found.add(GOOD, f"{text}: the guide reaches the tails of the posterior.")
    elif local:  # it adds up over rows, each of which may be fine
        found.add(
            USABLE, f"{text}, over 0.5. It grows with the rows, so go by those of the rows; if they are bad, {RICHER}."
        )
    elif k <= 0.7:
        found.add(USABLE, f"{text}, over 0.5: {RICHER}.")
    else:
        found.add(POOR, f"{text}, over 0.7, so the guide is too narrow or misplaced: {RICHER}, or reparameterise.")
    _worth(found, share, gap, joint=USABLE if local else POOR)


def _worth(found: Findings, share: float, gap: float, *, given: str = "", joint: int | None = None) -> None:
    """What the draws are worth as they are, and with their weights; ``joint`` is how bad joint weights can be."""
    text = f"The {'joint gap' if joint else 'gap'} from ELBO to IWAE is {max(gap, 0.0):.2f} nats"
    text += "" if joint else f" a row{given}"
    if gap <= GAP:
        found.add(GOOD, f"{text}: the draws can be used as they are.")
    else:
        cure = (
            "weigh them (sample_stats of to_arviz has log_weight), resample them (the guide ImportanceWeighted, in "
            "posterior.with_guide), or use a nearer guide"
        )
        found.add(USABLE, f"{text}, over 0.5, so the draws differ from the posterior's as they are: {cure}.")
    text = f"{'Jointly weighted' if joint else 'Weighted'}, the draws are worth {share:.1%} of as many of the posterior"
    text += given
    if share >= 0.1:
        found.add(GOOD, f"{text}: averages over them need {1 / share:.1f} times as many draws.")
    else:
        level = min(joint or POOR, USABLE if share >= 0.01 else POOR)
        found.add(level, f"{text}, under 10%: averages need {1 / share:.0f} times as many draws, or a nearer guide.")


def _of(k: float) -> str:
    return "below 0" if k < 0 else f"of {k:.2f}"


def _finite(found: Findings, log_w: Tensor) -> bool:
    bad = int((log_w.isnan() | (log_w == math.inf)).any(0).sum() + (log_w == -math.inf).all(0).sum())
    if bad:
        where = f"in {bad} of {log_w.shape[1]} rows " if log_w.shape[1] > 1 else ""
        found.add(POOR, f"The weights of the guide's draws are not finite {where}: look at the supports and the data.")
    return not bad


def _given_shared(
    found: Findings,
    posterior: Posterior,
    found_rows: list[Sample],
    batch: Call,
    view: View,
    particles: int,
    numbers: Tensor | None,
) -> None:
    """The rows' own latents, given one draw of those that they share: for each row a weight of its own."""
    program = posterior.program
    assert program.guide is not None
    values = at_draws(program, batch, view, ["posterior"], None, 1)["posterior"]
    given = {n: v[0].to(program.device) for n, v in values.items() if n not in posterior.local}

    def outside(message: dict) -> bool:
        return message["type"] == "sample" and all(f.name != program.plate for f in message["cond_indep_stack"])

    def condition(fn: Any) -> Any:
        return poutine.block(poutine.condition(fn, data=given), hide_fn=outside)

    model, guide = condition(program.model.fn), condition(program.guide.fn)

    def weigh_rows(some: Call) -> Tensor:
        layout = inspect_sites(model, guide, some)
        layout.checked, layout.serial = True, view.layout.serial
        return _log_weights(model, guide, some, layout, particles)

    size = view.layout.plates[str(program.plate)]
    some, index, log_w = first(found_rows, weigh_rows, lambda log_w: log_w.shape[1] > 1)
    if log_w.shape[1] > 1 or size == 1:
        _rows_findings(found, _take(log_w, index), numbers, " given one draw of the shared latents")


def _units(
    found: Findings, posterior: Posterior, batch: Call, view: View, index: Tensor | None, known: dict[str, Tensor]
) -> None:
    """How many dimensions of the rows' real latents move with the data, of which some have ``known`` means."""
    real = [n for n in posterior.local if _is_real(view.layout.model[n].support)]
    if not real:
        return
    means = {n: known[n] for n in real if n in known}
    if len(means) < len(real):
        others = {n: v for n, v in encode(posterior.program, batch, 100).items() if n in real and n not in known}
        others = {n: v if index is None else v[index] for n, v in others.items()}
        means |= {n: v.flatten(1) if v.dim() > 1 else v.unsqueeze(1) for n, v in others.items() if len(v) > 1}
    if not means:
        return
    active = sum(int(active_units(v).sum()) for v in means.values())
    units = sum(v.shape[1] for v in means.values())
    found.figures |= {"units": units, "active_units": active}
    if active < units:
        found.add(
            GOOD if active else USABLE,
            f"{units - active} of {units} latent dimensions are inactive: their posterior mean is the same for every "
            "row. A smaller latent would do; or let the weight of the KL grow from 0 over the first epochs.",
        )


def _information(found: Findings, posterior: Posterior, data: Any, rows: int) -> dict[str, Tensor]:
    """What the rows' latents say about them, where the guide has a density to go by; and their means, ``[N, d]``."""
    try:
        summaries = latent_summaries(posterior, data, rows=rows, seed=None).sites.values()
    except ValueError:
        return {}
    found.figures["kl"] = sum(s.rate for s in summaries)
    for s in summaries:
        if s.information is not None and len(summaries) == 1:
            found.figures["mutual_information"] = s.information
        if s.kl is None:
            continue
        if s.collapsed is not None and s.collapsed.all():
            found.add(
                USABLE,
                f"The latent '{s.site}' has collapsed: its posterior is the prior for every row (KL {s.rate:.3f} nats) "
                "and says nothing of them. Let the weight of the KL grow from 0 (annealed(linear(0, 1))), leave "
                "it some nats (free_bits), or use a decoder that needs the latent.",
            )
        found.show(
            f"What '{s.site}' says about a row",
            f"The KL of each dim's posterior to the prior, averaged over {s.rows} rows: a dim with none is not used. "
            "The posterior of a passive dim is the prior's for every row; that of a mixed one, for some.",
            partial(plots.kl, s.kl.mean(0), None if s.kinds is None else s.kinds.names),
        )
    return {s.site: s.mean for s in summaries}


def _is_real(support: Any) -> bool:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support is constraints.real
