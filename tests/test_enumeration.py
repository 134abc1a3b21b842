"""Discrete latents that are summed out: log-weights against exact sums and Pyro's own evaluator."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex
from torch import Tensor, nn
from truth import biased_guide, ppca

from pyro_ae import batch_plate, elbo, fit, importance, iwae, log_weights, svi
from pyro_ae.density import site_terms, weigh
from pyro_ae.plates import Scaled, tempered
from pyro_ae.sites import inspect_sites

LOCS = torch.tensor([-2.0, 0.5, 3.0])
WEIGHTS = torch.tensor([0.2, 0.5, 0.3])


def mixture(x: Tensor) -> None:
    """A mixture for each row, shifted by a code of the row."""
    with batch_plate(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(LOCS[k] + z, 0.5), obs=x)


def code(x: Tensor) -> None:
    with batch_plate(x):
        pyro.sample("z", dist.Normal(0.3 * x, 0.9))


def marginal_log_p(x: Tensor, z: Tensor) -> Tensor:
    parts = dist.Normal(LOCS + z.unsqueeze(-1), 0.5).log_prob(x.unsqueeze(-1)) + WEIGHTS.log()
    return parts.logsumexp(-1) + dist.Normal(0.0, 1.0).log_prob(z)


@pytest.mark.parametrize("particles", [1, 6])
def test_log_weights_of_a_mixture(particles):
    x = torch.randn(7)
    (run,) = weigh(mixture, code, x, particles).passes
    z = run.values["z"].reshape(particles, 7)
    torch.testing.assert_close(run.log_p, marginal_log_p(x, z))
    torch.testing.assert_close(run.log_q, dist.Normal(0.3 * x, 0.9).log_prob(z))


class Fixed(nn.Module):
    """Gives z its value, so that log-weights have no noise."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.z = nn.Parameter(z)

    def forward(self, x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("z", dist.Delta(self.z[: len(x)]))


def test_minibatches_are_scaled_outside_the_sum():
    x, fixed = torch.randn(5), Fixed(torch.randn(5))
    scaled = [Scaled(fn, "data", 50) for fn in (mixture, fixed)]
    loss = importance(iwae, 4)(*scaled, x)
    torch.testing.assert_close(loss, -10 * marginal_log_p(x, fixed.z).sum())
    (ours,) = torch.autograd.grad(loss, fixed.z)
    (theirs,) = torch.autograd.grad(-10 * marginal_log_p(x, fixed.z).sum(), fixed.z)
    torch.testing.assert_close(ours, theirs)


def test_evidence_of_a_pure_mixture_is_exact():
    def model(x):
        with batch_plate(x):
            k = pyro.sample("k", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(LOCS[k], 0.5), obs=x)

    x = torch.randn(4)
    log_w, _ = log_weights(model, lambda x: None, x)
    exact = dist.MixtureSameFamily(dist.Categorical(WEIGHTS), dist.Normal(LOCS, 0.5)).log_prob(x)
    torch.testing.assert_close(log_w[0], exact)


def test_global_latents_and_a_subsampled_plate_agree_with_pyro():
    @config_enumerate
    def model(x):
        locs = pyro.sample("locs", dist.Normal(0.0, 3.0).expand([3]).to_event(1))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        with batch_plate(x):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(Vindex(locs)[..., k], 0.5), obs=x)

    def guide(x):
        pyro.sample("locs", dist.Delta(LOCS, event_dim=1))
        pyro.sample("weights", dist.Delta(WEIGHTS, event_dim=1))

    x = torch.randn(6)
    scaled = [Scaled(fn, "data", 60) for fn in (model, guide)]
    theirs = TraceEnum_ELBO(max_plate_nesting=1).loss(*scaled, x)
    torch.testing.assert_close(importance(elbo, 1)(*scaled, x).item(), theirs, atol=1e-3, rtol=1e-5)
    with pytest.raises(ValueError, match="'locs'"):
        importance(iwae, 2)(*scaled, x)


def test_a_markov_chain_agrees_with_pyro():
    move = torch.tensor([[0.8, 0.2], [0.3, 0.7]])

    def model(x):
        with batch_plate(x):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            k = 0
            for t in pyro.markov(range(x.shape[1])):
                k = pyro.sample(f"k{t}", dist.Categorical(move[k]), infer={"enumerate": "parallel"})
                pyro.sample(f"x{t}", dist.Normal(k + shift, 1.0), obs=x[:, t])

    def guide(x):
        with batch_plate(x):
            pyro.sample("shift", dist.Delta(0.1 * x.sum(1)))

    x = torch.randn(3, 5)
    ours = importance(elbo, 4)(model, guide, x)
    theirs = TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x)
    torch.testing.assert_close(ours.item(), theirs, atol=1e-3, rtol=1e-5)
    assert log_weights(model, guide, x, particles=4)[0].shape == (4, 3)


