"""Predictions with their uncertainty in two parts, streamed over draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.distributions import Categorical, OneHotCategorical
from torch import Size, Tensor

from .draws import mean_of, replay
from .program import Program
from .sites import Layout, Recorder, Site, elements_of
from .types import Draws


class Prediction(NamedTuple):
    """What is predicted at a site, ``[N, *event]``; of a categorical one, ``[N, classes]`` and two entropies ``[N]``.

    Attributes:
        mean: of the likelihood, averaged over draws; the probabilities of the classes.
        aleatoric: the likelihood's own variance, averaged over draws: what more data would not take away. Of a
            categorical site the mean entropy, in nats.
        epistemic: the variance of the likelihood's mean between draws: what more data would take away. Of a
            categorical site the mutual information of class and draw, in nats.
    """

    mean: Tensor
    aleatoric: Tensor
    epistemic: Tensor


def predict_moments(program: Program, values: Draws, batch: Any) -> dict[str, Prediction]:
    """The moments of each observed site's likelihood at draws of the latents.

    Raises:
        ValueError: for a site whose likelihood has no finite mean or variance.
    """
    kinds: dict[str, bool] = {}

    def read(layout: Layout, runs: list[Recorder], k: int) -> dict[str, Tensor]:
        names = [n for n in layout.names("observed")]
        # where the model is given None, what was observed in the fit is a latent of this run
        names += [n for n in layout.names("latent") if n in program.layout.names("observed")]
        kinds.update({n: _is_categorical(runs[0].sites[n]) for n in names})
        out = {"count": torch.tensor([float(k)], dtype=torch.float64)}
        for n in names:
            fn = runs[0].sites[n]["fn"]
            event = elements_of(fn).probs.shape[-1:] if kinds[n] else fn.event_shape
            mean = _stack(runs, n, layout.model[n], k, _mean, event)
            spread = _stack(runs, n, layout.model[n], k, _spread, Size() if kinds[n] else event)
            out |= {f"mean {n}": mean.mean(0, keepdim=True), f"spread {n}": spread.mean(0, keepdim=True)}
            out[f"within {n}"] = (mean - mean.mean(0)).square().mean(0, keepdim=True)
        return out

    parts = replay(program, values, batch, read)
    weights = parts["count"] / parts["count"].sum()

    def average(parts: Tensor) -> Tensor:
        return torch.einsum("p,p...->...", weights.to(parts), parts)

    found = {}
    for name, categorical in kinds.items():
        means, aleatoric = parts[f"mean {name}"], average(parts[f"spread {name}"])
        mean = average(means)
        if categorical:
            epistemic = torch.special.entr(mean).sum(-1) - aleatoric
        else:
            epistemic = average(parts[f"within {name}"] + (means - mean).square())
        found[name] = Prediction(*(t.to(torch.get_default_dtype()) for t in (mean, aleatoric, epistemic)))
    return found


def _stack(runs: list[Recorder], name: str, site: Site, k: int, read: Callable[[dict], Tensor], event: Size) -> Tensor:
    """What is read of a site for each of ``k`` draws, ``[k, *batch, *event]``, in double precision."""
    wanted = site.batch + event
    values = [read(r.sites[name]) for r in runs]
    if len(values) == k > 1:
        return torch.stack([v.expand(wanted) for v in values]).double()
    value = values[0]  # of all draws, or of one that no draw changes
    return (value.expand(k, *wanted) if value.shape == wanted else value.reshape(k, *wanted)).double()


def _is_categorical(site: dict) -> bool:
    return isinstance(elements_of(site["fn"]), (Categorical, OneHotCategorical))


def _mean(site: dict) -> Tensor:
    if _is_categorical(site):
        return elements_of(site["fn"]).probs
    mean = mean_of(site)
    if mean is None:
        raise ValueError(f"the likelihood of site '{site['name']}' has no finite mean: use predict")
    return mean


def _spread(site: dict) -> Tensor:
    if _is_categorical(site):
        return elements_of(site["fn"]).entropy()
    try:
        variance = site["fn"].variance
    except NotImplementedError:
        variance = torch.full((), torch.inf)
    if not torch.isfinite(variance).all():
        raise ValueError(f"the likelihood of site '{site['name']}' has no finite variance: use predict")
    return variance
