"""Every guide of the zoo: its model's sites, a finite gradient for each parameter, right densities."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn
from torch.distributions import constraints
from truth import banana, on_a_grid, ppca, same_noise

from discovery import modules
from pyro_ae import Posterior, elbo, fit, importance, iwae, log_weights, svi
from pyro_ae.estimators import dreg, pathwise, score_function, sticking_the_landing
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.flow import Flow
from pyro_ae.guides.full_rank import FullRank
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.guides.shared import Shared
from pyro_ae.guides.together import Together
from pyro_ae.losses.importance import name_of
from pyro_ae.models import ppca as ppca_file
from pyro_ae.nn import MLP
from pyro_ae.sites import Recorder, inspect_sites, is_estimated

FILES = dict(modules("pyro_ae.guides"))
HEADS = [pytest.param(m, id=n) for n, m in FILES.items() if len(m.example()) == 2]
GUIDES = [pytest.param(m, id=n) for n, m in FILES.items() if len(m.example()) == 3]


@pytest.mark.parametrize("module", HEADS)
def test_a_head_maps_features_to_a_distribution(module):
    head, features = module.example()
    for leading in [(), (3,)]:
        q = head(features.expand(*leading, *features.shape))
        assert q.batch_shape == (*leading, len(features))
        assert len(q.event_shape) == 1
        z = q()
        assert q.log_prob(z).shape == q.batch_shape


@pytest.mark.parametrize("module", HEADS)
def test_a_head_trains_in_an_amortized_guide(module):
    head, features = module.example()
    latent = head(features).event_shape[0]
    x = torch.randn(10, 4)
    model = ppca_file.PPCA(4, latent)
    guide = Amortized(MLP(4, [features.shape[-1]]), head)
    estimator = pathwise if head(features).has_rsample else score_function()
    importance(iwae, 4, estimator)(model, guide, x).backward()
    _finite_gradients(guide)


@pytest.mark.parametrize("module", GUIDES)
def test_a_guide_samples_its_models_sites_and_every_parameter_learns(module):
    model, guide, x = module.example()
    layout = inspect_sites(model, guide, x)
    assert {n for n, s in layout.guide.items() if s.kind == "latent"} == set(layout.names("latent"))
    importance(elbo, 4)(model, guide, x).backward()
    _finite_gradients(guide)


@pytest.mark.parametrize("estimator", [pathwise, sticking_the_landing, dreg, score_function()], ids=name_of)
@pytest.mark.parametrize("module", GUIDES)
def test_every_estimator_has_a_gradient_for_every_guide(module, estimator):
    model, guide, x = module.example()
    loss = importance(elbo if estimator is sticking_the_landing else iwae, 3, estimator)
    if estimator in (sticking_the_landing, dreg) and _estimates_its_density(guide, x):
        with pytest.raises(ValueError, match="density at other values"):
            loss(model, guide, x)
        return
    loss(model, guide, x).backward()
    _finite_gradients(guide)


def _estimates_its_density(guide: nn.Module, x: Tensor) -> bool:
    with Recorder() as r:
        guide(x)
    return any(map(is_estimated, r.sites.values()))


@pytest.mark.parametrize("module", GUIDES)
def test_a_guide_runs_all_particles_at_once_on_minibatches(module):
    """The particles of one that cannot would be run one by one, with a warning, which is an error here."""
    model, guide, x = module.example()
    posterior = fit(model, x, guide=guide, method=svi(steps=2, loss=importance(elbo, 3)), batch_size=8, progress=False)
    assert posterior.program.layout.serial is None
    latents = posterior.sample(4, x[:5])
    assert all(torch.isfinite(v).all() and len(v) == 4 for v in latents.values())


@pytest.mark.parametrize("module", GUIDES)
def test_a_saved_guide_draws_the_same(module, tmp_path):
    """From disk, and from a state that is loaded before the first call."""
    model, guide, x = module.example()
    posterior = fit(model, x, guide=guide, method=svi(steps=3), seed=0, progress=False)
    posterior.save(tmp_path / "posterior")
    again, fresh, _ = module.example()
    loaded = Posterior.load(tmp_path / "posterior", again, fresh, data=x)
    another, untouched, _ = module.example()
    if isinstance(model, nn.Module):
        another.load_state_dict(model.state_dict())
    untouched.load_state_dict(guide.state_dict())
    third = fit(another, x, guide=untouched, method=svi(steps=1, lr=1e-30), progress=False)
    draws = same_noise(*(lambda p=p: p.sample(3) for p in (posterior, loaded, third)))
    for name, value in draws[0].items():
        torch.testing.assert_close(value, draws[1][name])
        torch.testing.assert_close(value, draws[2][name])


def _finite_gradients(guide: nn.Module) -> None:
    bad = [n for n, p in guide.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not bad, f"no finite gradient for {bad}"


@pytest.mark.parametrize("module", HEADS)
def test_importance_sampling_with_a_trained_guide_finds_the_evidence(module):
    """|iwae - log p(x)| within five standard errors of the estimate, row by row."""
    head, features = module.example()
    q = head(features)
    if isinstance(q, dist.Delta) or not q.support.check(torch.full(q.event_shape, 2.0)):
        pytest.skip("its draws have no density over all real vectors")
    model, x = ppca(rows=30)
    torch.manual_seed(0)
    guide = Amortized(MLP(5, [features.shape[-1]]), head)
    posterior = fit(model, x, guide=guide, method=svi(lr=1e-2, steps=400), progress=False)
    with torch.no_grad():
        log_w, _ = log_weights(posterior.model, guide, x, particles=4000)
        evidence = model.marginal().log_prob(x)
        w = (log_w - evidence).exp()  # has mean one
        error = w.std(0) / 4000**0.5
    assert ((w.mean(0) - 1).abs() < 5 * error).all()
    assert (iwae(log_w) - evidence).abs().max() < 0.2


def test_a_flow_is_nearer_to_a_bent_posterior_than_any_normal():
    """The gap of the ELBO from the evidence, by quadrature; tests/benchmarks/guides.py has that of every head."""
    x = torch.tensor([[2.0]])
    evidence = on_a_grid(banana, x)
    gaps = {}
    for name, head in {"normal": FullRank, "flow": partial(Flow, flow="MAF", hidden_features=(32, 32))}.items():
        guide = Shared(banana, head, plate=None, scale=1.0)
        method = svi(lr=1e-2, schedule="cosine", steps=400, loss=importance(elbo, 32))
        fit(banana, x, guide=guide, method=method, seed=0, progress=False)
        with torch.no_grad():
            gaps[name] = float(evidence - elbo(log_weights(banana, guide, x, particles=2000)[0]))
    assert gaps["normal"] > 0.8
    assert gaps["flow"] < 0.3 * gaps["normal"], gaps


def test_mean_field_keeps_to_the_support():
    head = MeanField(4, 3, support=constraints.positive)
    features = torch.randn(1000, 4)
    q = head(features)
    z = q.rsample()
    assert (z > 0).all()
    loc, log_scale = head.linear(features).chunk(2, -1)
    torch.testing.assert_close(q.log_prob(z), dist.LogNormal(loc, log_scale.exp()).to_event(1).log_prob(z))
    assert (MeanField(4, 3, support=constraints.simplex)(features).rsample().sum(-1) - 1).abs().max() < 1e-5
    with pytest.raises(ValueError, match="no transform takes them onto Boolean"):
        MeanField(4, 3, support=constraints.boolean)


def test_amortized_reads_the_argument_it_is_told_to():
    def model(y: Tensor, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    guide = Amortized(MLP(2, [4]), MeanField(4, 2), inputs=lambda y, x: x)
    log_w, _ = log_weights(model, guide, (torch.zeros(5, 9), torch.randn(5, 2)))
    assert log_w.shape == (1, 5)
    with pytest.raises(ValueError, match=r"expected inputs \[\*, 2\]"):
        log_weights(model, Amortized(MLP(2, [4]), MeanField(4, 2)), (torch.zeros(5, 9), torch.randn(5, 2)))


def test_amortized_refuses_integers_and_nothing():
    model, guide, x = ppca_file.example()
    with pytest.raises(ValueError, match="'z' needs floating point rows.*int64.*255"):
        guide(x.long())
    with pytest.raises(ValueError, match="'z' needs the rows"):
        guide()


@pytest.mark.parametrize("auto", [AutoNormal, AutoMultivariateNormal, partial(AutoLowRankMultivariateNormal, rank=1)])
def test_pyros_autoguides_serve_under_particles(auto):
    """Also those that draw one auxiliary latent, and are built only when first called."""

    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        s = pyro.sample("s", dist.Exponential(1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a.sum(-1), s), obs=y)

    posterior = fit(
        model, torch.randn(12), guide=auto(model), method=svi(loss=importance(iwae, 5), steps=3), progress=False
    )
    draws = posterior.sample(7)
    assert {n: tuple(v.shape) for n, v in draws.items()} == {"a": (7, 2), "s": (7,)}
    assert (draws["s"] > 0).all()


def test_together_is_the_sum_of_its_parts():
    from pyro_ae.guides import together

    model, guide, x = together.example()
    shared, local = guide.parts
    torch.manual_seed(0)
    both = pyro.poutine.trace(guide).get_trace(x)
    assert set(both.nodes) >= {"mean", "z"}
    assert set(pyro.poutine.trace(Together(local)).get_trace(x).nodes) >= {"z"}
    assert "z" not in pyro.poutine.trace(shared).get_trace(x).nodes


@pytest.mark.parametrize("make", [lambda model: AutoNormal(model), lambda model: _one_for_each_row])
def test_a_guide_with_parameters_for_each_row_in_minibatches(make):
    """Batches of one size would run, and pair each parameter with other rows every time."""

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = torch.randn(20)
    with pytest.raises(ValueError, match="parameters for each row of a batch in 'z'.*Amortized"):
        fit(model, y, guide=make(model), batch_size=5, method=svi(steps=3), progress=False)


def _one_for_each_row(y):
    loc = pyro.param("loc", torch.zeros(5))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(loc, 1.0))
