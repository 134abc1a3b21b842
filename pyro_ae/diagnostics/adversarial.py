"""How far small changes of a row can move its amortised posterior."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data import LoadedRows, Rows
from ..draws import draw
from ..particles import chunk_size, run_particles
from ..program import Program, validation
from ..runtime import seeded
from ..sites import pointwise_log_prob
from .rows import evenly

if TYPE_CHECKING:
    from ..posterior import Posterior


PACE = 5.0
"""The first step's length over that of the shift: a step so long is one of the power method, which soon converges."""


@dataclass(frozen=True, repr=False, eq=False)
class AdversarialShift:
    """What an attack on an amortised posterior came to; print it for a summary.

    Attributes:
        data: the rows after the attack, ``[N, *event]``.
        shift: what was added to them, ``[N, *event]``.
        kl: KL(q(z|x) || q(z|x + shift)) in nats, ``[N]``.
        random: the same for a shift of the same length in a random direction, ``[N]``.
        eps: the largest length of a shift.
    """

    data: Tensor
    shift: Tensor
    kl: Tensor
    random: Tensor
    eps: float

    def __str__(self) -> str:
        return (
            f"Shifts of length {self.eps:.3g} move the posterior of {len(self.kl)} rows by {self.kl.median():.3g} nats "
            f"in the median and {self.kl.max():.3g} at most; in a random direction by {self.random.median():.3g}."
        )

    __repr__ = __str__


