"""The heads of guides: densities, draws and their gradients against quadrature, and fits against exact posteriors."""

import math
import sys
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints, kl_divergence
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from truth import ppca, same_noise

from pyro_ae import elbo, fit, importance, log_weights, svi
from pyro_ae.data import observe
from pyro_ae.density import weigh
from pyro_ae.estimators import analytic_kl, pathwise, score_function
from pyro_ae.flows import tanh_root
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.bernoulli import Bernoulli
from pyro_ae.guides.categorical import Categorical
from pyro_ae.guides.flow import Flow
from pyro_ae.guides.full_rank import FullRank
from pyro_ae.guides.low_rank import LowRank
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.guides.mixture import Mixture
from pyro_ae.guides.planar import Planar
from pyro_ae.guides.power_spherical import PowerSpherical as PowerSphericalHead
from pyro_ae.guides.radial import Radial
from pyro_ae.guides.sylvester import Sylvester
from pyro_ae.models.ppca import PPCA
from pyro_ae.plates import batch_plate
from pyro_ae.posterior import Posterior
from pyro_ae.spheres import PowerSpherical, UniformOnSphere

small = {"transforms": 2, "hidden_features": (8,)}
REAL = {
    "mean field": MeanField,
    "full rank": FullRank,
    "low rank": partial(LowRank, rank=2),
    "mixture": partial(Mixture, components=3),
    "planar": partial(Planar, layers=3),
    "radial": partial(Radial, layers=3),
    "sylvester": partial(Sylvester, layers=2),
    "NSF": partial(Flow, flow="NSF", **small),
    "NSF, slow draws": partial(Flow, flow="NSF", inverse=False, **small),
    "MAF": partial(Flow, flow="MAF", **small),
    "NAF": partial(Flow, flow="NAF", transforms=1, hidden_features=(8,), signal=4),
    "RealNVP": partial(Flow, flow="RealNVP", **small),
    "CNF": partial(Flow, flow="CNF", hidden_features=(8,)),
}
heads = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in REAL.items()])
FAST = {n: m for n, m in REAL.items() if n not in ("NSF, slow draws", "NAF", "CNF")}
fast_heads = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in FAST.items()])


def lively(make, latent: int | tuple[int, ...] = 2, **options) -> tuple[nn.Module, Tensor]:
    """A head in double precision that is far from its start, and features of three rows."""
    head = make(4, latent, **options)
    for parameter in head.linear.parameters():
        parameter.data.mul_(1.5)
    return head.double(), 0.5 * torch.randn(3, 4, dtype=torch.double)


def plane(q: Distribution) -> tuple[Tensor, float]:
    """A grid ``[n, 1, 2]`` over where the draws of a distribution ``[1]`` are, and the area of its cells."""
    z = q.expand((2000, 1)).sample().squeeze(1)
    axes = [torch.linspace(-6.5, 6.5, 81, dtype=torch.double) * s + m for m, s in zip(z.mean(0), z.std(0), strict=True)]
    return torch.cartesian_prod(*axes).unsqueeze(1), float((axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0]))


def score(z: Tensor) -> Tensor:
    """Functions of which a wrong mean, spread, dependence or shape changes the expectation, ``[*, 5]``."""
    a, b = z.unbind(-1)
    return torch.stack([a, b, a * b, a.sin() * b, (a**2 + b**2).sqrt()], -1)


@heads
def test_densities_integrate_to_one_and_draws_have_them(make):
    head, features = lively(make)
    n = 10_000
    with torch.no_grad():
        q = head(features[:1])
        grid, area = plane(q)
        density = q.expand((len(grid), 1)).log_prob(grid).exp() * area
        assert float(density.sum()) == pytest.approx(1.0, abs=5e-3)
        draws = q.expand((n, 1))
        values = draws.rsample()
        found, expected = score(values).squeeze(1), (density * score(grid).squeeze(1)).sum(0) / density.sum()
        error = (found.var(0) / n).sqrt()
        assert ((found.mean(0) - expected).abs() < 4.5 * error + 2e-3).all(), (found.mean(0) - expected) / error
        torch.testing.assert_close(  # what a draw remembers is its density
            draws.log_prob(values)[:300], q.expand((300, 1)).log_prob(values[:300].clone()), atol=1e-3, rtol=0
        )


