"""Laplace's approximation: a Gaussian at the maximum a posteriori, with the curvature there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch.func import grad, jacrev

from ..data import Call, LoadedRows, Rows, call_with, missing_values
from ..draws import row_chunks
from ..energy import Energy
from ..plates import replicated
from ..posterior import Posterior
from ..program import Program, validation
from ..sites import Recorder, is_deterministic, site_log_prob
from ..types import Draws, Guide, Model
from .ensemble import map_
from .run import Run
from .stacked import StackedEnergy
from .starts import unconstrained_draws

STRUCTURES = ("full", "diagonal", "kronecker", "low_rank")


@dataclass(frozen=True, kw_only=True)
class laplace:
    r"""Laplace's approximation: a Gaussian at the maximum a posteriori, with the inverse curvature as covariance.

    .. math:: q(v) = N(\hat v, (F + P)^{-1}), \qquad F = \sum_n E_{y \sim p(y \mid x_n, \hat v)} [g_n g_n^\top]

    F is the Fisher information of the likelihood, from one draw of the model for each row, and P the curvature of the
    prior. ``"kronecker"`` keeps for each matrix the factors :math:`\sum_n G_n G_n^\top` and
    :math:`\sum_n G_n^\top G_n` of its gradients, and a diagonal for vectors; ``"full"`` is the exact Hessian, for up to
    a few thousand latents. It needs the rows in the plate of the data, but for ``"full"``.

    References:
        Laplace Redux: Effortless Bayesian Deep Learning (Daxberger et al., 2021) https://arxiv.org/abs/2106.14806
        A New Perspective on Shampoo's Preconditioner (Morwani et al., 2024) https://arxiv.org/abs/2406.17748

    Arguments:
        structure: ``"full"``, ``"diagonal"``, ``"kronecker"`` or ``"low_rank"``.
        draws: from the Gaussian.
        sites: patterns of the sites that have a Gaussian; others stay at the maximum. ``("w.4.*",)`` is a last layer.
        rank: of ``"low_rank"``.
        at: how the maximum is found, or a posterior whose mean is taken to be it.

    Raises:
        ValueError: for values out of range; when run, for sites that match nothing, latents of rows, rows that tie
            together, and a full Hessian that is not positive definite or too large.

    Example:
        >>> laplace(structure="diagonal").draws
        100
    """

    structure: str = "kronecker"
    draws: int = 100
    sites: tuple[str, ...] = ("*",)
    rank: int = 20
    at: map_ | Posterior = field(default_factory=map_)

    def __post_init__(self) -> None:
        if self.structure not in STRUCTURES:
            raise ValueError(f"unknown structure {self.structure!r}; known are {', '.join(STRUCTURES)}")
        if self.draws < 1 or self.rank < 1:
            raise ValueError(f"draws and rank must be at least 1, got {self.draws} and {self.rank}")

    def __repr__(self) -> str:
        at = "a posterior" if isinstance(self.at, Posterior) else repr(self.at)
        return f"laplace(structure={self.structure!r}, draws={self.draws}, sites={self.sites!r}, at={at})"

    def __call__(self, model: Model, guide: Guide | None, run: Run) -> Posterior:
        run.refuse_checkpoint("laplace")
        run.refuse_precision("laplace")
        found = self.at(model, None, run) if isinstance(self.at, map_) else self.at
        program = Program(model, None, plate=run.plate, total=run.data.size, device=run.device)
        program.build(run.data.first(run.batch_size, run.device), minibatched=run.minibatched)
        missing = missing_values(run.data.has_missing) if isinstance(run.data, Rows) else nullcontext()
        with program.active(), validation(False), missing:  # no derivative can look for NaN
            draws = self._draws(program, found, run)
        return Posterior(
            program,
            data=run.data,
            method=repr(self),
            history=found.history,
            draws={n: v.unsqueeze(0).cpu() for n, v in draws.items()},
            interrupted=found.interrupted,
            batch_size=run.batch_size,
        )

    def _draws(self, program: Program, found: Posterior, run: Run) -> dict[str, Tensor]:
        data = run.data.to(run.device)
        energy = Energy(program.model, data.first(run.batch_size))
        stacked = StackedEnergy(energy)
        v = unconstrained_draws(found, energy)
        centre = {n: x.mean(0).to(run.device) for n, x in v.items()}
        chosen = [n for n in centre if any(fnmatchcase(n, pattern) for pattern in self.sites)]
        if not chosen:
            raise ValueError(f"sites={self.sites} match no latent; there are {', '.join(centre)}")
        curvature = _Curvature(program, energy, stacked, centre, chosen)
        if self.structure == "full":
            deviations = curvature.full(data, run, self.draws)
        else:
            gradients = curvature.row_gradients(data, run)
            prior = curvature.prior_diagonal()
            deviations = {
                "diagonal": _diagonal,
                "kronecker": _kronecker,
                "low_rank": lambda *a: _low_rank(*a, rank=self.rank),
            }[self.structure](gradients, prior, self.draws)
        with torch.no_grad():
            values = {
                n: (x + deviations[n] if n in deviations else x.expand(self.draws, *x.shape)) for n, x in centre.items()
            }
            return energy.constrain(values)


class _Observed(Messenger):
    """Let observed sites have other values, and be drawn where there are none."""

    def __init__(self, values: Draws | None = None) -> None:
        super().__init__()
        self.values = values
        self.drawn: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] or site_is_subsample(msg) or site_is_factor(msg) or is_deterministic(msg):
            return
        with torch.no_grad():
            value = msg["fn"].sample() if self.values is None else self.values[msg["name"]]
        msg["value"] = self.drawn[msg["name"]] = value


class _Curvature:
    """Derivatives of a model's energy at a point, of chosen sites alone."""

    def __init__(
        self, program: Program, energy: Energy, stacked: StackedEnergy, centre: dict[str, Tensor], chosen: list[str]
    ) -> None:
        self.program, self.energy, self.stacked, self.centre = program, energy, stacked, centre
        self.chosen = {n: centre[n] for n in chosen}

    def row_gradients(self, data: Rows | LoadedRows, run: Run) -> Iterator[dict[str, Tensor]]:
        """The gradients of each row's likelihood of a drawn value, site to ``[rows, *shape]``, in parts."""
        layout = self.program.layout
        outside = [n for n in layout.names("observed") if all(p[0] != run.plate for p in layout.model[n].plates)]
        local = layout.local(run.plate)
        if outside or local or not layout.names("observed"):
            raise ValueError(
                f"structures but 'full' need rows that are independent given the latents: in plate '{run.plate}' there "
                f"must be what is observed, and no latent. Look at {', '.join(outside + local) or 'the model'}, or use "
                "structure='full'"
            )
        size = 1 + 2**24 // sum(x.numel() for x in self.chosen.values())
        for whole in row_chunks(self.program, data, 1):
            rows = next(iter(t for t in (*whole.args, *whole.kwargs.values()) if isinstance(t, Tensor) and t.dim()))
            for start in range(0, len(rows), size):
                yield self._row_gradients(_map(whole, lambda t, s=start: t[s : s + size]))

    def _row_gradients(self, batch: Call) -> dict[str, Tensor]:
        model = self.program.model.fn
        with torch.no_grad(), Recorder(self.energy.constrain(self.centre)), _Observed() as seen:
            model(*batch.args, **batch.kwargs)

        def log_likelihood(v: dict[str, Tensor], row: Any, y: dict[str, Tensor]) -> Tensor:
            call = _map(row, lambda t: t.unsqueeze(0))
            values = self.energy.constrain(self.centre | v)
            observed = {n: t.unsqueeze(0) for n, t in y.items()}
            with Recorder(values) as recorder, _Observed(observed):
                model(*call.args, **call.kwargs)
            return sum((site_log_prob(recorder.sites[n]).sum() for n in observed), torch.zeros(()))

        row = Call(*(_mapped(part) for part in batch))
        return torch.vmap(grad(log_likelihood), (None, row, 0), randomness="different")(self.chosen, batch, seen.drawn)

    def prior_diagonal(self, probes: int = 16) -> dict[str, Tensor]:
        """The diagonal of the prior's curvature, exact where latents are independent, by random signs."""
        prior = Energy(replicated(self.program.model, 0.0), self.energy.batch)

        total = {n: torch.zeros_like(x) for n, x in self.chosen.items()}
        for _ in range(probes):
            signs = {n: torch.randint_like(x, 2) * 2.0 - 1.0 for n, x in self.chosen.items()}

            def along(v: dict[str, Tensor], signs: dict[str, Tensor] = signs) -> Tensor:
                gradient = grad(lambda u: prior(self.centre | u))(v)
                return sum(((gradient[n] * s).sum() for n, s in signs.items()), torch.zeros(()))

            product = grad(along)(self.chosen)
            total = {n: t + product[n].detach() * signs[n] / probes for n, t in total.items()}
        return {n: t.clamp(min=1e-6) for n, t in total.items()}

    def full(self, data: Rows | LoadedRows, run: Run, draws: int) -> dict[str, Tensor]:
        size = sum(x.numel() for x in self.chosen.values())
        if size > 5000:
            raise ValueError(f"a full Hessian of {size:,} latents is too large: choose sites, or another structure")
        if isinstance(data, LoadedRows):
            raise ValueError("structure='full' needs all data at once: pass tensors in place of a DataLoader")
        shapes = {n: x.shape for n, x in self.chosen.items()}

        def of(flat: Tensor) -> Tensor:
            return self.energy(self.centre | _split(flat, shapes), data.call())

        flat = torch.cat([x.reshape(-1) for x in self.chosen.values()])
        matrix = jacrev(grad(of))(flat).detach()
        factor, failed = torch.linalg.cholesky_ex(matrix.double())
        if failed:
            raise ValueError(
                "the Hessian at the point is not positive definite, so that is no maximum: look for it with more steps "
                "(at=map_(steps=...)), or use structure='kronecker', whose curvature is never negative"
            )
        noise = torch.randn(size, draws, dtype=torch.float64, device=flat.device)
        deviations = torch.linalg.solve_triangular(factor.T, noise, upper=True).T.to(flat.dtype)
        return _split(deviations, shapes)


