"""What the latents of the rows hold, against closed forms of linear models and guides that are made up."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from torch import Tensor, nn
from torch.distributions import kl_divergence
from truth import biased_guide, exact_guide, gaussian_mean, ladder, ppca, stubborn

from pyro_ae import Posterior, batch_plate, fit, observe, svi
from pyro_ae.data import as_rows
from pyro_ae.diagnostics.latents import latent_summaries, latent_summary
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.bottom_up import BottomUp
from pyro_ae.guides.flow import Flow
from pyro_ae.guides.importance_weighted import ImportanceWeighted
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.guides.point import Point
from pyro_ae.models.ppca import PPCA
from pyro_ae.models.vae import VAE
from pyro_ae.nn import MLP
from pyro_ae.program import Program


def posterior_of(model: Callable, guide: Callable | None, data: object, **state: object) -> Posterior:
    """A guide as it is, not trained."""
    rows = as_rows(data)
    program = Program(model, guide, total=rows.size)
    program.build(rows.first(None))
    return Posterior(program, data=rows, method="given", **state)


def orthogonal(rows: int, sizes: tuple[float, ...] = (2.0, 0.5, 0.0), noise: float = 0.5) -> tuple[PPCA, Tensor]:
    """A linear model whose posterior has independent elements; a column of size 0 says nothing."""
    model = PPCA(6, len(sizes), noise)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.qr(torch.randn(6, len(sizes)))[0] * torch.tensor(sizes))
        x = model.marginal().sample((rows,))
    return model.requires_grad_(False), x


def independent(model: PPCA, shift: float = 0.0, shrink: float = 1.0) -> Callable:
    """The exact posterior of :func:`orthogonal`, or all of its means moved."""

    def guide(x: Tensor) -> None:
        with batch_plate(x):
            exact = model.posterior(x)
            scale = exact.variance.sqrt()
            pyro.sample("z", dist.Normal(shrink * exact.mean + shift, shrink * scale).to_event(1))

    return guide


def prior_guide(x: Tensor) -> None:
    with batch_plate(x):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


# ------------------------------------------------------------------------------------------- closed forms


def test_linear_model_has_its_rate_information_and_surgery() -> None:
    model, x = orthogonal(1000)
    found = latent_summary(posterior_of(model, independent(model), x))
    exact = model.posterior(x)
    mean, variance = exact.mean, exact.variance
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.variance, variance)
    kl = 0.5 * (variance + mean.square() - 1 - variance.log())
    assert found.kl is not None and found.kl_by == "closed form"
    torch.testing.assert_close(found.kl, kl, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.row_kl, kl.sum(1), atol=1e-5, rtol=1e-4)
    assert found.rate == pytest.approx(float(kl.sum(1).mean()), rel=1e-5)

    channel = 0.5 * float(torch.logdet(torch.eye(3) + model.weight.T @ model.weight / 0.25))
    assert found.information is not None and found.information_error is not None
    assert found.information == pytest.approx(channel, abs=4 * found.information_error)
    assert found.information_error < 0.06 and not found.saturated
    assert found.aggregate_kl is not None
    assert found.information + found.aggregate_kl == pytest.approx(found.rate, abs=0.06)
    assert 0 < found.aggregate_kl < 0.1

    assert found.collapsed is not None and found.kinds is not None
    assert found.collapsed.tolist() == [False, False, True], "one of several is found"
    assert found.kinds.names == ["active", "mixed", "passive"]
    assert found.mmd is not None and found.wasserstein is not None
    assert min(found.mmd.p_value, found.wasserstein.p_value) > 0.05, "the aggregate posterior is the prior"


@pytest.mark.parametrize("guide", [exact_guide, biased_guide])
def test_tied_elements_have_the_divergence_of_their_marginals(guide: Callable) -> None:
    model, x = ppca(300)
    found = latent_summary(posterior_of(model, guide(model), x), draws=400)
    exact = model.posterior(x)
    if guide is biased_guide:
        exact = dist.MultivariateNormal(exact.loc + 0.3, 1.3 * exact.covariance_matrix)
    row_kl = kl_divergence(exact, dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    assert found.rate == pytest.approx(float(row_kl.mean()), abs=0.02)
    torch.testing.assert_close(found.row_kl, row_kl, atol=0.5, rtol=0)
    marginals = 0.5 * (exact.variance + exact.mean.square() - 1 - exact.variance.log())
    assert found.kl is not None and found.kl_by == "normal fit"
    torch.testing.assert_close(found.kl, marginals, atol=1e-4, rtol=1e-4)
    assert "normal fit" in str(found)


def test_information_that_is_as_much_as_rows_can_show_is_said_to_be() -> None:
    model, x = orthogonal(40, (3.0, 3.0, 3.0), noise=0.01)
    found = latent_summary(posterior_of(model, independent(model), x))
    assert found.information == pytest.approx(math.log(40), abs=1e-2)
    assert found.saturated and "log N = 3.69" in str(found)
    assert found.aggregate_kl is not None and found.rate > 10
    assert found.information + found.aggregate_kl == pytest.approx(found.rate, abs=0.6)


def test_guide_that_is_the_prior_says_nothing() -> None:
    model, x = ppca(500)
    found = latent_summary(posterior_of(model, prior_guide, x))
    assert found.rate == 0 and found.information == pytest.approx(0.0, abs=1e-6)
    assert found.aggregate_kl == pytest.approx(0.0, abs=1e-6)
    assert found.collapsed is not None and found.collapsed.all() and not found.saturated
    assert found.kinds is not None and found.kinds.names == ["passive", "passive"]
    assert found.mmd is not None and found.mmd.p_value > 0.05
    assert str(found).count("collapsed") == 2


@pytest.mark.parametrize("sizes", [(0.0, 0.0), (2.0, 0.0)])
def test_trained_guide_of_a_decoder_that_ignores_its_latent_collapses(sizes: tuple[float, ...]) -> None:
    model, x = orthogonal(300, sizes)
    guide = Amortized(MLP(6, [16]), MeanField(16, 2))
    posterior = fit(model, x, guide=guide, method=svi(lr=1e-2, steps=300, schedule="cosine"), seed=0, progress=False)
    found = latent_summary(posterior)
    assert found.collapsed is not None and found.information is not None
    assert found.collapsed.tolist() == [size == 0 for size in sizes]
    channel = sum(0.5 * math.log(1 + size**2 / 0.25) for size in sizes)
    assert found.information == pytest.approx(channel, abs=0.15)


def test_aggregate_posterior_that_is_shifted_or_shrunk_is_not_the_prior() -> None:
    model, x = orthogonal(300)
    for change in ({"shift": 0.4}, {"shrink": 0.6}):
        found = latent_summary(posterior_of(model, independent(model, **change), x))
        assert found.mmd is not None and found.wasserstein is not None
        assert found.mmd.value > found.mmd.usual and found.mmd.p_value < 0.05
        assert found.wasserstein.value > found.wasserstein.usual and found.wasserstein.p_value < 0.05
        assert found.aggregate_kl is not None and found.aggregate_kl > 0.15


def test_units_are_those_of_the_prior() -> None:
    def model(x: Tensor | None = None, *, size: int = 1) -> Tensor:
        with batch_plate(x, size):
            z = pyro.sample("z", dist.Normal(torch.tensor([0.0, 3.0]), 5.0).to_event(1))
            return observe("x", dist.Normal(z[..., :1], 0.1).to_event(1), x)

    def guide(x: Tensor) -> None:
        with batch_plate(x):
            loc = torch.cat([x, torch.full_like(x, 3.0)], 1)
            pyro.sample("z", dist.Normal(loc, torch.tensor([0.1, 5.0])).to_event(1))

    with torch.no_grad():
        x = model(size=400)
    found = latent_summary(posterior_of(model, guide, x))
    assert found.kinds is not None and found.kinds.names == ["active", "passive"]
    assert found.mmd is not None and found.mmd.p_value > 0.05


def test_support_that_is_not_real_has_its_divergence_by_draws() -> None:
    def model(x: Tensor) -> None:
        with batch_plate(x):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0).expand([3]).to_event(1))
            pyro.sample("x", dist.Poisson(z).to_event(1), obs=x)

    m, s = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.3, 0.5, 0.7])

    def guide(x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("z", dist.LogNormal(m, s).to_event(1))

    found = latent_summary(posterior_of(model, guide, torch.ones(200, 3)), draws=200)
    log_q = -m - s.log() - 0.5 * math.log(2 * math.pi * math.e)
    log_p = m - (m + s.square() / 2).exp()  # of Gamma(2, 1), whose constant is 1
    assert found.kl is not None and found.kl_by == "draws"
    torch.testing.assert_close(found.kl.mean(0), log_q - log_p, atol=0.02, rtol=0)
    assert found.information == pytest.approx(0.0, abs=1e-5)
    moments = dist.LogNormal(m, s)
    torch.testing.assert_close(found.mean[0], moments.mean)
    torch.testing.assert_close(found.variance[0], moments.variance)


# --------------------------------------------------------------------------------------- several latents


def chain_guide(x: Tensor) -> None:
    with batch_plate(x):
        pyro.sample("z2", dist.Normal(x[:, :2], 0.5).to_event(1))
        pyro.sample("z1", dist.Normal(x[:, 2:], 0.3).to_event(1))


def test_prior_that_depends_on_a_latent_is_met_at_its_draws() -> None:
    model, x, _ = ladder()
    found = latent_summaries(posterior_of(model, chain_guide, x), draws=4000)
    assert list(found.sites) == ["z2", "z1"] and not found.skipped
    (above,) = model.priors
    weight, mean = above.map.weight, above.map(x[:, :2])
    spread = weight.square().sum(1) * 0.5**2 / 0.49
    kl = 0.5 * ((0.09 + (x[:, 2:] - mean).square()) / 0.49 + spread - 1 - math.log(0.09 / 0.49))
    z1, z2 = found.sites["z1"], found.sites["z2"]
    assert z1.kl is not None and z1.kl_by == "closed form"
    torch.testing.assert_close(z1.kl, kl, atol=0.15, rtol=0.05)
    assert z1.rate == pytest.approx(float(kl.sum(1).mean()), rel=0.01)
    assert z1.information is not None and z1.aggregate_kl is None, "the prior of z1 is known given z2 alone"
    assert any("prior is not the same for all" in note for note in z1.notes)
    assert z2.information is not None and z2.aggregate_kl is not None and z2.notes == ()
    assert z1.mmd is not None and z1.mmd.p_value < 0.05
    assert str(found).count("Latent 'z") == 2
    again = latent_summary(posterior_of(model, chain_guide, x), site="z2")
    assert again.rate == pytest.approx(z2.rate)


def test_guide_that_goes_up_has_no_information_of_its_upper_latent() -> None:
    model, x, _ = ladder()
    guide = BottomUp((MLP(5, [8]), MeanField(8, 3)), (MLP(3, [8]), MeanField(8, 2)))
    posterior = posterior_of(model, guide, x)
    found = latent_summaries(posterior, draws=1000).sites
    assert found["z2"].information is None and "depends on other latents" in found["z2"].notes[0]
    assert found["z1"].information is not None
    drawn = posterior.sample(2000)["z2"]
    torch.testing.assert_close(found["z2"].mean, drawn.mean(0), atol=0.25, rtol=0)
    torch.testing.assert_close(found["z2"].variance, drawn.var(0), atol=0, rtol=0.25)


def test_prior_that_differs_between_rows() -> None:
    def model(c: Tensor, x: Tensor) -> None:
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(c, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(c: Tensor, x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("z", dist.Normal(c, 1.0).to_event(1))

    c = 2 * torch.randn(200, 1)
    found = latent_summary(posterior_of(model, guide, (c, c)))
    assert found.rate == 0 and found.aggregate_kl is None and found.mmd is not None
    assert found.information is not None and found.information > 0.3, "a draw tells which row it is from"
    assert found.mmd.p_value > 0.05


def test_prior_that_depends_on_what_all_rows_share() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(torch.stack([mu, mu], -1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("mu", dist.Normal(0.5, 0.1))
        prior_guide(x)

    x = torch.randn(40, 2)
    found = latent_summary(posterior_of(model, guide, x), draws=400)
    assert found.aggregate_kl is None and found.information is not None
    assert found.rate == pytest.approx(0.25 + 0.01, abs=0.02), "averaged over draws of mu"


def test_plates_beside_that_of_the_rows() -> None:
    def model(x: Tensor) -> None:
        with batch_plate(x), pyro.plate("parts", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x.T)

    variances = torch.tensor([[0.1, 1.0], [0.2, 0.3], [0.4, 0.5]])

    def guide(x: Tensor) -> None:
        with batch_plate(x), pyro.plate("parts", 3, dim=-2):
            loc = torch.stack([x.T, torch.zeros_like(x.T)], -1)
            pyro.sample("z", dist.Normal(loc, variances.sqrt().unsqueeze(1)).to_event(1))

    x = torch.randn(50, 3)
    found = latent_summary(posterior_of(model, guide, x))
    flat = variances.flatten()
    mean = torch.stack([x, torch.zeros_like(x)], -1).flatten(1)
    assert found.kl is not None and found.aggregate_kl is not None and found.information is not None
    torch.testing.assert_close(found.kl, 0.5 * (flat + mean.square() - 1 - flat.log()), atol=1e-5, rtol=1e-4)
    assert found.information + found.aggregate_kl == pytest.approx(found.rate, abs=0.3)


def test_discrete_latents_are_left_out_with_the_reason() -> None:
    @config_enumerate
    def summed(x: Tensor) -> None:
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            c = pyro.sample("c", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z.sum(-1) + c, 1.0), obs=x[:, 0])

    def drawn(x: Tensor) -> None:
        with batch_plate(x):
            c = pyro.sample("c", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1) + c, 1.0), obs=x[:, 0])

    def both(x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("c", dist.Bernoulli(0.3))
        prior_guide(x)

    x = torch.randn(30, 2)
    found = latent_summaries(posterior_of(summed, prior_guide, x))
    assert list(found.sites) == ["z"] and "summed out" in found.skipped["c"]
    found = latent_summaries(posterior_of(drawn, both, x))
    assert list(found.sites) == ["z"] and "discrete" in found.skipped["c"] and "'c' is left out" in str(found)
    with pytest.raises(ValueError, match="discrete"):
        latent_summary(posterior_of(drawn, both, x), site="c")


# ------------------------------------------------------------------------------------------------- how


def test_guide_with_parameters_for_each_row() -> None:
    model, x = orthogonal(60)
    exact = model.posterior(x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 60):
            pyro.sample("z", dist.Normal(exact.mean, exact.variance.sqrt()).to_event(1))

    found = latent_summary(posterior_of(model, guide, x), rows=10)
    rows = torch.linspace(0, 59, 10).round().long()
    torch.testing.assert_close(found.mean, exact.mean[rows])
    amortised = latent_summary(posterior_of(model, independent(model), x), rows=10)
    torch.testing.assert_close(found.kl, amortised.kl)
    assert found.information == pytest.approx(amortised.information, abs=0.2)
    assert found.information is not None and found.information < math.log(10)


def test_program_that_is_run_draw_by_draw() -> None:
    model, x = ppca(30)
    one_by_one = stubborn(model)

    def guide(x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("z", dist.Normal(x[:, :2], 0.5).to_event(1))

    together = latent_summary(posterior_of(model, guide, x))
    with pytest.warns(UserWarning, match="one by one"):
        alone = latent_summary(posterior_of(one_by_one, guide, x), draws=7)
    torch.testing.assert_close(alone.kl, together.kl)
    torch.testing.assert_close(alone.variance, together.variance)
    assert alone.information == pytest.approx(together.information, abs=0.2)


@pytest.mark.parametrize("inverse", [True, False])
def test_flow_has_its_surgery(inverse: bool) -> None:
    model, x = ppca(60)
    guide = Amortized(MLP(5, [16]), Flow(16, 2, inverse=inverse))
    found = latent_summary(posterior_of(model, guide, x), draws=200)
    assert found.information is not None and found.aggregate_kl is not None and found.kl_by == "normal fit"
    assert found.information + found.aggregate_kl == pytest.approx(found.rate, abs=0.35)
    drawn = posterior_of(model, guide, x).sample(2000)["z"]
    torch.testing.assert_close(found.mean, drawn.mean(0), atol=0.5, rtol=0)
    torch.testing.assert_close(found.variance, drawn.var(0), atol=0.1, rtol=0.5)
    assert found.kl is not None and found.kl.isfinite().all()


def test_decoder_does_not_run_for_the_draws() -> None:
    seen: list[int] = []

    class Decoder(nn.Linear):
        def forward(self, z: Tensor) -> Tensor:
            seen.append(z.shape[:-1].numel())
            return super().forward(z)

    posterior = posterior_of(VAE(Decoder(2, 2), 2), prior_guide, torch.ones(20, 2))
    seen.clear()
    latent_summary(posterior, draws=50)
    assert max(seen) <= 20


def test_same_seed_same_summary_and_no_trace_in_the_global_state() -> None:
    model, x = ppca(30)
    posterior = posterior_of(model, exact_guide(model), x)
    state = torch.get_rng_state()
    first, second, other = (latent_summary(posterior, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.information == second.information != other.information
    assert first.mmd == second.mmd


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda m, x: posterior_of(m, exact_guide(m), x), {"rows": 1}, "rows and draws must be at least 2"),
        (lambda m, x: posterior_of(m, exact_guide(m), x), {"draws": 1}, "rows and draws must be at least 2"),
        (lambda m, x: posterior_of(m, exact_guide(m), x[:1]), {}, "at least two rows"),
        (lambda m, x: posterior_of(m, exact_guide(m), x), {"site": "w"}, "no latent 'w'"),
        (lambda m, x: posterior_of(m, None, x, draws={"z": torch.zeros(2, 3, len(x), 2)}), {}, "fit with svi"),
        (
            lambda m, x: posterior_of(m, ImportanceWeighted(m, exact_guide(m), 5), x),
            {},
            "'z': its density in the guide is an estimate.*MeanField",
        ),
        (lambda m, x: posterior_of(m, Amortized(MLP(5, [8]), Point(8, 2)), x), {}, "gives it a point.*MeanField"),
        (lambda m, x: posterior_of(ladder()[0], chain_guide, x), {}, "latents 'z2', 'z1': name one with site="),
        (
            lambda m, x: posterior_of(gaussian_mean, lambda y: pyro.sample("mu", dist.Normal(0.0, 1.0)), x[:, 0]),
            {},
            "a latent for each row",
        ),
    ],
)
def test_refused_with_the_cure(make: Callable, options: dict, message: str) -> None:
    model, x = ppca(20)
    with pytest.raises(ValueError, match=message):
        latent_summary(make(model, x), **options)