@pytest.mark.parametrize("name", [n for n in FAST if n != "NSF"])  # whose density has kinks, a trouble for the grid
def test_gradients_of_expectations_are_those_of_quadrature(name):
    """Those of the draws, by all parameters: so weights of a mixture have theirs too."""
    head, features = lively(REAL[name])
    parameters = list(head.parameters())
    blocks, n = 10, 1000

    def gradient(expectation: Tensor) -> Tensor:
        found = torch.autograd.grad(expectation, parameters, retain_graph=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    q = head(features[:1])
    grid, area = plane(q)
    expected = gradient((q.expand((len(grid), 1)).log_prob(grid).exp() * area * score(grid).sum(-1)).sum())
    found = torch.stack([gradient(score(q.expand((n, 1)).rsample()).sum(-1).mean()) for _ in range(blocks)])
    largest = expected.abs().max()
    assert largest > 0.1
    assert ((found.mean(0) - expected).abs() < 6.5 * found.std(0) / blocks**0.5 + 0.01 * largest).all()


@fast_heads
def test_the_density_of_any_value_has_its_gradient(make):
    """At a fixed value against differences; and at a draw without a gradient, whose remembered density has none."""
    head, features = lively(make)
    start = parameters_to_vector(head.parameters()).detach()
    direction = torch.randn_like(start)
    q = head(features)
    with torch.no_grad():
        z = q.rsample()
        ends = []
        for step in (1e-6, -1e-6):
            vector_to_parameters(start + step * direction, head.parameters())
            ends.append(head(features).log_prob(z.clone()).sum())
        vector_to_parameters(start, head.parameters())
    found = torch.autograd.grad(q.log_prob(z).sum(), list(head.parameters()), materialize_grads=True)
    slope = torch.cat([g.flatten() for g in found]) @ direction
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-5)


def test_the_scalar_equation_of_flows_is_solved_also_where_it_is_nearly_flat():
    target, slope, shift = (3 * torch.randn(500, dtype=torch.double) for _ in range(3))
    gain = torch.where(slope > 0, 1.0, -1.0) * torch.rand(500, dtype=torch.double) * 4 - 0.99999 / slope
    root = tanh_root(target, gain, slope, shift)
    torch.testing.assert_close(root + gain * torch.tanh(slope * root + shift), target)


@pytest.mark.parametrize("latent", [1, 3])
def test_gradients_of_a_mixtures_draws_in_other_dimensions(latent):
    """E[sin(w'z)] and E[|z|^2] of normals are known, with their gradients."""
    head, features = lively(partial(Mixture, components=3), latent)
    parameters = head.linear(features[:1]).detach().requires_grad_()
    w = torch.linspace(1.0, 0.3, latent, dtype=torch.double)
    each = parameters.unflatten(-1, (3, -1))
    pi, (loc, log_scale) = each[..., 0].softmax(-1), each[..., 1:].chunk(2, -1)
    sine = (loc @ w).sin() * (-0.5 * ((2 * log_scale).exp() * w**2).sum(-1)).exp()
    square = (loc**2 + (2 * log_scale).exp()).sum(-1)
    exact = torch.autograd.grad((pi * (sine + square)).sum(), parameters)[0]
    z = head.distribution(parameters).expand((200_000, 1)).rsample()
    found = torch.autograd.grad((z @ w).sin().mean() + z.square().sum(-1).mean(), parameters)[0]
    torch.testing.assert_close(found, exact, atol=0.03, rtol=0.03)


def test_many_dimensions_and_narrow_components_have_finite_gradients():
    head = Mixture(4, 100, components=3)
    with torch.no_grad():
        head.linear.bias.unflatten(-1, (3, -1))[:, 101:] = -4.0
    head(torch.randn(5, 4)).expand((7, 5)).rsample().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in head.parameters())


@pytest.mark.parametrize("particles", [1, 7, 100])
def test_particles_are_shared_out_among_components(particles):
    """Floor or ceiling of K pi in each row; and on average pi, in every place."""
    head = Mixture(2, 1, components=3)
    pi = torch.tensor([0.15, 0.6, 0.25])
    with torch.no_grad():
        head.linear.weight.zero_()
        head.linear.bias.copy_(torch.stack([pi.log(), torch.tensor([-50.0, 0.0, 50.0]), torch.zeros(3)], -1).flatten())
        z = head(torch.zeros(4000, 2)).expand((particles, 4000)).rsample().squeeze(-1)
    from_each = torch.stack([z < -25, z.abs() < 25, z > 25], -1).float()
    counts = from_each.sum(0)
    assert (counts >= (particles * pi).floor()).all() and (counts <= (particles * pi + 1 - 1e-4).floor()).all()
    torch.testing.assert_close(from_each[particles // 2].mean(0), pi, atol=0.035, rtol=0)


def correlated() -> tuple[PPCA, Tensor]:
    """A PPCA whose posterior is far from independent, and rows."""
    model = PPCA(3, 2, noise=0.7)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.8], [0.9, 1.0], [0.2, 0.5]]))
    return model.requires_grad_(False), model.marginal().sample((40,))