def adversarial_shift(
    posterior: Posterior,
    data: Any = None,
    *,
    eps: float = 0.1,
    unit: Tensor | float | None = None,
    steps: int = 30,
    starts: int = 4,
    draws: int = 64,
    argument: int | str | None = None,
    rows: int = 200,
    seed: int = 0,
) -> AdversarialShift:
    r"""The small change of each row that moves the posterior that a guide reads off it the furthest.

    .. math:: \max_{\| d / u \|_2 \le \epsilon} KL\big(q(z \mid x) \,\|\, q(z \mid x + d)\big)

    By projected gradient ascent from random directions. The divergence is estimated from draws of q(z|x), less the
    part that is linear in d, which has mean zero; for location families whose log-density is quadratic no noise is
    left. An ascent may end below the maximum. A posterior that is right may move too: compare with the exact one, or
    with the shift in a random direction.

    References:
        Adversarial robustness of amortized Bayesian inference (Gloeckler, Deistler and Macke, 2023)
        https://arxiv.org/abs/2305.14984

    Arguments:
        posterior: with a guide that is a function of the rows, such as ``Amortized``.
        data: rows to attack; those of the fit by default.
        eps: the largest length of a shift, in units.
        unit: u, one for each element or for all; the standard deviations of the elements over the rows by default.
        steps: of the ascent, which become shorter.
        starts: directions that each row's ascent begins with; the best end counts.
        draws: of q(z|x), the same in all steps; the divergence at the end is from others.
        argument: position or name of the argument that is attacked; the first floating point tensor by default.
        rows: how many of the rows, spread evenly.
        seed: of the directions and draws; the global random states stay as they were.

    Raises:
        ValueError: for numbers out of range, a posterior without a guide or latents of the rows, or one that does not
            depend on the argument.

    Example:
        >>> from pyro_ae import fit, svi
        >>> from pyro_ae.models import ppca
        >>> model, guide, x = ppca.example()
        >>> posterior = fit(model, x, guide=guide, method=svi(steps=50), seed=0, progress=False, check=False)
        >>> found = adversarial_shift(posterior, eps=0.5)
        >>> bool((found.kl > found.random).all())
        True
    """
    for what, number in (("eps", eps), ("steps", steps), ("starts", starts), ("draws", draws), ("rows", rows)):
        if not number > 0:
            raise ValueError(f"{what} must be positive, got {number!r}")
    _check(posterior)
    held = _spread_rows(posterior, data, rows)
    name = _attacked(held, argument)
    x = held.entries[name]
    scale = _deviations(x) if unit is None else torch.as_tensor(unit, dtype=x.dtype, device=x.device)
    if not bool((scale >= 0).all()) or not bool((scale > 0).any()):
        raise ValueError(
            f"the unit of shifts must be at least 0, and above it somewhere; got {'' if unit is None else 'unit of '}"
            f"{float(scale.min()):.3g} to {float(scale.max()):.3g}" + ("; pass unit=1.0" if unit is None else "")
        )
    parts: list[tuple[Tensor, ...]] = []
    with seeded(seed), posterior.program.active(), validation(False):
        layout = posterior.program.inspect(held.take(slice(0, 1)).call(), model=False)
        size = max(1, chunk_size(layout) // (draws * starts))
        for index in torch.arange(len(x)).split(size):
            several = index.repeat(starts)
            some, units = held.take(several), scale.expand_as(x)[several]
            ascended = _ascend(posterior.program, some, name, units, eps=eps, steps=steps, starts=starts, draws=draws)
            parts.append(ascended)
    shift, kl, random = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return AdversarialShift(x.cpu() + shift, shift, kl, random, float(eps))


def _ascend(
    program: Program, rows: Rows, name: str, scale: Tensor, *, eps: float, steps: int, starts: int, draws: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best shifts of rows that are given ``starts`` times, what they come to, and what a random one does."""
    start = _of_length(torch.randn_like(scale) * (scale > 0), eps)
    u, divergence = start, _Divergence(program, rows, name, draws)
    for step in range(steps):
        gradient = divergence.gradient(scale * u)
        u = u + _of_length(scale * gradient, PACE * eps * (1 - step / steps))
        u = torch.where(_norm(u) > eps, _of_length(u, eps), u)
    found = divergence(scale * u).reshape(starts, -1)
    best = found.argmax(0) * found.shape[1] + torch.arange(found.shape[1], device=found.device)
    u, start, scale = u[best], start[best], scale[best]
    fresh = _Divergence(program, rows.take(best), name, draws)
    return scale * u, fresh(scale * u), fresh(scale * start)


def _norm(u: Tensor) -> Tensor:
    """The length of each row, ``[N, 1, ...]``."""
    return u.reshape(len(u), -1).norm(dim=1).reshape(-1, *(1,) * (u.dim() - 1))


def _of_length(u: Tensor, length: float) -> Tensor:
    return u * (length / _norm(u).clamp(min=torch.finfo(u.dtype).tiny))


class _Divergence:
    """KL(q(z|x) || q(z|x + d)) of each row, from draws that stay the same."""

    def __init__(self, program: Program, rows: Rows, name: str, draws: int) -> None:
        self.program, self.rows, self.name, self.draws = program, rows, name, draws
        values = draw(program, draws, rows.call())
        self.values = {n: v.to(program.device) for n, v in values.items()}
        self.layout = program.inspect(rows.call(), model=False)
        x = rows.entries[name].detach().clone().requires_grad_()
        log_q = self._log_q(x)
        self.log_q, self.score = log_q.detach(), _gradient(log_q, x)

    def _log_q(self, x: Tensor) -> Tensor:
        """The mean log-density of the draws, ``[N]``."""
        call = replace(self.rows, entries={**self.rows.entries, self.name: x}).call()
        guide, plate = self.program.guide, self.program.plate
        assert guide is not None
        with torch.enable_grad():
            runs = run_particles(guide, call, self.draws, self.layout, self.layout.model, self.values)
            found = []
            for site in (s for run in runs for s in run.scored):
                frame = next((f for f in site["cond_indep_stack"] if f.name == plate), None)
                if frame is not None:
                    each = pointwise_log_prob(site).movedim(frame.dim, -1)
                    found.append(each.reshape(-1, each.shape[-1]).sum(0))
            return torch.stack(found).sum(0) / self.draws

    def gradient(self, d: Tensor) -> Tensor:
        """Of the divergence in d."""
        x = (self.rows.entries[self.name] + d).detach().requires_grad_()
        return self.score - _gradient(self._log_q(x), x)

    def __call__(self, d: Tensor) -> Tensor:
        # the score has mean zero under q, and where d is small it has nearly all the noise
        return (
            self.log_q - self._log_q(self.rows.entries[self.name] + d) + (self.score * d).reshape(len(d), -1).sum(1)
        ).detach()


def _gradient(log_q: Tensor, x: Tensor) -> Tensor:
    gradient = None
    if log_q.requires_grad:
        gradient = torch.autograd.grad(log_q, x, torch.ones_like(log_q), allow_unused=True)[0]
    if gradient is None:
        raise ValueError(
            "the guide's distribution does not depend on the argument that is attacked: name another with argument="
        )
    return gradient.nan_to_num()


def _deviations(x: Tensor) -> Tensor:
    """The standard deviation of each element, of what is observed of it."""
    return (x - x.nanmean(0)).square().nanmean(0).sqrt().nan_to_num()


def _check(posterior: Posterior) -> None:
    if posterior.program.guide is None:
        raise ValueError("chains have no guide that could be attacked: fit with svi and an amortised guide")
    if not posterior.local:
        raise ValueError(
            f"an attack is on what a guide makes of each row, and no latent is inside plate '{posterior.program.plate}'"
        )


def _spread_rows(posterior: Posterior, data: Any, most: int) -> Rows:
    rows = posterior._rows(data)
    if isinstance(rows, LoadedRows):
        raise ValueError("the rows come from a DataLoader: pass those that are to be attacked as data=")
    return rows.take(evenly(rows.need_size(), most))


def _attacked(rows: Rows, argument: int | str | None) -> str:
    """Which entry is attacked."""
    known = [name for name, value in rows.rows.items() if value.is_floating_point()]
    wanted = next(iter(known), None) if argument is None else str(argument)
    if wanted not in known:
        raise ValueError(
            f"there is no argument {argument!r} of floating point rows to attack; there are "
            f"{', '.join(known) or 'none'}"
        )
    return wanted
