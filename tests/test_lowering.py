"""Densities captured as graphs and run in JAX, against what torch computes."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from densities import COUNT, EVERY, NO_DENSITY, NOT_LOWERED
from torch import Tensor, nn

from discovery import modules
from pyro_ae import fit, nuts
from pyro_ae.energy import Energy
from pyro_ae.lowering.capture import CaptureError, capture
from pyro_ae.lowering.density import to_jax
from pyro_ae.lowering.to_jax import MissingOpError, array, arrays, lower
from pyro_ae.nn import MLP
from pyro_ae.plates import batched


def both(fn, *args: Tensor) -> None:
    """The same values and the same gradients, by all arguments that torch differentiates."""
    inputs = [a.clone().requires_grad_(a.is_floating_point()) for a in args]
    value = fn(*inputs)
    graph = capture(fn, *args)
    lowered, constants = lower(graph), arrays(graph.constants)
    real = tuple(i for i, a in enumerate(args) if a.is_floating_point())
    run = jax.value_and_grad(lowered, argnums=real) if real else lambda *a, **k: (lowered(*a, **k), ())
    ours, gradients = jax.jit(run)(*map(array, args), constants=constants)
    torch.testing.assert_close(float(ours), value.item(), rtol=1e-5, atol=1e-5)
    if not real or not value.requires_grad:
        return
    try:
        theirs = torch.autograd.grad(value, [inputs[i] for i in real], allow_unused=True)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # Pyro's own, of GaussianScaleMixture
        return
    for found, wanted in zip(gradients, theirs, strict=True):
        if wanted is not None and torch.isfinite(wanted).all():
            torch.testing.assert_close(torch.tensor(np.array(found)), wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", sorted(set(EVERY) - set(NOT_LOWERED)))
def test_every_distribution_agrees_with_torch(name):
    """As a likelihood of data that are known, and as a prior of a latent."""
    make, parameters, value = EVERY[name]

    def likelihood(*p):
        with pyro.validation_enabled(False):
            return make(*p).log_prob(value).sum()

    def prior(x, *p):
        with pyro.validation_enabled(False):
            return make(*p).log_prob(x).sum()

    both(likelihood, *parameters)
    if value.is_floating_point() and value is not COUNT and not torch.isnan(value).any():
        both(prior, value, *parameters)


@pytest.mark.parametrize("name", sorted(NOT_LOWERED))
def test_those_that_cannot_be_lowered_say_so(name):
    """If one can be by now, it belongs to the others."""
    make, parameters, value = EVERY[name]

    def density(*p):
        with pyro.validation_enabled(False):
            return make(*p).log_prob(value).sum()

    with pytest.raises(CaptureError, match=r"depends on the values.*nuts\(backend='pyro'\)"):
        capture(density, *parameters)


def test_every_distribution_of_pyro_is_accounted_for():
    kinds = {
        n
        for n, v in vars(dist).items()
        if inspect.isclass(v) and issubclass(v, torch.distributions.Distribution) and not n.startswith("_")
    }
    assert kinds - set(EVERY) - set(NO_DENSITY) == set()
    assert (set(EVERY) | set(NO_DENSITY)) - kinds == set()


NETWORKS = {
    "mlp": (lambda: MLP(4, [8], 3, activation=nn.Tanh), (2, 4)),
    "gelu": (lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2), nn.SiLU()), (2, 4)),
    "elu": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.LeakyReLU(), nn.Softplus()), (2, 4)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 2, groups=2)),
        (3, 2, 8, 8),
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.ConvTranspose2d(6, 2, 4, stride=2, padding=1, dilation=2),
        ),
        (3, 4, 5, 5),
    ),
    "one dimension": (lambda: nn.Conv1d(2, 3, 3, dilation=2, padding=2), (3, 2, 9)),
    "folded": (lambda: batched(nn.Conv2d(1, 3, 3), 3), (2, 3, 1, 6, 6)),
    "pooling": (lambda: nn.Sequential(nn.AvgPool2d(2), nn.MaxPool2d(2)), (2, 3, 8, 8)),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (2, 5, 8)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), (3, 4)),
    "batch norm": (lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)), (3, 2, 4, 4)),
    "embedding": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1), nn.LogSoftmax(0)), (3, 4)),
    "recurrent": (lambda: Recurrent(), (2, 5, 3)),
}


class Recurrent(nn.Module):
    """A loop over time, by a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 4)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return h


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_agree_with_torch(name):
    make, shape = NETWORKS[name]
    net = make().eval()
    both(lambda x: net(x).square().sum() + net(x).flatten()[0], torch.randn(shape))


