"""Replayed steps are the steps themselves: same losses, same buffers, same draws; or the run says why it was eager."""

import pytest
import torch
from replays import agree, both
from torch import nn

from discovery import modules
from pyro_ae import elbo, importance, iwae
from pyro_ae.divergences import adversarial, energy_distance, mmd, sliced_wasserstein
from pyro_ae.estimators import dreg, pathwise, score_function, sticking_the_landing
from pyro_ae.guides.amortized import Amortized
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
from pyro_ae.models import ppca
from pyro_ae.nn import MLP
from pyro_ae.schedules import linear

FILES = dict(modules())
PAIRS = [pytest.param(m.example, id=n) for n, m in FILES.items() if len(m.example()) == 3]
HEADS = [pytest.param(m.example, id=n) for n, m in FILES.items() if len(m.example()) == 2]


@pytest.mark.parametrize("example", PAIRS)
def test_every_pair_of_the_zoo_agrees(example, monkeypatch):
    out, steps = both(example, importance(elbo, 2), monkeypatch)
    agree(out)
    assert steps.reason is None


@pytest.mark.parametrize("example", HEADS)
def test_every_head_agrees(example, monkeypatch):
    def pair():
        head, features = example()
        torch.manual_seed(0)
        guide = Amortized(MLP(5, [features.shape[-1]]), head)
        return ppca.PPCA(5, head(features).event_shape[0]), guide, torch.randn(16, 5)

    head, features = example()
    estimator = pathwise if head(features).has_rsample else score_function()
    out, steps = both(pair, importance(iwae, 3, estimator), monkeypatch)
    agree(out)
    assert steps.reason is None


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
    "adversarial": wasserstein(
        adversarial(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)))
    ),
    "moments": aggregate_moments(beta=linear(0.1, 1.0), spread=0.2),
    "fisher": fisher(linear(0.0, 0.1)),
    "wake_sleep": wake_sleep(3, sleep=0.5),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_agrees(name, monkeypatch):
    out, steps = both(ppca.example, LOSSES[name], monkeypatch)
    agree(out)
    assert steps.reason is None
