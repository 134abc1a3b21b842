"""The energy of a model over its unconstrained latents: what samplers, MAP and Laplace are functions of."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import IndependentTransform, identity_transform
from torch.fx.traceback import annotate

from .data import call_with
from .density import first_bad_site
from .enumeration import enumerating, marginalise
from .sites import Recorder, anywhere, draw_or_any, inspect_sites, quote, site_log_prob
from .types import Draws, Model


def _median(site: Any) -> Tensor:
    try:
        return init_to_median(site)
    except NotImplementedError:  # improper
        return anywhere(site)


def _continuous(init: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """Discrete latents are summed out, so any value of theirs does."""
    return lambda site: draw_or_any(site) if site["fn"].support.is_discrete else init(site)


def _start(site: Any) -> Tensor:
    """What the model itself proposes, as ``bayesian`` does for weights; else the median."""
    propose = (site["infer"] or {}).get("start")
    return propose() if propose else _median(site)


INITS = {"prior": draw_or_any, "median": _median, "uniform": anywhere, "start": _start}


class Energy:
    r"""The potential of a model over its unconstrained latents, with all that a sampler needs.

    .. math:: U(v) = -\log p(x, T(v)) - \log \lvert \det J_T(v) \rvert

    Arguments:
        model: a callable with Pyro sites; its discrete latents are summed out.
        batch: as for ``fit``.

    Attributes:
        transforms: latent site to the transform T from unconstrained to constrained values.
        layout: the sites of the model.

    Raises:
        ValueError: for a discrete latent of infinitely many values, or one whose support depends on another.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> energy = Energy(lambda: pyro.sample("s", dist.Exponential(1.0)), None)
        >>> energy({"s": torch.tensor(0.0)})  # s = 1: log-density -1, log-Jacobian 0
        tensor(1.)
    """

    def __init__(self, model: Model, batch: Any) -> None:
        self.model = model
        self.batch = batch
        self.layout = inspect_sites(model, None, batch)
        again = inspect_sites(model, None, batch)
        self.transforms: dict[str, Any] = {}
        self.enumerated: list[str] = []
        for name in self.layout.names("latent"):
            support = self.layout.model[name].support
            if support.is_discrete:
                if not self.layout.model[name].enumerable:
                    raise ValueError(
                        f"site '{name}' is discrete and has no finite list of values to sum over, so the energy has no "
                        "gradient in it: sum it out by hand, give it bounds, or fit with svi"
                    )
                self.enumerated.append(name)
                continue
            if not _same(support, again.model[name].support):
                raise ValueError(
                    f"the support of site '{name}' depends on another latent: sample it on a fixed support and "
                    "transform it with pyro.deterministic"
                )
            self.transforms[name] = biject_to(support)
        if not self.transforms:
            besides = f" besides {quote(self.enumerated)}, which are summed out" if self.enumerated else ""
            raise ValueError(f"the model has no latent site{besides}, so there is nothing to sample")

    def __call__(self, v: Draws, batch: Any = None) -> Tensor:
        """The energy, a scalar in nats, at unconstrained values; on another batch where one is given."""
        values = self.constrain(v)
        sites, terms = marginalise(self._run(values, self.batch if batch is None else batch).scored)
        log_prob: Any = 0.0
        for site in sites:
            with annotate({"site": site["name"]}):  # so that a captured graph knows whose an op is
                log_prob = log_prob + site_log_prob(site).sum()
        for term in terms:
            log_prob = log_prob + (term.log_prob * term.scale).sum()
        for name, transform in self.transforms.items():
            if not _is_identity(transform):
                log_prob = log_prob + transform.log_abs_det_jacobian(v[name], values[name]).sum()
        return -log_prob

    def _run(self, values: Draws, batch: Any) -> Recorder:
        args, kwargs = call_with(batch)
        with ExitStack() as stack:
            if self.enumerated:
                stack.enter_context(enumerating(self.layout.nesting))
            recorder = stack.enter_context(Recorder(values))
            self.model(*args, **kwargs)
        return recorder

    def constrain(self, v: Draws) -> dict[str, Tensor]:
        """Unconstrained values, with any leading dims, to the values that the model samples."""
        return {name: transform(v[name]) for name, transform in self.transforms.items()}

    def unconstrain(self, values: Draws) -> dict[str, Tensor]:
        """The inverse of :meth:`constrain`."""
        return {name: transform.inv(values[name]) for name, transform in self.transforms.items()}

    def init(self, strategy: str = "median", tries: int = 100) -> dict[str, Tensor]:
        """A point of finite energy and finite gradient.

        Arguments:
            strategy: ``"prior"`` (a draw), ``"median"`` (of draws from the prior), ``"uniform"`` (in (-2, 2),
                unconstrained) or ``"start"`` (what the site's ``infer={"start": function}`` gives, else the median).

        Raises:
            ValueError: for an unknown strategy, or where no such point is found.
        """
        if strategy not in INITS:
            raise ValueError(f"unknown init {strategy!r}; known are {', '.join(INITS)}")
        args, kwargs = call_with(self.batch)
        for attempt in range(tries):
            init = INITS[strategy] if attempt < tries // 2 else anywhere
            with torch.no_grad(), Recorder() as r, InitMessenger(_continuous(init)):
                self.model(*args, **kwargs)
            values = {n: r.sites[n]["value"].detach() for n in self.transforms}
            v = {n: x.detach().clone().requires_grad_() for n, x in self.unconstrain(values).items()}
            energy = self(v)
            gradients = torch.autograd.grad(energy, list(v.values()), allow_unused=True)
            if all(torch.isfinite(t).all() for t in (energy, *(g for g in gradients if g is not None))):
                return {n: x.detach() for n, x in v.items()}
        bad = first_bad_site(self.model, None, self.batch)
        raise ValueError(
            f"no starting point with a finite density in {tries} tries"
            + (f"; look at site {bad}" if bad else "; is the data inside the support of the likelihood?")
        )


def _is_identity(transform: Any) -> bool:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform == identity_transform


def _same(a: Any, b: Any) -> bool:
    """Whether two constraints are alike, bounds included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, constraints.Constraint):
        return vars(a).keys() == vars(b).keys() and all(_same(vars(a)[k], vars(b)[k]) for k in vars(a))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
