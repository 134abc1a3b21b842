"""Discrete latents with an approximate gradient: straight-through and Gumbel-softmax samplers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent, constraints
from torch.nn.functional import one_hot, softplus

from .density import Weights
from .estimators import pathwise
from .types import Bound


@dataclass(frozen=True)
class gumbel:
    r"""Draws of OneHotCategorical and Bernoulli sites relaxed to the inside of the simplex or interval.

    .. math:: z = \text{softmax}\big((\log \pi + g) / \tau\big), \qquad g_i \sim \text{Gumbel}(0, 1)

    The densities are extended linearly in z. So the loss is that of a relaxed model, and no bound for the discrete
    one; with a low temperature it is near it, and its gradient noisy. What is evaluated after the fit is the discrete
    model.

    References:
        Categorical Reparameterization with Gumbel-Softmax (Jang, Gu and Poole, 2017) https://arxiv.org/abs/1611.01144

    Arguments:
        temperature: positive; a draw is nearly one-hot for a low one.

    Raises:
        ValueError: for a temperature that is not positive; when called, for other sites without a reparameterised
            sampler.

    Example:
        >>> gumbel(0.5)
        gumbel(temperature=0.5)
    """

    temperature: float = 0.67

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"the temperature must be positive, got {self.temperature!r}")

    def handler(self) -> AbstractContextManager:
        return _Relaxing(self.temperature, hard=False)

    def __call__(self, bound: Bound, weights: Weights) -> Tensor:
        return pathwise(bound, weights)


@dataclass(frozen=True)
class straight_through:
    r"""Discrete draws of OneHotCategorical and Bernoulli sites, with the gradient of relaxed ones.

    .. math:: z = \text{onehot}(\arg\max_i \log \pi_i + g_i), \qquad
        \nabla z := \nabla \, \text{softmax}\big((\log \pi + g) / \tau\big)

    The loss is the discrete model's own bound; its gradient is biased.

    References:
        Categorical Reparameterization with Gumbel-Softmax (Jang, Gu and Poole, 2017) https://arxiv.org/abs/1611.01144

    Arguments:
        temperature: positive.

    Raises:
        ValueError: for a temperature that is not positive; when called, for other sites without a reparameterised
            sampler.

    Example:
        >>> straight_through()
        straight_through(temperature=1.0)
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"the temperature must be positive, got {self.temperature!r}")

    def handler(self) -> AbstractContextManager:
        return _Relaxing(self.temperature, hard=True)

    def __call__(self, bound: Bound, weights: Weights) -> Tensor:
        return pathwise(bound, weights)


class _Relaxing(Messenger):
    """Give discrete latents a sampler with a gradient, and a density that is linear in their value."""

    def __init__(self, temperature: float, hard: bool) -> None:
        super().__init__()
        self.temperature, self.hard = temperature, hard

    def _pyro_sample(self, msg: Any) -> None:
        enumerated = bool(msg["infer"]) and msg["infer"].get("enumerate") == "parallel"
        if not msg["is_observed"] and not enumerated and not getattr(msg["fn"], "has_rsample", True):
            msg["fn"] = _relaxed(msg["fn"], self.temperature, self.hard)


def _relaxed(fn: Any, temperature: float, hard: bool) -> Any:
    if isinstance(fn, Independent):
        inside = _relaxed(fn.base_dist, temperature, hard)
        return fn if inside is fn.base_dist else dist.Independent(inside, fn.reinterpreted_batch_ndims)
    if isinstance(fn, torch.distributions.OneHotCategorical):
        return _OneHot(fn.logits, temperature, hard)
    if isinstance(fn, torch.distributions.Bernoulli):
        return _Binary(fn.logits, temperature, hard)
    return fn


class _Relaxed(dist.TorchDistribution):
    arg_constraints: ClassVar[dict] = {}
    has_rsample = True

    def __init__(self, logits: Tensor, temperature: float, hard: bool, batch: torch.Size, event: torch.Size) -> None:
        self.logits, self.temperature, self.hard = logits, temperature, hard
        super().__init__(batch, event, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        shape = torch.Size(batch_shape)
        return type(self)(self.logits.expand(shape + self.event_shape), self.temperature, self.hard)  # type: ignore

    def _noise(self, sample_shape: Any) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        tiny = torch.finfo(self.logits.dtype).tiny
        return torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device).clamp(tiny, 1 - 1e-7)


class _OneHot(_Relaxed):
    support = constraints.independent(constraints.unit_interval, 1)

    def __init__(self, logits: Tensor, temperature: float, hard: bool) -> None:
        super().__init__(logits.log_softmax(-1), temperature, hard, logits.shape[:-1], logits.shape[-1:])

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        gumbel = -torch.log(-torch.log(self._noise(sample_shape)))
        soft = torch.softmax((self.logits + gumbel) / self.temperature, -1)
        return one_hot(soft.argmax(-1), soft.shape[-1]) + (soft - soft.detach()) if self.hard else soft

    def log_prob(self, value: Tensor) -> Tensor:
        return (self.logits * value).sum(-1)


class _Binary(_Relaxed):
    support = constraints.unit_interval

    def __init__(self, logits: Tensor, temperature: float, hard: bool) -> None:
        super().__init__(logits, temperature, hard, logits.shape, torch.Size())

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        noise = self._noise(sample_shape)
        soft = torch.sigmoid((self.logits + noise.log() - torch.log1p(-noise)) / self.temperature)
        return (soft > 0.5) + (soft - soft.detach()) if self.hard else soft

    def log_prob(self, value: Tensor) -> Tensor:
        return self.logits * value - softplus(self.logits)
