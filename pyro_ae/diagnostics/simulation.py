"""Simulation-based calibration: whether inference finds again what made the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data import Call, LoadedRows, Rows, as_rows
from ..draws import draw, replay
from ..enumeration import marginalise
from ..program import Program, validation
from ..runtime import seeded
from ..sites import Layout, Recorder, Site, pointwise_log_prob, quote
from ..types import Draws, Model
from .entries import columns
from .groups import View, from_prior, look
from .ranks import FEWEST, Ranks, ranks_of, to_uniform
from .rows import evenly
from .simulated import as_given, prior_run, repeated, with_observed

if TYPE_CHECKING:
    from ..posterior import Posterior

LOG_JOINT = "log p(x, z)"
"""The test quantity that is always there."""

ENTRIES = 50
"""Numbers of a model, at most, whose effective sample size is worked out in each replication."""

Quantities: TypeAlias = Mapping[str, Callable[[dict[str, Tensor], Any], Tensor]]
"""Name to a function of latents, site to ``[draws, *shape]``, and the data that it was made with, as the model takes
it, to ``[draws, *any]``."""


class Simulated(NamedTuple):
    """Rows drawn from the joint distribution of a model, with what the guide makes of them.

    Attributes:
        truths: latent site to ``[replications, *event]``.
        draws: latent site to ``[draws, replications, *event]``.
        data: the simulated rows, as the model takes them.
        log_joint: log p(x, z) of each row at the truth, then at the draws, ``[1 + draws, replications]``.
    """

    truths: dict[str, Tensor]
    draws: dict[str, Tensor]
    data: Any
    log_joint: Tensor


def simulation_based_calibration(
    posterior: Posterior,
    replications: int = 200,
    draws: int = 100,
    *,
    data: Any = None,
    quantities: Quantities | None = None,
    seed: int = 0,
) -> Ranks:
    r"""Whether an amortised guide finds again the latents that made a row.

    .. math:: (z, x) \sim p(z, x), \quad z_1, \dots, z_S \sim q(z \mid x): \qquad
        \textstyle \sum_s 1[z_s < z] \sim \text{Uniform}\{0, \dots, S\}

    Each replication is a row of its own, all made and all inferred at once. Ranks of the latents alone do not see a
    guide that ignores the data and is the prior, but those of the log joint density do; it is always among the test
    quantities. The parameters of the model, such as a decoder's weights, stay as they were learnt: what is tested is
    the guide, on rows of the model's own making. Where the model does not fit the data, those differ from yours.

    References:
        Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts, Betancourt, Simpson, Vehtari
        and Gelman, 2018) https://arxiv.org/abs/1804.06788
        Simulation-Based Calibration Checking for Bayesian Computation: The Choice of Test Quantities Shapes Sensitivity
        (Modrak, Moon, Kim, Buerkner, Huurre, Faltejskova, Gelman and Vehtari, 2023) https://arxiv.org/abs/2211.02383

    Arguments:
        posterior: of a guide, where all that is latent belongs to the rows.
        replications: R, how many rows are simulated.
        draws: S, of the guide for each row.
        data: rows that covariates and missing values are taken from, spread evenly; those of the fit by default.
        quantities: name to a function of ``(latents, data)``, with latents ``{site: [draws, R, *event]}`` and the
            simulated rows as the model takes them, to ``[draws, R, *any]``.
        seed: of the simulation; the global random states stay as they were.

    Returns:
        :class:`~pyro_ae.diagnostics.ranks.Ranks` of each number of the latents, of ``"log p(x, z)"`` and of the
        quantities.

    Raises:
        ValueError: for chains, for latents that rows share or for a guide with parameters for each row, which
            :func:`refit_calibration` is for; for too few replications or draws.

    Example:
        >>> from pyro_ae import fit, svi
        >>> from pyro_ae.models import ppca
        >>> model, guide, x = ppca.example()
        >>> posterior = fit(model, x, guide=guide, method=svi(steps=10), seed=0, progress=False)
        >>> {name: rank.shape for name, rank in simulation_based_calibration(posterior).ranks.items()}
        {'z': torch.Size([200, 2]), 'log p(x, z)': torch.Size([200])}
    """
    with seeded(seed):
        found = simulate(posterior, replications, draws, data=data)
        ranks = {name: ranks_of(truth, found.draws[name]) for name, truth in found.truths.items()}
        both = {name: torch.cat([truth[None], found.draws[name]]) for name, truth in found.truths.items()}
        return Ranks(ranks | _ranks_of_quantities(found.log_joint, quantities, both, found.data), draws)


@torch.no_grad()
def simulate(posterior: Posterior, replications: int, draws: int, *, data: Any = None) -> Simulated:
    """Rows from the joint distribution of a model, all at once, and draws of the guide for each.

    Arguments:
        posterior: of a guide, where all that is latent belongs to the rows.
        replications: how many rows.
        draws: of the guide for each row.
        data: rows that covariates and missing values are taken from; those of the fit by default.
    """
    _check_numbers(replications, draws)
    program, plate = posterior.program, posterior.program.plate
    if program.guide is None:
        raise ValueError(
            "chains hold draws for the rows of the fit only, and nothing to infer new rows with: use "
            "refit_calibration(model, infer, data), which fits each simulated data set"
        )
    rows = posterior._rows(data)
    if isinstance(rows, LoadedRows) or rows.size is None:
        raise ValueError(f"rows are simulated in the form of the data's, and this has no rows at hand: {rows}")
    template = repeated(rows, replications)
    with program.active(), validation(False):
        try:
            program._check_amortised(template.call(), program.inspect(template.call()))
            view = look(program, template.call())
        except (ValueError, RuntimeError, IndexError) as error:
            raise ValueError(
                f"the guide cannot infer rows that it was not fitted to ({str(error).splitlines()[0]}): use an "
                "amortised guide, or refit_calibration(model, infer, data), which fits each simulated data set"
            ) from error
        _check_joint(view)
        if not view.latents:
            raise ValueError("the guide draws no latent, so there is nothing to find again")
        if plate not in [name for name, _, _ in view.common]:
            shared = [n for n in view.latents if n not in view.layout.local(plate)]
            raise ValueError(
                f"the latents {quote(shared)} stand outside plate '{plate}'" * bool(shared)
                + f"not all sites stand in plate '{plate}'" * (not shared)
                + ", so that rows cannot be inferred one by one: use refit_calibration(model, infer, data), which fits "
                "each simulated data set"
            )
        sites = prior_run(posterior, view, template).sites
    made = with_observed(view, template, {n: sites[n]["value"].detach() for n in view.observed})
    model = view.layout.model
    truths = {n: _rows_first(sites[n]["value"].detach(), model[n], plate) for n in view.latents}
    found = draw(program, draws, made.call())
    points = [n for n in view.latents if found[n].is_floating_point() and torch.equal(found[n][0], found[n][1])]
    if points:
        raise ValueError(f"the guide gives {quote(points)} a single point, without uncertainty that could be checked")
    both = {n: torch.cat([sites[n]["value"].detach().cpu()[None], found[n]]) for n in view.latents}
    log_joint = _log_joint(program, both, made.call(), bool(view.undrawn), plate)
    by_row = {n: _rows_first(found[n], model[n], plate, 1) for n in view.latents}
    return Simulated({n: v.cpu() for n, v in truths.items()}, by_row, as_given(made.to("cpu")), log_joint)


def refit_calibration(
    model: Model,
    infer: Callable[[Any], Posterior | Draws],
    data: Any,
    replications: int = 100,
    draws: int = 100,
    *,
    plate: str = "data",
    quantities: Quantities | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Ranks:
    r"""Whether an inference finds again the latents that made the data, by doing it for many simulated data sets.

    As :func:`simulation_based_calibration`, for any inference and any model, at the price of a fit for each
    replication. Draws of chains are thinned to nearly independent ones, as many as their effective sample size: where
    that is below ``draws``, the ranks among fewer are spread at random over 0 to S.

    References:
        Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts, Betancourt, Simpson, Vehtari
        and Gelman, 2018) https://arxiv.org/abs/1804.06788
        Simulation-Based Calibration Checking for Bayesian Computation: The Choice of Test Quantities Shapes Sensitivity
        (Modrak, Moon, Kim, Buerkner, Huurre, Faltejskova, Gelman and Vehtari, 2023) https://arxiv.org/abs/2211.02383

    Arguments:
        model: with proper priors; its own parameters stay as they are.
        infer: from simulated data, in the form of ``data``, to a posterior, such as
            ``lambda data: fit(model, data, method=nuts(), progress=False)``, or to independent draws
            ``{site: [draws, *shape]}``. It must not set a seed: each replication needs random numbers of its own.
        data: in any form that ``fit`` takes. What the model observes is replaced by what it simulates, and the rest,
            such as covariates and the places of missing values, stays.
        replications: R, how many data sets are simulated.
        draws: S, that ranks are among.
        plate: name of the plate of the rows.
        quantities: name to a function of ``(latents, data)``, with latents ``{site: [draws, *shape]}`` and one
            simulated data set, to ``[draws, *any]``.
        seed: of the simulation and of inferences that draw from the global random states, which stay as they were.
        progress: whether to show a progress bar.

    Returns:
        :class:`~pyro_ae.diagnostics.ranks.Ranks` of each number of the latents, of ``"log p(x, z)"`` and of the
        quantities.

    Raises:
        ValueError: for a prior that cannot be drawn from; where a site observes what is no entry of the data; where
            ``infer`` gives too few draws, or draws of other shapes than the model's.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def exact(y):
        ...     return {"mu": y.sum() / 4 + torch.randn(100) / 2}
        >>> refit_calibration(model, exact, torch.zeros(3), seed=1, progress=False).ok()
        True
    """
    _check_numbers(replications, draws)
    rows = as_rows(data)
    if isinstance(rows, LoadedRows):
        raise ValueError("refit_calibration needs all data at once, not in a DataLoader's batches: pass tensors")
    with seeded(seed):
        device = next((v.device for v in rows.rows.values()), torch.device("cpu"))
        program = Program(model, None, plate=plate, total=rows.size, device=device)
        program.build(rows.call())
        fixed = {n: v.detach().clone() for n, v in program.parameters.named().items()}
        with torch.no_grad(), program.active(), validation(False):
            try:
                view = look(program, rows.call())
                _check_joint(view)
                prior = from_prior(program, rows.call(), view, ["prior", "prior_predictive"], replications)
            except NotImplementedError as error:
                prior = f"a prior of the model cannot be drawn from ({error})"
        if isinstance(prior, str):
            raise ValueError(f"data cannot be simulated: {prior}. Give the model proper priors")
        found: dict[str, list[Tensor]] = {}
        effective = np.inf
        for r in tqdm(range(replications), "simulation-based calibration", disable=not progress, dynamic_ncols=True):
            truth = {n: prior["prior"][n][r] for n in program.layout.names("latent")}
            made = with_observed(view, rows, {n: prior["prior_predictive"][n][r] for n in view.observed})
            values, size = _independent(infer(as_given(made)), truth, draws)
            effective = min(effective, size)
            changed = [n for n, v in program.parameters.named().items() if not torch.equal(v, fixed[n])]
            if changed:
                raise ValueError(
                    f"infer changed the model's parameters {quote(changed)}, and with them what is to be found again: "
                    "hold them fixed, by model.requires_grad_(False), or infer with a copy of the model"
                )
            with torch.no_grad():
                for name, rank in _ranks(program, truth, values, made, quantities).items():
                    found.setdefault(name, []).append(_spread(rank, len(next(iter(values.values()))), draws))
    ranks = {name: torch.stack(parts) for name, parts in found.items()}
    return Ranks(ranks, draws, effective if np.isfinite(effective) else None)


def _ranks(
    program: Program, truth: dict[str, Tensor], values: dict[str, Tensor], made: Rows, quantities: Quantities | None
) -> dict[str, Tensor]:
    """Of one data set."""
    both = {n: torch.cat([truth[n][None], v]) for n, v in values.items()}
    log_joint = _log_joint(program, both, made.call(), len(values) < len(truth))
    of_latents = {n: ranks_of(truth[n], v) for n, v in values.items()}
    return of_latents | _ranks_of_quantities(log_joint, quantities, both, as_given(made))


def _ranks_of_quantities(
    log_joint: Tensor, quantities: Quantities | None, both: dict[str, Tensor], data: Any
) -> dict[str, Tensor]:
    values = {LOG_JOINT: log_joint}
    for name, function in (quantities or {}).items():
        if name in both or name == LOG_JOINT:
            raise ValueError(f"a quantity cannot be called {name!r}, which there is already")
        value = torch.as_tensor(function(both, data))
        if value.shape[: log_joint.dim()] != log_joint.shape:
            raise ValueError(
                f"quantity {name!r} has shape {tuple(value.shape)} and must begin with {tuple(log_joint.shape)}: a "
                "value for each draw" + " and row" * (log_joint.dim() - 1)
            )
        values[name] = value
    return {name: ranks_of(value[0], value[1:]) for name, value in values.items()}


def _check_numbers(replications: int, draws: int) -> None:
    if replications < FEWEST or draws < FEWEST:
        raise ValueError(f"ranks need {FEWEST} replications and draws or more, got {replications} and {draws}")


# -- the joint distribution -----------------------------------------------------------------------------------


def _check_joint(view: View) -> None:
    factors = view.layout.names("factor")
    if factors:
        raise ValueError(f"the factors {quote(factors)} are part of the density and cannot be simulated from")
    if not view.observed:
        raise ValueError("the model observes nothing, so there is no data to infer from")


def _log_joint(program: Program, values: Draws, call: Call, enumerate: bool, plate: str | None = None) -> Tensor:
    """log p(x, z) at draws of the latents, ``[draws]``, or of each row of a plate, ``[draws, rows]``."""

    def read(layout: Layout, runs: list[Recorder], k: int) -> dict[str, Tensor]:
        depth = layout.nesting + 1
        keep = {-depth, *(dim for s in layout.model.values() for name, dim, _ in s.plates if name == plate)}
        totals = []
        for run in runs:
            sites, terms = marginalise(run.scored)
            total = torch.zeros(())
            for log_prob in [*map(pointwise_log_prob, sites), *(t.log_prob for t in terms)]:
                log_prob = log_prob.reshape((1,) * (depth - log_prob.dim()) + log_prob.shape)
                drop = [d for d in range(-depth, 0) if d not in keep]
                total = total + (log_prob.sum(drop) if drop else log_prob)
            totals.append(total)
        return {LOG_JOINT: torch.cat(totals)}

    return replay(program, values, call, read, enumerate=enumerate)[LOG_JOINT]


def _rows_first(value: Tensor, site: Site, plate: str | None, lead: int = 0) -> Tensor:
    """The dim of a plate moved to the front, behind ``lead`` others."""
    (dim,) = (dim for name, dim, _ in site.plates if name == plate)
    return value.movedim(lead + len(site.batch) + dim, lead)


# -- the draws of an inference --------------------------------------------------------------------------------


def _independent(result: Posterior | Draws, truth: Draws, draws: int) -> tuple[dict[str, Tensor], float]:
    """Nearly independent draws, at most ``draws``, and the effective sample size of chains."""
    size = float("inf")
    if isinstance(result, Mapping):
        values = {str(n): torch.as_tensor(v).detach().cpu() for n, v in result.items()}
    else:
        if result.draws is not None:
            size = _effective(result.draws)
        values = result.sample(None if result.draws is not None else draws)
    values = {n: v for n, v in values.items() if n in truth}
    wrong = [n for n, v in values.items() if v.shape[1:] != truth[n].shape]
    if wrong or not values:
        shapes = {n: tuple(v.shape) for n, v in truth.items()}
        raise ValueError(
            "infer must give a posterior or draws {site: [draws, *shape]} of the model's latents, which are "
            f"{shapes}, and gave {({n: tuple(v.shape) for n, v in values.items()}) or type(result).__name__}"
        )
    held = min(len(v) for v in values.values())
    if held < draws:
        raise ValueError(f"infer gave {held} draws, fewer than draws={draws}: let it draw more, or rank among fewer")
    keep = max(1, min(draws, int(size)) if np.isfinite(size) else draws)
    index = evenly(held, keep)
    return {n: v[index] for n, v in values.items()}, size


def _effective(chains: Draws) -> float:
    """The smallest effective sample size of the bulk, of some numbers of the sites."""
    import arviz

    smallest = float("inf")
    for value in chains.values():
        flat = columns(value)
        moves = (flat != flat[:1, :1]).any(0).any(0).nonzero().squeeze(-1)  # others are fixed by the support
        most = max(1, ENTRIES // len(chains))
        for i in moves[evenly(len(moves), most)].tolist():
            smallest = min(smallest, float(np.nan_to_num(arviz.ess(flat[..., i].numpy(), method="bulk"), nan=1.0)))
    return smallest


def _spread(rank: Tensor, fewer: int, draws: int) -> Tensor:
    """A rank among ``fewer`` draws as one among ``draws``, at random, so that uniform ranks stay uniform."""
    return rank if fewer == draws else (to_uniform(rank, fewer) * (draws + 1)).long().clamp(max=draws)
