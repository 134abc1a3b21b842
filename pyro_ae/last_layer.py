"""Variational Bayesian last layers: a posterior of the last layer's weights, by a bound that draws no samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor, nn
from torch.distributions import Distribution, LowRankMultivariateNormal, MultivariateNormal, Normal, kl_divergence

from .data import Call
from .density import weigh
from .plates import batch_plate
from .sites import Recorder, elements_of, is_latent
from .types import Guide, Model, Recipe

Likelihood = Literal["regression", "discriminative", "generative"]
Covariance = Literal["diagonal", "dense", "low_rank"]
_GAUSSIAN = (Normal, MultivariateNormal, LowRankMultivariateNormal)


def _linear(features: Tensor, w: Tensor) -> Tensor:
    """Features ``[*, N, h]`` times weights ``[outputs, h]``, or of particles, ``[*, 1, outputs, h]``."""
    return features @ (w.squeeze(-3) if w.dim() > 2 else w).mT


def _variance(features: Tensor, q: Distribution) -> Tensor:
    """The variance of each output of the layer, ``[N, outputs]``."""
    if isinstance(q, MultivariateNormal):
        return torch.einsum("nh,ohg->nog", features, q.scale_tril).square().sum(-1)
    if isinstance(q, LowRankMultivariateNormal):
        factors = torch.einsum("nh,ohr->nor", features, q.cov_factor)
        return factors.square().sum(-1) + features.square() @ q.cov_diag.mT
    return features.square() @ q.variance.mT


def _with_noise(q: Distribution, noise: Tensor) -> Distribution:
    """A Gaussian with more variance: event ``[h]``."""
    if isinstance(q, MultivariateNormal):
        return MultivariateNormal(q.mean, q.covariance_matrix + noise.diag())
    if isinstance(q, LowRankMultivariateNormal):
        return LowRankMultivariateNormal(q.mean, q.cov_factor, q.cov_diag + noise)
    return dist.Normal(q.mean, (q.variance + noise).sqrt()).to_event(1)


def _divergence(q: dict, p: dict) -> Tensor:
    """KL(q || p) of a recorded site, in closed form if any is known."""
    ours, prior = q["fn"], p["fn"]
    if isinstance(elements_of(ours), _GAUSSIAN) and isinstance(elements_of(prior), Normal):
        trace = sum_rightmost(ours.variance / prior.variance, prior.event_dim)
        return trace / 2 - prior.log_prob(ours.mean) - ours.entropy()
    try:
        return kl_divergence(ours, prior)
    except NotImplementedError:
        return ours.log_prob(q["value"]) - prior.log_prob(q["value"])


class _Regression(NamedTuple):
    """What is observed: given the weights, in expectation over them, and with them integrated out."""

    features: Tensor
    noise: Tensor

    def given(self, w: Tensor) -> Distribution:
        return dist.Normal(_linear(self.features, w), self.noise.sqrt()).to_event(1)

    def expected(self, y: Tensor, q: Distribution) -> Tensor:
        return self.given(q.mean).log_prob(y) - (_variance(self.features, q) / self.noise).sum(-1) / 2

    def predictive(self, q: Distribution, samples: int) -> Distribution:
        variance = _variance(self.features, q) + self.noise
        return dist.Normal(_linear(self.features, q.mean), variance.sqrt()).to_event(1)


class _Discriminative(NamedTuple):
    features: Tensor
    noise: Tensor | None

    def given(self, w: Tensor) -> Distribution:
        logits = _linear(self.features, w)
        return dist.Categorical(logits=logits if self.noise is None else logits + _epsilon(self.noise))

    def _logits(self, q: Distribution) -> tuple[Tensor, Tensor]:
        variance = _variance(self.features, q)
        return _linear(self.features, q.mean), variance if self.noise is None else variance + self.noise

    def expected(self, y: Tensor, q: Distribution) -> Tensor:
        mean, variance = self._logits(q)
        return mean.gather(-1, y.unsqueeze(-1)).squeeze(-1) - (mean + variance / 2).logsumexp(-1)

    def predictive(self, q: Distribution, samples: int) -> Distribution:
        mean, variance = self._logits(q)
        logits = mean + variance.sqrt() * torch.randn(samples, *mean.shape, dtype=mean.dtype, device=mean.device)
        return dist.Categorical(probs=logits.softmax(-1).mean(0))


class _Generative(NamedTuple):
    features: Tensor
    noise: Tensor

    def given(self, w: Tensor) -> Distribution:
        scaled = w / self.noise.unsqueeze(-2)
        # log N(features; w_k, noise) less what is the same for all classes
        return dist.Categorical(logits=_linear(self.features, scaled) - (w * scaled).sum(-1) / 2)

    def _log_densities(self, q: Distribution) -> Tensor:
        return _with_noise(q, self.noise).log_prob(self.features.unsqueeze(-2))

    def expected(self, y: Tensor, q: Distribution) -> Tensor:
        own = dist.Normal(q.mean[y], self.noise.sqrt()).to_event(1).log_prob(self.features)
        return own - (q.variance[y] / self.noise).sum(-1) / 2 - self._log_densities(q).logsumexp(-1)

    def predictive(self, q: Distribution, samples: int) -> Distribution:
        return dist.Categorical(logits=self._log_densities(q))


def _epsilon(noise: Tensor) -> Tensor:
    return pyro.sample("epsilon", dist.Normal(torch.zeros_like(noise), noise.sqrt()).to_event(1))


_KINDS: dict[str, Any] = {"regression": _Regression, "discriminative": _Discriminative, "generative": _Generative}


class LastLayer(nn.Module):
    r"""A network with a prior on the weights of its last layer: a linear regression or classifier of its features.

    .. math::
        w_k \sim N(0, s I), \qquad \sigma_k^2 \sim \text{InverseGamma}(\nu / 2, \psi / 2), \qquad
        p(y \mid x, w) = \begin{cases}
            N\big(y;\, w \phi(x), \sigma^2\big) & \text{regression} \\
            \text{softmax}_y\big(w \phi(x) + \varepsilon\big), \; \varepsilon \sim N(0, \sigma^2)
                & \text{discriminative} \\
            N\big(\phi(x);\, w_y, \sigma^2\big) \,/\, \sum_k N\big(\phi(x);\, w_k, \sigma^2\big) & \text{generative}
        \end{cases}

    Latents are ``w``, ``noise`` (the variances) and, for each row, the ``epsilon`` of logits. The network is trained as
    it is. There is no intercept: let the network give a constant feature where one is needed. The inverse gamma is the
    inverse Wishart distribution of a single variance; noise is not correlated here.

    References:
        Variational Bayesian Last Layers (Harrison, Willes and Snoek, 2024) https://arxiv.org/abs/2404.11599

    Arguments:
        network: maps ``x`` to features ``[N, features]``.
        features: h, how many the network gives.
        outputs: how many targets or classes.
        likelihood: ``"regression"`` for y ``[N, outputs]``, or for classes y ``[N]``, whole numbers in [0, outputs),
            ``"discriminative"`` or ``"generative"``.
        prior: the variance s; by default 1 / h, and 2 / h for classes.
        noise: a variance to fix the noise of targets, logits or features at; of logits it may be 0.
        wishart: nu and psi; by default 1 and 0.01, and 1 and 1 for classes.

    Raises:
        ValueError: for values out of range; when called, for features or y that are not what was announced.

    Example:
        >>> model = LastLayer(nn.Linear(4, 8), 8, 2)
        >>> model(torch.zeros(5, 4)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        network: nn.Module,
        features: int,
        outputs: int,
        likelihood: Likelihood = "regression",
        *,
        prior: float | None = None,
        noise: float | None = None,
        wishart: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        _choose("likelihood", likelihood, _KINDS)
        classes = int(likelihood != "regression")
        if features < 1 or outputs < 1 + classes:
            raise ValueError(f"features must be at least 1 and outputs {1 + classes}, got {features} and {outputs}")
        self.network, self.likelihood, self.features, self.outputs = network, likelihood, features, outputs
        self.prior = (1 + classes) / features if prior is None else prior
        self.wishart = wishart or (1.0, 1.0 if classes else 0.01)
        self.noise, self.noiseless = noise, likelihood == "discriminative" and noise == 0
        self.variances = features if likelihood == "generative" else outputs
        given = 1.0 if noise is None or self.noiseless else noise
        for name, value in {"prior": self.prior, "noise": given, "wishart": min(self.wishart)}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value!r}")

    def forward(self, x: Any, y: Tensor | None = None) -> Tensor:
        features = self.network(x)
        self._check(features, y)
        w = pyro.sample("w", dist.Normal(features.new_zeros(self.outputs, self.features), self.prior**0.5).to_event(2))
        noise = None if self.noiseless else features.new_full((self.variances,), self.noise or 0.0)
        if self.noise is None:
            shape, rate = (features.new_full((self.variances,), value / 2) for value in self.wishart)
            noise = pyro.sample("noise", dist.InverseGamma(shape, rate).to_event(1))
        with batch_plate(size=features.shape[-2]):
            layer = _KINDS[self.likelihood](features, noise)
            return pyro.sample("y", layer.given(w), obs=y, infer={"last_layer": layer})

    def _check(self, features: Tensor, y: Tensor | None) -> None:
        if features.dim() < 2 or features.shape[-1] != self.features:
            raise ValueError(
                f"the network gave features of shape {tuple(features.shape)}, and the last layer takes "
                f"[N, {self.features}]: set features to the width of the network's output"
            )
        if y is None:
            return
        regression = self.likelihood == "regression"
        shape = (features.shape[-2], self.outputs)[: 1 + regression]
        if y.shape != shape or y.is_floating_point() != regression:
            kind = "numbers" if regression else "classes, as whole numbers,"
            raise ValueError(f"y must be {kind} of shape {shape}, got {y.dtype} of shape {tuple(y.shape)}")
        if not regression and dist.is_validation_enabled() and not 0 <= int(y.min()) <= int(y.max()) < self.outputs:
            raise ValueError(f"classes must be in [0, {self.outputs}), got {int(y.min())} to {int(y.max())}")