OPERATIONS = {
    "indexing": lambda x: x[:, [2, 0]].sum() + x[x.new_tensor([1, 0]).long()].prod() + x[1, ::2].sum(),
    "scatter": lambda x: (torch.zeros(3, 4).scatter(1, torch.tensor([[0, 3], [1, 2], [2, 0]]), x[:3, :2]) ** 2).sum(),
    "scatter_add": lambda x: (torch.zeros(2, 4).index_add(0, torch.tensor([0, 1, 0, 1]), x) ** 2).sum(),
    "gather": lambda x: (x.gather(1, torch.tensor([[0, 3], [1, 1]])) ** 2).sum(),
    "cumulative": lambda x: x.cumsum(1).sum() + x.exp().cumprod(0).sum() + x.logcumsumexp(1).sum(),
    "masked": lambda x: x.masked_fill(torch.eye(4, dtype=torch.bool), 0.5).square().sum() + x.tril().sum(),
    "cholesky": lambda x: torch.linalg.cholesky(x @ x.T + torch.eye(4)).log().diagonal().sum(),
    "solve": lambda x: torch.linalg.solve(x @ x.T + torch.eye(4), x[:, 0]).sum(),
    "inverse": lambda x: torch.linalg.inv(x + 5 * torch.eye(4)).sum(),
    "triangular": lambda x: torch.linalg.solve_triangular(x.tril() + 3 * torch.eye(4), x, upper=False).sum(),
    "cholesky_solve": lambda x: torch.cholesky_solve(x, x.tril() + 3 * torch.eye(4)).sum(),
    "determinant": lambda x: torch.logdet(x @ x.T + torch.eye(4)) + torch.det(x + 3 * torch.eye(4)),
    "eigenvalues": lambda x: torch.linalg.eigvalsh(x @ x.T).log1p().sum(),
    "gamma": lambda x: torch.lgamma(x.exp()).sum() + torch.digamma(x.exp()).sum() + torch.polygamma(1, x.exp()).sum(),
    "erf": lambda x: (x.erf() + (2 * x).erfc() + torch.special.ndtri(x.sigmoid())).sum(),
    "bessel": lambda x: torch.special.i0e(x).log().sum() + torch.special.log_ndtr(x).sum(),
    "extremes": lambda x: (x.max(1).values + x.amin(0) + x.clamp(-0.3, 0.4) + x.sort(0).values[1]).sum(),
    "spread": lambda x: x.var(1).sum() + x.std() + x.norm() + torch.cdist(x, x[:2]).sum() + x.logsumexp(0).sum(),
    "shapes": lambda x: torch.cat([x.T, x], 1).view(2, -1).unfold(1, 4, 3).flip(0).roll(1).sin().sum(),
    "einsum": lambda x: torch.einsum("ij,kj,k->i", x, x, x[0]).sin().sum(),
    "in place": lambda x: torch.zeros(4, 4).copy_(x).mul_(2).index_put_((torch.tensor([1]),), x[2]).cos().sum(),
    "block": lambda x: torch.block_diag(x, x[:1]).sum() + torch.diag_embed(x[0], 1).square().sum(),
    "exponential": lambda x: torch.linalg.matrix_exp(0.3 * x).sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_agree_with_torch(name):
    both(OPERATIONS[name], torch.randn(4, 4))


ZOO = [pytest.param(m, id=n) for n, m in modules("pyro_ae.models")]


@pytest.mark.parametrize("module", ZOO)
def test_every_model_of_the_zoo_is_lowered(module):
    model, _, x = module.example()
    energy = Energy(model, x)
    start = energy.init("prior")
    both(lambda *v: energy(dict(zip(start, v, strict=True))), *start.values())


# ---------------------------------------------------------------------------------------------------- the graph


def test_constants_are_inputs_and_masks_are_folded():
    data, mask = torch.randn(5), torch.tensor([True, False, True, True, False])

    def density(a):
        return ((data - a)[mask] ** 2).sum()

    graph = capture(density, torch.zeros(5))
    assert any(torch.equal(c, data) for c in graph.constants.values())
    lowered = jax.jit(lower(graph))
    other = {n: jnp.zeros(5) if c.is_floating_point() else array(c) for n, c in graph.constants.items()}
    assert lowered(jnp.ones(5), constants=other) == 3.0
    torch.testing.assert_close(graph(torch.ones(5)), density(torch.ones(5)))


def test_arguments_may_be_nested_and_keys_in_any_order():
    graph = capture(lambda v: {"out": [v["b"] - v["a"][0]]}, {"b": torch.tensor(5.0), "a": (torch.tensor(3.0),)})
    found = lower(graph)({"a": (jnp.float32(1.0),), "b": jnp.float32(2.0)}, constants={})
    assert float(found["out"][0]) == 1.0


def test_zero_probabilities_have_a_gradient():
    """Where a weight of zero stands beside a logarithm of zero, plain differentiation gives NaN."""
    graph = capture(lambda p: (p * torch.tensor([0.0, 1.0])).log().logsumexp(0), torch.tensor([0.3, 0.4]))
    gradient = jax.grad(lower(graph))(jnp.array([0.3, 0.4]), constants=arrays(graph.constants))
    np.testing.assert_allclose(gradient, [0.0, 2.5], rtol=1e-5)


def test_counts_may_be_whole_numbers():
    counts = torch.tensor([1, 2, 3])
    both(lambda rate: dist.Poisson(rate, validate_args=False).log_prob(counts).sum(), torch.tensor([0.5, 1.0, 2.0]))
    both(lambda x: torch.special.xlog1py(counts, x).sum(), torch.tensor([0.5, 1.0, 2.0]))


def test_random_numbers_and_control_flow_are_refused():
    with pytest.raises(CaptureError, match="draws random numbers"):
        capture(lambda x: x + torch.randn(3), torch.zeros(3))
    with pytest.raises(CaptureError, match="depends on the values"):
        capture(lambda x: x.sum() if x[0] > 0 else x.prod(), torch.ones(3))
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    with pytest.raises(CaptureError, match="evaluation mode where it is dropout"):
        capture(net, torch.zeros(3))


def bessel(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("odd", Odd(mu), obs=y)


class Odd(dist.Normal):
    """A normal whose density takes a detour by an op that has no translation."""

    def __init__(self, loc: Tensor) -> None:
        super().__init__(loc, 1.0)

    def log_prob(self, value: Tensor) -> Tensor:
        detour = torch.special.modified_bessel_k0(self.loc.detach().abs() + 1)
        return super().log_prob(value) + detour - detour.detach()


def test_an_op_without_an_entry_names_itself_the_site_and_the_way_out():
    y = torch.tensor([0.4])
    with pytest.raises(MissingOpError, match=r"modified_bessel_k0.*at site 'odd'.*nuts\(backend='pyro'\)"):
        fit(bessel, y, method=nuts(draws=5, warmup=5, chains=1), progress=False, plate=None)
    method = nuts(draws=200, warmup=100, chains=2, backend="pyro")
    posterior = fit(bessel, y, method=method, progress=False, plate=None, seed=0)
    assert abs(posterior.draws["mu"].mean() - 0.2) < 0.2


# ------------------------------------------------------------------------------------------------------- to_jax


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, s), obs=y)


