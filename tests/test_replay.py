"""What changes from step to step is no constant of a replay: buffers, draws, schedules, settings; or it is refused."""

import copy
import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from replays import agree, both
from torch import nn

from pyro_ae import fit, importance, iwae, svi
from pyro_ae.data import observe
from pyro_ae.engines.compiled import Steps
from pyro_ae.engines.run import NonFiniteError
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.losses import annealed, autogen
from pyro_ae.lowering.capture import CaptureError
from pyro_ae.lowering.tape import record
from pyro_ae.models import vae
from pyro_ae.plates import batch_plate
from pyro_ae.schedules import linear

# ----------------------------------------------------------------------------------------- what changes between steps


def rows(count=16, size=3):
    return torch.randn(count, size) + 1.0


class Line(nn.Module):
    """A normal latent through a network to rows; the network is what a test is about."""

    def __init__(self, net: nn.Module | None = None, size: int = 3) -> None:
        super().__init__()
        self.net = net or nn.Linear(2, size)

    def forward(self, x):
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            observe("x", dist.Normal(self.net(z), 1.0).to_event(1), x)


def line(make=None, encoder=None):
    return lambda: (
        Line(make() if make else None),
        Amortized(encoder() if encoder else nn.Linear(3, 8), MeanField(8, 2)),
        rows(),
    )


class Codebook(nn.Module):
    """Keeps a moving average of what it sees, in place or by another tensor each time."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place, self.net = in_place, nn.Linear(2, 3)
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, z):
        out = self.net(z - self.mean)
        with torch.no_grad():
            new = 0.9 * self.mean + 0.1 * z.flatten(0, -2).mean(0)
            if self.in_place:
                self.mean.copy_(new)
            else:
                self.mean = new
        return out


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)),
        lambda: nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.3), nn.Linear(4, 3)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(2, 3)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)),
        lambda: Codebook(in_place=True),
    ],
    ids=["batch_norm", "dropout", "spectral_norm", "weight_norm", "codebook"],
)
def test_buffers_and_noise_evolve_as_they_do(make, monkeypatch):
    out, steps = both(line(make), importance(), monkeypatch, steps=12)
    agree(out)
    assert steps.reason is None
    buffers = dict(make().named_buffers())
    assert all(any(n.endswith(name) for n in out[1][1]) for name in buffers)


def stepped(done: float) -> float:
    """Constant for so long that a check of the first replay would not see it move."""
    return 0.0 if done < 0.7 else 3.0


@pytest.mark.parametrize("schedule", [linear(0.0, 3.0), stepped], ids=["linear", "stepped"])
@pytest.mark.parametrize("make", [annealed, autogen], ids=["annealed", "autogen"])
def test_schedules_are_no_constants(make, schedule, monkeypatch):
    out, steps = both(line(), make(schedule), monkeypatch, steps=30)
    agree(out)
    assert steps.reason is None
    flat, _ = both(line(), make(0.0), monkeypatch, steps=30)
    assert abs(flat[1][0]["loss"][-1] - out[1][0]["loss"][-1]) > 0.1


class Counting:
    """A loss that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model, guide, *args):
        self.calls += 1
        return importance()(model, guide, *args) * (1 + self.calls / 10)


def drawn_by_numpy(model, guide, *args):
    return importance()(model, guide, *args) * (1 + np.random.rand())


def if_of_noise(model, guide, *args):
    return importance()(model, guide, *args) * (2.0 if torch.rand(()) < 0.5 else 1.0)


def if_of_values(model, guide, *args):
    loss = importance()(model, guide, *args)
    return loss * 2 if loss > 0 else loss


def sized_by_values(model, guide, *args):
    return importance()(model, guide, *args) + args[0][args[0] > 1].sum()


def around_torch(model, guide, *args):
    weight = next(guide.fn.parameters())
    return importance()(model, guide, *args) * float(weight.detach().numpy().mean() + 2)


@pytest.mark.parametrize(
    "loss, why",
    [
        (Counting(), "loss.calls"),
        (drawn_by_numpy, "NumPy"),
        (if_of_noise, "line"),
        (if_of_values, "line"),
        (sized_by_values, "sizes depend"),
        (around_torch, "other values"),
    ],
)
def test_what_is_no_tape_runs_as_it_is_and_says_why(loss, why, monkeypatch):
    out, steps = both(line(), loss, monkeypatch)
    agree(out)
    assert why in (steps.reason or "")


