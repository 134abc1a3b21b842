"""The two parts of a guide's gap, where both are known."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from test_heads import correlated, mean_field_gap, set_by_hand
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.utils.data import DataLoader, TensorDataset
from truth import ppca, untrained

from pyro_ae import Posterior, batch_plate
from pyro_ae.data import as_rows
from pyro_ae.diagnostics.amortisation import Gaps, amortisation_gap
from pyro_ae.guides import bottom_up, structured, together, top_down
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.bernoulli import Bernoulli
from pyro_ae.guides.flow import Flow
from pyro_ae.guides.full_rank import FullRank
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.models.ppca import PPCA


def perturbed(make: Callable) -> tuple[PPCA, Amortized, Tensor]:
    """A PPCA and a guide that is the best of its family but for a shift and a scale."""
    model, x = correlated()
    exact = model.posterior(x[0])
    if make is FullRank:
        constants = [exact.scale_tril.diagonal().log() + 0.2, exact.scale_tril[1, 0] + 0.1]
    else:
        constants = [-0.5 * exact.precision_matrix.diagonal().log() + 0.3]
    guide = set_by_hand(make(3, 2), model, x, *constants)
    with torch.no_grad():
        guide.head.linear.bias[:2] += torch.tensor([0.3, -0.2])
    return model, guide, x


def divergence(model: PPCA, guide: Amortized, x: Tensor) -> Tensor:
    """KL(q || p) of each row, in closed form."""
    with torch.no_grad():
        q, p = guide.head(x), model.posterior(x)
        covariance = q.covariance_matrix if hasattr(q, "covariance_matrix") else q.variance.diag_embed()
        return kl_divergence(MultivariateNormal(q.mean, covariance), p)


def evidence(model: PPCA, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.marginal().log_prob(x)


def within_errors(found: Tensor, expected: Tensor, error: Tensor) -> None:
    """Each within five standard errors."""
    assert ((found - expected).abs() < 5 * error + 1e-4).all(), (found - expected) / error


def test_exact_family_has_no_approximation_gap():
    model, guide, x = perturbed(FullRank)
    found = amortisation_gap(untrained(model, guide, x), rows=10)
    assert found.how == "parameters" and found.rows.tolist() == [0, 4, 9, 13, 17, 22, 26, 30, 35, 39]
    some = x[found.rows]
    torch.testing.assert_close(found.refined, evidence(model, some), atol=0.01, rtol=0)
    torch.testing.assert_close(found.log_evidence, evidence(model, some), atol=0.01, rtol=0)
    torch.testing.assert_close(found.approximation, torch.zeros(10), atol=0.01, rtol=0)
    gap = divergence(model, guide, some)
    assert (gap > 0.1).all() and (found.error < 0.05).all()
    within_errors(found.amortisation, gap, found.error)
    torch.testing.assert_close(found.total, found.amortisation + found.approximation)


def test_both_gaps_of_a_mean_field_guide():
    model, guide, x = perturbed(MeanField)
    posterior = untrained(model, guide, x)
    known = evidence(model, x)
    found = amortisation_gap(posterior, rows=len(x), log_evidence=known, draws=4000, steps=200)
    assert found.given and torch.equal(found.log_evidence, known)
    least = mean_field_gap(model.posterior(x[0]).precision_matrix)
    assert least > 0.4
    torch.testing.assert_close(found.approximation.mean(), least, atol=0.01, rtol=0)
    torch.testing.assert_close(found.approximation, least.expand(len(x)), atol=0.08, rtol=0)
    within_errors(found.amortisation, divergence(model, guide, x) - least, found.error)
    estimated = amortisation_gap(posterior, rows=len(x), steps=200)
    assert float(estimated.log_evidence.mean()) == pytest.approx(float(known.mean()), abs=0.1)
    assert not estimated.given and (estimated.approximation > 0.1).all()


def test_what_cannot_be_refined_is_left_as_it_is():
    """The best of a family gains nothing, and a row for which the steps went wrong keeps what it had."""
    model, guide, x = perturbed(FullRank)
    with torch.no_grad():
        exact = model.posterior(x[0])
        guide.head.linear.bias[:2] -= torch.tensor([0.3, -0.2])
        guide.head.linear.bias[2:4] -= 0.2
        guide.head.linear.bias[4] -= 0.1
    torch.testing.assert_close(guide.head(x[0]).covariance_matrix, exact.covariance_matrix)
    found = amortisation_gap(untrained(model, guide, x), rows=5)
    torch.testing.assert_close(found.amortisation, torch.zeros(5), atol=1e-4, rtol=0)
    wild = amortisation_gap(untrained(model, guide, x), rows=5, steps=1, lr=3.0)
    assert torch.equal(wild.refined, wild.elbo) and (wild.error == 0).all()


def test_nothing_is_changed():
    model, guide, x = perturbed(FullRank)
    model.requires_grad_(True)
    posterior = untrained(model, guide, x)
    before = posterior.program.parameters.state()
    state = torch.get_rng_state()
    with torch.no_grad():  # as a report is made
        found = amortisation_gap(posterior, rows=3, steps=20)
    assert torch.equal(torch.get_rng_state(), state)
    after = posterior.program.parameters.state()
    assert before.keys() == after.keys() and all(torch.equal(v, after[n]) for n, v in before.items())
    assert all(p.grad is None for p in (*model.parameters(), *guide.parameters()))
    assert not guide.head.linear._forward_hooks
    again = amortisation_gap(posterior, rows=found.rows, steps=20)
    assert torch.equal(again.refined, found.refined) and torch.equal(again.rows, found.rows)
    assert not torch.equal(amortisation_gap(posterior, rows=3, steps=20, seed=1).refined, found.refined)


class Opaque(nn.Module):
    """A head that shows nothing of its parameters."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.hidden = head

    def forward(self, features: Tensor) -> Any:
        return self.hidden(features)


