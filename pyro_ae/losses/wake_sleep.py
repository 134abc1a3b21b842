"""Wake-sleep: a guide that is fitted to the posterior's draws, or to the model's dreams, needs no gradient of draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ..bounds import iwae
from ..data import Call, call_with
from ..density import refuse_shared, weigh
from ..sites import Recorder, is_latent, quote, site_log_prob
from ..types import Guide, Model, Sides
from .importance import check_particles


class _Detached(Messenger):
    """Draws that carry no gradient."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["value"], Tensor) and is_latent(msg):
            msg["value"] = msg["value"].detach()


@dataclass(frozen=True)
class wake_sleep:
    r"""Reweighted wake-sleep, for latents of any kind.

    .. math::
        \theta: \; -\text{IWAE}_K, \qquad
        \phi: \; -(1 - s) \sum_k \bar w_k \log q_\phi(z_k \mid x) - s \, E_{p(x', z')} \log q_\phi(z' \mid x')

    The model maximises the importance-weighted bound. The guide is fitted to weighted draws of the posterior (wake)
    and to what the model generates (sleep). With one particle and ``sleep=1`` this is the wake-sleep algorithm.

    References:
        Reweighted Wake-Sleep (Bornschein and Bengio, 2015) https://arxiv.org/abs/1406.2751

    Arguments:
        particles: K.
        sleep: s, the weight of the sleep phase, in [0, 1].

    Raises:
        ValueError: for fewer than one particle or a weight outside [0, 1]; when called, for rows that share a latent
            and are subsampled, and for a sleep phase of a model whose observations are not among its arguments.

    Example:
        >>> from pyro_ae.models import ppca
        >>> wake_sleep(particles=5, sleep=0.5)(*ppca.example()).guide.shape
        torch.Size([])
    """

    particles: int = 5
    sleep: float = 0.0

    def __post_init__(self) -> None:
        check_particles(self.particles)
        if not 0 <= self.sleep <= 1:
            raise ValueError(f"sleep must be in [0, 1], got {self.sleep!r}")

    def __call__(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> Sides:
        batch = Call(args, kwargs)
        with _Detached():
            weights = weigh(model, guide, batch, self.particles)
        refuse_shared(weights, repr(self))
        log_w = weights.log_weights
        model_loss = -weights.scale * iwae(log_w).sum()
        guide_loss = torch.zeros_like(model_loss)
        if self.sleep < 1:
            normalised = torch.softmax(log_w.detach(), 0)
            score = weights.gather(lambda run: run.log_q)
            guide_loss = guide_loss - (1 - self.sleep) * weights.scale * (normalised * score).sum()
        if self.sleep > 0:
            guide_loss = guide_loss + self.sleep * _sleep(model, guide, batch)
        return Sides(model_loss, guide_loss)


def _sleep(model: Model, guide: Guide, batch: Call) -> Tensor:
    """Minus the guide's log-density of the latents behind rows that the model dreams, as many as there are."""
    args, kwargs = call_with(batch)
    with torch.no_grad():
        with Recorder() as awake:
            model(*args, **kwargs)
        with Recorder(generate=True) as dream:
            model(*args, **kwargs)
    seen = {n: awake.sites[n]["value"] for n in dream.generated}
    used: set[str] = set()

    def dreamt(value: Any) -> Any:
        for name, x in seen.items():
            same = value is x or (isinstance(value, Tensor) and value.shape == x.shape and torch.equal(value, x))
            if same:
                used.add(name)
                return dream.sites[name]["value"].to(value.dtype)
        return value

    args, kwargs = tuple(map(dreamt, args)), {n: dreamt(v) for n, v in kwargs.items()}
    if set(seen) - used:
        raise ValueError(
            f"the sleep phase cannot put dreams of {quote(sorted(set(seen) - used))} in the place of an argument of "
            "the model: none has the observed values. Pass what is observed as it is, without missing values, or set "
            "sleep=0"
        )
    values = {name: site["value"] for name, site in dream.sites.items()}
    with Recorder(values) as q:
        guide(*args, **kwargs)
    return -torch.stack([site_log_prob(s).sum() for s in q.scored]).sum()