class LastLayerGuide(nn.Module):
    r"""A Gaussian posterior of each output's weights, and point estimates of the noise.

    .. math:: q(w) = \prod_k N(w_k; m_k, S_k)

    References:
        Variational Bayesian Last Layers (Harrison, Willes and Snoek, 2024) https://arxiv.org/abs/2404.11599

    Arguments:
        model: a ``LastLayer``.
        covariance: of the weights of one output: ``"diagonal"``; ``"dense"``, with h x h numbers for each output; or
            ``"low_rank"``, a diagonal and a factor h x rank.
        rank: of the factor.

    Raises:
        ValueError: for an unknown covariance, or a rank below 1.

    Example:
        >>> LastLayerGuide(LastLayer(nn.Linear(4, 8), 8, 2))(torch.zeros(5, 4))["w"].shape
        torch.Size([2, 8])
    """

    def __init__(self, model: LastLayer, covariance: Covariance = "dense", *, rank: int = 3) -> None:
        super().__init__()
        _choose("covariance", covariance, ("diagonal", "dense", "low_rank"))
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        shape = (model.outputs, model.features)
        self.covariance, self.noise = covariance, model.noise
        self.epsilon = model.likelihood == "discriminative" and not model.noiseless
        scale = 0.1 * model.prior**0.5  # narrower than the prior, so that the features are learnt first
        self.mean = nn.Parameter(torch.randn(shape) * model.prior**0.5)
        self.log_scale = nn.Parameter(torch.full(shape, math.log(scale)))
        if covariance != "diagonal":
            columns = model.features if covariance == "dense" else rank
            self.factor = nn.Parameter(torch.randn(*shape, columns) / columns)  # in units of scale
        if model.noise is None:
            self.log_noise = nn.Parameter(torch.full((model.variances,), -2.0))

    @property
    def posterior(self) -> Distribution:
        """Of the weights."""
        scale = self.log_scale.exp()
        if self.covariance == "dense":
            unit = self.factor.tril(-1) + torch.eye(scale.shape[-1]).to(scale)
            return dist.MultivariateNormal(self.mean, scale_tril=scale.unsqueeze(-1) * unit).to_event(1)
        if self.covariance == "low_rank":
            factor = scale.unsqueeze(-1) * self.factor
            return dist.LowRankMultivariateNormal(self.mean, factor, scale.square()).to_event(1)
        return dist.Normal(self.mean, scale).to_event(2)

    def forward(self, x: Any, y: Tensor | None = None) -> dict[str, Tensor]:
        values = {"w": pyro.sample("w", self.posterior)}
        if self.noise is None:
            values["noise"] = pyro.sample("noise", dist.Delta(self.log_noise.exp(), event_dim=1))
        if self.epsilon:
            noise = values["noise"] if self.noise is None else self.mean.new_full((len(self.mean),), self.noise)
            with batch_plate(x):
                values["epsilon"] = _epsilon(noise)
        return values


