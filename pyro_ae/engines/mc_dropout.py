"""Dropout as a posterior: networks with units left out at random, in the fit and in its draws."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_pre_hook

from ..bayesian import Bayesian
from ..data import Call
from .ensemble import ensemble
from .stacked import StackedEnergy
from .stochastic import State

DROPPED = (nn.Linear, _ConvNd)
"""Layers whose inputs are left out."""

LAYERS = (*DROPPED, nn.Bilinear, nn.Embedding, nn.RNNBase)
"""Layers of which the first of a network is taken to be the one that sees data."""


class _Units(NamedTuple):
    """The units of one model: which each latent is a weight of, ``[d]``, and how probably each unit is kept.

    Unit 0 has the latents that are never left out.
    """

    of: Tensor
    keep: Tensor

    def kept(self, *shape: int) -> Tensor:
        """Which latents are kept, ``[*shape, d]``."""
        return (torch.rand(*shape, len(self.keep), device=self.keep.device) < self.keep)[..., self.of]


@dataclass(frozen=True, kw_only=True, repr=False)
class mc_dropout(ensemble):
    r"""Monte Carlo dropout: weights whose input units are left out at random, fitted and drawn in that way.

    .. math:: w = M \operatorname{diag}(b), \quad b_j \sim \text{Bernoulli}(1 - p), \qquad
        M = \arg\min E_b[-\log p(x, w)]

    This is variational inference in which the entropy of w counts as constant in M, the paper's approximation; the
    prior at the dropped weights gives its weight decay. Each step of Adam draws one b for all rows, as rows share the
    weights, and for each chain its own; kept inputs are not scaled up. The inputs of linear layers and the input
    channels of convolutions are left out; biases, the weights of other layers and latents that are no weights of a
    ``bayesian`` network, such as the scales of priors, are points.

    References:
        Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep Learning (Gal and Ghahramani, 2016)
        https://arxiv.org/abs/1506.02142
        Bayesian Convolutional Neural Networks with Bernoulli Approximate Variational Inference
        (Gal and Ghahramani, 2016) https://arxiv.org/abs/1506.02158

    Arguments:
        p: probability that a unit is left out, in [0, 1).
        draws: networks with units left out, of each chain's fit.
        chains: fits from starting points of their own; several make an ensemble of dropout networks.
        steps: of Adam, with a learning rate that falls to zero along a cosine.
        inputs: whether the inputs of each network's first layer, in the order in which it lists them, are left out as
            well; they are data, as a rule.

    Raises:
        ValueError: as ``sgld`` does; for a model without a ``bayesian`` network, one that has no unit to leave out, and
            weights that a prior keeps from being zero.

    Example:
        >>> mc_dropout(p=0.05, steps=500)
        mc_dropout(steps=500, p=0.05)
    """

    members: int = field(default=0, init=False, repr=False)
    chains: int = 1
    p: float = 0.1
    draws: int = 100
    inputs: bool = False
    units: _Units | None = field(default=None, init=False, repr=False, compare=False)  # of the model, once prepared

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", self.chains)
        super().__post_init__()
        if not 0 <= self.p < 1:
            raise ValueError(f"p must lie in [0, 1), got {self.p}")

    def prepare(self, energy: StackedEnergy, position: Tensor) -> mc_dropout:
        v = energy.unpack(position[0])
        values = energy.energy.constrain(v)
        networks = _networks(energy, v)
        if not networks:
            raise ValueError(
                "mc_dropout leaves out units of networks, and the model has none whose weights are latent: make one "
                "with bayesian(network), or fit with svi, sghmc or nuts"
            )
        of = {name: torch.zeros(shape, dtype=torch.long) for name, shape in energy.shapes.items()}
        count = 1
        for name, inputs in self._layers(networks):
            if name in of:  # and is not observed
                if not torch.equal(values[name], v[name]):
                    raise ValueError(
                        f"the prior of site '{name}' is not over all real numbers, and mc_dropout sets weights to "
                        "zero: give it a prior such as normal(), or make that layer deterministic=..."
                    )
                of[name] = inputs + count
                count += int(inputs.max()) + 1
        if count == 1:
            raise ValueError(
                "mc_dropout finds no unit to leave out: the first layer of each network sees data, whose units stay, "
                "and there is no other with latent weights. mc_dropout(inputs=True) leaves out those as well"
            )
        keep = torch.full((count,), 1.0 - self.p)
        keep[0] = 1.0
        prepared = copy.copy(self)
        object.__setattr__(prepared, "units", _Units(energy.pack(of).to(position.device), keep.to(position.device)))
        return prepared

    def _layers(self, networks: list[Bayesian]) -> Iterator[tuple[str, Tensor]]:
        """The sites of weights that have units to leave out, and which input each weight is of."""
        for network in networks:
            first = next((m for m in network.module.modules() if isinstance(m, LAYERS)), None)
            for w in network.weights:
                tensor = w.places[0].rpartition(".")[2]
                if tensor == "weight" and isinstance(w.owner, DROPPED) and (self.inputs or w.owner is not first):
                    yield w.site, _inputs(w.owner)

    def energies(self, state: State, energy: StackedEnergy, batch: Call, parameters: Any) -> tuple[Tensor, ...]:
        assert self.units is not None
        if self.p == 0:
            return super().energies(state, energy, batch, parameters)
        kept = self.units.kept(len(state["position"]))
        energies, gradient, *rest = energy(state["position"] * kept, batch, parameters)
        return (energies, gradient * kept, *rest)

    def finish(self, kept: Tensor) -> Tensor:
        assert self.units is not None
        units = _Units(*(t.to(kept.device) for t in self.units))
        return kept * units.kept(len(kept), self.draws)


def _networks(energy: StackedEnergy, v: dict[str, Tensor]) -> list[Bayesian]:
    """The networks that the model calls; those of a plain function are known by nothing else."""
    called: list[nn.Module] = []
    hook = register_module_forward_pre_hook(lambda module, _: called.append(module))
    try:
        with torch.no_grad():
            energy.energy(v)
    finally:
        hook.remove()
    return [module for module in called if isinstance(module, Bayesian)]


def _inputs(layer: Any) -> Tensor:
    """The number of the input unit or channel that each weight of a layer is of."""
    shape, groups = layer.weight.shape, getattr(layer, "groups", 1)
    if getattr(layer, "transposed", False):
        number = torch.arange(shape[0])[:, None]
    else:
        group = torch.arange(groups).repeat_interleave(shape[0] // groups)
        number = group[:, None] * shape[1] + torch.arange(shape[1])
    return number.view(*number.shape, *(1,) * (len(shape) - 2)).expand(shape)