def gap(model: PPCA, guide: nn.Module, x: Tensor, particles: int = 1000) -> Tensor:
    """How far the ELBO is below the evidence, for each row."""
    with torch.no_grad():
        return model.marginal().log_prob(x) - log_weights(model, guide, x, particles=particles)[0].mean(0)


def mean_field_gap(precision: Tensor) -> Tensor:
    """The least KL divergence of independent normals from the posterior: their precisions are its diagonal."""
    return 0.5 * (precision.diagonal().log().sum() - precision.logdet())


def set_by_hand(head: nn.Module, model, x: Tensor, *constants: Tensor) -> Amortized:
    """The location is the posterior's, which is linear in the row; all else is the same for each row."""
    zero = model.posterior(torch.zeros(3))
    with torch.no_grad():
        head.linear.weight.zero_()
        head.linear.weight[:2] = model.posterior(torch.eye(3)).loc.T - zero.loc.unsqueeze(-1)
        head.linear.bias.copy_(torch.cat([zero.loc, *(c.flatten() for c in constants)]))
    return Amortized(nn.Identity(), head)


def test_normal_heads_hold_the_posterior_or_the_best_of_their_family():
    model, x = correlated()
    exact = model.posterior(x[0])
    tril, covariance = exact.scale_tril, exact.covariance_matrix
    full = set_by_hand(FullRank(3, 2), model, x, tril.diagonal().log(), tril[1, 0])
    part = torch.linalg.eigvalsh(covariance)[0] / 2
    factor = torch.linalg.cholesky(covariance - part * torch.eye(2))
    low = set_by_hand(LowRank(3, 2, rank=2), model, x, part.log().expand(2) / 2, factor)
    for guide in (full, low):
        torch.testing.assert_close(gap(model, guide, x, 3), torch.zeros(len(x)), atol=1e-4, rtol=0)
    field = set_by_hand(MeanField(3, 2), model, x, -0.5 * exact.precision_matrix.diagonal().log())
    expected = mean_field_gap(exact.precision_matrix)
    assert expected > 0.05
    assert gap(model, field, x).mean() == pytest.approx(float(expected), abs=0.01)


SHARES = {"full rank": 0.1, "MAF": 0.2, "NSF": 0.6, "sylvester": 0.6, "planar": 0.6, "mixture": 1.0, "radial": 1.0}


@pytest.mark.parametrize(("name", "share"), SHARES.items())
def test_heads_come_to_a_part_of_the_gap_of_mean_field(name, share):
    model, x = correlated()
    head = REAL[name](3, 2)
    optimizer = torch.optim.Adam(head.parameters(), 0.03)
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    for _ in range(250):
        q = head(x).expand((8, 40))
        z = q.rsample()
        joint = prior.log_prob(z) + dist.Normal(z @ model.weight.T, 0.7).log_prob(x).sum(-1)
        optimizer.zero_grad()
        (q.log_prob(z) - joint).mean().backward()
        optimizer.step()
    found = gap(model, Amortized(nn.Identity(), head), x).mean()
    assert -0.01 < found < share * mean_field_gap(model.posterior(x).precision_matrix[0]) + 0.01


SUPPORTS = {(): constraints.real, 1: constraints.real, (2, 3): constraints.positive, 3: constraints.simplex}


@fast_heads
@pytest.mark.parametrize(("latent", "support"), SUPPORTS.items(), ids=["scalar", "one", "matrix", "simplex"])
def test_shapes_and_supports(make, latent, support):
    head, features = lively(make, latent, support=support)
    shape = (latent,) if isinstance(latent, int) else latent
    q = head(features).expand((7, 3))
    z = q.rsample()
    assert q.has_rsample and q.batch_shape == (7, 3) and q.event_shape == shape and z.shape == (7, 3, *shape)
    assert q.support.check(z).all()
    assert head(features).rsample((4,)).shape == (4, 3, *shape)
    torch.testing.assert_close(q.log_prob(z), q.log_prob(z.clone()), atol=1e-4, rtol=1e-4)
    if support == constraints.simplex:
        points = torch.rand(20_000, 2, dtype=torch.double)
        inside = points[points.sum(-1) < 1]
        with torch.no_grad():
            values = head(features[:1]).log_prob(torch.cat([inside, 1 - inside.sum(-1, keepdim=True)], -1)).exp()
        assert values.sum() / len(points) == pytest.approx(1.0, abs=6 * float(values.std()) / 20_000**0.5)


