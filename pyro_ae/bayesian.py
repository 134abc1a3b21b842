"""Any network with its weights as latent sites."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.runtime import get_plates
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from .priors import Prior, as_key, everywhere, fan_in_of, normal

Priors: TypeAlias = Prior | Distribution | Mapping[str, Prior | Distribution]

STANDARD = normal()

PARTICLES = ("_particles", "num_particles_vectorized", "_num_predictive_samples")
"""The plates of particles, ours and Pyro's: the only ones that weights may be in."""


class _Weight(NamedTuple):
    """One site: a tensor of the network, which tied layers have in several places."""

    site: str
    key: str
    places: tuple[str, ...]
    owner: nn.Module
    prior: Prior


class Bayesian(nn.Module):
    """A network whose weights are latent sites of the Pyro model that calls it; see :func:`bayesian`.

    Arguments:
        module, prior, deterministic, name, start, event_dims: as for :func:`bayesian`.

    Attributes:
        module: a copy of the network, with the deterministic parameters.
        initial: the initial values of the others, as buffers.

    Example:
        >>> list(pyro.poutine.trace(Bayesian(nn.Linear(2, 1))).get_trace(torch.zeros(5, 2)).stochastic_nodes)
        ['w.weight', 'w.bias']
    """

    def __init__(
        self,
        module: nn.Module,
        prior: Priors = STANDARD,
        *,
        deterministic: Sequence[str] = (),
        name: str = "w",
        start: str = "fresh",
        event_dims: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if start not in ("fresh", "module"):
            raise ValueError(f'start is "fresh" or "module", got {start!r}')
        patterns = [deterministic] if isinstance(deterministic, str) else list(deterministic)
        fixed = _fixed(module, patterns)
        self.name, self.start = name, start
        self.event_dims = _event_dims(module) if event_dims is None else event_dims
        self.module = copy.deepcopy(module)
        self.frozen = [m for n, m in self.module.named_modules() if _refuse(n, m, n in fixed)]
        self.initial = nn.Module()
        self.weights: list[_Weight] = []
        for places, owners, parameter in _tensors(self.module):
            if fixed.isdisjoint(places):
                self._make_latent(places, owners, parameter, prior)
        learnt = {id(w.prior): w.prior for w in self.weights if isinstance(w.prior, nn.Module)}
        self.priors = nn.ModuleList(learnt.values())
        with torch.no_grad(), torch.random.fork_rng(devices=()), pyro.poutine.block():
            for w in self.weights:
                if isinstance(w.prior, nn.Module):  # which makes its parameters when it is called
                    self._prior(w)

    def _make_latent(self, places: list[str], owners: list[nn.Module], parameter: Tensor, prior: Priors) -> None:
        key, value = as_key(places[0]), parameter.detach().clone()
        self.initial.register_buffer(key, value)
        for place, owner in zip(places, owners, strict=True):
            del owner._parameters[_last(place)]
            # an attribute and no buffer, as recurrent layers keep a list of what is set as their attributes
            setattr(owner, _last(place), value.to("meta"))
        chosen = _choose(prior, places[0])
        self.weights.append(_Weight(f"{self.name}.{places[0]}", key, tuple(places), owners[0], chosen))

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        self._known_to_pyro(inputs)
        self._hold()  # whoever knows the layers of a plain function's network switches them one by one
        values = [
            pyro.sample(w.site, self._prior(w), infer={"start": partial(self._start, i)})
            for i, w in enumerate(self.weights)
        ]
        run = partial(self._run, kwargs=kwargs)
        depth = max((v.dim() - self._initial(w).dim() for w, v in zip(self.weights, values, strict=True)), default=0)
        if depth:
            return self._particles(run, values, inputs, depth)
        if len(inputs) == 1 and isinstance(self.event_dims, int) and inputs[0].dim() > self.event_dims + 1:
            # particles that another network brought, which convolutions refuse beside the rows
            leading = inputs[0].shape[: inputs[0].dim() - self.event_dims]
            out = run(values, (inputs[0].flatten(0, len(leading) - 1),))
            return tree_map(lambda y: y.unflatten(0, leading), out)
        return run(values, inputs)

    def _run(self, values: Sequence[Tensor], inputs: tuple, kwargs: dict[str, Any]) -> Any:
        named = {place: v for w, v in zip(self.weights, values, strict=True) for place in w.places}
        return functional_call(self.module, named, inputs, kwargs, tie_weights=False)

    def _particles(self, run: Callable[..., Any], values: list[Tensor], inputs: tuple, depth: int) -> Any:
        """All particles at once: weights ``[K, 1, .., 1, *shape]``, with a dim for each of the model's plates."""
        given = [p.name for p in get_plates() if p.vectorized and p.name not in PARTICLES]
        if given:
            raise ValueError(f"'{self.weights[0].site}' is inside plate '{given[0]}': call the network outside it")
        leads = [v.shape[: v.dim() - self._initial(w).dim()] for w, v in zip(self.weights, values, strict=True)]
        particles = max(lead[0] for lead in leads if len(lead) == depth)
        for w, lead in zip(self.weights, leads, strict=True):
            if lead.numel() != 1 and lead != (particles, *(1,) * (depth - 1)):
                raise ValueError(
                    f"site '{w.site}' has values of leading dims {tuple(lead)}, and the network takes one dim of "
                    f"particles with ones after it, ({particles}{', 1' * (depth - 1)}): give each particle one value"
                )
        over = [0 if len(lead) and lead[0] == particles else None for lead in leads]
        flat = [
            v.reshape(*(() if o is None else (particles,)), *self._initial(w).shape)
            for w, v, o in zip(self.weights, values, over, strict=True)
        ]
        shared, dims, rows = self._split(inputs, particles, depth)
        out = torch.vmap(run, in_dims=(over, dims), randomness="different")(flat, shared)
        ones = (1,) * (depth - 1 - rows)  # plates that the inputs are not in
        return tree_map(lambda y: y.reshape(particles, *ones, *y.shape[1:]), out) if ones else out

    def _split(self, inputs: tuple, particles: int, depth: int) -> tuple[tuple, tuple, int]:
        """Inputs, where they have the dim of the particles, and how many dims of rows there are."""
        if self.event_dims is None:
            raise ValueError(
                f"'{self.name}' gets particles, and the dims of one of its inputs cannot be told from its first layer: "
                "say how many there are, such as bayesian(..., event_dims=3) for images [channels, height, width]"
            )
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        events = [self.event_dims] * len(tensors) if isinstance(self.event_dims, int) else list(self.event_dims)
        if len(events) != len(tensors):
            raise ValueError(f"'{self.name}' has event_dims for {len(events)} tensors and was given {len(tensors)}")
        found: list[Any] = []
        dims: list[int | None] = []
        most, left = 0, iter(events)
        for x in inputs:
            over = None
            if isinstance(x, Tensor):
                rows = x.dim() - next(left)
                if rows == depth and x.shape[0] == particles:
                    over, rows = 0, rows - 1
                elif rows < 0 or rows > depth or (rows == depth and x.shape[0] != 1):
                    raise ValueError(
                        f"'{self.name}' has {particles} particles, and its input of shape {tuple(x.shape)} has "
                        f"{max(rows, 0)} dims before the {x.dim() - rows} of one input: none are shared by particles, "
                        f"up to {depth - 1} are rows, and the first of {depth} must be the particles. Say how many "
                        "dims one input has with bayesian(..., event_dims=...)"
                    )
                first = 0 if over is None else 1
                while rows > 1 and x.shape[first] == 1:  # convolutions refuse more than one
                    x, rows = x.squeeze(first), rows - 1
                most = max(most, rows)
            found.append(x)
            dims.append(over)
        return tuple(found), tuple(dims), most

    def _initial(self, w: _Weight) -> Tensor:
        return self.initial._buffers[w.key]  # type: ignore[return-value]

    def _prior(self, w: _Weight) -> Any:
        """The prior of a site, with all dims of the tensor in the event."""
        tensor = self._initial(w)
        prior = w.prior(w.site, tensor)
        if not prior.batch_shape and not prior.event_shape:
            prior = prior.expand(tensor.shape)
        left = tensor.dim() - len(prior.event_shape)
        bare = not callable(prior)  # as torch's own are, which Pyro would call
        if 0 <= left <= len(prior.batch_shape) and (left or bare):
            prior = dist.Independent(prior, left)
        if prior.event_shape != tensor.shape:
            raise ValueError(
                f"the prior of '{w.site}' is over {tuple(prior.batch_shape + prior.event_shape)}, and the tensor is "
                f"{tuple(tensor.shape)}: return a distribution of that shape; a latent scale goes in as scale[..., "
                f"{', '.join(['None'] * tensor.dim())}]"
            )
        return prior

    def _start(self, index: int) -> Tensor:
        """A value to start a sampler from."""
        w = self.weights[index]
        tensor = self._initial(w).clone()
        if self.start == "module":
            return tensor
        if isinstance(w.owner, (nn.Linear, _ConvNd)):
            bound = fan_in_of(w.owner.weight) ** -0.5
            return tensor.uniform_(-bound, bound)
        if not hasattr(w.owner, "reset_parameters"):
            return tensor
        fresh: Any = copy.deepcopy(w.owner)
        for other in self.weights:
            if other.owner is w.owner:
                setattr(fresh, _last(other.places[0]), nn.Parameter(self._initial(other).clone()))
        fresh.reset_parameters()
        return getattr(fresh, _last(w.places[0])).detach()

    def _known_to_pyro(self, inputs: tuple) -> None:
        """A plain function's network is known by what it registers; without parameters, it follows its input."""
        learns = False
        for name, p in self.named_parameters():
            if p.requires_grad:
                learns = True
                pyro.param(f"{self.name}$$${name}", p)
        x = next((x for x in inputs if isinstance(x, Tensor)), None)
        held = next(chain(self.parameters(), self.buffers()))
        if not learns and x is not None and x.device != held.device:
            self.to(x.device)

    def train(self, mode: bool = True) -> Bayesian:
        super().train(mode)
        self._hold()
        return self

    def _hold(self) -> None:
        for module in self.frozen:
            module.eval()

    def extra_repr(self) -> str:
        sizes = [self._initial(w).numel() for w in self.weights]
        lines = [f"{w.site} {list(self._initial(w).shape)}: {_shown(w.prior)}" for w in self.weights]
        learnt = sum(p.numel() for p in self.module.parameters())
        return "\n".join([*lines, f"{sum(sizes)} stochastic and {learnt} deterministic weights"])


def bayesian(
    module: nn.Module,
    prior: Priors = STANDARD,
    *,
    deterministic: Sequence[str] = (),
    name: str = "w",
    start: str = "fresh",
    event_dims: int | Sequence[int] | None = None,
) -> Bayesian:
    """Make the weights of any network latent sites of the Pyro model that calls it, outside all of its plates.

    Sites are named after the parameters, such as ``"w.0.weight"``; tied weights are one site. With particles, weights
    ``[K, 1, .., 1, *shape]``, all are run at once: inputs with the dim of the particles are mapped along it, others are
    shared, and so are keyword arguments. A network is called once in a model, as each call samples the weights.

    References:
        Bayesian Learning for Neural Networks (Neal, 1996) https://doi.org/10.1007/978-1-4612-0745-0

    Arguments:
        module: a network; a copy is taken.
        prior: a function of site name and tensor, such as ``normal()``, ``fan_in()``, ``hierarchical()``,
            ``horseshoe()`` or ``learnable()``; or a distribution of one weight; or a mapping of name patterns to those,
            of which the first that matches counts.
        deterministic: patterns of names, of parameters or submodules, that stay parameters and are trained along.
        name: what the sites' names begin with.
        start: what ``site["infer"]["start"]()`` gives to samplers: ``"fresh"``, PyTorch's default initialisation
            anew, or ``"module"``, the network's own values.
        event_dims: of one input, such as 3 for images ``[channels, height, width]``, or of each of several inputs; by
            default what the first layer takes.

    Raises:
        ValueError: for layers that mix rows or draw noise outside the deterministic part, lazy layers, a pattern that
            matches nothing, a weight without a prior; when called, for shapes that do not fit.

    Example:
        >>> from pyro_ae.priors import fan_in
        >>> net = bayesian(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), fan_in(), deterministic=["0"])
        >>> net
        Bayesian(
          w.2.weight [1, 3]: fan_in(scale=1.0)
          w.2.bias [1]: fan_in(scale=1.0)
          4 stochastic and 9 deterministic weights
          ...
    """
    return Bayesian(module, prior, deterministic=deterministic, name=name, start=start, event_dims=event_dims)


def _tensors(module: nn.Module) -> Iterator[tuple[list[str], list[nn.Module], Tensor]]:
    """Each parameter, with all its places in the network and the modules there."""
    found: dict[int, tuple[list[str], list[nn.Module], Tensor]] = {}
    seen: set[tuple[int, str]] = set()
    for name, p in module.named_parameters(remove_duplicate=False):
        owner = module.get_submodule(name.rpartition(".")[0])
        if (id(owner), _last(name)) not in seen:  # a module may be in two places too
            seen.add((id(owner), _last(name)))
            places, owners, _ = found.setdefault(id(p), ([], [], p))
            places.append(name)
            owners.append(owner)
    yield from found.values()


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern is for a parameter or submodule, or for one that it is in."""
    parts = name.split(".")
    within = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(part, pattern) for pattern in patterns for part in within)


def _fixed(module: nn.Module, patterns: list[str]) -> set[str]:
    """Names of the parameters and submodules of the deterministic part."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    if not parameters:
        raise ValueError(f"{type(module).__name__} has no parameters, so there is nothing to be made latent")
    lazy = [n for n, t in [*parameters.items(), *module.named_buffers()] if is_lazy(t)]
    if lazy:
        raise ValueError(f"'{lazy[0]}' has no shape yet: run the lazy network once, or give its layers their sizes")
    modules = {n: m for n, m in module.named_modules() if n}
    names = [*modules, *(n for n in parameters if n not in modules)]
    for pattern in patterns:
        if not any(fnmatchcase(n, pattern) for n in names):
            raise ValueError(f"deterministic={pattern!r} matches nothing; there are {', '.join(names)}")
    fixed = {n for n in names if _matches(n, patterns)}
    inner = {n: {f"{n}.{k}" for k, _ in m.named_parameters()} for n, m in modules.items()}
    return fixed | {n for n, held in inner.items() if held and held <= fixed}


def _refuse(name: str, module: nn.Module, fixed: bool) -> bool:
    """Refuse what has no density of its own for each row; and whether to hold a module in evaluation mode."""
    kind = f"'{name}' ({type(module).__name__})" if name else type(module).__name__
    if isinstance(module, _BatchNorm) or (isinstance(module, _NormBase) and module.track_running_stats):
        if fixed and not module.training and module.running_mean is not None:
            return True
        raise ValueError(
            f"{kind} mixes the rows of a batch or counts them, so the weights have no likelihood of single rows: use "
            "LayerNorm or GroupNorm, or match it by deterministic=... and put it in eval() mode with running statistics"
        )
    p = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
    if not fixed and (isinstance(module, nn.RReLU) or (isinstance(p, (int, float)) and p > 0)):
        raise ValueError(
            f"{kind} draws noise, so the density of the weights is random: leave it out or set it to 0, as "
            "the prior regularises; or match it by deterministic=..."
        )
    return False


def _event_dims(module: nn.Module) -> int | None:
    """How many dims one input has, by the first layer that is not element-wise; None where that cannot be told."""
    for m in module.modules():
        if hasattr(m, "event_dims"):  # as our own networks have, and what folds their leading dims
            return m.event_dims  # type: ignore[return-value]
        if isinstance(m, (nn.Linear, nn.Embedding)):
            return int(isinstance(m, nn.Linear))
        if isinstance(m, _ConvNd):
            return len(m.kernel_size) + 1
        if isinstance(m, nn.LayerNorm):
            return len(m.normalized_shape)
        elementwise = type(m).__module__ == "torch.nn.modules.activation" or isinstance(m, (_DropoutNd, nn.Identity))
        leaf = next(m.children(), None) is None
        if next(m.parameters(recurse=False), None) is not None or (leaf and not elementwise):
            return None
    return None


def _choose(prior: Any, name: str) -> Prior:
    """The prior of one parameter."""
    if isinstance(prior, Mapping):
        chosen = next((p for pattern, p in prior.items() if _matches(name, [pattern])), None)
        if chosen is None:
            raise ValueError(f"no prior for '{name}': the patterns are {', '.join(prior)}; add '*' for the rest")
        return _choose(chosen, name)
    if isinstance(prior, Distribution):
        if prior.batch_shape or prior.event_shape:
            raise ValueError(
                f"the prior of '{name}' has shape {tuple(prior.batch_shape + prior.event_shape)}: give a distribution "
                "of one weight, or a function (name, tensor) -> distribution over the tensor"
            )
        return everywhere(prior)
    if not callable(prior):
        raise ValueError(
            f"the prior of '{name}' is {prior!r}: give a distribution, or a function (name, tensor) -> one"
        )
    return prior


def _shown(prior: Prior) -> str:
    if isinstance(prior, nn.Module):
        return f"{type(prior).__name__}({prior.extra_repr()})"
    return getattr(prior, "__qualname__", None) or repr(prior)
