"""What every engine owes: one seed, one result; ArviZ, disk, prediction, resumption; and what all of them refuse."""

import warnings
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from truth import NOISE, regression, regression_posterior, regression_rows

from pyro_ae import (
    Posterior,
    batch_plate,
    bayesian,
    ensemble,
    entropy_sghmc,
    feynman_kac,
    fit,
    hmc,
    laplace,
    map_,
    mc_dropout,
    nuts,
    sghmc,
    sgld,
    sgnht,
    svi,
    swag,
)
from pyro_ae.engines.run import NonFiniteError
from pyro_ae.engines.store import Store
from pyro_ae.fit import METHODS
from pyro_ae.schedules import linear

SHORT = {"warmup": 5, "draws": 6, "thinning": 2}
ENGINES = {
    "sgld": sgld(lr=1e-3, **SHORT),
    "sghmc": sghmc(**SHORT),
    "sgnht": sgnht(lr=1e-3, **SHORT),
    "entropy_sghmc": entropy_sghmc(**SHORT),
    "cycles": sghmc(warmup=4, draws=6, thinning=2, cycles=2),
    "swag": swag(lr=1e-3, warmup=5, snapshots=6, rank=3, thinning=2, draws=6),
    "ensemble": ensemble(members=3, steps=8),
    "map": map_(steps=8),
    "feynman_kac": feynman_kac(particles=30, steps=8),
    "laplace": laplace(structure="diagonal", at=map_(steps=8), draws=6),
    "mc_dropout": mc_dropout(inputs=True, chains=2, steps=8, draws=6),
}


def quick(engine, model=regression, given=None, **kwargs):
    given = regression_rows() if given is None else given
    return fit(model, given, method=engine, **({"seed": 0, "progress": False} | kwargs))


def network_model(net):
    def model(x, y=None):
        mean = net(x).squeeze(-1)
        with batch_plate(x):
            pyro.sample("y", dist.Normal(mean, NOISE), obs=y)

    return model


def mlp(hidden=4):
    return nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 1))


TARGETS = {"mc_dropout": (network_model(bayesian(nn.Linear(3, 1, bias=False))), "w.weight")}  # it is of networks alone


# -- one contract --------------------------------------------------------------------------------------------------


def test_every_method_by_name_is_held_to_the_contract():
    assert set(METHODS) - set(ENGINES) == {"svi", "nuts", "hmc"}  # which have tests of their own


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("batch_size", [None, 64])
def test_same_seed_same_draws_and_another_another(name, batch_size):
    model, w = TARGETS.get(name, (regression, "w"))
    draws = [quick(ENGINES[name], model, batch_size=batch_size, seed=s).sample()[w] for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].shape[-1] == 3 and torch.isfinite(draws[0]).all()


@pytest.mark.parametrize("name", ENGINES)
def test_a_posterior_goes_to_arviz_disk_prediction_and_report(name, tmp_path):
    import arviz

    model, w = TARGETS.get(name, (regression, "w"))
    posterior = quick(ENGINES[name], model, batch_size=64)
    idata = posterior.to_arviz()
    assert idata.posterior[w].shape == posterior.draws[w].shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ on a handful of draws
        arviz.summary(idata)
        if len(posterior.sample()[w]) > 1:
            arviz.loo(idata)
        arviz.plot_trace(idata)
        arviz.plot_ppc(idata)
    assert posterior.predict((torch.zeros(4, 3), None), draws=5)["y"].shape[1:] == (4,)
    again = Posterior.load(posterior.save(tmp_path / "p"), model)
    assert torch.equal(again.sample()[w], posterior.sample()[w])
    assert type(ENGINES[name]).__name__ in repr(again)
    assert str(posterior.report())


@pytest.mark.parametrize("name", ENGINES)
def test_a_network_and_minibatches(name):
    posterior = quick(ENGINES[name], network_model(bayesian(mlp())), batch_size=64)
    assert posterior.draws["w.0.weight"].shape[2:] == (4, 3)
    assert posterior.predict((torch.zeros(4, 3), None), draws=2)["y"].shape == (min(2, posterior._at_most(2)), 4)


