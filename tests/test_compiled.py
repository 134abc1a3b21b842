"""Replayed steps are the steps themselves: same losses, same buffers, same draws; or the run says why it was eager."""

import copy
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from discovery import modules
from pyro_ae import elbo, fit, importance, iwae, svi
from pyro_ae.data import observe
from pyro_ae.divergences import adversarial, energy_distance, mmd, sliced_wasserstein
from pyro_ae.engines.compiled import Steps
from pyro_ae.engines.run import NonFiniteError
from pyro_ae.estimators import dreg, pathwise, score_function, sticking_the_landing
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.losses import (
    aggregate,
    aggregate_moments,
    annealed,
    autogen,
    capacity,
    fisher,
    free_bits,
    info_vae,
    piwae,
    soft_free_bits,
    total_correlation,
    wake_sleep,
    wasserstein,
)
from pyro_ae.lowering.capture import CaptureError
from pyro_ae.lowering.tape import record
from pyro_ae.models import ppca, vae
from pyro_ae.models.vae import VAE
from pyro_ae.nn import MLP
from pyro_ae.plates import batch_plate
from pyro_ae.schedules import linear

FILES = dict(modules())
PAIRS = [pytest.param(m.example, id=n) for n, m in FILES.items() if len(m.example()) == 3]
HEADS = [pytest.param(m.example, id=n) for n, m in FILES.items() if len(m.example()) == 2]


def both(example, loss, monkeypatch, steps=9, batch_size=6, **kwargs):
    """Histories and states of a fit as it is and of one that is replayed, and why the latter was eager, if it was."""
    made: list[Steps] = []

    def watched(*args):
        made.append(Steps(*args))
        return made[-1]

    monkeypatch.setattr("pyro_ae.engines.svi.Steps", watched)
    out = []
    for compile in (False, True):
        torch.manual_seed(1)
        model, guide, x = example()
        method = svi(loss=copy.deepcopy(loss), steps=steps, lr=1e-3, **kwargs)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            options = {"batch_size": batch_size, "seed": 0, "progress": False, "check": False}
            posterior = fit(model, x, guide=guide, method=method, compile=compile, **options)
        out.append((posterior.history, posterior.program.parameters.state(), method.loss))
    told = [str(w.message) for w in caught if "cannot be captured" in str(w.message)]
    assert len(told) <= 1
    replays = sum(t.count for t in made[1]._taped.values())
    assert bool(told) == (made[1].reason is not None) != bool(replays), (told, made[1].reason, replays)
    return out, made[1]


def agree(out):
    (theirs, first, _), (ours, second, _) = out
    assert theirs.keys() == ours.keys()
    for name in theirs:
        torch.testing.assert_close(torch.tensor(ours[name]), torch.tensor(theirs[name]), rtol=1e-4, atol=1e-4)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


EAGER: dict[str, str] = {}
"""What cannot be captured, and a part of the reason."""


@pytest.mark.parametrize("example", PAIRS)
def test_every_pair_of_the_zoo_agrees(example, monkeypatch, request):
    out, steps = both(example, importance(elbo, 2), monkeypatch)
    agree(out)
    print("EAGER", request.node.callspec.id, steps.reason)


@pytest.mark.parametrize("example", HEADS)
def test_every_head_agrees(example, monkeypatch, request):
    def pair():
        head, features = example()
        torch.manual_seed(0)
        guide = Amortized(MLP(5, [features.shape[-1]]), head)
        return ppca.PPCA(5, head(features).event_shape[0]), guide, torch.randn(16, 5)

    head, features = example()
    estimator = pathwise if head(features).has_rsample else score_function()
    out, steps = both(pair, importance(iwae, 3, estimator), monkeypatch)
    agree(out)
    print("EAGER", request.node.callspec.id, steps.reason)


LOSSES = {
    "iwae5": importance(iwae, 5),
    "stl": importance(elbo, 2, estimator=sticking_the_landing),
    "dreg": importance(iwae, 3, estimator=dreg),
    "score": importance(elbo, 2, estimator=score_function()),
    "piwae": piwae(2, 2),
    "annealed": annealed(linear(0.0, 1.0)),
    "autogen": autogen(linear(0.0, 2.0)),
    "capacity": capacity(linear(0.0, 5.0), gamma=10.0),
    "free_bits": free_bits(linear(0.0, 0.5)),
    "soft_free_bits": soft_free_bits(2.0),
    "total_correlation": total_correlation(beta=linear(1.0, 4.0)),
    "mmd": aggregate(mmd(), weight=linear(0.0, 10.0), beta=linear(0.0, 1.0)),
    "info_vae": info_vae(),
    "sliced": wasserstein(sliced_wasserstein()),
    "energy": wasserstein(energy_distance()),
    "adversarial": wasserstein(adversarial(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)))),
    "moments": aggregate_moments(beta=linear(0.1, 1.0), spread=0.2),
    "fisher": fisher(linear(0.0, 0.1)),
    "wake_sleep": wake_sleep(3, sleep=0.5),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_agrees(name, monkeypatch):
    out, steps = both(ppca.example, LOSSES[name], monkeypatch)
    agree(out)
    print("EAGER", name, steps.reason)
