"""A loss with a price on how far the guide's distribution moves with small changes of the rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data import Call, call_with
from ..schedules import Schedule, now
from ..sites import Recorder, is_latent, pointwise_log_prob, quote
from ..types import Guide, Loss, Model, Sides
from .importance import importance


@dataclass(frozen=True, eq=False)
class fisher:
    r"""Another loss, and the trace of the Fisher information of the guide with respect to the rows.

    .. math::
        \text{loss} + \beta \sum_n \text{tr} \, I(x_n), \qquad
        \text{tr} \, I(x) = E_{q(z \mid x)} \big\| \nabla_x \log q(z \mid x) \big\|^2

    To second order KL(q(z|x) || q(z|x + d)) is d' I(x) d / 2, so that no small shift of a row, such as by an adversary,
    moves the guide far. Each step takes one draw for each row of the batch. For neural posterior estimation the loss is
    ``wake_sleep(1, sleep=1.0)`` and the rows are simulated.

    References:
        Adversarial robustness of amortized Bayesian inference (Gloeckler, Deistler and Macke, 2023)
        https://arxiv.org/abs/2305.14984

    Arguments:
        weight: beta, of at least 0, or a schedule of it.
        loss: a loss of ours or of Pyro's; the ELBO of one particle by default.
        arguments: positions or names of the arguments that it is the information about; by default all that are
            floating point tensors and that the guide reads.
        unit: that the elements of the rows are measured in, such as their standard deviations, ``[*event]``.

    Raises:
        ValueError: for a negative weight; when called, for a guide that reads none of these arguments, or that cannot
            be reparameterised.

    Example:
        >>> from pyro_ae.models import ppca
        >>> fisher(0.01)(*ppca.example()).shape
        torch.Size([])
    """

    weight: Schedule
    loss: Loss = field(default_factory=importance)
    arguments: tuple[int | str, ...] | None = None
    unit: Tensor | float = 1.0

    def __post_init__(self) -> None:
        if not callable(self.weight) and self.weight < 0:
            raise ValueError(f"weight must be at least 0, got {self.weight!r}")

    def __call__(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> Tensor | Sides:
        value = getattr(self.loss, "differentiable_loss", self.loss)(model, guide, *args, **kwargs)
        penalty = now(self.weight) * fisher_trace(guide, Call(args, kwargs), self.arguments, self.unit)
        return value + penalty if isinstance(value, Tensor) else value._replace(guide=value.guide + penalty)


def fisher_trace(
    guide: Guide, batch: Any, arguments: tuple[int | str, ...] | None = None, unit: Tensor | float = 1.0
) -> Tensor:
    r"""The trace of the guide's Fisher information with respect to the rows, from one draw for each.

    .. math:: \frac{N}{B} \sum_b \big\| \nabla_x \log q(z_b \mid x_b) \big\|^2, \qquad z_b \sim q(z \mid x_b)

    Its gradient in the guide's parameters is pathwise and unbiased.

    References:
        Adversarial robustness of amortized Bayesian inference (Gloeckler, Deistler and Macke, 2023)
        https://arxiv.org/abs/2305.14984

    Arguments:
        guide: samples the latents, as a function of the rows.
        batch: as for ``fit``: ``guide(x)``, ``guide(*tuple)`` or ``guide(**dict)``.
        arguments: as for :class:`fisher`.
        unit: as for :class:`fisher`.

    Returns:
        A scalar, for the whole data set; per squared unit of the rows.

    Raises:
        ValueError: as for :class:`fisher`.

    Example:
        >>> from pyro_ae.models import ppca
        >>> _, guide, x = ppca.example()
        >>> bool(fisher_trace(guide, x) > 0)
        True
    """
    args, kwargs = call_with(batch)
    with Recorder() as drawn:
        guide(*args, **kwargs)
    _check(drawn)
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        named: dict[int | str, Any] = dict(enumerate(args))
        named.update(kwargs.items())
        rows = {name: x.detach().clone().requires_grad_() for name, x in named.items() if _chosen(name, x, arguments)}
        named |= rows
        # the draws move with the guide's parameters, and not with the rows that the density is differentiated by
        with Recorder({name: site["value"] for name, site in drawn.sites.items()}) as q:
            guide(*(named[i] for i in range(len(args))), **{name: named[name] for name in kwargs})
        log_q = torch.stack([pointwise_log_prob(s).sum() for s in q.scored]).sum()
        found = torch.autograd.grad(log_q, list(rows.values()), create_graph=keep, allow_unused=True) if rows else ()
    scores = [score for score in found if score is not None]
    if not scores:
        raise ValueError(
            f"the distribution of {quote(s['name'] for s in q.scored)} in the guide depends on none of the arguments "
            f"{', '.join(map(repr, arguments)) if arguments else 'that are floating point tensors'}, so it has no "
            "Fisher information about them: use a guide that is a function of the rows, such as Amortized"
        )
    plates = {f.name: f for s in q.scored for f in s["cond_indep_stack"] if f.vectorized}
    scale = math.prod(f.full_size / f.size for f in plates.values() if f.full_size)
    return scale * torch.stack([(score * unit).square().sum() for score in scores]).sum()


def _chosen(name: int | str, value: Any, arguments: tuple[int | str, ...] | None) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and (arguments is None or name in arguments)


def _check(drawn: Recorder) -> None:
    fixed = [s["name"] for s in drawn.scored if is_latent(s) and not getattr(s["fn"], "has_rsample", False)]
    if fixed:
        raise ValueError(
            f"the draws of {quote(fixed)} in the guide are not differentiable, so neither is its Fisher information: "
            "give these latents continuous heads, or leave them out of the guide and sum them out"
        )
