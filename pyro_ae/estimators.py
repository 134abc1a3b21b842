"""Gradients of bounds: each a function of a bound and log-weights, whose value is the bound."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from .bounds import is_linear
from .density import Pass, Weights
from .sites import elements_of, is_estimated, is_latent, quote
from .types import Bound

CURES = (
    "use score_function(), which needs no such sampler; straight_through() or gumbel() for a OneHotCategorical or "
    "Bernoulli site; or leave the site out of the guide and sum it out, with infer={'enumerate': 'parallel'} in the "
    "model"
)


def pathwise(bound: Bound, weights: Weights) -> Tensor:
    r"""The reparameterised gradient of a bound: through the draws, and through the guide's density.

    .. math:: \nabla_\phi \mathcal{L}\big(\log w(z_\phi(\epsilon), \phi)\big)

    References:
        Auto-Encoding Variational Bayes (Kingma and Welling, 2014) https://arxiv.org/abs/1312.6114

    Arguments:
        bound: a function of log-weights ``[K, *batch]``.
        weights: of draws from the guide.

    Raises:
        ValueError: for a site of the guide without a reparameterised sampler.
    """
    refuse_discrete(weights, "pathwise")
    return bound(weights.log_weights)


def sticking_the_landing(bound: Bound, weights: Weights) -> Tensor:
    r"""The pathwise gradient without the score of the guide.

    .. math:: \nabla_\phi \mathcal{L}\big(\log p(x, z_\phi) - \log q_{\bar\phi}(z_\phi)\big)

    The score, which is left out, has mean zero in the ELBO, so there the gradient stays unbiased, and it has no
    variance where the guide is the posterior. In a nonlinear bound of several particles the score has another mean:
    the gradient of the guide is then biased, and ``dreg`` is what to use.

    References:
        Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational Inference
        (Roeder, Wu and Duvenaud, 2017) https://arxiv.org/abs/1703.09194

    Arguments:
        bound: a function of log-weights ``[K, *batch]``.
        weights: of draws from the guide.

    Raises:
        ValueError: for a site of the guide without a reparameterised sampler.
    """
    refuse_discrete(weights, "sticking_the_landing")
    return bound(weights.gather(_path))


def dreg(bound: Bound, weights: Weights) -> Tensor:
    r"""The doubly reparameterised gradient of the guide, and the plain one of the model.

    .. math::
        \nabla_\phi: \; \sum_k (\mathcal{L}'_k - \mathcal{L}''_{kk}) \,
        \frac{\partial \log w_k}{\partial z_k} \frac{\partial z_k}{\partial \phi}, \qquad
        \nabla_\theta: \; \sum_k \mathcal{L}'_k \, \nabla_\theta \log p_\theta(x, z_k)

    The score of the guide is reparameterised once more, which is unbiased for every smooth bound; derivatives are by
    its log-weights. For IWAE the factor of the guide is the squared normalised weight, for the ELBO this is
    ``sticking_the_landing``.

    References:
        Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker et al., 2019)
        https://arxiv.org/abs/1810.04152

    Arguments:
        bound: a function of log-weights ``[K, *batch]``.
        weights: of draws from the guide.

    Raises:
        ValueError: for a site of the guide without a reparameterised sampler.
    """
    refuse_discrete(weights, "dreg")
    log_w = weights.gather(_path)
    first, second = _derivatives(bound, log_w.detach())
    ratio = torch.where(first == 0, 1.0, 1 - second / first)
    for run, part in zip(weights.passes, ratio.split([p.particles for p in weights.passes]), strict=True):
        for site in run.latents:
            value = run.values[site["name"]]
            if value.requires_grad:
                # what is behind the draw gets the factor of the guide; the model's own parameters do not
                value.register_hook(partial(torch.mul, run.align(part, site)))
    return bound(log_w)


@dataclass(frozen=True)
class score_function:
    r"""The gradient by the guide's score, for sites that cannot be reparameterised.

    .. math::
        \sum_k \big(\mathcal{L} - \mathcal{L}_{-k}\big) \nabla_\phi \log q_\phi(z_k \mid x) + \nabla \mathcal{L}

    In the baseline the log-weight of a particle is the mean of the others', so with one particle there is none. For
    IWAE this is VIMCO. Sites that can be reparameterised are.

    References:
        Variational Inference for Monte Carlo Objectives (Mnih and Rezende, 2016) https://arxiv.org/abs/1602.06725

    Arguments:
        baseline: whether to subtract the bound without the particle; without it this is plain REINFORCE.

    Example:
        >>> score_function()
        score_function(baseline=True)
    """

    baseline: bool = True

    def __call__(self, bound: Bound, weights: Weights) -> Tensor:
        log_w = weights.log_weights
        value = bound(log_w)
        score = weights.gather(_score)
        signal = value.detach() - (self._without(bound, log_w.detach()) if self.baseline and len(log_w) > 1 else 0.0)
        return value + (signal * (score - score.detach())).sum(0)

    @staticmethod
    def _without(bound: Bound, log_w: Tensor) -> Tensor:
        """The bound with one log-weight at a time replaced by the mean of the others, ``[K, *batch]``."""
        particles = len(log_w)
        others = (log_w.sum(0) - log_w) / (particles - 1)
        this = torch.eye(particles, dtype=torch.bool, device=log_w.device)
        this = this.reshape(particles, particles, *(1,) * (log_w.dim() - 1))
        return bound(torch.where(this, others.unsqueeze(0), log_w.unsqueeze(1)))


def analytic_kl(bound: Bound, weights: Weights) -> Tensor:
    r"""The ELBO's pathwise gradient, with the KL divergence in closed form wherever it has one.

    .. math:: E_q[\log p(x \mid z)] - KL\big(q(z \mid x) \,\|\, p(z)\big)

    Sites without a closed form keep the log-ratio of their draw, which has the same mean.

    References:
        Auto-Encoding Variational Bayes (Kingma and Welling, 2014) https://arxiv.org/abs/1312.6114

    Arguments:
        bound: a linear bound, as the KL divergence is the mean of a log-weight's part.
        weights: of draws from the guide.

    Raises:
        ValueError: for a bound that is not linear, or a site of the guide without a reparameterised sampler.
    """
    if not is_linear(bound):
        raise ValueError(f"analytic_kl is for elbo, as {bound} is not linear in the log-weights")
    refuse_discrete(weights, "analytic_kl")
    return bound(weights.gather(lambda p: reconstruction(p) - kl(p)))


def refuse_discrete(weights: Weights, what: str) -> None:
    """A site whose draws carry no gradient would leave a part of the guide's gradient out, without a word."""
    for site in weights.passes[0].latents:
        if not site["fn"].has_rsample:
            raise ValueError(f"the guide's site '{site['name']}' has no reparameterised sampler for {what}: {CURES}")