@pytest.mark.parametrize("float64", [False, True])
def test_to_jax_is_the_density_with_its_transforms(float64):
    data = torch.randn(20, 2), torch.randn(20)
    density = to_jax(regression, data, float64=float64)
    v = {"w": torch.tensor([0.3, -0.2], dtype=torch.float64), "s": torch.tensor(0.4, dtype=torch.float64)}
    torch.set_default_dtype(torch.float64)
    exact = -Energy(regression, tuple(t.double() for t in data))(v).item()
    with jax.enable_x64(float64):
        ours = float(jax.jit(density.log_density)({n: jnp.asarray(t.numpy()) for n, t in v.items()}))
        s = float(density.constrain({n: jnp.asarray(t.numpy()) for n, t in v.items()})["s"])
    assert abs(ours - exact) < (1e-10 if float64 else 1e-4) * abs(exact) or abs(ours - exact) < 2e-5
    assert abs(s - np.exp(0.4)) < (1e-7 if float64 else 1e-5)
    assert density.initial.keys() == v.keys()


def test_to_jax_serves_another_sampler():
    """Random-walk Metropolis, written here in JAX, on a density from Pyro."""
    density = to_jax(lambda: pyro.sample("g", dist.Gamma(3.0, 2.0)))

    def step(carry, key):
        v, lp = carry
        noise, accept = jax.random.split(key)
        new = {"g": v["g"] + 0.9 * jax.random.normal(noise)}
        lp_new = density.log_density(new)
        better = jnp.log(jax.random.uniform(accept)) < lp_new - lp
        v = {"g": jnp.where(better, new["g"], v["g"])}
        return (v, jnp.where(better, lp_new, lp)), density.constrain(v)["g"]

    keys = jax.random.split(jax.random.PRNGKey(0), 40_000)
    start = density.initial, density.log_density(density.initial)
    _, draws = jax.lax.scan(step, start, keys)
    assert abs(float(draws.mean()) - 1.5) < 0.05
    assert abs(float(draws.std()) - 0.75**0.5) < 0.05
