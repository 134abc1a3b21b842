"""An instance of each distribution of Pyro: parameters, how to make it of them, and a value."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import tensor as t
from torch.distributions import constraints

A, B, S = t([0.3, -0.7, 1.2]), t([1.1, 0.4, 2.0]), t([0.8, 1.3, 0.6])
P = t([0.2, 0.6, 0.35])
COV = t([[2.0, 0.3, 0.1], [0.3, 1.5, -0.2], [0.1, -0.2, 1.0]])
TRIL = torch.linalg.cholesky(COV)
SIMPLEX = t([0.2, 0.5, 0.3])
POSITIVE = t([0.5, 1.7, 2.2])
UNIT = t([0.25, 0.6, 0.85])
COUNT = t([2.0, 0.0, 3.0])

# name: (make, parameters, value); the density is differentiated by the parameters, and by the value where it is real
EVERY = {
    "AffineBeta": (lambda a, b: dist.AffineBeta(a, b, -1.0, 3.0), (B, S), t([0.5, 1.0, -0.6])),
    "AsymmetricLaplace": (dist.AsymmetricLaplace, (A, S, B), t([0.1, 0.5, -1.0])),
    "AVFMultivariateNormal": (
        lambda loc, scale, control: dist.AVFMultivariateNormal(loc, scale, control),
        (A, TRIL, torch.zeros(2, 1, 3)),
        POSITIVE,
    ),
    "Bernoulli": (lambda logits: dist.Bernoulli(logits=logits), (A,), t([1.0, 0.0, 1.0])),
    "Beta": (dist.Beta, (B, S), UNIT),
    "BetaBinomial": (lambda a, b: dist.BetaBinomial(a, b, total_count=5), (B, S), COUNT),
    "Binomial": (lambda p: dist.Binomial(5, p), (P,), COUNT),
    "Categorical": (lambda logits: dist.Categorical(logits=logits), (A,), t(2)),
    "Cauchy": (dist.Cauchy, (A, S), B),
    "Chi2": (dist.Chi2, (POSITIVE,), B),
    "CoalescentTimes": (
        lambda rate: dist.CoalescentTimes(t([0.0, 0.2, 0.5]), rate),
        (t(1.3),),
        t([-0.5, -0.2]),
    ),
    "CoalescentTimesWithRate": (
        lambda rate: dist.CoalescentTimesWithRate(t([0.0, 0.2, 0.5]), rate),
        (t([1.0, 1.3]),),
        t([-0.5, -0.2]),
    ),
    "ContinuousBernoulli": (dist.ContinuousBernoulli, (P,), UNIT),
    "Delta": (lambda v, d: dist.Delta(v, d), (A, S), A),
    "Dirichlet": (dist.Dirichlet, (POSITIVE,), SIMPLEX),
    "DirichletMultinomial": (lambda a: dist.DirichletMultinomial(a, total_count=t(5.0)), (POSITIVE,), COUNT),
    "DiscreteHMM": (
        lambda init, move, loc: dist.DiscreteHMM(init, move, dist.Normal(loc, 1.0)),
        (t([0.1, 0.4]), t([[0.2, 0.3], [-0.5, 0.9]]), t([0.0, 1.0])),
        t([0.3, 1.2, -0.4]),
    ),
    "Empirical": (lambda w: dist.Empirical(t([0.0, 1.0, 2.0]), w), (A,), t(1.0)),
    "Exponential": (dist.Exponential, (POSITIVE,), B),
    "ExtendedBetaBinomial": (lambda a, b: dist.ExtendedBetaBinomial(a, b, 5), (B, S), COUNT),
    "ExtendedBinomial": (lambda logits: dist.ExtendedBinomial(5, logits=logits), (A,), COUNT),
    "FisherSnedecor": (dist.FisherSnedecor, (POSITIVE, B), S),
    "FoldedDistribution": (lambda a, s: dist.FoldedDistribution(dist.Normal(a, s)), (A, S), POSITIVE),
    "Gamma": (dist.Gamma, (POSITIVE, S), B),
    "GammaGaussianHMM": (
        lambda a, b, scale: dist.GammaGaussianHMM(
            dist.Gamma(2.0, 1.0),
            dist.MultivariateNormal(torch.zeros(2), torch.diag_embed(a)),
            torch.eye(2),
            dist.MultivariateNormal(torch.zeros(2), torch.diag_embed(b)),
            torch.eye(2),
            dist.MultivariateNormal(torch.zeros(2), torch.diag_embed(scale)),
        ),
        (t([1.0, 2.0]), t([0.5, 0.4]), t([0.8, 0.9])),
        torch.linspace(-1, 1, 6).reshape(3, 2),
    ),
    "GammaPoisson": (dist.GammaPoisson, (POSITIVE, B), COUNT),
    "GaussianHMM": (
        lambda a, b, scale: dist.GaussianHMM(
            dist.MultivariateNormal(torch.zeros(2), torch.diag_embed(a)),
            0.9 * torch.eye(2),
            dist.MultivariateNormal(torch.zeros(2), torch.diag_embed(b)),
            torch.eye(2),
            dist.MultivariateNormal(torch.zeros(2), torch.diag_embed(scale)),
            duration=3,
        ),
        (t([1.0, 2.0]), t([0.5, 0.4]), t([0.8, 0.9])),
        torch.linspace(-1, 1, 6).reshape(3, 2),
    ),
    "GaussianMRF": (
        lambda a, b: dist.GaussianMRF(
            dist.MultivariateNormal(torch.zeros(2), torch.diag_embed(a)),
            dist.MultivariateNormal(torch.zeros(4), torch.diag_embed(b)),
            dist.MultivariateNormal(torch.zeros(4), torch.eye(4)),
        ),
        (t([1.0, 2.0]), t([0.5, 0.4, 0.7, 0.9])),
        torch.linspace(-1, 1, 6).reshape(3, 2),
    ),
    "GaussianScaleMixture": (
        lambda scale, logits: dist.GaussianScaleMixture(scale, logits, t([0.7, 1.5])),
        (S, t([0.2, -0.1])),
        A,
    ),
    "GeneralizedPareto": (dist.GeneralizedPareto, (A, S, P), A + POSITIVE),
    "Geometric": (dist.Geometric, (P,), COUNT),
    "GroupedNormalNormal": (
        lambda loc, scale, obs: dist.GroupedNormalNormal(loc, scale, obs, t([0, 1, 0, 1])),
        (t([0.1, 0.4]), t([1.0, 0.7]), t(0.5)),
        t([0.2, 0.1, 0.9, -0.3]),
    ),
    "Gumbel": (dist.Gumbel, (A, S), B),
    "HalfCauchy": (dist.HalfCauchy, (S,), POSITIVE),
    "HalfNormal": (dist.HalfNormal, (S,), POSITIVE),
    "ImproperUniform": (lambda: dist.ImproperUniform(constraints.real, (), ()), (), t(0.4)),
    "Independent": (lambda a, s: dist.Normal(a, s).to_event(1), (A, S), B),
    "IndependentHMM": (
        lambda a, b, scale: dist.IndependentHMM(
            dist.GaussianHMM(
                dist.MultivariateNormal(torch.zeros(2, 1), a[:, None, None] * torch.eye(1)),
                0.9 * torch.ones(2, 1, 1, 1),
                dist.MultivariateNormal(torch.zeros(1), b * torch.eye(1)),
                torch.eye(1),
                dist.MultivariateNormal(torch.zeros(1), scale * torch.eye(1)),
                duration=3,
            )
        ),
        (t([1.0, 2.0]), t(0.5), t(0.8)),
        torch.linspace(-1, 1, 6).reshape(3, 2),
    ),
    "InverseGamma": (dist.InverseGamma, (POSITIVE, S), B),
    "Kumaraswamy": (dist.Kumaraswamy, (B, POSITIVE), UNIT),
    "LKJ": (lambda c: dist.LKJ(3, c), (t(1.5),), t([[1.0, 0.2, 0.1], [0.2, 1.0, -0.3], [0.1, -0.3, 1.0]])),
    "LKJCholesky": (
        lambda c: dist.LKJCholesky(3, c),
        (t(1.5),),
        torch.linalg.cholesky(t([[1.0, 0.2, 0.1], [0.2, 1.0, -0.3], [0.1, -0.3, 1.0]])),
    ),
    "Laplace": (dist.Laplace, (A, S), B),
    "LogNormal": (dist.LogNormal, (A, S), POSITIVE),
    "LogNormalNegativeBinomial": (
        lambda logits, scale: dist.LogNormalNegativeBinomial(t(5.0), logits, scale),
        (A, S),
        COUNT,
    ),
    "Logistic": (dist.Logistic, (A, S), B),
    "LogisticNormal": (dist.LogisticNormal, (A[:2], S[:2]), SIMPLEX),
    "LowRankMultivariateNormal": (dist.LowRankMultivariateNormal, (A, COV[:, :2], S), B),
    "MaskedDistribution": (lambda a, s: dist.Normal(a, s).mask(t([True, False, True])), (A, S), B),
    "MaskedMixture": (
        lambda a, b: dist.MaskedMixture(t([True, False, True]), dist.Normal(a, 1.0), dist.Normal(b, 2.0)),
        (A, B),
        S,
    ),
    "MixtureOfDiagNormals": (
        lambda locs, scale, logits: dist.MixtureOfDiagNormals(locs, scale, logits),
        (COV[:2], POSITIVE.expand(2, 3), t([0.3, -0.2])),
        A,
    ),
    "MixtureOfDiagNormalsSharedCovariance": (
        dist.MixtureOfDiagNormalsSharedCovariance,
        (COV[:2], POSITIVE, t([0.3, -0.2])),
        A,
    ),
    "MixtureSameFamily": (
        lambda logits, a, s: dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(a, s)),
        (B, A, S),
        t(0.7),
    ),
    "Multinomial": (lambda logits: dist.Multinomial(5, logits=logits), (A,), COUNT),
    "MultivariateNormal": (dist.MultivariateNormal, (A, COV), B),
    "MultivariateStudentT": (lambda df, a, tril: dist.MultivariateStudentT(df, a, tril), (t(4.0), A, TRIL), B),
    "NanMaskedMultivariateNormal": (
        lambda a, c: dist.NanMaskedMultivariateNormal(a.expand(2, 3), c.expand(2, 3, 3)),
        (A, COV),
        t([[1.1, 0.4, 2.0], [1.1, float("nan"), 2.0]]),
    ),
    "NanMaskedNormal": (dist.NanMaskedNormal, (A, S), t([0.1, float("nan"), 0.4])),
    "NegativeBinomial": (lambda n, logits: dist.NegativeBinomial(n, logits=logits), (POSITIVE, A), COUNT),
    "Normal": (dist.Normal, (A, S), B),
    "OMTMultivariateNormal": (dist.OMTMultivariateNormal, (A, TRIL), B),
    "OneHotCategorical": (lambda logits: dist.OneHotCategorical(logits=logits), (A,), t([0.0, 1.0, 0.0])),
    "OneOneMatching": (lambda logits: dist.OneOneMatching(logits), (COV,), t([2, 0, 1])),
    "OrderedLogistic": (lambda x, cuts: dist.OrderedLogistic(x, cuts), (A, t([-1.0, 0.5])), t([0, 2, 1])),
    "Pareto": (dist.Pareto, (S, POSITIVE), 1.0 + POSITIVE),
    "Poisson": (dist.Poisson, (POSITIVE,), COUNT),
    "ProjectedNormal": (dist.ProjectedNormal, (A,), t([0.6, 0.0, 0.8])),
    "RelaxedBernoulli": (lambda logits: dist.RelaxedBernoulli(t(0.7), logits=logits), (A,), UNIT),
    "RelaxedOneHotCategorical": (
        lambda logits: dist.RelaxedOneHotCategorical(t(0.7), logits=logits),
        (A,),
        SIMPLEX,
    ),
    "SineBivariateVonMises": (
        lambda a, b, c, d: dist.SineBivariateVonMises(a, b, c, d, t(0.3)),
        (t(0.1), t(0.4), t(1.2), t(0.9)),
        t([0.5, -0.4]),
    ),
    "SineSkewed": (
        lambda a, k, skew: dist.SineSkewed(dist.VonMises(a, k).expand([2]).to_event(1), skew),
        (t(0.1), t(1.2), t([0.2, 0.3])),
        t([0.5, -0.4]),
    ),
    "SkewLogistic": (dist.SkewLogistic, (A, S, POSITIVE), B),
    "SoftAsymmetricLaplace": (dist.SoftAsymmetricLaplace, (A, S, B, POSITIVE), UNIT),
    "SoftLaplace": (dist.SoftLaplace, (A, S), B),
    "SpanningTree": (lambda logits: dist.SpanningTree(logits), (A,), t([[0, 1], [0, 2]])),
    "StableWithLogProb": (dist.StableWithLogProb, (t([1.5, 0.7, 1.8]), t([0.2, -0.3, 0.1]), S, A), B),
    "StudentT": (dist.StudentT, (POSITIVE, A, S), B),
    "TransformedDistribution": (
        lambda a, s: dist.TransformedDistribution(dist.Normal(a, s), [torch.distributions.transforms.ExpTransform()]),
        (A, S),
        POSITIVE,
    ),
    "TruncatedPolyaGamma": (lambda: dist.TruncatedPolyaGamma(t(0.0)), (), t(0.4)),
    "Uniform": (lambda low: dist.Uniform(low, low + 3.0), (A,), A + 1.0),
    "Unit": (dist.Unit, (A,), torch.zeros(3, 0)),
    "VonMises": (dist.VonMises, (A, POSITIVE), B),
    "VonMises3D": (dist.VonMises3D, (A,), t([0.6, 0.0, 0.8])),
    "Weibull": (dist.Weibull, (S, POSITIVE), B),
    "Wishart": (lambda df, c: dist.Wishart(df, c), (t(5.0), COV), COV + torch.eye(3)),
    "ZeroInflatedDistribution": (
        lambda gate, rate: dist.ZeroInflatedDistribution(dist.Poisson(rate), gate=gate),
        (P, POSITIVE),
        COUNT,
    ),
    "ZeroInflatedNegativeBinomial": (
        lambda n, p, gate: dist.ZeroInflatedNegativeBinomial(n, probs=p, gate=gate),
        (POSITIVE, P, UNIT),
        COUNT,
    ),
    "ZeroInflatedPoisson": (lambda rate, gate: dist.ZeroInflatedPoisson(rate, gate=gate), (POSITIVE, P), COUNT),
}

# what cannot be lowered, by name, and why
NOT_LOWERED = {
    "SineBivariateVonMises": "it checks its normaliser's convergence by an if",
    "SineSkewed": "it checks the sum of its skewness by an if",
    "StableWithLogProb": "its quadrature branches on the parameters",
    "Wishart": "it checks its degrees of freedom by an if that no switch turns off",
}

# what has no density of its own, or is an alias or a part of others
NO_DENSITY = {
    "ExpandedDistribution": "what expand gives",
    "ExponentialFamily": "abstract",
    "LKJCorrCholesky": "a deprecated name of LKJCholesky",
    "LinearHMM": "no log_prob",
    "OneHotCategoricalStraightThrough": "the density of OneHotCategorical",
    "OneTwoMatching": "no exact normaliser: a sum over all matchings, or belief propagation",
    "Rejector": "made of a sampler and a density that the user writes",
    "RelaxedBernoulliStraightThrough": "the density of RelaxedBernoulli",
    "RelaxedOneHotCategoricalStraightThrough": "the density of RelaxedOneHotCategorical",
    "Stable": "no log_prob",
    "TorchDistribution": "abstract",
}