@pytest.mark.parametrize("name", [n for n in ENGINES if n != "laplace"])
@pytest.mark.parametrize("batch_size", [None, 64])
def test_a_fit_that_stopped_goes_on_to_the_same_draws(name, batch_size, tmp_path):
    """Stopped by a callback in the middle, of a pass as well, and gone on with from its folder."""
    engine, (model, w) = ENGINES[name], TARGETS.get(name, (regression, "w"))
    whole = quick(engine, model, batch_size=batch_size).draws[w]
    steps = engine.lengths[0]

    def stop(event):
        if event.step == steps * 2 // 3:
            raise KeyboardInterrupt

    folder = tmp_path / "run"
    part = quick(engine, model, batch_size=batch_size, callbacks=[stop], checkpoint=folder)
    assert part.interrupted
    gone_on = quick(engine, model, batch_size=batch_size, checkpoint=folder, seed=5)
    assert torch.equal(gone_on.draws[w], whole)
    with pytest.raises(ValueError, match="another fit"):
        quick(replace(engine, lr=0.5), model, batch_size=batch_size, checkpoint=folder)


def test_an_interrupt_in_the_middle_of_a_step_leaves_no_half_step_behind(tmp_path, monkeypatch):
    """Ctrl-C may come when the chains have moved and the step is not yet counted: that state is not written."""
    engine = ENGINES["sghmc"]
    whole = quick(engine).draws["w"]
    move, calls = sghmc.step, []

    def interrupted(self, *args):
        move(self, *args)
        calls.append(1)
        if len(calls) == 14:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sghmc, "step", interrupted)
        assert quick(engine, checkpoint=tmp_path / "run").interrupted
    assert torch.equal(quick(engine, checkpoint=tmp_path / "run").draws["w"], whole)


def test_parameters_and_their_optimiser_go_on_as_well(tmp_path):
    def run(**kwargs):
        torch.manual_seed(3)
        net = bayesian(mlp(), deterministic=["0"])
        posterior = quick(sghmc(warmup=20, draws=4, thinning=3), network_model(net), batch_size=64, **kwargs)
        return posterior.draws["w.2.weight"], net.module[0].weight.detach().clone()

    def stop(event):
        if event.step == 11:
            raise KeyboardInterrupt

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[stop], checkpoint=tmp_path / "run")
    for a, b in zip(run(checkpoint=tmp_path / "run"), whole, strict=True):
        assert torch.equal(a, b)


def test_draws_are_of_the_ends_of_their_steps():
    engine = sghmc(warmup=5, draws=3, thinning=4)
    kept = {step: engine.plan(step).kept for step in range(engine.lengths[0])}
    assert {step: k for step, k in kept.items() if k is not None} == {8: 0, 12: 1, 16: 2}
    assert [engine.plan(step).adapting for step in (0, 4, 5)] == [True, True, False]
    cycles = sghmc(warmup=4, draws=4, thinning=3, cycles=2)  # twice two steps of warm-up and two draws
    kept = {step: cycles.plan(step).kept for step in range(cycles.lengths[0])}
    assert {step: k for step, k in kept.items() if k is not None} == {4: 0, 7: 1, 12: 2, 15: 3}
    assert [cycles.plan(step).heat for step in (1, 2, 7, 8, 9, 10)] == [0.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    assert [cycles.plan(step).adapting for step in (1, 2, 8, 9)] == [True, False, False, False]
    assert cycles.plan(8).lr == 1.0 and cycles.plan(7).lr < 0.05


def test_an_interrupted_run_keeps_what_was_drawn():
    def stop(event):
        if event.metrics["drawn"] == 3:
            raise KeyboardInterrupt

    posterior = quick(ENGINES["sghmc"], callbacks=[stop])
    assert posterior.interrupted and posterior.draws["w"].shape == (4, 3, 3)
    assert torch.equal(posterior.draws["w"], quick(ENGINES["sghmc"]).draws["w"][:, :3])
    early = quick(replace(ENGINES["ensemble"], steps=50), callbacks=[lambda e: e.step >= 20])
    assert early.draws["w"].shape == (1, 3, 3)  # a point is worth keeping wherever descent is stopped


def test_chains_have_noise_of_their_own_and_batches_where_asked():
    for own in (False, True):
        draws = quick(replace(ENGINES["sgld"], own_batches=own, init="median"), batch_size=50).draws["w"]
        assert (draws[0] != draws[1]).all()
    together = quick(sgld(lr=1e-3, temperature=0.0, **SHORT), batch_size=50, model=_same_start).draws["w"]
    apart = quick(sgld(lr=1e-3, temperature=0.0, own_batches=True, **SHORT), batch_size=50, model=_same_start)
    assert (together[0] == together[1]).all() and (apart.draws["w"][0] != apart.draws["w"][1]).any()


def _same_start(x, y=None):
    start = {"start": lambda: torch.ones(3)}
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1), infer=start)
    with batch_plate(x):
        pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def test_a_schedule_of_the_learning_rate_and_a_start_from_a_posterior():
    fitted = quick(map_(steps=400, lr=0.05))
    mean, _ = regression_posterior(*regression_rows())
    still = quick(sgld(lr=linear(1e-7, 1e-9), init=fitted, **SHORT))
    torch.testing.assert_close(still.draws["w"], mean.expand(4, 6, 3), rtol=0, atol=0.02)
    assert "<a posterior by map_" in still.method
    with pytest.raises(ValueError, match="lacks 'w.0.weight'"):
        quick(sgld(init=fitted), network_model(bayesian(mlp())))