def _split(flat: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    parts = flat.split([s.numel() for s in shapes.values()], -1)
    return {n: p.reshape(p.shape[:-1] + s) for (n, s), p in zip(shapes.items(), parts, strict=True)}


def _map(call: Call, change: Any) -> Call:
    """The rows of a call, changed; its settings as they are."""

    def one(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) else value

    args, kwargs = call_with(call)
    return Call(tuple(map(one, args)), {n: one(v) for n, v in kwargs.items()})


def _mapped(part: Any) -> Any:
    """Which entries of a call's arguments are rows, for vmap."""
    if isinstance(part, dict):
        return {n: 0 if isinstance(v, Tensor) and v.dim() else None for n, v in part.items()}
    return tuple(0 if isinstance(v, Tensor) and v.dim() else None for v in part)


def _diagonal(parts: Iterator[dict[str, Tensor]], prior: dict[str, Tensor], draws: int) -> dict[str, Tensor]:
    precision = {n: p.clone() for n, p in prior.items()}
    for part in parts:
        for n, g in part.items():
            precision[n] += g.square().sum(0)
    return {n: torch.randn(draws, *p.shape, device=p.device) * p.rsqrt() for n, p in precision.items()}


def _kronecker(parts: Iterator[dict[str, Tensor]], prior: dict[str, Tensor], draws: int) -> dict[str, Tensor]:
    left: dict[str, Tensor] = {}
    right: dict[str, Tensor] = {}
    flat: dict[str, Tensor] = {}
    for part in parts:
        for n, g in part.items():
            if g.dim() < 3:
                flat[n] = flat.get(n, 0.0) + g.square().sum(0)
                continue
            matrix = g.flatten(2)  # a kernel's inputs and places together
            left[n] = left.get(n, 0.0) + torch.einsum("nij,nkj->ik", matrix, matrix)
            right[n] = right.get(n, 0.0) + torch.einsum("nij,nik->jk", matrix, matrix)
    out = {n: torch.randn(draws, *f.shape, device=f.device) * (f + prior[n]).rsqrt() for n, f in flat.items()}
    for n, a in left.items():
        (x, u), (y, w) = torch.linalg.eigh(a), torch.linalg.eigh(right[n])
        # the factors' traces are both that of F, so the product of the two is divided by it once
        curvature = torch.outer(x.clamp(min=0.0), y.clamp(min=0.0)) / a.trace().clamp(min=1e-30)
        noise = torch.randn(draws, *curvature.shape, device=a.device) * (curvature + prior[n].mean()).rsqrt()
        out[n] = (u @ noise @ w.T).reshape(draws, *prior[n].shape)
    return out


def _low_rank(
    parts: Iterator[dict[str, Tensor]], prior: dict[str, Tensor], draws: int, *, rank: int
) -> dict[str, Tensor]:
    """Precision P + U U', where U holds the strongest directions of the gradients, in units of the prior."""
    shapes = {n: p.shape for n, p in prior.items()}
    scale = torch.cat([p.reshape(-1) for p in prior.values()]).rsqrt()
    sketch = torch.zeros(0, len(scale), device=scale.device)
    for part in parts:
        rows = torch.cat([g.flatten(1) for g in part.values()], 1) * scale
        _, values, directions = torch.linalg.svd(torch.cat([sketch, rows]), full_matrices=False)
        sketch = values[:rank, None] * directions[:rank]
    values, directions = sketch.norm(dim=1), torch.nn.functional.normalize(sketch, dim=1)
    noise = torch.randn(draws, len(scale), device=scale.device)
    shrink = 1.0 - (1.0 + values.square()).rsqrt()
    return _split((noise - (noise @ directions.T * shrink) @ directions) * scale, shapes)