@heads
def test_particles_are_evaluated_row_by_row(make):
    model, x = ppca(rows=3)
    head, _ = lively(make)
    guide = Amortized(nn.Linear(5, 4), head).float()
    with torch.no_grad():
        weights = weigh(model, guide, x, 4)
        each = [
            model.posterior(x[n]).log_prob(z) + model.marginal().log_prob(x[n]) - head(guide.encoder(x[n])).log_prob(z)
            for particle in weights.passes[0].values["z"]
            for n, z in enumerate(particle)
        ]
    torch.testing.assert_close(weights.log_weights, torch.stack(each).reshape(4, 3), atol=3e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["full rank", "mixture", "planar", "NSF"])
def test_a_fitted_head_comes_back_from_a_file(name, tmp_path):
    model, x = ppca(rows=8)

    def fresh() -> Amortized:
        return Amortized(nn.Linear(5, 4), REAL[name](4, 2))

    posterior = fit(model, x, guide=fresh(), method=svi(steps=3), progress=False)
    loaded = Posterior.load(posterior.save(tmp_path / "p"), model, fresh(), data=x)
    draws = same_noise(lambda: posterior.sample(5)["z"], lambda: loaded.sample(5)["z"])
    assert torch.equal(*draws)


WEIGHTS, CENTRES = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([-1.5, 0.0, 2.0])
GROUPS = dist.OneHotCategorical(WEIGHTS.expand(2, 3)).to_event(1)
CODES = {
    "one-hot": (partial(Categorical, 2, (2, 3)), GROUPS, lambda z: (z * CENTRES).sum(-1), CENTRES, WEIGHTS),
    "bit": (partial(Bernoulli, 1, ()), dist.Bernoulli(0.6), lambda z: 2 * z.unsqueeze(-1), CENTRES[1:], [0.4, 0.6]),
}


@pytest.mark.parametrize(("make", "prior", "loc", "centres", "weights"), CODES.values(), ids=CODES)
def test_discrete_codes_find_a_posterior_whose_logits_are_linear(make, prior, loc, centres, weights):
    def model(x: Tensor) -> None:
        with batch_plate(x):
            observe("x", dist.Normal(loc(pyro.sample("z", prior)), 1.0).to_event(1), x)

    guide = Amortized(nn.Identity(), make())
    x = 2 * torch.randn(30, make().linear.in_features)
    method = svi(loss=importance(elbo, 8, score_function()), lr=0.2, steps=150, schedule="cosine")
    fit(model, x, guide=guide, method=method, progress=False)
    parts = torch.as_tensor(weights).log() + dist.Normal(centres, 1.0).log_prob(x.unsqueeze(-1))
    with torch.no_grad():
        bound = log_weights(model, guide, x, particles=500)[0].mean(0)
    assert float((parts.logsumexp(-1).sum(-1) - bound).mean()) == pytest.approx(0.0, abs=0.02)
    with pytest.raises(ValueError, match=r"no reparameterised sampler.*straight_through"):
        importance(elbo, 2, pathwise)(model, guide, x)


@pytest.mark.parametrize("d", [2, 3, 6])
@pytest.mark.parametrize("concentration", [1.0, 7.0])
def test_the_power_spherical_against_quadrature(d, concentration):
    """Its density is of t = loc'z alone, and the sphere's slice there is a smaller sphere."""
    angle = torch.linspace(0, math.pi, 20_001, dtype=torch.double)
    slices = 2 * math.pi ** ((d - 1) / 2) / math.gamma((d - 1) / 2) * angle.sin() ** (d - 2)
    loc = nn.functional.normalize(torch.randn(d, dtype=torch.double), dim=0)
    kappa = torch.tensor(concentration, dtype=torch.double, requires_grad=True)
    q, p = PowerSpherical(loc, kappa), UniformOnSphere(loc)
    across = torch.randn(d, dtype=torch.double)
    across = nn.functional.normalize(across - (across @ loc) * loc, dim=0)
    z = angle.cos().unsqueeze(-1) * loc + angle.sin().unsqueeze(-1) * across
    log_q = q.log_prob(z)

    def mean(f: Tensor) -> Tensor:
        return torch.trapezoid(f * log_q.exp() * slices, angle)

    torch.testing.assert_close(mean(torch.ones_like(angle)), torch.ones_like(kappa), atol=1e-5, rtol=0)
    torch.testing.assert_close(mean(-log_q), q.entropy(), atol=1e-4, rtol=0)
    torch.testing.assert_close(mean(log_q - p.log_prob(z)), kl_divergence(q, p), atol=1e-4, rtol=0)
    torch.testing.assert_close(mean(angle.cos()) * loc, q.mean, atol=1e-4, rtol=0)
    draws = q.rsample((40_000,))
    assert q.support.check(draws).all()
    cosine = draws @ loc
    torch.testing.assert_close(draws.mean(0), q.mean, atol=0.015, rtol=0)
    torch.testing.assert_close((cosine**2).mean(), mean(angle.cos() ** 2), atol=0.015, rtol=0)
    exact, found = (torch.autograd.grad(f, kappa)[0] for f in (mean(angle.cos() ** 3), (cosine**3).mean()))
    torch.testing.assert_close(found, exact, atol=0.01, rtol=0)


