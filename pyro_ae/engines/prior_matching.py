"""Priors with parameters, tuned until what the model draws from them is distributed as it should be."""

from __future__ import annotations

import re
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..critics import Distance
from ..data import Call, LoadedRows, as_rows
from ..particles import gather, run_particles
from ..program import Program, validation
from ..runtime import find_device, seeded
from ..sites import Layout, Recorder, is_deterministic, is_latent, quote, site_log_prob
from ..types import Model
from .run import NonFiniteError
from .stream import (
    Stream,
    optimizer_state,
    random_state,
    read_state,
    set_optimizer_state,
    set_random_state,
    write_state,
)

Target: TypeAlias = Callable[..., Tensor]
"""How many, and the arguments that the model is called with, to samples ``[n, *shape]``."""


def match_prior(
    model: Model,
    data: Any,
    distance: Distance,
    target: Target | None = None,
    *,
    site: str | None = None,
    steps: int = 200,
    warmup: int = 0,
    samples: int = 128,
    lr: float = 0.05,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.RMSprop,
    batch_size: int | None = None,
    device: str | torch.device = "auto",
    seed: int | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> dict[str, list[float]]:
    r"""Tune a prior's parameters until what a model draws from it is distributed as samples of a target are.

    .. math:: \min_\psi D\Big( \int p(f \mid w)\, p_\psi(w)\, dw, \ p^\star(f) \Big)

    The parameters are those that the densities of the latents depend on, as those of ``learnable()`` do; no other is
    changed. Afterwards they are held still (``requires_grad_(False)``), so that samplers take the prior as given. The
    target's samples are of whole draws of a site, for all rows at once, such as functions at the points ``data``;
    without a target, single rows that the model draws are compared with the rows of the data.

    References:
        All You Need is a Good Functional Prior for Bayesian Deep Learning (Tran et al., 2022)
        https://arxiv.org/abs/2011.12829
        Model Selection for Bayesian Autoencoders (Tran et al., 2021) https://arxiv.org/abs/2106.06245

    Arguments:
        model: a callable with Pyro sites.
        data: as for ``fit``; or a function of nothing that gives it, called at each step, for points at random.
        distance: of samples ``[n, d]`` of the model and ``[m, d]`` of the target, such as ``wasserstein_critic()``.
        target: of a number n and what the model is called with, to samples ``[n, *shape]``, such as
            ``gaussian_process()``; or None, for the rows of the data.
        site: what is compared, of shape ``[*shape]``: an observed site, or one by ``pyro.deterministic``, such as a
            network's output without the noise; the observed site by default.
        steps: how many, with those of the warm-up.
        warmup: first steps, that only teach the distance and leave the prior as it is, for a distance that goes on
            learning; 50 of 2000 in the second paper's code.
        samples: of the prior at each step; as many of the target.
        lr: learning rate.
        optimizer: of the parameters.
        batch_size: rows of a step; all by default.
        device, seed, progress: as for ``fit``.
        checkpoint: folder that the state is written to every half minute, at the end and when interrupted; a call with
            the same settings goes on from there, to the same prior as if it had never stopped. A distance that goes on
            learning needs ``state()`` and ``resume(state)`` for it; any other is taken to start anew with each step.

    Returns:
        The history: ``"step"``; ``"distance"``, as it was before each step; and ``"warmup"``, 1 for a step that left
        the prior as it was. Interrupted (Ctrl-C), it warns, keeps the prior that it has come to, and returns as well.

    Raises:
        ValueError: for a prior without parameters, or with some that are no module's; a latent or a likelihood that is
            not reparameterised; an unknown site; samples of another size than the site's; a distance that is infinite;
            a warm-up of a distance that starts anew with each step; the checkpoint of another run.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ae import batch_plate, bayesian
        >>> from pyro_ae.divergences import energy_distance
        >>> from pyro_ae.priors import learnable
        >>> net = bayesian(nn.Linear(1, 1, bias=False), learnable())
        >>> def model(x, y=None):
        ...     f = pyro.deterministic("f", net(x).squeeze(-1))
        ...     with batch_plate(x):
        ...         pyro.sample("y", dist.Normal(f, 0.1), obs=y)
        >>> lines = lambda n, x: 3.0 * torch.randn(n, 1) * x.T
        >>> x = torch.linspace(-1.0, 1.0, 10).unsqueeze(-1)
        >>> _ = match_prior(model, x, energy_distance(), lines, site="f", seed=0, progress=False)
        >>> 2.0 < (0.5 * next(iter(net.priors[0].log_variance.values()))).exp() < 4.0
        tensor(True)
    """
    if steps < 1 or samples < 2 or not lr > 0:
        raise ValueError(f"steps must be at least 1, samples 2 and lr positive; got {steps}, {samples} and {lr}")
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup, the first of the {steps} steps, must be from 0 to {steps - 1}; got {warmup}")
    if not hasattr(distance, "state") and (warmup or (checkpoint is not None and isinstance(distance, nn.Module))):
        raise ValueError(
            f"{_shown(distance)} has no state() to go on learning from: a warm-up would teach it nothing, and a "
            "checkpoint would lack what it has learned. Leave them out, or take a distance that has one, such as "
            "distributional_sliced_wasserstein()"
        )
    file = None if checkpoint is None else Path(checkpoint) / "state.safetensors"
    with seeded(seed):
        calls = _calls(data, batch_size, find_device(device))
        first = next(calls)
        program = Program(model, None, plate=None, device=find_device(device))
        program.build(first)
        with program.active(), validation(False):
            compared = _find_site(program.layout, site)
            settings = {"site": compared, "distance": distance, "target": target, "steps": steps, "warmup": warmup}
            settings |= {"samples": samples, "lr": lr, "optimizer": optimizer, "batch_size": batch_size, "seed": seed}
            settings = {n: v if isinstance(v, int | float | None) else _shown(v) for n, v in settings.items()}
            saved = None
            if file is not None:
                settings["data"] = _fingerprint(data)
                saved = _open(file, settings)
            if saved is None:
                parameters = _prior_parameters(program, first, compared)
            else:
                program.parameters.load(saved[0]["parameters"])
                named = program.parameters.named()
                parameters = {n: named[n].requires_grad_() for n in saved[1]["parameters"]}
            descent = optimizer(list(parameters.values()), lr=lr)
            history: dict[str, list[float]] = {"step": [], "distance": [], "warmup": []}
            matching = _Matching(
                *(program, parameters, descent, distance, calls, history), site=compared, target=target, samples=samples
            )
            if saved is not None:
                matching.resume(*saved)
            interrupted = _run(matching, steps, warmup, progress, file, settings)
        for parameter in parameters.values():
            parameter.grad = None
            parameter.requires_grad_(False)
    if interrupted:
        done = len(history["step"])
        again = "; a call with the same settings and checkpoint goes on" if file is not None else ""
        warnings.warn(f"interrupted after {done} of {steps} steps: the prior is as it was then{again}", stacklevel=2)
    return history


class _Matching(NamedTuple):
    """A run, of which all but the last three changes."""

    program: Program
    parameters: dict[str, Tensor]
    descent: torch.optim.Optimizer
    distance: Distance
    calls: Iterator[Call]
    history: dict[str, list[float]]
    site: str
    target: Target | None
    samples: int

    def state(self, settings: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """A copy, for :func:`write_state`."""
        parts = {
            "parameters": self.program.parameters.state(),
            "optimizer": optimizer_state(self.descent),
            "distance": self.distance.state() if hasattr(self.distance, "state") else {},
            "stream": self.calls.state() if isinstance(self.calls, Stream) else {},
            "random": random_state(self.program.device),
        }
        history = {n: list(values) for n, values in self.history.items()}
        about = {"settings": settings, "parameters": list(self.parameters), "history": history}
        return {part: {n: v.clone() for n, v in named.items()} for part, named in parts.items()}, about

    def step(self, step: int, warming: bool) -> float:
        """The distance, and then a step of the prior, unless the distance is all that learns."""
        fixed, call = self.distance, next(self.calls)
        if hasattr(fixed, "fitted"):
            with torch.no_grad():
                pair = self.pair(call)
            with torch.enable_grad():
                fixed = fixed.fitted(*pair)
        parameters = [] if warming else list(self.parameters.values())
        with torch.set_grad_enabled(not warming):
            value = fixed(*self.pair(call))
        gradients = torch.autograd.grad(value, parameters, allow_unused=True) if parameters else ()
        if not all(torch.isfinite(t).all() for t in (value, *gradients) if t is not None):
            raise NonFiniteError(
                f"the distance or its gradient is not finite at step {step}: {value.item():.4g}. Try a smaller lr "
                f"than {self.descent.param_groups[0]['lr']:.3g}, or look at the draws of site '{self.site}' and of the "
                "target"
            )
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if not warming:
            self.descent.step()
        return value.item()

    def pair(self, call: Call) -> tuple[Tensor, Tensor]:
        return _pair(self.program, call, self.site, self.samples, self.target)

    def resume(self, parts: Mapping[str, Mapping[str, Tensor]], about: Mapping[str, Any]) -> None:
        set_optimizer_state(self.descent, parts.get("optimizer", {}))
        if hasattr(self.distance, "resume"):
            self.distance.resume(parts.get("distance", {}))
        if isinstance(self.calls, Stream):
            self.calls.resume(parts["stream"])
        set_random_state(parts["random"], self.program.device)
        self.history.update(about["history"])


def _run(
    matching: _Matching, steps: int, warmup: int, progress: bool, file: Path | None, settings: Mapping[str, Any]
) -> bool:
    """Take the steps that are left; whether it was interrupted."""
    history, latest, written = matching.history, None, time.monotonic()
    done = len(history["step"])
    with tqdm(
        total=steps, initial=done, desc="match_prior", unit="step", disable=not progress, dynamic_ncols=True
    ) as bar:
        try:
            for step in range(done, steps):
                warming = step < warmup
                value = matching.step(step, warming)
                for name, new in (("step", step), ("distance", value), ("warmup", float(warming))):
                    history[name].append(new)
                bar.set_postfix_str(f"{'warm-up, ' * warming}distance {value:.4g}", refresh=False)
                bar.update()
                if file is not None:
                    # of each step, as an interruption comes in the middle of one
                    latest = matching.state(settings)
                    if time.monotonic() - written > 30 or step == steps - 1:
                        write_state(file, *latest)
                        written = time.monotonic()
        except KeyboardInterrupt:
            if file is not None and latest is not None:
                write_state(file, *latest)
            return True
    return False


def _shown(thing: Any) -> str:
    """Without addresses, so that it is the same in each process."""
    return re.sub(r" at 0x\w+", "", repr(thing))


def _fingerprint(data: Any) -> str:
    if callable(data):
        return _shown(data)
    rows = as_rows(data)
    if isinstance(rows, LoadedRows):
        raise ValueError("a DataLoader cannot be resumed in the middle of a pass: pass tensors, or no checkpoint")
    total = 0
    for tensor in rows.rows.values():
        total = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data, total)
    return f"{rows!r}, checksum {total:08x}"


def _open(file: Path, settings: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The state in a file, if it is there, of a run with these settings."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        return None
    parts, about = read_state(file)
    theirs = about.get("settings", {})
    differ = [f"{n} is {theirs.get(n)!r} there and {v!r} here" for n, v in settings.items() if theirs.get(n) != v]
    if differ:
        raise ValueError(
            f"{file.parent} holds the state of another run, whose {'; '.join(differ)}: give a new folder, or the same "
            "settings"
        )
    return parts, about


def _calls(data: Any, batch_size: int | None, device: torch.device) -> Iterator[Call]:
    if not callable(data):
        rows = as_rows(data)
        rows.check_batch_size(batch_size)
        return Stream(rows.to(device), batch_size, device)
    if batch_size is not None:
        raise ValueError("data that a function gives have no batches: leave out batch_size")
    return (as_rows(data()).to(device).call() for _ in count())


def _find_site(layout: Layout, site: str | None) -> str:
    observed, known = layout.names("observed"), [*layout.names("observed"), *layout.names("deterministic")]
    if site is None and len(observed) == 1:
        return observed[0]
    if site is None or site not in layout.model:
        raise ValueError(
            f"say what is compared with the target, site=...: there are {quote(known) or 'none'}; name the output of a "
            "network with pyro.deterministic"
        )
    return site


def _prior_parameters(program: Program, call: Call, compared: str) -> dict[str, Tensor]:
    """What can be trained in the densities of the latents that come before a site, by name."""
    named = program.parameters.trainable()
    trainable = list(named.values())
    with torch.enable_grad(), Recorder(generate=True) as run:
        program.model(*call.args, **call.kwargs)
    names = list(run.sites)
    latents = [n for n in names[: names.index(compared)] if is_latent(run.sites[n]) and n not in run.generated]
    found: dict[int, Tensor] = {}
    stiff = []
    for name in [n for n in latents if trainable]:
        density = site_log_prob(run.sites[name]).sum()
        if not density.requires_grad:
            continue
        gradients = torch.autograd.grad(density, trainable, allow_unused=True, retain_graph=True)
        found |= {id(p): p for p, g in zip(trainable, gradients, strict=True) if g is not None}
        stiff += [] if run.sites[name]["fn"].has_rsample else [name]
    last = run.sites[compared]
    if stiff or not (is_deterministic(last) or last["fn"].has_rsample):
        raise ValueError(
            f"the draws of {quote(stiff or [compared])} have no gradient in the prior, as their distribution is not "
            "reparameterised: take a continuous one, such as ContinuousBernoulli in place of Bernoulli, or compare the "
            "network's output, site=..., in place of what is observed"
        )
    if not found or not last["value"].requires_grad:
        raise ValueError(
            f"site '{compared}' depends on no prior that has parameters to train: give the network one, as "
            "bayesian(network, learnable()) does; make a model with parameters of its own a torch.nn.Module; or "
            "requires_grad_(True) if it was matched before"
        )
    lost = [n for n, p in named.items() if id(p) in found and not isinstance(p, nn.Parameter)]
    if lost:
        raise ValueError(
            f"{quote(lost)} would be lost after the matching, as each fit has a pyro.param store of its own: make them "
            "parameters of a torch.nn.Module"
        )
    return {n: p for n, p in named.items() if id(p) in found}


def _pair(program: Program, call: Call, site: str, samples: int, target: Target | None) -> tuple[Tensor, Tensor]:
    """Draws of a site from the prior, and the target's samples: ``[n, d]`` and ``[m, d]``."""
    layout = program.inspect(call)
    runs = run_particles(program.model, call, samples, layout, layout.model, generate=True)
    drawn = gather(runs, [site], layout.model, samples, lambda s: s["value"])[site]
    with torch.no_grad():
        if target is not None:
            wanted = target(samples, *call.args, **call.kwargs).to(drawn)
            if wanted.shape != drawn.shape:
                raise ValueError(
                    f"the target's samples have shape {tuple(wanted.shape)}, and the draws of site '{site}' "
                    f"{tuple(drawn.shape)}: both must be [samples, *shape]"
                )
            return drawn.flatten(1), wanted.flatten(1)
        with Recorder() as run:
            program.model(*call.args, **call.kwargs)
    if not run.sites[site]["is_observed"] or is_deterministic(run.sites[site]):
        raise ValueError(f"site '{site}' is not observed in the data, so there are no rows to match: give a target")
    described = layout.model[site]
    size = described.shape[len(described.batch) :].numel()
    return drawn.reshape(-1, size), run.sites[site]["value"].reshape(-1, size).to(drawn)