# -- partial networks, and agreement with NUTS ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sghmc", "ensemble", "swag", "laplace"])
def test_deterministic_parts_are_trained_along_and_then_held(name):
    net = bayesian(mlp(), deterministic=["0"])
    before = net.module[0].weight.detach().clone()
    posterior = quick(ENGINES[name], network_model(net), batch_size=64)
    assert set(posterior.draws) == {"w.2.weight", "w.2.bias"}
    assert (net.module[0].weight != before).all()


def test_the_gradient_of_deterministic_parts_is_the_mean_over_chains():
    """One step of Adam from rest moves each parameter by the learning rate, against the sign of its gradient."""
    torch.manual_seed(0)
    net = bayesian(nn.Linear(3, 1), deterministic=["bias"], start="module")
    x, y = regression_rows()
    before = net.module.bias.item()
    engine = sgld(lr=1e-12, warmup=1, draws=1, thinning=1, parameter_lr=0.25)
    posterior = quick(engine, network_model(net), (x, y + 100.0))
    assert net.module.bias.item() == pytest.approx(before + 0.25, abs=1e-3)
    assert posterior.program.parameters.trainable()


@pytest.mark.slow  # 90 s, nearly all of it NUTS: pytest -m slow tests/test_engines.py
def test_agrees_with_nuts_on_a_network_of_fifty_units():
    """Mean and standard deviation of the prediction, which is what does not depend on the order of the units."""
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 40)[:, None]
    y = (3 * x).sin().squeeze(-1) + 0.2 * torch.randn(40)
    net = bayesian(
        nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1)),
        {"0.*": dist.Normal(0.0, 1.0), "*": dist.Normal(0.0, 0.3)},
    )

    def model(x, y=None):
        mean = pyro.deterministic("mean", net(x).squeeze(-1))
        with batch_plate(x):
            pyro.sample("y", dist.Normal(mean, 0.2), obs=y)

    grid = torch.linspace(-1.5, 1.5, 13)[:, None]
    found = []
    for engine in (
        nuts(draws=200, warmup=200, chains=2),
        sghmc(lr=1e-4, warmup=2000, draws=50, thinning=40, chains=16),
    ):
        posterior = fit(model, (x, y), method=engine, seed=0, progress=False)
        found.append(posterior.predict((grid, None), draws=400, sites=["mean"])["mean"])
    assert (found[0].mean(0) - found[1].mean(0)).abs().max() < 0.12
    assert (found[0].std(0) / found[1].std(0)).log().abs().max() < 0.3


def test_hmc_samples_a_small_network():
    posterior = quick(hmc(draws=20, warmup=20, chains=2), network_model(bayesian(nn.Linear(3, 1, bias=False))))
    mean, covariance = regression_posterior(*regression_rows())
    w = posterior.sample()["w.weight"].squeeze(1)
    assert ((w.mean(0) - mean) / covariance.diagonal().sqrt()).abs().max() < 1.0


# -- room for draws ------------------------------------------------------------------------------------------------


def test_draws_in_half_precision_and_on_disk_are_used_alike(tmp_path):
    plain = quick(ENGINES["sghmc"])
    for engine in (replace(ENGINES["sghmc"], dtype=torch.bfloat16), replace(ENGINES["sghmc"], memory=1e-9)):
        posterior = quick(engine)
        expected = plain.draws["w"].to(posterior.draws["w"].dtype)
        assert torch.equal(posterior.draws["w"], expected)
        assert posterior.predict((torch.ones(4, 3), None), draws=5)["y"].dtype == torch.float32
        torch.testing.assert_close(
            posterior.log_likelihood()["y"], plain.log_likelihood()["y"], rtol=0.1, atol=1.0 if engine.dtype else 1e-6
        )
        assert posterior.to_arviz().posterior["w"].shape == (4, 6, 3)
        again = Posterior.load(posterior.save(tmp_path / str(engine.dtype)), regression)
        assert again.draws["w"].dtype == expected.dtype


def test_draws_that_find_no_room_say_how_much_they_take():
    with pytest.raises(ValueError, match=r"take .* GiB.*at most \d+ draws of each chain.*float16"):
        Store(8, 10**9, 10**6, torch.float32)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [sgld(lr=1e3), sghmc(lr=1e6, adaptive=False), sgnht(lr=1e5), ensemble(lr=1e30)])
