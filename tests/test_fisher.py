"""The Fisher information of a guide about the rows, as a penalty, against closed forms."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_ae import batch_plate, fit, svi
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.full_rank import FullRank
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.guides.mixture import Mixture
from pyro_ae.guides.shared import Shared
from pyro_ae.losses import importance, wake_sleep
from pyro_ae.losses.fisher import fisher, fisher_trace
from pyro_ae.models import ppca, vae
from pyro_ae.nn import MLP
from pyro_ae.plates import Scaled, batched

ROWS = 40_000


def linear_guide(head: type[nn.Module] = MeanField) -> tuple[Amortized, Tensor, Tensor]:
    """A guide with a linear encoder, and the maps from a row to the location and to the logarithms of the scales."""
    guide = Amortized(nn.Linear(5, 3), head(3, 2))
    jacobian = guide.head.linear.weight @ guide.encoder.weight
    return guide, jacobian[:2], jacobian[2:4]


def test_of_a_linear_normal_guide_is_in_closed_form():
    """tr I = |S^-1 dm/dx|^2 + 2 |d log s/dx|^2, the same in each row where the scales are."""
    guide, loc, log_scale = linear_guide()
    x = torch.randn(1, 5).expand(ROWS, 5)
    scale = guide.head(guide.encoder(x[:1])).stddev[0]
    exact = (loc / scale.unsqueeze(1)).square().sum() + 2 * log_scale.square().sum()
    torch.testing.assert_close(fisher_trace(guide, x) / ROWS, exact, rtol=0.03, atol=0)


def test_of_a_full_covariance_is_in_closed_form():
    guide, loc, log_diagonal = linear_guide(FullRank)
    with torch.no_grad():
        guide.head.linear.weight[2:] = 0.0  # the covariance is the same in each row
        guide.head.linear.bias[4] = 1.5
    x = torch.randn(1, 5).expand(ROWS, 5)
    covariance = guide.head(guide.encoder(x[:1])).covariance_matrix[0]
    exact = (loc.T @ torch.linalg.inv(covariance) @ loc).trace()
    torch.testing.assert_close(fisher_trace(guide, x) / ROWS, exact, rtol=0.03, atol=0)


def test_gradient_is_that_of_the_closed_form():
    """Also in the scales, which the draws depend on: with draws held still it would be twice as large."""
    guide, *_ = linear_guide()
    x = torch.randn(1, 5).expand(ROWS, 5)
    parameters = list(guide.parameters())
    found = torch.autograd.grad(fisher_trace(guide, x) / ROWS, parameters)
    loc, log_scale = (guide.head.linear.weight @ guide.encoder.weight).chunk(2)
    scale = guide.head(guide.encoder(x[0])).stddev
    exact = (loc / scale.unsqueeze(1)).square().sum() + 2 * log_scale.square().sum()
    for got, wanted in zip(found, torch.autograd.grad(exact, parameters), strict=True):
        assert (got - wanted).norm() < 0.06 * wanted.norm()


def test_is_the_curvature_of_the_divergence():
    """For a network: the mean of KL(q(z|x) || q(z|x + d)) over many small d is tr I |d|^2 / (2 dims)."""
    guide = Amortized(MLP(5, [16], activation=nn.Tanh), MeanField(16, 2))
    x, size = torch.randn(1, 5), 0.02
    d = size * torch.nn.functional.normalize(torch.randn(ROWS, 5), dim=1)
    q, moved = (guide.head(guide.encoder(rows)) for rows in (x, x + d))
    kl = torch.distributions.kl_divergence(q.expand((ROWS,)), moved).mean()
    trace = fisher_trace(guide, x.expand(ROWS, 5)) / ROWS
    torch.testing.assert_close(trace, kl * 2 * 5 / size**2, rtol=0.04, atol=0)


def test_rows_of_a_minibatch_count_for_all():
    guide, *_ = linear_guide()
    x = torch.randn(6, 5)
    torch.manual_seed(0)
    small = fisher_trace(guide, x)
    torch.manual_seed(0)
    torch.testing.assert_close(fisher_trace(Scaled(guide, "data", 60), x), 10 * small)


def test_the_penalty_is_added_to_a_loss_and_to_the_guides_side():
    model, guide, x = ppca.example()

    def with_seed(function):
        torch.manual_seed(3)
        return function()

    # both losses draw first, and the trace after them
    plain, penalised = (with_seed(lambda b=b: fisher(b, importance(particles=2))(model, guide, x)) for b in (0.0, 0.5))
    both = [with_seed(lambda b=b: fisher(b, wake_sleep(1, sleep=1.0))(model, guide, x)) for b in (0.0, 0.5)]
    assert penalised > plain + 1e-3
    assert both[1].model == both[0].model
    assert both[1].guide > both[0].guide + 1e-3


def test_minimising_it_makes_the_guide_forget_the_rows_and_leaves_the_model_alone():
    _, guide, x = ppca.example()
    model = ppca.PPCA(5, 2)

    def trace() -> float:
        return fisher_trace(guide, x.repeat(100, 1)).item() / 1600

    before = trace()
    fit(model, x, guide=guide, method=svi(loss=fisher(3.0), lr=1e-2, steps=300), seed=0, progress=False, check=False)
    without = trace_of_a_plain_fit(x)
    assert trace() < 0.2 * min(before, without)


def trace_of_a_plain_fit(x: Tensor) -> float:
    _, guide, _ = ppca.example()
    fit(ppca.PPCA(5, 2), x, guide=guide, method=svi(lr=1e-2, steps=300), seed=0, progress=False, check=False)
    return fisher_trace(guide, x.repeat(100, 1)).item() / 1600


@pytest.mark.parametrize("head", [MeanField(16, 2), FullRank(16, 2), Mixture(16, 2, components=3)])
def test_every_parameter_of_the_guide_gets_a_finite_gradient(head):
    guide = Amortized(MLP(12, [16], activation=nn.Tanh), head)
    fisher_trace(guide, vae.example()[2]).backward()
    wrong = [n for n, p in guide.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not wrong


def test_convolutions_chained_latents_and_missing_values():
    images = torch.randn(7, 1, 6, 6)
    encoder = batched(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten()), 3)
    heads = {"a": MeanField(32, 1), "b": MeanField(33, 2)}
    assert torch.isfinite(fisher_trace(Amortized(encoder, heads, chained=True), images))
    guide = Amortized(MLP(5, [16], missing=True), MeanField(16, 2))
    x = torch.randn(6, 5)
    x[:, 1] = torch.nan
    assert fisher_trace(guide, x) > 0


def test_of_chosen_arguments_and_without_gradients():
    guide = Amortized(nn.Linear(5, 3), MeanField(3, 2), inputs=lambda x, y: torch.cat([x, y], -1))
    batch = {"x": torch.randn(ROWS, 2), "y": torch.randn(ROWS, 3)}
    with torch.no_grad():
        whole, x, y = (fisher_trace(guide, batch, chosen) / ROWS for chosen in (None, ("x",), ("y",)))
    assert not whole.requires_grad
    torch.testing.assert_close(whole, x + y, rtol=0.05, atol=0)
    torch.testing.assert_close(fisher_trace(guide, (batch["x"], batch["y"]), (1,)) / ROWS, y, rtol=0.05, atol=0)


def test_units_are_a_change_of_the_rows_scale():
    guide, *_ = linear_guide()
    x, unit = torch.randn(6, 5), torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0])
    stretched = Amortized(nn.Linear(5, 3), guide.head)
    with torch.no_grad():
        stretched.encoder.weight.copy_(guide.encoder.weight * unit)
        stretched.encoder.bias.copy_(guide.encoder.bias + guide.encoder.weight[:, 3] * x[0, 3])
    x[:, 3] = x[0, 3]
    torch.manual_seed(0)
    found = fisher_trace(guide, x, unit=unit)
    torch.manual_seed(0)
    torch.testing.assert_close(fisher_trace(stretched, (x / unit).nan_to_num(posinf=0.0, neginf=0.0)), found)


def test_what_has_no_information_is_refused():
    model, guide, x = ppca.example()
    with pytest.raises(ValueError, match="'z' in the guide depends on none of the arguments that are floating"):
        fisher_trace(Shared(model, plate=None), x)
    with pytest.raises(ValueError, match="depends on none of the arguments 'y'"):
        fisher_trace(guide, x, ("y",))
    with pytest.raises(ValueError, match="weight must be at least 0, got -1"):
        fisher(-1.0)

    def discrete(x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("k", dist.Bernoulli(logits=x[:, 0]))

    with pytest.raises(ValueError, match="the draws of 'k' in the guide are not differentiable"):
        fisher_trace(discrete, x)
