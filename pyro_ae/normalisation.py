"""Trained networks made Bayesian in their normalisation layers alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .bayesian import Bayesian, bayesian
from .plates import Wrapped
from .priors import normal
from .types import Guide, Model

CHANNELS_SECOND = (_NormBase, nn.GroupNorm)
"""Layers whose features are the dim after the rows; those of others are the last dims."""

KINDS = (*CHANNELS_SECOND, nn.LayerNorm, nn.RMSNorm)


class BayesianNormalisation(nn.Module):
    r"""A normalisation layer whose scale is noisy; without noise it is the layer as it was.

    .. math:: \mathrm{BNL}(h)_j = \frac{h_j - \mu_j}{\sigma_j} \, \gamma_j (1 + \epsilon_j) + \beta_j

    References:
        Make Me a BNN: A Simple Strategy for Estimating Bayesian Uncertainty from Pre-trained Models
        (Franchi et al., 2024) https://arxiv.org/abs/2312.15297

    Arguments:
        layer: one with a scale gamma, such as ``nn.LayerNorm`` or ``nn.BatchNorm2d``, for inputs ``[N, channels, ...]``
            or, of layer and RMS norms, ``[*, features]``.

    Example:
        >>> BayesianNormalisation(nn.LayerNorm(3)).noise
        Parameter containing:
        tensor([0., 0., 0.], requires_grad=True)
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        assert isinstance(layer.weight, Tensor)
        self.noise = nn.Parameter(torch.zeros_like(layer.weight))

    def forward(self, h: Tensor) -> Tensor:
        y: Tensor = self.layer(h)
        noise: Tensor = self.noise
        beta: Tensor | None = getattr(self.layer, "bias", None)
        if isinstance(self.layer, CHANNELS_SECOND):
            features = (-1, *(1,) * (h.dim() - 2))
            noise, beta = noise.view(features), None if beta is None else beta.view(features)
        return y + noise * (y if beta is None else y - beta)


def bayesian_normalisation(
    network: nn.Module, scale: float = 1.0, *, name: str = "w", event_dims: int | Sequence[int] | None = None
) -> Bayesian:
    r"""Make a trained network Bayesian by noise on the scales of its normalisation layers, to be fine-tuned.

    .. math:: \epsilon_j \sim N(0, \text{scale}^2)

    The noise of each layer is a latent site, such as ``"w.1.noise"``; one draw is one network, the same for all rows.
    Only gamma and beta of these layers are left to train; all else, running statistics too, is held as it is. The guide
    of the paper is :func:`noise_guide`; any other guide or sampler infers the noise in place of keeping its prior.

    References:
        Make Me a BNN: A Simple Strategy for Estimating Bayesian Uncertainty from Pre-trained Models
        (Franchi et al., 2024) https://arxiv.org/abs/2312.15297

    Arguments:
        network: a trained one, which a copy is taken of.
        scale: standard deviation of the noise: 1 in the paper, and in its code 0.01, drawn for each row and pixel.
        name: what the sites' names begin with.
        event_dims: of one input, as for :func:`pyro_ae.bayesian.bayesian`.

    Raises:
        ValueError: for a network without a normalisation layer that has a gamma, batch norms without running
            statistics, or a scale that is not positive.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1))
        >>> net = bayesian_normalisation(network, 0.1)
        >>> list(pyro.poutine.trace(net).get_trace(torch.zeros(5, 2)).stochastic_nodes)
        ['w.1.noise']
        >>> [name for name, p in net.named_parameters() if p.requires_grad]
        ['module.1.layer.weight', 'module.1.layer.bias']
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    network = copy.deepcopy(network).requires_grad_(False)
    made: dict[nn.Module, BayesianNormalisation] = {}  # a layer may be in two places
    for layer in network.modules():
        if isinstance(layer, KINDS) and layer.weight is not None:
            made[layer] = BayesianNormalisation(layer.eval().requires_grad_())
    if not made:
        raise ValueError(
            f"{type(network).__name__} has no normalisation layer with a scale to be made noisy, such as nn.LayerNorm "
            "or nn.BatchNorm2d (with affine=True): see pyro_ae.bayesian for its other weights"
        )
    for parent in list(network.modules()):
        for key, child in parent._modules.items():
            if child in made and not isinstance(parent, BayesianNormalisation):
                parent._modules[key] = made[child]
    network = made.get(network, network)
    noisy = {id(layer.noise) for layer in made.values()}
    fixed = [n for n, p in network.named_parameters(remove_duplicate=False) if id(p) not in noisy]
    whole = [
        n for n, m in network.named_modules() if not any(isinstance(k, BayesianNormalisation) for k in m.modules())
    ]
    return bayesian(network, normal(0.0, scale), deterministic=[*fixed, *whole], name=name, event_dims=event_dims)


def noise_guide(network: Bayesian) -> Guide:
    r"""The guide that leaves latent weights as their prior has them, so that they cost no KL divergence.

    .. math:: q(\epsilon) = p(\epsilon)

    References:
        Make Me a BNN: A Simple Strategy for Estimating Bayesian Uncertainty from Pre-trained Models
        (Franchi et al., 2024) https://arxiv.org/abs/2312.15297

    Arguments:
        network: what :func:`bayesian_normalisation` gives.

    Example:
        >>> guide = noise_guide(bayesian_normalisation(nn.LayerNorm(3), 0.1))
        >>> pyro.poutine.trace(guide).get_trace(torch.zeros(5, 3)).nodes["w.noise"]["fn"].stddev
        tensor([0.1000, 0.1000, 0.1000])
    """

    def guide(*args: Any, **kwargs: Any) -> None:
        for w in network.weights:
            pyro.sample(w.site, network._prior(w))

    return guide


def class_weighted(model: Model, weights: Tensor, *, site: str = "y") -> Model:
    r"""A classifier whose rows count in the fit by their class; what it predicts stays as it is.

    .. math:: \sum_n \eta_{y_n} \log p(y_n \mid x_n, w)

    Members of an ensemble that start at the same network differ where each favours other classes.

    References:
        Make Me a BNN: A Simple Strategy for Estimating Bayesian Uncertainty from Pre-trained Models
        (Franchi et al., 2024) https://arxiv.org/abs/2312.15297

    Arguments:
        model: one that observes a class of each row.
        weights: eta, of each class, ``[classes]``.
        site: name of the classes' site.

    Example:
        >>> import pyro.distributions as dist
        >>> model = lambda y: pyro.sample("y", dist.Categorical(logits=torch.zeros(len(y), 2)), obs=y)
        >>> weighted = class_weighted(model, torch.tensor([1.0, 7.0]))
        >>> trace = pyro.poutine.trace(weighted).get_trace(torch.tensor([0, 1]))
        >>> (trace.log_prob_sum() / torch.tensor(0.5).log()).item()
        8.0
    """
    return Wrapped(model, lambda: _ByClass(site, weights))


class _ByClass(Messenger):
    """Multiply an observed site's log-density by a weight of its value."""

    def __init__(self, site: str, weights: Tensor) -> None:
        super().__init__()
        self.site, self.weights = site, weights

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.site and msg["is_observed"]:
            y = msg["value"].long()
            msg["scale"] = msg["scale"] * self.weights.to(y.device)[y]