def test_a_masked_row_has_no_weight():
    keep = torch.tensor([True, False, True])

    def model(x):
        with batch_plate(x), poutine.mask(mask=keep):
            k = pyro.sample("k", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(LOCS[k], 0.5), obs=x)

    log_w, _ = log_weights(model, lambda x: None, torch.randn(3))
    assert (log_w[0] != 0).tolist() == keep.tolist()


def test_scales_that_differ_within_a_sum_are_refused():
    """The latent belongs to all rows, so N/B of a part of them would stand inside its logarithm."""

    def model(x):
        k = pyro.sample("k", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
        with batch_plate(x):
            pyro.sample("x", dist.Normal(LOCS[k], 0.5), obs=x)

    x = torch.randn(4)
    scaled = [Scaled(fn, "data", 40) for fn in (model, lambda x: None)]
    with pytest.raises(ValueError, match="'k', 'x' cannot be summed out.*without batch_size"):
        importance(elbo)(*scaled, x)
    with pytest.raises(ValueError, match="cannot be summed out"):
        importance(elbo)(tempered(mixture, 2.0), tempered(code, 2.0), x)
    whole = -importance(elbo)(model, lambda x: None, x)
    exact = (dist.Normal(LOCS, 0.5).log_prob(x.unsqueeze(-1)).sum(0) + WEIGHTS.log()).logsumexp(0)
    torch.testing.assert_close(whole, exact)


def test_a_guide_that_enumerates_is_refused():
    def guide(x):
        with batch_plate(x):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("k", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})

    with pytest.raises(ValueError, match="the guide enumerates 'k'"):
        log_weights(mixture, guide, torch.randn(3))


def test_a_fit_sums_out_and_says_so_in_its_history():
    torch.manual_seed(0)
    x = dist.MixtureSameFamily(dist.Categorical(WEIGHTS), dist.Normal(LOCS, 0.5)).sample((200,))

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits, self.locs = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.tensor([-1.0, 0.0, 1.0]))

        def forward(self, x):
            with batch_plate(x):
                k = pyro.sample("k", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(self.locs[k], 0.5), obs=x)

    model = Mixture()
    method = svi(lr=0.05, epochs=60)
    posterior = fit(model, x, guide=lambda x: None, method=method, batch_size=50, seed=0, progress=False)
    torch.testing.assert_close(model.locs.detach(), LOCS, atol=0.25, rtol=0)
    torch.testing.assert_close(model.logits.softmax(0).detach(), WEIGHTS, atol=0.1, rtol=0)
    assert posterior.history["log p(k, x)"][-1] > posterior.history["log p(k, x)"][0]


def test_terms_of_sites_name_what_was_summed():
    assert set(site_terms(mixture, code, torch.randn(3))) == {"log p(z)", "log p(k, x)", "log q(z)"}


def test_many_particles_are_run_in_parts(monkeypatch):
    """With the same draws in parts as at once, values and gradients agree; so K = 5000 fits into memory."""
    from pyro_ae import particles

    model, x = ppca(rows=4)
    guide = biased_guide(model)
    shift = torch.zeros(2, requires_grad=True)

    def shifted(x):
        with batch_plate(x):
            exact = model.posterior(x)
            pyro.sample("z", dist.MultivariateNormal(exact.loc + shift, 1.3 * exact.covariance_matrix))

    assert log_weights(model, guide, x, particles=5000)[0].shape == (5000, 4)
    whole, _ = log_weights(model, shifted, x, particles=3000)
    (gradient,) = torch.autograd.grad(iwae(whole).sum(), shift)
    monkeypatch.setattr(particles, "CHUNK", 4000)  # 200 particles at once
    parts, scale = log_weights(model, shifted, x, particles=3000)
    assert (parts.shape, scale) == ((3000, 4), 1)
    torch.testing.assert_close(iwae(parts), iwae(whole), atol=0.05, rtol=0)
    torch.manual_seed(5)
    parts, _ = log_weights(model, shifted, x, particles=3000)
    (ours,) = torch.autograd.grad(iwae(parts).sum(), shift)
    torch.manual_seed(5)
    layout = inspect_sites(model, shifted, x)
    expected = torch.cat([weigh(model, shifted, x, 200, layout=layout).log_weights for _ in range(15)])
    torch.testing.assert_close(parts, expected)
    torch.testing.assert_close(ours, torch.autograd.grad(iwae(expected).sum(), shift)[0])
    assert gradient.shape == (2,)
