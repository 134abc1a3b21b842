"""A path of densities from a start to the posterior of each row, and Markov chains that move along it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Literal, NamedTuple

import torch
from pyro.distributions import Delta
from torch import Tensor

from ..data import Call
from ..energy import Energy
from ..enumeration import enumerating, marginalise
from ..lowering.capture import CaptureError, Graph, capture
from ..particles import gather, pad_particles, part_sizes, run_particles
from ..plates import particle_plate
from ..program import Program
from ..sites import Recorder, elements_of, is_auxiliary, is_estimated, is_latent, quote, site_log_prob
from ..types import Draws
from .groups import View, look

Start = Literal["guide", "prior"]

ACCEPTANCE = 0.65
"""Of Metropolis' proposals, which the step size is adapted to."""


class Point(NamedTuple):
    """Where the chains of all rows are."""

    v: Tensor
    """Unconstrained latents, ``[K, N, d]``."""
    logs: Tensor
    """Log-densities of both ends of the path, ``[2, K, N]``."""
    slopes: Tensor
    """Their gradients, ``[2, K, N, d]``."""

    @property
    def log_ratio(self) -> Tensor:
        """Of the end to the start, ``[K, N]``."""
        return self.logs[1].double() - self.logs[0].double()


class Path:
    r"""The densities between a start and the unnormalised posterior of each row, over unconstrained latents.

    .. math:: f_\beta(v) = \pi(z)^{1 - \beta} \, p(x, z)^\beta \, |\det J_T(v)|, \qquad z = T(v)

    The densities and their gradients are captured as a graph once for each number of chains, where they can be.

    Arguments:
        program: a model whose latents all belong to rows, active.
        batch: the rows.
        start: :math:`\pi`, the guide's q(z | x) or the prior p(z).
        captured: whether there will be so many evaluations that a graph is worth its making.

    Raises:
        ValueError: for a model whose rows share a latent, or a start without a density.
    """

    def __init__(self, program: Program, batch: Call, start: Start, *, captured: bool = True) -> None:
        self.captured = captured
        self.model, self.batch = program.model.fn, batch
        self.guide = None
        if start == "guide":
            if program.guide is None:
                raise ValueError("there is no guide to start from, as the draws are those of chains: start='prior'")
            self.guide = program.guide.fn
        view = look(program, batch, None if self.guide else {})
        _check_rows(view, program.plate)
        self.layout, self.largest = view.layout, view.largest
        self.energy = Energy(self.model, batch)
        self.names = list(self.energy.transforms)
        if self.guide is not None:
            self._check_guide()
        site = self.layout.model[self.names[0]]
        self.dim, self.rows = next((dim, size) for name, dim, size in site.plates if name == program.plate)
        values = {n: view.run.sites[n]["value"] for n in self.names}
        self.shapes = {n: u.shape for n, u in self.energy.unconstrain(values).items()}
        self._graphs: dict[int, Graph | None] = {}

    def _check_guide(self) -> None:
        with Recorder() as q:
            self.guide(*self.batch.args, **self.batch.kwargs)  # type: ignore[misc]
        for name, site in q.sites.items():
            if not is_latent(site):
                continue
            if name in self.energy.enumerated:
                raise ValueError(
                    f"the guide draws '{name}', which is discrete and is summed out here: leave it out of the guide, "
                    "or start='prior'"
                )
            weighed = bool((site["infer"] or {}).get("weighed"))
            if weighed or is_auxiliary(site) or is_estimated(site) or isinstance(elements_of(site["fn"]), Delta):
                raise ValueError(
                    f"the guide has no density of site '{name}' at a given value, so no path can start there: "
                    "start='prior', or a guide with a density, such as Amortized with the head MeanField"
                )

    # -- latents as vectors ------------------------------------------------------------------------------------

    def _axis(self, name: str) -> int:
        """Where the rows are in the values of a site, behind the chains."""
        return 1 + len(self.layout.model[name].batch) + self.dim

    def pack(self, values: Draws) -> Tensor:
        """The model's values ``[K, *shape]`` as unconstrained vectors ``[K, N, d]``."""
        u = self.energy.unconstrain({n: values[n] for n in self.names})
        return torch.cat([x.movedim(self._axis(n), 1).reshape(len(x), self.rows, -1) for n, x in u.items()], -1)

    def unpack(self, v: Tensor) -> dict[str, Tensor]:
        """Vectors ``[K, N, d]`` as the unconstrained values ``[K, *shape]`` of each site."""
        out, start = {}, 0
        for name, shape in self.shapes.items():
            axis = self._axis(name)
            rest = shape[: axis - 1] + shape[axis:]
            part = v[..., start : start + rest.numel()]
            out[name] = part.reshape(len(v), self.rows, *rest).movedim(1, axis)
            start += rest.numel()
        return out

    def draw(self, chains: int) -> Tensor:
        """Independent draws of the start, ``[K, N, d]``."""
        fn, sites = (self.model, self.layout.model) if self.guide is None else (self.guide, self.layout.guide)
        try:
            runs = run_particles(fn, self.batch, chains, self.layout, sites)
        except NotImplementedError as error:
            raise ValueError(f"the prior cannot be drawn from ({error}): start='guide'") from None
        return self.pack(gather(runs, self.names, sites, chains, lambda s: s["value"]))

    # -- densities ---------------------------------------------------------------------------------------------

    def __call__(self, v: Tensor) -> Point:
        """The densities at unconstrained latents, and their gradients."""
        chains, v = len(v), v.contiguous()  # as a graph expects them
        if chains not in self._graphs:
            self._graphs[chains] = self._capture(v)
        graph = self._graphs[chains]
        logs, slopes = self._evaluate(v) if graph is None else graph(v)
        return Point(v, logs, slopes)

    def _capture(self, v: Tensor) -> Graph | None:
        """A graph of the densities, once it is seen to give what the program does at another point."""
        if not self.captured or None in self._graphs.values():
            return None
        try:
            graph = capture(self._evaluate, v, replayed=True)
            elsewhere = 0.99 * v + 0.01
            for replayed, own in zip(graph(elsewhere), self._evaluate(elsewhere), strict=True):
                scale = own.abs().nan_to_num(0.0, 0.0, 0.0).amax().clamp(min=1e-30)
                if not torch.allclose(replayed / scale, own / scale, rtol=1e-3, atol=1e-4, equal_nan=True):
                    raise CaptureError("a replay gives other values than the program does")
            return graph
        except (CaptureError, RuntimeError, NotImplementedError, TypeError) as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(
                f"the densities are no graph, so each step runs the program, which is slower: {why}", stacklevel=2
            )
        return None

    def _evaluate(self, v: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            v = v.detach().requires_grad_()
            ends = self.log_densities(v)
            slopes = [torch.autograd.grad(end.sum(), v, retain_graph=True)[0] for end in ends]
        return torch.stack(ends).detach(), torch.stack(slopes)

    def log_densities(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Of start and end, ``[K, N]`` each, with the Jacobian of the transforms."""
        chains, nesting, model = len(v), self.layout.nesting, self.layout.model
        u = self.unpack(v)
        values = self.energy.constrain(u)
        jacobian = torch.zeros(chains, self.rows)
        for name, transform in self.energy.transforms.items():
            batch = (chains, *model[name].batch)
            term = transform.log_abs_det_jacobian(u[name], values[name]).reshape(*batch, -1).sum(-1)
            jacobian = jacobian + self._per_row(pad_particles(term, model[name], nesting), nesting + 1)
        if self.layout.serial is None:
            padded = {n: pad_particles(x, model[n], nesting) for n, x in values.items()}
            start, end = self._ends(padded, chains)
        else:
            each = [self._ends({n: x[k] for n, x in values.items()}, None) for k in range(chains)]
            start, end = (torch.stack(one) for one in zip(*each, strict=True))
        return start + jacobian, end + jacobian

    def _ends(self, values: Draws, chains: int | None) -> tuple[Tensor, Tensor]:
        modelled = self._record(self.model, values, chains)
        if self.guide is None:
            start = [s for s in modelled if is_latent(s)]
        else:
            start = self._record(self.guide, values, chains)
        return self._total(start, chains), self._total(modelled, chains)

    def _record(self, fn: Callable, values: Draws, chains: int | None) -> list[dict]:
        nesting = self.layout.nesting
        with Recorder(values) as recorder, ExitStack() as stack:
            if self.energy.enumerated:  # inside the recorder, or a latent that depends on those has no dim for them
                stack.enter_context(enumerating(nesting + (chains is not None)))
            if chains is not None:
                stack.enter_context(particle_plate(chains, nesting))
            fn(*self.batch.args, **self.batch.kwargs)
        return recorder.scored

    def _total(self, sites: list[dict], chains: int | None) -> Tensor:
        """The log-density of sites, ``[K, N]``, or ``[N]`` of one chain."""
        untouched, summed = marginalise(sites)
        terms = [site_log_prob(s) for s in untouched] + [t.log_prob * t.scale for t in summed]
        depth = self.layout.nesting + (chains is not None)
        shape = (self.rows,) if chains is None else (chains, self.rows)
        return torch.stack([self._per_row(t, depth).expand(shape) for t in terms]).sum(0)

    def _per_row(self, term: Tensor, depth: int) -> Tensor:
        """A density summed over all plates but those of chains and rows."""
        term = term.reshape((1,) * (depth - term.dim()) + term.shape)
        drop = [d for d in range(-self.layout.nesting, 0) if d != self.dim]
        return term.sum(drop) if drop else term


def _check_rows(view: View, plate: str | None) -> None:
    sites = {n: s for n, s in view.layout.model.items() if s.kind != "deterministic"}
    if not view.layout.local(plate):
        raise ValueError(
            f"the model has no latent for each row, in plate '{plate}', so rows have no evidence of their own: see "
            "bridge_sampling for chains over shared latents"
        )
    shared = [n for n, s in sites.items() if all(p[0] != plate for p in s.plates)]
    if shared:
        raise ValueError(
            f"{quote(shared)} stand outside plate '{plate}' and tie the rows together, so that these have no evidence "
            "of their own: sample with nuts and use bridge_sampling, or learn them as parameters"
        )
    if not view.observed and not any(s.kind == "factor" for s in sites.values()):
        raise ValueError("the model observes nothing here, so there is no evidence: pass the rows as data")
    if view.subsampled:
        name = next(iter(view.subsampled.values()))
        raise ValueError(
            f"plate '{name}' takes a new subsample in each run: write pyro.plate('{name}', len(x)) and pass "
            "batch_size to fit"
        )


# -- chains ----------------------------------------------------------------------------------------------------


class Kernels(NamedTuple):
    """Markov kernels that leave the densities of a path invariant, one for each temperature inside it."""

    betas: list[float]
    """From 0 to 1."""
    steps: Tensor
    """Step sizes ``[len(betas) - 2, N, d]``."""
    leapfrog: int


def temperatures(count: int) -> list[float]:
    """A schedule from 0 to 1 in so many steps, in the shape of a sigmoid: slow at both ends."""
    grid = torch.sigmoid(torch.linspace(-4.0, 4.0, count + 1, dtype=torch.float64))
    return ((grid - grid[0]) / (grid[-1] - grid[0])).tolist()


def move(path: Path, at: Point, beta: float, step: Tensor, leapfrog: int) -> tuple[Point, Tensor]:
    """A transition of Hamiltonian Monte Carlo for each chain and row, and the probability of its acceptance.

    Step sizes are varied at random by up to a fifth, lest a trajectory closes in on itself.
    """
    step = step * (0.8 + 0.4 * torch.rand(*at.v.shape[:2], 1))
    kick = momentum = torch.randn_like(at.v)
    new = at
    for i in range(leapfrog):
        kick = kick + (0.5 if i == 0 else 1.0) * step * _between(new.slopes, beta)
        new = path(new.v + step * kick)
    kick = kick + 0.5 * step * _between(new.slopes, beta)
    log_p = _between(new.logs.double(), beta) - _between(at.logs.double(), beta)
    log_ratio = log_p - 0.5 * (kick.double().square() - momentum.double().square()).sum(-1)
    accept = log_ratio.clamp(max=0.0).exp().nan_to_num(0.0)  # not where a trajectory left the finite numbers
    taken = torch.rand_like(accept) < accept
    each = taken.unsqueeze(-1)
    v, slopes = torch.where(each, new.v, at.v), torch.where(each, new.slopes, at.slopes)
    return Point(v, torch.where(taken, new.logs, at.logs), slopes), accept


def _between(ends: Tensor, beta: float) -> Tensor:
    return torch.lerp(ends[0], ends[1], beta)


def adapted(path: Path, betas: list[float], chains: int, leapfrog: int) -> Kernels:
    """Kernels for each row, found in a pass of their own, so that those of what is measured are fixed.

    The step sizes follow the acceptance along the path, in units of the spread of the start.
    """
    starts = torch.cat([path.draw(k) for k in part_sizes(100, path.layout)])
    quartiles = starts.quantile(torch.tensor([0.25, 0.75], dtype=starts.dtype), 0)
    spread = ((quartiles[1] - quartiles[0]) / 1.349).clamp(min=1e-6)
    log_step = torch.full((path.rows, 1), -0.25 * math.log(starts.shape[-1]))
    at = path(starts[:chains])
    steps: list[Tensor] = []
    for beta in betas[1:-1]:
        for _ in range(max(1, 100 // len(betas)) if steps else 20):
            at, accept = move(path, at, beta, log_step.exp() * spread, leapfrog)
            log_step = log_step + 0.3 * (accept.mean(0) - ACCEPTANCE).unsqueeze(-1).to(log_step)
        steps.append(log_step.exp() * spread)
    return Kernels(betas, torch.stack(steps) if steps else starts.new_zeros(0), leapfrog)


def anneal(path: Path, kernels: Kernels, v: Tensor, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """Log-weights of chains ``[K, N]``, and the mean acceptance in each row ``[N]``.

    Arguments:
        path: of densities.
        kernels: fixed ones, or the weights are biased.
        v: draws of the start, or in ``reverse`` of the posterior.
        reverse: whether to go from the posterior to the start.
    """
    betas, last = kernels.betas, len(kernels.betas) - 1
    at, accepted = path(v), torch.zeros(path.rows, dtype=torch.float64)
    log_w = torch.zeros(v.shape[:2], dtype=torch.float64)
    for t in range(last, 0, -1) if reverse else range(1, last + 1):
        log_w = log_w + (betas[t] - betas[t - 1]) * at.log_ratio
        inside = t - 1 if reverse else t
        if 0 < inside < last:
            at, accept = move(path, at, betas[inside], kernels.steps[inside - 1], kernels.leapfrog)
            accepted = accepted + accept.mean(0)
    return log_w, accepted / max(1, last - 1)