def test_features_reach_at_most_what_parameters_reach():
    model, guide, x = perturbed(MeanField)
    with torch.no_grad():
        guide.head.linear.weight[2:] = 0.1 * torch.randn(2, 3)
    known = evidence(model, x[[0, 20, 39]])
    options = {"rows": [0, 20, 39], "log_evidence": known}
    whole = amortisation_gap(untrained(model, guide, x), **options)
    part = amortisation_gap(untrained(model, Amortized(guide.encoder, Opaque(guide.head)), x), **options)
    assert (whole.how, part.how) == ("parameters", "features")
    assert torch.equal(part.elbo, whole.elbo)
    assert (part.amortisation > 0.02).all() and (part.amortisation < whole.amortisation + 5 * whole.error).all()
    assert "is at least this" in " ".join(str(part).split()) and "at least" not in " ".join(str(whole).split())
    assert "features" not in vars(part)


def test_flow():
    model, x = correlated()
    guide = Amortized(nn.Identity(), Flow(3, 2, transforms=1, hidden_features=(8,)))
    found = amortisation_gap(untrained(model, guide, x), rows=4, steps=60, draws=500)
    assert found.how == "features" and (found.amortisation > 0.1).all()
    assert (found.refined < evidence(model, x[found.rows]) + 0.1).all()


@pytest.mark.parametrize(
    ("example", "how"),
    [(bottom_up.example, "features"), (top_down.example, "features"), (structured.example, "parameters")],
)
def test_layers_of_latents(example: Callable, how: str):
    model, guide, x = example()
    found = amortisation_gap(untrained(model, guide, x), rows=4, steps=60, particles=4, draws=500)
    assert found.how == how
    assert (found.amortisation > 0.2).all() and "features" not in vars(guide)


def two_sites(x: Tensor) -> None:
    with batch_plate(x):
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a + b.unsqueeze(-1), 0.5).to_event(1), obs=x)


def test_several_heads():
    x = torch.randn(9, 2)
    guide = Amortized(nn.Identity(), {"a": MeanField(2, 2), "b": MeanField(2, ())})
    exact = MultivariateNormal(torch.zeros(2), 1.25 * torch.eye(2) + torch.ones(2, 2)).log_prob(x)
    found = amortisation_gap(untrained(two_sites, guide, x), log_evidence=exact)
    assert found.how == "parameters"
    least = float(mean_field_gap(torch.tensor([[5.0, 0, 4], [0, 5, 4], [4, 4, 9]])))  # of the posterior
    assert float(found.approximation.mean()) == pytest.approx(least, abs=0.05)


def test_heads_that_see_other_latents_keep_what_they_make_of_them():
    guide = Amortized(nn.Identity(), {"a": MeanField(2, 2), "b": MeanField(4, ())}, chained=True)
    found = amortisation_gap(untrained(two_sites, guide, torch.randn(9, 2)), rows=3, steps=50)
    assert found.how == "features" and (found.amortisation > 0.1).all()