def _choose(name: str, value: str, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


@dataclass(frozen=True)
class last_layer_bound:
    r"""Minus a bound on log p(y | x) of a model with a ``LastLayer``, with its weights integrated out.

    .. math::
        \frac{N}{B} \sum_b \ell_b - KL\big(q(w) \,\|\, p(w)\big) + \log p(\sigma^2), \qquad
        \ell \; = \; \begin{cases}
            \log N\big(y; m \phi, \sigma^2\big) - \tfrac12 \sum_k \phi^\top S_k \phi \,/\, \sigma_k^2 \\
            m_y^\top \phi - \log \sum_k \exp\big(m_k^\top \phi + \tfrac12 (\phi^\top S_k \phi + \sigma_k^2)\big) \\
            \log N\big(\phi; m_y, \sigma^2\big) - \tfrac12 \text{tr}(S_y / \sigma^2)
                - \log \sum_k N\big(\phi; m_k, S_k + \sigma^2\big)
        \end{cases}

    For regression this is the ELBO, for classes a bound below it by Jensen's inequality. The noise of logits is
    integrated over its prior. Other latents, as of a network that is Bayesian itself, are drawn once.

    References:
        Variational Bayesian Last Layers (Harrison, Willes and Snoek, 2024) https://arxiv.org/abs/2404.11599

    Raises:
        ValueError: when called, for a model without a ``LastLayer``, or a guide whose ``w`` is not Gaussian.

    Example:
        >>> model = LastLayer(nn.Linear(4, 8), 8, 2)
        >>> last_layer_bound()(model, LastLayerGuide(model), torch.zeros(5, 4), torch.zeros(5, 2)).shape
        torch.Size([])
    """

    def __call__(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> Tensor:
        (run,) = weigh(model, guide, Call(args, kwargs), 1).passes
        drawn, sites = ({s["name"]: s for s in side} for side in (run.guided, run.modelled))
        likelihood, q = _parts(drawn, sites)

        def term(name: str, site: dict) -> Tensor:
            if "last_layer" in site["infer"]:
                return likelihood.expected(site["value"], q)
            return -_divergence(drawn[name], site) if is_latent(site) else site["fn"].log_prob(site["value"])

        terms = {name: term(name, site) for name, site in sites.items() if name != "epsilon"}
        scaled = [scale_and_mask(term, sites[name]["scale"], sites[name]["mask"]) for name, term in terms.items()]
        return -torch.stack([term.sum() for term in scaled]).sum()


def predictive(model: Model, guide: Guide, x: Any, *, samples: int = 20) -> Distribution:
    r"""The posterior predictive distribution of y, with the last layer's weights integrated out.

    .. math:: p(y \mid x) \approx \int p(y \mid x, w) \, q(w) \, dw

    It is a Normal in closed form for regression; for a generative likelihood each class has the density of the features
    with the class's mean integrated out; for a discriminative one the softmax is averaged over draws of the logits.

    References:
        Variational Bayesian Last Layers (Harrison, Willes and Snoek, 2024) https://arxiv.org/abs/2404.11599

    Arguments:
        model: a ``LastLayer``, such as ``posterior.model``; in evaluation mode where its network has such.
        guide: Gaussian in ``w``, such as ``posterior.guide``.
        x: rows, for ``model(x)``.
        samples: draws of the logits of each row.

    Returns:
        A Normal with batch shape ``[N]`` and event shape ``[outputs]``, or a Categorical with batch shape ``[N]``.

    Raises:
        ValueError: for a model without a ``LastLayer``, a guide whose ``w`` is not Gaussian, or no samples.

    Example:
        >>> model = LastLayer(nn.Linear(4, 8), 8, 2)
        >>> predictive(model, LastLayerGuide(model), torch.zeros(5, 4)).mean.shape
        torch.Size([5, 2])
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    with Recorder() as drawn:
        guide(x)
    with Recorder({name: site["value"] for name, site in drawn.sites.items()}) as sites:
        model(x)
    likelihood, q = _parts(drawn.sites, sites.sites)
    return likelihood.predictive(q, samples)


def _parts(drawn: dict[str, dict], sites: dict[str, dict]) -> tuple[Any, Distribution]:
    """The likelihood that a model left at its site, and the guide's Gaussian of the weights."""
    found = [s["infer"]["last_layer"] for s in sites.values() if "last_layer" in s["infer"]]
    if len(found) != 1 or "w" not in drawn:
        raise ValueError("this is for a model that is a LastLayer, and its guide: see bayesian_last_layer")
    q = elements_of(drawn["w"]["fn"])
    if not isinstance(q, _GAUSSIAN):
        raise ValueError(
            f"the guide's site 'w' is {type(q).__name__}, and only a Gaussian is integrated out here: use "
            "LastLayerGuide, or the loss importance() and posterior.predict"
        )
    return found[0], q


def bayesian_last_layer(
    network: nn.Module,
    features: int,
    outputs: int,
    likelihood: Likelihood = "regression",
    *,
    covariance: Covariance = "dense",
    rank: int = 3,
    **settings: Any,
) -> Recipe:
    r"""A network with a variational Bayesian last layer, for ``fit``.

    It is a :class:`LastLayer` with its :class:`LastLayerGuide`, fitted by ``svi(loss=last_layer_bound())``. Give
    ``fit`` such a method with other settings where they are wanted, or any other guide and method for the same model.

    References:
        Variational Bayesian Last Layers (Harrison, Willes and Snoek, 2024) https://arxiv.org/abs/2404.11599

    Arguments:
        network, features, outputs, likelihood: and ``settings``, all as :class:`LastLayer` takes them; ``covariance``
            and ``rank`` as :class:`LastLayerGuide` does.

    Example:
        >>> from pyro_ae import fit, svi
        >>> from pyro_ae.nn import MLP
        >>> x = torch.linspace(-1.0, 1.0, 50).unsqueeze(-1)
        >>> recipe, method = bayesian_last_layer(MLP(1, [20]), 20, 1), svi(loss=last_layer_bound(), lr=1e-2, steps=300)
        >>> posterior = fit(recipe, (x, x.sin()), method=method, seed=0, progress=False)
        >>> predictive(posterior.model, posterior.guide, x).mean.sub(x.sin()).abs().max() < 0.2
        tensor(True)
    """
    from .engines.svi import svi

    model = LastLayer(network, features, outputs, likelihood, **settings)
    return Recipe(model, LastLayerGuide(model, covariance, rank=rank), svi(loss=last_layer_bound()))
