"""Sequential Monte Carlo of partial networks: exact weights, moments in closed form, the parameters' gradient."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_ae import Posterior, batch_plate, bayesian, fit
from pyro_ae.data import Call, as_rows
from pyro_ae.engines.feynman_kac import feynman_kac, stratified
from pyro_ae.engines.run import Run
from pyro_ae.engines.stochastic import Stacked

Y = torch.tensor([1.4, 0.3, 1.1, 2.0, -0.2, 0.9, 1.7, 0.6])


def location(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with batch_plate(y):
        pyro.sample("y", dist.Normal(mu, 2.0), obs=y)


def scale(y: Tensor) -> None:
    """A positive latent, so that the energy holds the change of variables."""
    sd = pyro.sample("sd", dist.Gamma(3.0, 2.0))
    with batch_plate(y):
        pyro.sample("y", dist.Normal(0.0, sd), obs=y)


def filtered(model: object, batch_size: int | None, **settings: object) -> Stacked:
    run = Run(data=as_rows(Y), batch_size=batch_size, progress=False)
    return Stacked(feynman_kac(**settings), model, run)  # type: ignore[arg-type]


def weigh(run: Stacked, batch: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The particles, constrained, and their weights."""
    with run.program.active(), torch.no_grad():
        run.config.energies(run.state, run.stacked, Call((batch,)), [])
        values = run.energy.constrain(run.stacked.unpack(run.state["position"]))
    return values, run.state["log_weight"]


@pytest.mark.parametrize("batch_size", [None, 3])
def test_weights_are_the_likelihood_of_the_batch(batch_size: int | None) -> None:
    batch = Y[:batch_size]
    values, log_weight = weigh(filtered(location, batch_size, particles=6, walk=0.0), batch)
    expected = dist.Normal(values["mu"], 2.0).log_prob(batch.unsqueeze(-1)).sum(0)
    torch.testing.assert_close(log_weight, expected)
    values, log_weight = weigh(filtered(scale, batch_size, particles=6, walk=0.0), batch)
    expected = dist.Normal(0.0, values["sd"]).log_prob(batch.unsqueeze(-1)).sum(0)
    torch.testing.assert_close(log_weight, expected)


def test_the_walk_has_its_variance_in_the_unconstrained_space() -> None:
    run = filtered(scale, None, particles=400, walk=0.3)
    before = run.state["position"].clone()
    values, _ = weigh(run, Y)
    moved = (run.state["position"] - before).std()
    assert abs(moved - 0.3**0.5) < 4 * 0.3**0.5 / math.sqrt(2 * 400)
    assert (values["sd"] > 0).all()


def test_particles_of_one_step_without_a_walk_are_prior_draws_by_importance() -> None:
    torch.manual_seed(0)
    run = filtered(location, None, particles=300, walk=0.0, steps=1)
    before = run.state["position"].clone()
    _, log_weight = weigh(run, Y)
    wanted = 300 * log_weight.softmax(0)
    run.run()
    kept = run.state["position"]
    counts = (kept == before.T).sum(0)
    assert counts.sum() == 300, "all are draws from the prior"
    assert ((counts - wanted).abs() < 2).all(), "stratified: within two of the expected number"


@pytest.mark.parametrize("walk", [0.0, 0.05])
def test_moments_are_a_kalman_filters(walk: float) -> None:
    """The data are full batches, of which the last are remembered best."""
    steps, particles = 4, 500
    posterior = fit(
        *(location, Y), method=feynman_kac(particles=particles, walk=walk, steps=steps), seed=1, progress=False
    )
    mean, variance = 0.0, 1.0
    for _ in range(steps):
        variance += walk
        precision = 1.0 / variance + len(Y) / 4.0
        mean = (mean / variance + Y.sum().item() / 4.0) / precision
        variance = 1.0 / precision
    mu = posterior.sample()["mu"]
    # resampling at each step leaves fewer particles apart than there are
    few = math.sqrt(particles / (8.0 if walk == 0 else 3.0))
    assert abs(mu.mean() - mean) < 4.0 * variance**0.5 / few
    assert abs(mu.std() / variance**0.5 - 1.0) < 4.0 / few / math.sqrt(2.0)


