"""Fits that are replayed beside the same fits as they are, for the tests of both."""

import copy
import warnings

import torch

from pyro_ae import fit, svi
from pyro_ae.engines.compiled import Steps


def both(example, loss, monkeypatch, steps=9, batch_size=6, precision="float32", **kwargs):
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
            options["precision"] = precision
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