def test_chains_that_leave_for_infinity_stop_and_say_where(engine):
    def model(x, y=None):
        pyro.sample("calm", dist.Normal(0.0, 1e4))
        w = pyro.sample("steep", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with batch_plate(x):
            pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)

    with pytest.raises(NonFiniteError, match=r"not finite at step \d+.*site 'steep'.*smaller lr"):
        quick(engine, model)


def test_what_was_drawn_before_is_the_errors_posterior():
    engine = sgld(lr=lambda done: 1e-3 if done < 0.7 else 1e30, **SHORT)
    with pytest.raises(NonFiniteError, match=r"\.posterior") as error:
        quick(engine)
    assert error.value.posterior.draws["w"].shape[1] >= 1


def test_latents_of_rows_are_refused_in_minibatches_and_sampled_without():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with batch_plate(y):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(ValueError, match="'z' belong to the rows"):
        quick(ENGINES["sgld"], model, torch.randn(20), batch_size=5)
    assert quick(ENGINES["sgld"], model, torch.randn(20)).draws["z"].shape == (4, 6, 20)


def test_a_network_without_a_prior_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x, y=None):
            scale = pyro.sample("scale", dist.HalfNormal(1.0))
            mean = self.net(x).squeeze(-1)
            with batch_plate(x):
                pyro.sample("y", dist.Normal(mean, scale), obs=y)

    for engine in (ENGINES["sghmc"], ENGINES["map"], ENGINES["laplace"]):
        with pytest.raises(ValueError, match=r"have no prior.*bayesian\(network\)"):
            quick(engine, Model())
    quick(ENGINES["sghmc"], Model().requires_grad_(False))
    net = mlp()

    def closure(x, y=None):
        pyro.sample("unused", dist.Normal(0.0, 1.0))
        mean = net(x).squeeze(-1)
        with batch_plate(x):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"belong to no module.*bayesian\(network\)"):
        quick(ENGINES["sghmc"], closure)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: sgld(draws=0), "draws must be at least 1"),
        (lambda: sghmc(chains=0), "chains must be at least 1"),
        (lambda: sgnht(lr=-1.0), "lr must be positive"),
        (lambda: sgld(temperature=-1.0), "temperature must not be negative"),
        (lambda: sghmc(friction=0.0), "friction must lie"),
        (lambda: sghmc(draws=10, cycles=3), "shared out evenly"),
        (lambda: sgld(init="nowhere"), "unknown init 'nowhere'"),
        (lambda: entropy_sghmc(flatness=0.0), "flatness must be positive"),
        (lambda: entropy_sghmc(keep="all"), "keep must be"),
        (lambda: sgld(decay=1.0), "decay must lie"),
        (lambda: swag(rank=50, snapshots=10), "rank must be"),
        (lambda: laplace(structure="block"), "unknown structure 'block'"),
        (lambda: laplace(draws=0), "draws and rank"),
        (lambda: ensemble(members=0), "chains must be at least 1"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_cannot_be_done_with_a_loader_or_other_engines(tmp_path):
    loader = DataLoader(TensorDataset(*regression_rows()), batch_size=50)
    assert torch.isfinite(quick(ENGINES["sghmc"], given=loader).draws["w"]).all()
    with pytest.raises(ValueError, match="own_batches needs the rows"):
        quick(replace(ENGINES["sghmc"], own_batches=True), given=loader)
    with pytest.raises(ValueError, match="cannot be resumed"):
        quick(ENGINES["sghmc"], given=loader, checkpoint=tmp_path)
    for engine in (svi(steps=2), nuts(draws=2, warmup=2), laplace(at=map_(steps=2))):
        with pytest.raises(ValueError, match="keeps no checkpoint"):
            quick(engine, checkpoint=tmp_path)


def test_laplace_refuses_what_is_no_maximum_and_rows_that_are_tied():
    with pytest.raises(ValueError, match="not positive definite"):
        fit(_two_modes, None, method=laplace(structure="full", at=map_(steps=1, lr=1e-9)), seed=0, progress=False)
    with pytest.raises(ValueError, match="rows that are independent"):
        fit(_two_modes, None, method=laplace(at=map_(steps=1)), seed=0, progress=False)


def _two_modes():
    z = pyro.sample("z", dist.Normal(0.0, 3.0), infer={"start": lambda: torch.zeros(())})
    pyro.sample("y", dist.Normal(z**2, 0.1), obs=torch.tensor(4.0))