class Partial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        network = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
        self.net = bayesian(network, deterministic=["0"])

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        f = self.net(x).squeeze(-1)
        with batch_plate(x):
            pyro.sample("y", dist.Normal(f, 0.5), obs=y)


@pytest.mark.parametrize("batch_size", [None, 5])
def test_the_parameters_gradient_is_that_of_all_rows_averaged_over_weighted_particles(batch_size: int | None) -> None:
    x, particles = torch.linspace(-1.0, 1.0, 8).unsqueeze(-1), 7
    model = Partial()
    data = Run(data=as_rows((x, Y)), batch_size=batch_size, progress=False)
    run = Stacked(feynman_kac(particles=particles, walk=0.0), model, data)
    batch = (x[:batch_size], Y[:batch_size])
    named = dict(model.net.module.named_parameters())
    with run.program.active():
        _, _, *found = run.config.energies(run.state, run.stacked, Call(batch), run.trained)
        values = run.energy.constrain(run.stacked.unpack(run.state["position"]))
    hidden = torch.tanh(torch.nn.functional.linear(batch[0], named["0.weight"], named["0.bias"]))
    f = torch.einsum("bh,kh->kb", hidden, values["w.2.weight"].squeeze(1)) + values["w.2.bias"]
    log_p = dist.Normal(f, 0.5).log_prob(batch[1]).sum(1)
    weights = log_p.detach().softmax(0)
    expected = torch.autograd.grad(-len(x) / len(batch[0]) * (weights * log_p).sum(), list(named.values()))
    assert len(found) == len(expected) == 2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a / particles, b, rtol=1e-4, atol=1e-5)


def test_trains_both_parts_and_gives_the_particles_as_one_chain() -> None:
    torch.manual_seed(0)
    x = torch.linspace(-1.0, 1.0, 40).unsqueeze(-1)
    y = torch.sin(4.0 * x.squeeze(-1))
    model = Partial()
    before = [p.clone() for p in model.parameters()]
    posterior = fit(model, (x, y), method=feynman_kac(particles=50, steps=150), batch_size=10, seed=0, progress=False)
    assert isinstance(posterior, Posterior) and posterior.draws is not None
    assert posterior.draws["w.2.weight"].shape == (1, 50, 1, 3)
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    log_p = posterior.log_likelihood((x, y))["y"].logsumexp(0) - math.log(50)
    constant = dist.Normal(y.mean(), y.std()).log_prob(y)
    assert log_p.mean() > constant.mean() + 0.2


def test_same_seed_same_particles() -> None:
    first, again, other = (
        fit(location, Y, method=feynman_kac(particles=5, steps=3), batch_size=4, seed=s, progress=False).sample()["mu"]
        for s in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_stratified_keeps_each_as_often_as_its_weight_says() -> None:
    torch.manual_seed(0)
    weights = torch.tensor([0.1, 0.0, 0.55, 0.35])
    counts = sum(torch.bincount(stratified(weights.log()), minlength=4) for _ in range(4000)) / 4000  # type: ignore[misc]
    torch.testing.assert_close(counts, 4 * weights, atol=0.05, rtol=0)
    assert stratified(torch.full((9,), -1e4)).tolist() == list(range(9)), "equal weights keep all"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"particles": 0}, "chains must be"), ({"walk": -1.0}, "walk at least 0"), ({"lr": lambda t: t}, "lr must be")],
)
def test_refuses(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        feynman_kac(**settings)


def test_refuses_latents_of_rows() -> None:
    def model(y: Tensor) -> None:
        with batch_plate(y):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(ValueError, match="feynman_kac cannot hold a chain"):
        fit(model, Y, method=feynman_kac(particles=3, steps=2), batch_size=4, progress=False)