def _path(run: Pass) -> Tensor:
    """Log-weights that depend on the guide's parameters by the draws alone, ``[K, *batch]``."""
    estimated = [s["name"] for s in run.drawn.scored if is_estimated(s)]
    if estimated:
        raise ValueError(
            f"this estimator needs the guide's density at other values than its draws, and that of {quote(estimated)} "
            "is an estimate made with the draw: use pathwise, the default"
        )
    log_q = run.total(run.rescore(run.values))
    still = run.total(run.rescore({name: value.detach() for name, value in run.values.items()}))
    return run.log_p - log_q + still - still.detach()


def _score(run: Pass) -> Tensor:
    """The guide's log-density of the draws without a gradient, with no scale or mask, ``[K, *batch]``."""
    sites = [s for s in run.latents if not s["fn"].has_rsample]
    return run.total(sites, lambda s: s["fn"].log_prob(s["value"]))


def _derivatives(bound: Bound, log_w: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second derivative of a bound by each of its log-weights, ``[K, *batch]``."""
    gradient = torch.func.grad(lambda w: bound(w).sum())
    one = torch.eye(len(log_w), dtype=log_w.dtype, device=log_w.device)
    directions = one.reshape(*one.shape, *(1,) * (log_w.dim() - 1)).expand(len(log_w), *log_w.shape)
    columns = torch.func.vmap(lambda d: torch.func.vjp(gradient, log_w)[1](d)[0])(directions)
    return gradient(log_w), torch.einsum("kk...->k...", columns)


def reconstruction(run: Pass) -> Tensor:
    """The log-density of all that is not in a KL divergence: of observed sites and factors, ``[K, *batch]``.

    What the guide has besides the model's latents, auxiliary sites and factors, is taken off it.
    """
    names = {s["name"] for s in run.latents}
    own = {s["name"] for s in run.modelled}
    extra = [s for s in run.guided if not is_latent(s) or s["name"] not in own]
    rest = run.total([s for s in run.modelled if s["name"] not in names], terms=True)
    return rest - run.total(extra) if extra else rest


def kl(run: Pass) -> Tensor:
    """The KL divergences of the latents from their priors, summed, ``[K, *batch]``.

    In closed form where both sides have it, else by the log-ratio of the draw.
    """
    priors = {s["name"]: s for s in run.modelled}
    sites = [s for s in run.latents if s["name"] in priors]
    return run.total(sites, lambda q: _scaled(run, q, _divergence(q["fn"], priors[q["name"]]["fn"], q["value"])))


def element_kl(run: Pass, name: str) -> Tensor:
    """The KL divergence of each element of one latent, ``[K, *batch, d]``."""
    q, p = (next(s for s in sites if s["name"] == name) for sites in (run.guided, run.modelled))
    each = _divergence(base_of(q), base_of(p), q["value"]).reshape(*q["fn"].batch_shape, -1)

    def total(part: Tensor) -> Tensor:
        return run.total([q], lambda _: _scaled(run, q, part))

    return torch.stack([total(part) for part in each.unbind(-1)], -1)


def _divergence(q: Distribution, p: Distribution, value: Tensor) -> Tensor:
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return q.log_prob(value) - p.log_prob(value)


def _scaled(run: Pass, site: dict, divergence: Tensor) -> Tensor:
    return scale_and_mask(divergence, run.scale_of(site["scale"]), site["mask"])


def base_of(site: dict) -> Distribution:
    """The distribution of a latent's elements, which must be independent of one another."""
    fn: Distribution = elements_of(site["fn"])
    if fn.event_shape:
        raise ValueError(
            f"the elements of site '{site['name']}' are tied together by {type(fn).__name__}, so none has a density "
            "of its own: use independent elements, such as Normal(...).to_event(1)"
        )
    return fn
