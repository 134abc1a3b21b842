"""Whether data that the model replicates look like those observed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ..data import Call, Rows
from ..particles import chunk_size
from ..program import validation
from ..runtime import seeded
from ..sites import quote
from .conversion import observed_values
from .groups import View, at_draws, from_prior, look

if TYPE_CHECKING:
    from ..posterior import Posterior

Statistic: TypeAlias = Callable[[Tensor], Tensor]
"""A function of one data set's values of a site, or of a vector of those that are there where some are missing."""

STATISTICS: dict[str, Statistic] = {
    "mean": lambda y: y.mean(),
    "sd": lambda y: y.std(),
    "min": lambda y: y.amin(),
    "max": lambda y: y.amax(),
    "zeros": lambda y: (y == 0).to(y.dtype).mean(),
}
"""By name; ``"zeros"`` is the share of them."""


@dataclass(frozen=True)
class PredictiveCheck:
    """Statistics of the observed data, and of data that the model replicates.

    Attributes:
        observed: statistic, such as ``"max(y)"``, to its value on the data.
        replicated: statistic to its values on replicated data, ``[draws]``.
        p_values: statistic to twice the smaller share of replicates on either side of the observed value, at most 1.
    """

    observed: dict[str, float]
    replicated: dict[str, Tensor]
    p_values: dict[str, float]

    def ok(self, level: float = 0.05) -> bool:
        """Whether every statistic is where replicated ones are, by Bonferroni's method."""
        return all(p * len(self.p_values) > level for p in self.p_values.values())

    def __str__(self) -> str:
        width = max(map(len, self.observed))
        lines = [f"{'statistic':<{max(width, 9)}}  observed  replicated, 5% to 95%      p"]
        for name in sorted(self.p_values, key=lambda n: self.p_values[n]):
            low, high = self.replicated[name].double().quantile(torch.tensor([0.05, 0.95]).double()).tolist()
            span, p = f"{low:.4g} to {high:.4g}", self.p_values[name]
            lines.append(f"{name:<{max(width, 9)}}  {self.observed[name]:>8.4g}  {span:>22}  {p:>7.2g}")
        return "\n".join(lines)


def predictive_check(
    posterior: Posterior,
    statistics: Mapping[str, Statistic] | Iterable[str | Statistic] | None = None,
    *,
    data: Any = None,
    draws: int = 500,
    prior: bool = False,
    seed: int = 0,
) -> PredictiveCheck:
    r"""Whether statistics of the data are where the model puts those of data that it replicates.

    .. math:: 2 \min\big( P(T(x^{rep}) \ge T(x)),\; P(T(x^{rep}) \le T(x)) \big), \qquad x^{rep} \sim p(x^{rep} \mid x)

    The data are used twice, to fit and to check, so that p-values of a model that is right are nearer to 1/2 than
    uniform ones, and those of statistics that the model has a parameter for see nothing. What is missing is left out of
    the replicates too.

    References:
        Posterior Predictive Assessment of Model Fitness via Realized Discrepancies (Gelman, Meng and Stern, 1996)
        https://www3.stat.sinica.edu.tw/statistica/oldpdf/a6n41.pdf

    Arguments:
        posterior: of any engine.
        statistics: name to a function of the values ``[*shape]`` of one data set at an observed site, or names and
            functions; names are mean, sd, min, max and zeros. By default these, zeros only where there are counts.
            Where values are missing, a function is given those that are there, as a vector.
        data: rows; those of the fit by default.
        draws: how many data sets are replicated.
        prior: whether the latents are drawn from the prior in place of the posterior.
        seed: of the replicates; the global random states stay as they were.

    Raises:
        ValueError: for a model that observes nothing, or an unknown statistic; for one that is not a single number, or
            is NaN; for too few draws; for a prior that cannot be drawn from.

    Example:
        >>> from pyro_ae import fit, svi
        >>> from pyro_ae.models import ppca
        >>> model, guide, x = ppca.example()
        >>> posterior = fit(model, x, guide=guide, method=svi(steps=10), seed=0, progress=False)
        >>> list(predictive_check(posterior).p_values)
        ['mean(x)', 'sd(x)', 'min(x)', 'max(x)']
    """
    if draws < 20:
        raise ValueError(f"p-values need 20 draws or more, got {draws}")
    chosen = None if statistics is None else _named(statistics)
    program, rows = posterior.program, posterior._rows(data)
    batch = rows.call()
    assert isinstance(rows, Rows)  # a DataLoader has no call
    with seeded(seed), torch.no_grad(), program.active(), validation(False):
        held = None if posterior.draws is None else posterior.sample(posterior._at_most(draws), data)
        view = look(program, batch, None if held is None else {n: v[None] for n, v in held.items()})
        if not view.observed:
            raise ValueError("the model observes nothing, so there is nothing to replicate")
        observed = {name: value.cpu() for name, value in observed_values(view, rows).items()}
        at_data = dict(_evaluate(chosen, observed, {n: v[None] for n, v in observed.items()}))
        found: dict[str, list[Tensor]] = {name: [] for name in at_data}
        for part in _replicates(posterior, view, batch, None if prior else held, draws, prior):
            for name, value in _evaluate(chosen, observed, part):
                found[name].append(value)
    replicated = {name: torch.cat(values) for name, values in found.items()}
    return PredictiveCheck(
        {name: float(value) for name, value in at_data.items()},
        replicated,
        {name: _p_value(value, at_data[name]) for name, value in replicated.items()},
    )