class Plain(nn.Module):
    """A guide of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> None:
        loc, log_scale = self.linear(x).chunk(2, -1)
        with batch_plate(x):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def plain_function() -> Callable:
    network = Plain()

    def guide(x: Tensor) -> None:
        pyro.module("network", network)
        shift = pyro.param("shift", torch.zeros(2))
        loc, log_scale = network.linear(x).chunk(2, -1)
        with batch_plate(x):
            pyro.sample("z", dist.Normal(loc + shift, log_scale.exp()).to_event(1))

    return guide


@pytest.mark.parametrize("make", [Plain, plain_function])
def test_other_guides_are_trained_further_and_put_back(make: Callable):
    model, x = correlated()
    posterior = untrained(model.requires_grad_(True), make(), x)
    parameters = posterior.program.parameters
    kept = {n: p.grad for n, p in parameters.named().items()}
    before = parameters.state()
    known = evidence(model, x[[5]])
    found = amortisation_gap(posterior, rows=[5], log_evidence=known, steps=400, lr=0.05, draws=20_000)
    assert found.how == "guide" and float(found.amortisation) > 0.5
    # with a single row, nothing is amortised any more
    least = mean_field_gap(model.posterior(x[5]).precision_matrix).detach()
    assert float(found.approximation) == pytest.approx(float(least), abs=0.05)
    after = parameters.state()
    assert before.keys() == after.keys() and all(torch.equal(v, after[n]) for n, v in before.items())
    assert all(p.grad is kept[n] for n, p in parameters.named().items())


def test_discrete_latents():
    """A latent without a reparameterised sampler, of which the family holds the posterior."""

    def model(x: Tensor) -> None:
        with batch_plate(x):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.3])).to_event(1))
            pyro.sample("x", dist.Normal(2 * z, 1.0).to_event(1), obs=x)

    x = torch.linspace(0, 2, 6).unsqueeze(-1)
    guide = Amortized(nn.Identity(), Bernoulli(1, 1))
    found = amortisation_gap(untrained(model, guide, x), rows=6)
    either = torch.stack([dist.Normal(2.0 * z, 1.0).log_prob(x[:, 0]) for z in (0, 1)], -1)
    exact = (either + torch.tensor([0.7, 0.3]).log()).logsumexp(-1)
    torch.testing.assert_close(found.refined, exact, atol=0.03, rtol=0)
    assert found.amortisation.mean() > 0.1


def test_in_words():
    found = Gaps(
        torch.tensor([3, 7]),
        *(torch.tensor(v) for v in ([-3.0, -5.0], [-2.5, -3.0], [-2.0, -2.8], [0.1, 0.1])),
        "guide",
    )
    text = str(found)
    assert "amortisation   1.250  (2.000, row 7)" in text
    assert "approximation  0.350  (0.500, row 3)" in text
    assert "total          1.600  (2.200, row 7)" in text
    assert "trained further" in text and "importance-weighted" in text


def test_refusals():
    model, guide, x = perturbed(MeanField)
    posterior = untrained(model, guide, x)
    with pytest.raises(ValueError, match="log_evidence is of the 3 chosen rows"):
        amortisation_gap(posterior, rows=3, log_evidence=torch.zeros(2))
    with pytest.raises(ValueError, match="steps must be positive"):
        amortisation_gap(posterior, steps=0)
    with pytest.raises(ValueError, match="at least 2"):
        amortisation_gap(posterior, draws=1)
    with pytest.raises(ValueError, match=r"rows must be a number or an index \[n\] in \[0, 40\)"):
        amortisation_gap(posterior, rows=[40])
    with pytest.raises(ValueError, match="DataLoader"):
        amortisation_gap(posterior, DataLoader(TensorDataset(x), batch_size=4))
    chains = Posterior(posterior.program, data=as_rows(x), method="nuts()", draws={"z": torch.zeros(2, 9, 40, 2)})
    with pytest.raises(ValueError, match="chains are not amortised"):
        amortisation_gap(chains)
    shared = untrained(*together.example())
    with pytest.raises(ValueError, match="shared by all rows"):
        amortisation_gap(shared)
    with torch.no_grad():
        x[1] = torch.inf
    with pytest.raises(ValueError, match="not finite in 1 of 40 rows"):
        amortisation_gap(posterior, x)


def test_guides_with_nothing_to_refine_are_refused():
    model, x = ppca(6)

    def exact(x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("z", model.posterior(x))

    def point(x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("z", dist.Delta(pyro.param("point", torch.zeros(2)).expand(len(x), 2)).to_event(1))

    def each(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(6, 2))
        with pyro.plate("data", 6):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    with pytest.raises(ValueError, match="no parameters that could be refined"):
        amortisation_gap(untrained(model, exact, x))
    with pytest.raises(ValueError, match="single point"):
        amortisation_gap(untrained(model, point, x))
    with pytest.raises(ValueError) as caught:
        amortisation_gap(untrained(model, each, x), rows=3)
    assert "parameters for each row" in str(caught.value.__notes__)