def test_a_tensor_that_is_replaced_is_refused(monkeypatch):
    out, steps = both(line(lambda: Codebook(in_place=False)), importance(), monkeypatch)
    agree(out)
    assert "mean" in (steps.reason or "")


def test_closures_and_files_keep_settings_too(monkeypatch):
    calls = {"n": 0}

    def loss(model, guide, *args):
        calls["n"] += 1
        return importance()(model, guide, *args) * (1 + calls["n"] % 7)

    def example():
        calls["n"] = 0
        return line()()

    out, steps = both(example, loss, monkeypatch)
    agree(out)
    assert "calls" in (steps.reason or "")


class Weighted:
    def __init__(self) -> None:
        self.weight = 1.0

    def __call__(self, model, guide, *args):
        return importance()(model, guide, *args) * self.weight


def test_a_callback_may_change_a_setting():
    losses = []
    for compile in (False, True):
        torch.manual_seed(1)
        model, guide, x = line()()
        loss = Weighted()

        def turn(event, loss=loss):
            loss.weight = 1.0 + event.epoch

        options = {"batch_size": 6, "seed": 0, "progress": False, "check": False, "callbacks": [turn]}
        posterior = fit(model, x, guide=guide, method=svi(loss=loss, steps=30), compile=compile, **options)
        losses.append(torch.tensor(posterior.history["loss"]))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


def test_a_late_difference_is_an_error(monkeypatch):
    """What depends on what nothing here can see is found by the checks that follow, and not passed over."""

    calls = itertools.count(1)

    def loss(model, guide, *args):
        return importance()(model, guide, *args) * (1.0 if next(calls) < 5 else 2.0)

    model, guide, x = line()()
    with pytest.raises(CaptureError, match="compile=False"):
        fit(model, x, guide=guide, method=svi(loss=loss, steps=40), progress=False, compile=True)


def test_params_of_plain_functions(monkeypatch):
    net = nn.Linear(3, 4)

    def model(x):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(-1, 3), scale).to_event(1), obs=x)

    def guide(x):
        own = pyro.module("net", net)
        with pyro.plate("data", len(x)):
            loc, scale = own(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    start = copy.deepcopy(net.state_dict())

    def example():
        net.load_state_dict(start)
        return model, guide, rows()

    out, steps = both(example, importance(), monkeypatch)
    agree(out)
    assert steps.reason is None
    assert (out[1][1]["scale"] - 0.0).abs() > 1e-4


def test_missing_values(monkeypatch):
    def example():
        model, _, x = line()()
        x[3, 1] = float("nan")
        x[7] = float("nan")

        class Encoder(nn.Linear):
            def forward(self, x, observed=None):
                return super().forward(x if observed is None else x + observed)

        return model, Amortized(Encoder(3, 8), MeanField(8, 2)), x

    out, steps = both(example, importance(iwae, 2), monkeypatch, steps=24)
    agree(out)
    assert steps.reason is None
    assert len(steps._taped) > 2  # batches with missing values, and without


def test_missing_values_of_a_models_own_data(monkeypatch):
    own = torch.randn(6)
    own[2] = float("nan")

    class Two(Line):
        def forward(self, x):
            super().forward(x)
            with pyro.plate("rows", 6):
                observe("own", dist.Normal(self.net.bias.sum(), 1.0), own)

    def example():
        return Two(), *line()()[1:]

    out, steps = both(example, importance(), monkeypatch)
    agree(out)
    assert steps.reason is None


def test_enumerated_latents(monkeypatch):
    def example():
        logits = nn.Linear(1, 2)

        class Mixture(nn.Module):
            def __init__(self):
                super().__init__()
                self.loc = nn.Parameter(torch.tensor([-1.0, 1.0]))
                self.logits = logits

            def forward(self, x):
                with batch_plate(x):
                    k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
                    pyro.sample("x", dist.Normal(self.loc[k], 1.0), obs=x)

        return Mixture(), lambda x: None, torch.randn(16)

    out, steps = both(example, importance(), monkeypatch)
    agree(out)
    assert steps.reason is None


@pytest.mark.parametrize("automatic", [AutoNormal, AutoMultivariateNormal, AutoDelta, AutoIAFNormal])
def test_automatic_guides_of_pyro(automatic, monkeypatch):
    def model(x):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("groups", 3):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean.sum() + effect.mean(), scale), obs=x)

    out, steps = both(lambda: (model, automatic(model), torch.randn(16)), importance(), monkeypatch)
    agree(out)
    assert steps.reason is None