def test_gradients_by_the_direction_are_those_of_the_mean():
    raw = torch.randn(5, 4, dtype=torch.double, requires_grad=True)  # with directions on both sides of the pole
    q = PowerSpherical(nn.functional.normalize(raw, dim=-1), torch.full((5,), 3.0, dtype=torch.double))
    weights = torch.randn(4, dtype=torch.double)
    means = (q.mean, q.rsample((40_000,)).mean(0))
    exact, found = (torch.autograd.grad((m @ weights).sum(), raw, retain_graph=True)[0] for m in means)
    torch.testing.assert_close(found, exact, atol=0.02, rtol=0)


def test_a_sphere_of_codes_is_found_with_the_divergence_in_closed_form():
    """With orthogonal loadings the posterior is of von Mises and Fisher, around a linear function of the row."""
    weight = 2 * torch.eye(5, 3)

    def model(x: Tensor) -> None:
        with batch_plate(x):
            z = pyro.sample("z", UniformOnSphere(torch.zeros(3)))
            observe("x", dist.Normal(z @ weight.T, 1.0).to_event(1), x)

    x = dist.Normal(UniformOnSphere(torch.zeros(30, 3)).sample() @ weight.T, 1.0).sample()
    guide = Amortized(nn.Identity(), PowerSphericalHead(5, 3))
    method = svi(loss=importance(elbo, 8, analytic_kl), lr=0.1, steps=150, schedule="cosine")
    fit(model, x, guide=guide, method=method, progress=False)
    kappa = (x @ weight).norm(dim=-1)
    evidence = dist.Normal(0.0, 1.0).log_prob(x).sum(-1) - 2.0 + (kappa.sinh() / kappa).log()
    with torch.no_grad():
        assert 0 < (evidence - log_weights(model, guide, x, particles=2000)[0].mean(0)).mean() < 0.3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRank(4, 2, rank=0), "rank must be at least 1"),
        (lambda: Mixture(4, 2, components=0), "at least one component"),
        (lambda: Planar(4, 2, layers=0), "at least one layer"),
        (lambda: Sylvester(4, 2, directions=3), r"directions in 1 \.\.\. 2"),
        (lambda: FullRank(4, 0), "positive size"),
        (lambda: FullRank(4, 2, support=constraints.boolean), "no transform takes them onto"),
        (lambda: Flow(4, 2, "Spline"), "no flow 'Spline': choose one of MAF"),
        (lambda: Flow(4, 2, "NCSF"), "no normal distribution"),
        (lambda: Flow(4, 2, hidden=(3,)), "'NSF' makes no flow of 2 dimensions.*unexpected keyword argument 'hidden'"),
        (lambda: Flow(4, 2, "NAF", inverse=False), "keep inverse=True"),
        (lambda: PowerSphericalHead(4, 1), "at least 2, got 1"),
        (lambda: PowerSpherical(torch.ones(3, 1), torch.ones(3)), "at least two dimensions"),
        (lambda: Categorical(4, (3, 1)), "two classes or more"),
        (lambda: Bernoulli(4, 0), "positive size"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [*FAST.values(), PowerSphericalHead, Categorical, Bernoulli])
def test_features_of_another_width_are_refused(make):
    with pytest.raises(ValueError, match=r"takes features \[\*, 4\], and the encoder gave \[3, 5\]"):
        make(4, 2)(torch.randn(3, 5))


def test_importing_zuko_leaves_validation_on(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "zuko"]:
        monkeypatch.delitem(sys.modules, name)
    Distribution.set_default_validate_args(True)
    Flow(4, 2)(torch.randn(3, 4)).rsample()
    assert "zuko" in sys.modules and Distribution._validate_args
