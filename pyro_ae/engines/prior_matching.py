"""Priors with parameters, tuned until what the model draws from them is distributed as it should be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..critics import Distance
from ..data import Call, as_rows
from ..particles import gather, run_particles
from ..program import Program, validation
from ..runtime import find_device, seeded
from ..sites import Layout, Recorder, is_deterministic, is_latent, quote, site_log_prob
from ..types import Model
from .run import NonFiniteError
from .stream import Stream

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
    samples: int = 128,
    lr: float = 0.05,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.RMSprop,
    batch_size: int | None = None,
    device: str | torch.device = "auto",
    seed: int | None = None,
    progress: bool = True,
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
        steps: of the optimiser.
        samples: of the prior at each step; as many of the target.
        lr: learning rate.
        optimizer: of the parameters.
        batch_size: rows of a step; all by default.
        device, seed, progress: as for ``fit``.

    Returns:
        The history: ``"step"`` and ``"distance"``, as it was before each step.

    Raises:
        ValueError: for a prior without parameters, or with some that are no module's; a latent or a likelihood that is
            not reparameterised; an unknown site; samples of another size than the site's; a distance that is infinite.

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
    history: dict[str, list[float]] = {"step": [], "distance": []}
    with seeded(seed):
        calls = _calls(data, batch_size, find_device(device))
        first = next(calls)
        program = Program(model, None, plate=None, device=find_device(device))
        program.build(first)
        with program.active(), validation(False), tqdm(range(steps), "match_prior", disable=not progress) as bar:
            compared = _find_site(program.layout, site)
            parameters = _prior_parameters(program, first, compared)
            descent = optimizer(parameters, lr=lr)
            for step in bar:
                call = next(calls)
                fixed = distance
                if hasattr(distance, "fitted"):
                    with torch.no_grad():
                        pair = _pair(program, call, compared, samples, target)
                    with torch.enable_grad():
                        fixed = distance.fitted(*pair)
                value = fixed(*_pair(program, call, compared, samples, target))
                gradients = torch.autograd.grad(value, parameters, allow_unused=True)
                if not all(torch.isfinite(t).all() for t in (value, *gradients) if t is not None):
                    raise NonFiniteError(
                        f"the distance or its gradient is not finite at step {step}: {value.item():.4g}. Try a smaller "
                        f"lr than {lr:.3g}, or look at the draws of site '{compared}' and of the target"
                    )
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                descent.step()
                history["step"].append(step)
                history["distance"].append(value.item())
                bar.set_postfix_str(f"distance {value.item():.4g}", refresh=False)
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(False)
    return history


def _calls(data: Any, batch_size: int | None, device: torch.device) -> Iterator[Call]:
    if callable(data):
        if batch_size is not None:
            raise ValueError("data that a function gives have no batches: leave out batch_size")
        while True:
            yield as_rows(data()).to(device).call()
    rows = as_rows(data)
    rows.check_batch_size(batch_size)
    stream = Stream(rows.to(device), batch_size, device)
    while True:
        yield next(stream)


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


def _prior_parameters(program: Program, call: Call, compared: str) -> list[Tensor]:
    """What can be trained in the densities of the latents that come before a site."""
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
    return list(found.values())


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