def _named(statistics: Mapping[str, Statistic] | Iterable[str | Statistic]) -> dict[str, Statistic]:
    if isinstance(statistics, Mapping):
        return dict(statistics)
    found: dict[str, Statistic] = {}
    for statistic in [statistics] if isinstance(statistics, str) else statistics:
        name = statistic if isinstance(statistic, str) else getattr(statistic, "__name__", type(statistic).__name__)
        if isinstance(statistic, str) and name not in STATISTICS:
            raise ValueError(f"unknown statistic {name!r}; known are {quote(STATISTICS)}, or a function")
        if name in found:
            raise ValueError(f"two statistics are called {name!r}: give a mapping of names to functions")
        found[name] = STATISTICS[name] if isinstance(statistic, str) else statistic
    if not found:
        raise ValueError(f"there is no statistic to check; known are {quote(STATISTICS)}")
    return found


def _replicates(
    posterior: Posterior, view: View, batch: Call, held: dict[str, Tensor] | None, draws: int, prior: bool
) -> Iterator[dict[str, Tensor]]:
    """Site to ``[k, *shape]`` of replicated data, in parts that fit into memory."""
    draws = draws if held is None else len(next(iter(held.values())))
    size = chunk_size(elements=sum(view.layout.model[n].shape.numel() for n in view.observed))
    for start in range(0, draws, size):
        k = min(size, draws - start)
        if prior:
            part = from_prior(posterior.program, batch, view, ["prior_predictive"], k)
            if isinstance(part, str):
                raise ValueError(f"data cannot be replicated from the prior: {part}")
            yield part["prior_predictive"]
        else:
            some = None if held is None else {n: v[start : start + k] for n, v in held.items()}
            yield at_draws(posterior.program, batch, view, ["posterior_predictive"], some, k)["posterior_predictive"]


def _evaluate(
    chosen: dict[str, Statistic] | None, observed: dict[str, Tensor], values: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Each statistic of each site, ``[k]``, at values ``[k, *shape]`` where the observed ones are not missing."""
    for site, value in values.items():
        there = ~observed[site].isnan()
        if not there.any():
            continue
        data = observed[site][there]
        if not there.all():
            value = value[:, there]
        if not value.is_floating_point():
            value = value.to(torch.get_default_dtype())
        for name, statistic in (_defaults(data) if chosen is None else chosen).items():
            found = _apply(statistic, value)
            if found.shape != value.shape[:1] or found.isnan().any():
                what = "NaN" if found.shape == value.shape[:1] else f"of shape {tuple(found.shape[1:])}"
                raise ValueError(
                    f"statistic {name!r} of site '{site}' must be a number for each data set, and is {what}"
                )
            yield f"{name}({site})", found


def _defaults(data: Tensor) -> dict[str, Statistic]:
    counts = bool((data == data.round()).all() & (data >= 0).all() & (data > 1).any())
    few = [] if data.numel() > 1 else ["sd", "min", "max"]
    return {n: f for n, f in STATISTICS.items() if n not in few and (n != "zeros" or counts)}


def _apply(statistic: Statistic, values: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that an operation is slow under vmap
        try:
            return torch.vmap(statistic)(values)
        except (RuntimeError, ValueError, TypeError):  # it looks at values, or gives a float
            return torch.stack([torch.as_tensor(statistic(value)) for value in values])


def _p_value(replicated: Tensor, observed: Tensor) -> float:
    sides = torch.stack([replicated >= observed, replicated <= observed]).sum(1)
    return min(1.0, 2 * (1 + int(sides.min())) / (1 + len(replicated)))
