"""Anomaly scores against closed forms and sums over draws, and digits that were not seen."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset
from truth import exact_guide, ppca, regression, regression_rows, untrained

from pyro_ae import Posterior, batch_plate, datasets, fit, observe, sghmc
from pyro_ae.diagnostics import anomaly, anomaly_scores, auroc, conformal_p_values, out_of_distribution
from pyro_ae.diagnostics.anomaly import AnomalyScores
from pyro_ae.models.bayesian_autoencoder import BayesianAutoencoder
from pyro_ae.nn import MLP
from pyro_ae.priors import fan_in


def by_hand(log_likelihood: Tensor, means: Tensor, x: Tensor) -> AnomalyScores:
    """From ``[draws, rows]`` and ``[draws, rows, *event]``, by the definitions."""
    mean = means.mean(0)
    return AnomalyScores(
        -log_likelihood.exp().mean(0).log(),
        -log_likelihood.mean(0),
        (log_likelihood - log_likelihood.mean(0)).square().mean(0),
        (x - mean).square().flatten(1).sum(1),
        (means - mean).square().mean(0).flatten(1).sum(1),
    )


def check(found: AnomalyScores, wanted: AnomalyScores, rtol: float = 1e-3, atol: float = 1e-4) -> None:
    for name in AnomalyScores._fields:
        a, b = getattr(found, name), getattr(wanted, name)
        torch.testing.assert_close(a, b.to(a), rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("chunk", [2**24, 5 * 64 * 7])
def test_the_posterior_of_linear_codes(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_ae.particles.CHUNK", chunk)  # the smaller one holds seven rows
    model, x = ppca(20)
    found = anomaly_scores(untrained(model, exact_guide(model), x), draws=6000)
    exact, w, noise = model.posterior(x), model.weight, 0.7**2
    mean, inner = exact.mean @ w.T + model.mean, exact.covariance_matrix[0]
    residual, spread = x - mean, (w @ inner @ w.T).trace()
    quadratic, slope = inner @ (w.T @ w) / (2 * noise), residual @ w / noise
    error = residual.square().sum(1)
    wanted = AnomalyScores(
        -dist.MultivariateNormal(mean, w @ inner @ w.T + noise * torch.eye(5)).log_prob(x),
        (error + spread) / (2 * noise) + 2.5 * torch.tensor(2 * torch.pi * noise).log(),
        (slope @ inner * slope).sum(1) + 2 * (quadratic @ quadratic).trace(),
        error,
        spread.expand(20),
    )
    check(found, wanted, rtol=0.12, atol=0.02)
    torch.testing.assert_close(found.nll, wanted.nll, rtol=0.01, atol=0.05)


def autoencoder(rows: int = 25) -> tuple[BayesianAutoencoder, dict[str, Tensor], Tensor]:
    """A Bayesian autoencoder of small images, two chains of three draws of its weights that are made up, and rows."""
    model = BayesianAutoencoder(MLP((4, 3), [5], 2), MLP(2, [5], (4, 3)), 2)
    draws = {f"encoder.{n}": p for n, p in MLP((4, 3), [5], 2).named_parameters()}
    draws |= {f"decoder.{n}": p for n, p in MLP(2, [5], (4, 3)).named_parameters()}
    return model, {n: torch.randn(2, 3, *p.shape) for n, p in draws.items()}, torch.rand(rows, 4, 3)


def rebuilt(draws: dict[str, Tensor], x: Tensor) -> Tensor:
    """Logits of each draw, one by one."""
    out = []
    for c, s in [(c, s) for c in range(2) for s in range(3)]:
        z = x
        for part, net in (("encoder.", MLP((4, 3), [5], 2)), ("decoder.", MLP(2, [5], (4, 3)))):
            z = functional_call(net, {n.removeprefix(part): v[c, s] for n, v in draws.items() if part in n}, (z,))
        out.append(z)
    return torch.stack(out).detach()


def test_an_autoencoder_whose_weights_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    model, draws, x = autoencoder()
    posterior = untrained(model, None, x, draws=draws)
    likelihood = model.likelihood(rebuilt(draws, x)).to_event(2)
    wanted = by_hand(likelihood.log_prob(x), likelihood.mean, x)
    check(anomaly_scores(posterior), wanted)
    assert wanted.nll_variance.min() > 0.1 and wanted.spread.min() > 0.01
    monkeypatch.setattr(anomaly, "ROWS", 7)
    monkeypatch.setattr("pyro_ae.particles.CHUNK", 7 * 12 * 4)  # four of the six draws at once
    check(anomaly_scores(posterior, x), wanted)
    check(anomaly_scores(posterior, DataLoader(TensorDataset(x), 6)), wanted)
    for score, name in (("reconstruction", "expected_nll"), ("nll", "nll"), ("error", "error"), ("spread", "spread")):
        found = out_of_distribution(posterior, x, x[:5], score=score)
        torch.testing.assert_close(found.inliers, getattr(wanted, name), rtol=1e-3, atol=1e-4)


def test_codes_that_chains_drew() -> None:
    model, x = ppca(9)
    z = torch.randn(2, 5, 9, 2)
    found = anomaly_scores(untrained(model, None, x, draws={"z": z}))
    means = z.flatten(0, 1) @ model.weight.T + model.mean
    check(found, by_hand(dist.Normal(means, 0.7).to_event(1).log_prob(x), means, x))


def shifted(x: Tensor) -> None:
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with batch_plate(x):
        observe("x", dist.Normal(shift.unsqueeze(-1) * torch.arange(1.0, 4.0), 0.5).to_event(1), x)


def columns(x: Tensor) -> None:
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), dim=-2), pyro.plate("columns", 3, dim=-1):
        observe("x", dist.Normal(shift * torch.arange(1.0, 4.0), 0.5), x)


def two_sites(x: Tensor) -> None:
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with batch_plate(x):
        observe("first", dist.Normal(shift, 0.5), x[:, 0])
        observe("rest", dist.Normal(shift.unsqueeze(-1) * torch.tensor([2.0, 3.0]), 0.5).to_event(1), x[:, 1:])


@pytest.mark.parametrize("model", [shifted, columns, two_sites])
@pytest.mark.parametrize("missing", [False, True])
def test_values_of_a_row_are_summed_where_they_are_not_missing(model: Callable, missing: bool) -> None:
    x, shift = torch.randn(6, 3), torch.randn(2, 4)
    means = (shift.reshape(8, 1, 1) * torch.arange(1.0, 4.0)).expand(8, 6, 3)
    seen = torch.ones(6, 3, dtype=torch.bool)
    if missing:
        seen[1, 0] = seen[4, 2] = seen[5, 0] = False
    density = (dist.Normal(means, 0.5).log_prob(x) * seen).sum(-1)
    wanted = by_hand(density, means * seen, x * seen)
    check(anomaly_scores(untrained(model, None, x.masked_fill(~seen, torch.nan), draws={"shift": shift})), wanted)


def test_a_seed_repeats_it_and_leaves_the_random_state_alone() -> None:
    model, x = ppca(12)
    posterior = untrained(model, exact_guide(model), x)
    before = torch.get_rng_state()
    found = anomaly_scores(posterior, draws=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(anomaly_scores(posterior, draws=5), found, strict=True))
    assert not torch.equal(anomaly_scores(posterior, draws=5, seed=1).nll, found.nll)


@pytest.fixture(scope="module")
def zeros() -> tuple[Posterior, Tensor, Tensor]:
    """A Bayesian autoencoder of 100 zeros, 32 more of them, and 200 other digits."""
    train = datasets.load("digits").train
    x, y = train["x"].flatten(1), train["y"]
    model = BayesianAutoencoder(
        MLP(64, [32], 4),
        MLP(4, [32], 64),
        4,
        likelihood=lambda logits: dist.Normal(logits.sigmoid(), 0.15),
        prior=fan_in(),
    )
    method = sghmc(lr=1e-3, warmup=300, draws=10, thinning=10, chains=2)
    posterior = fit(model, x[y == 0][:100], method=method, seed=0, progress=False, check=False)
    return posterior, x[y == 0][100:], x[y != 0][:200]


@pytest.mark.parametrize("name", AnomalyScores._fields)
def test_digits_that_were_not_seen_score_higher(zeros: tuple[Posterior, Tensor, Tensor], name: str) -> None:
    posterior, held, others = zeros
    normal, odd = (getattr(anomaly_scores(posterior, rows), name) for rows in (held, others))
    assert auroc(normal, odd) > 0.9
    p = conformal_p_values(odd, normal)
    assert float(p.median()) <= 2 / 33, "most of them score above all held out zeros but one"


def test_p_values_count_normal_rows_that_score_as_high() -> None:
    scores, reference = torch.randint(0, 9, (4, 3)).double(), torch.randint(0, 9, (20,))
    wanted = (1 + (reference >= scores.unsqueeze(-1)).sum(-1)) / 21
    torch.testing.assert_close(conformal_p_values(scores, reference.double()), wanted)
    with pytest.raises(ValueError, match="reference must be scores"):
        conformal_p_values(scores, torch.zeros(0))
    with pytest.raises(ValueError, match="1 of 2 reference are NaN"):
        conformal_p_values(scores, torch.tensor([0.0, torch.nan]))


def test_p_values_of_normal_rows_are_as_rarely_small_as_they_say() -> None:
    sets = 20_000
    p = torch.cat([conformal_p_values(torch.randn(1), torch.randn(19)) for _ in range(sets)])
    for level in (0.05, 0.5):
        assert float((p <= level + 1e-6).double().mean()) == pytest.approx(level, abs=5 * (0.25 / sets) ** 0.5)


def outside(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1), obs=x)


def classes(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with batch_plate(x):
        pyro.sample("y", dist.Categorical(logits=x.unsqueeze(-1) * w), obs=y)


def mixed(x: Tensor) -> None:
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with batch_plate(x):
        kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.25, 0.75])), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(shift + torch.tensor([-5.0, 5.0])[kind], 1.0), obs=x)


def test_latents_that_are_summed_out_have_a_likelihood_and_no_reconstruction() -> None:
    x, shift = 3 * torch.randn(6), torch.randn(2, 4)
    posterior = untrained(mixed, None, x, draws={"shift": shift})
    means = shift.reshape(8, 1, 1) + torch.tensor([-5.0, 5.0])
    density = (dist.Normal(means, 1.0).log_prob(x.unsqueeze(-1)) + torch.tensor([0.25, 0.75]).log()).logsumexp(-1)
    found = out_of_distribution(posterior, None, None, score="nll_variance").inliers
    torch.testing.assert_close(found, density.var(0, correction=0), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="no draws of 'kind'"):
        anomaly_scores(posterior)


def test_what_has_no_score_is_refused() -> None:
    x = torch.randn(6)
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        anomaly_scores(untrained(outside, None, x, draws={"z": torch.zeros(2, 3, 6)}), draws=0)
    with pytest.raises(ValueError, match="'x' stands outside plate 'data'"):
        anomaly_scores(untrained(outside, None, x, draws={"z": torch.zeros(2, 3, 6)}))
    labels = torch.arange(6) % 3
    posterior = untrained(classes, None, (x, labels), draws={"w": torch.randn(2, 3, 3)})
    with pytest.raises(ValueError, match="'y' is of classes"):
        anomaly_scores(posterior)
    density = posterior.log_likelihood()["y"].exp().mean(0)
    torch.testing.assert_close(out_of_distribution(posterior, None, (x, labels), score="nll").inliers, -density.log())
    rows = regression_rows(8)
    posterior = untrained(regression, None, rows, draws={"w": torch.randn(2, 3, 3)})
    with pytest.raises(ValueError, match="observes nothing in these rows"):
        anomaly_scores(posterior, (rows[0], None))