@pytest.mark.parametrize("elbo_class", [Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO])
def test_elbos_of_pyro_agree(elbo_class, monkeypatch):
    out, steps = both(line(), elbo_class(), monkeypatch)
    agree(out)
    # this one leaves out by an if what has weight zero
    assert steps.reason is None if elbo_class is not TraceEnum_ELBO else "control flow" in steps.reason


def test_gradients_that_share_memory_are_clipped_once(monkeypatch):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

        def forward(self, z):
            return z.sum(-1, keepdim=True) + self.a + self.b

    out, steps = both(line(Two), importance(), monkeypatch, clip=1e-3)
    agree(out)
    assert steps.reason is None


@pytest.mark.parametrize("compile", [False, True])
def test_what_is_not_finite_names_its_site_and_step(compile):
    torch.manual_seed(1)
    model, guide, x = line()()

    def explode(event):
        if event.epoch == 4:
            with torch.no_grad():
                model.net.weight.fill_(float("inf"))

    options = {"batch_size": 8, "progress": False, "callbacks": [explode], "compile": compile}
    with pytest.raises(NonFiniteError, match=r"at step 8 \(epoch 4.*'x'"):
        fit(model, x, guide=guide, method=svi(steps=20), **options)


# ------------------------------------------------------------------------------------------------------- the rules


def test_auto_captures_long_runs_alone(monkeypatch):
    made = []
    monkeypatch.setattr("pyro_ae.engines.svi.Steps", lambda *args: made.append(Steps(*args)) or made[-1])
    monkeypatch.setattr("pyro_ae.engines.compiled.REPLAY_PAYS", 40)
    for steps in (40, 200):
        model, guide, x = line()()
        fit(model, x, guide=guide, method=svi(steps=steps), batch_size=5, progress=False, check=False)
    short, long = made
    assert not short._taped
    assert [t.tape is not None for t in long._taped.values()] == [True, True]
    assert sum(t.count for t in long._taped.values()) > 100


def test_compile_is_one_of_its_words():
    with pytest.raises(ValueError, match="compile must be one of"):
        fit(*vae.example()[::2], compile="always")


def test_a_tape_follows_what_it_holds():
    weight, mean = torch.ones(3, requires_grad=True), torch.zeros(3)

    def fn(x):
        mean.mul_(0.5).add_(x, alpha=0.5)
        loss = ((x - mean) * weight * torch.randn(3) * torch.zeros(3).exp()).sum()
        return [loss.detach(), *torch.autograd.grad(loss, [weight])]

    state = torch.get_rng_state()
    first, tape = record(fn, torch.ones(3), live=[weight, mean])
    torch.testing.assert_close(mean, torch.full((3,), 0.5))
    assert len(tape.written) == 1 and tape.written[0] is mean
    with torch.no_grad():
        weight.fill_(4.0)
        mean.zero_()
    torch.set_rng_state(state)
    second = tape(torch.ones(3))
    torch.testing.assert_close(second[0], 4 * first[0])
    torch.testing.assert_close(mean, torch.full((3,), 0.5))
    torch.testing.assert_close(second[1], first[1])


def test_a_tape_draws_what_nothing_uses():
    def fn(x):
        torch.randn(5)
        return [x + torch.rand(3)]

    _, tape = record(fn, torch.ones(3), live=[])
    torch.manual_seed(4)
    expected = fn(torch.ones(3))
    torch.manual_seed(4)
    torch.testing.assert_close(tape(torch.ones(3)), expected)


@pytest.mark.slow
def test_inductor_agrees(monkeypatch):
    losses = []
    for compile in (False, "inductor"):
        torch.manual_seed(1)
        model, guide, x = line(lambda: nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))()
        options = {"batch_size": 8, "seed": 0, "progress": False, "check": False}
        posterior = fit(model, x, guide=guide, method=svi(steps=30), compile=compile, **options)
        losses.append(posterior.history["loss"])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-4)
