"""Rows that lie in files, batches fetched ahead of their use, and losses fetched together."""

import threading
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ae import batch_plate, fit, sghmc, svi
from pyro_ae.data import as_rows
from pyro_ae.engines.run import NonFiniteError
from pyro_ae.prefetch import ahead


@pytest.fixture
def mapped(tmp_path):
    """Rows in a file, and the same in memory."""
    x = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    return np.load(tmp_path / "x.npy", mmap_mode="r"), x


def regression(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with batch_plate(x):
        pyro.sample("y", dist.Normal(x[..., :2] @ w, 1.0), obs=x[..., 2])


def test_rows_in_a_file_stay_there(mapped):
    on_disk, in_memory = mapped
    rows = as_rows({"x": on_disk, "part": on_disk[10:20], "y": np.arange(500)})
    assert rows.rows["x"].data_ptr() == on_disk.ctypes.data
    assert rows.rows["part"].data_ptr() == on_disk[10:20].ctypes.data
    torch.testing.assert_close(rows.rows["x"], torch.from_numpy(in_memory))


def test_other_numbers_in_a_file_are_read_as_those_in_memory_are(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6.0))
    assert as_rows(np.load(tmp_path / "x.npy", mmap_mode="r")).rows["0"].dtype == torch.float32


@pytest.mark.parametrize(
    "method", [svi(epochs=3), sghmc(lr=1e-3, chains=2, warmup=20, draws=10, thinning=2, own_batches=True)], ids=repr
)
def test_streamed_fits_are_those_of_rows_in_memory(mapped, method, monkeypatch):
    histories, threads = [], []
    for data, least in zip(mapped, (0, 2**30), strict=True):
        monkeypatch.setattr("pyro_ae.data.STREAMED", least)
        monkeypatch.setattr("pyro_ae.data.ahead", lambda *args: threads.append(1) or ahead(*args))
        options = {"batch_size": 64, "seed": 0, "progress": False, "check": False}
        histories.append(fit(regression, data, method=method, **options).history)
    assert histories[0] == histories[1]
    assert bool(threads) == isinstance(method, svi)  # batches of chains' own are taken together


def test_missing_values_are_looked_for_part_by_part(monkeypatch):
    looked = []
    isnan = torch.isnan
    monkeypatch.setattr(torch, "isnan", lambda t: looked.append(len(t)) or isnan(t))
    x = torch.zeros(50, 2**20)
    assert not as_rows(x).has_missing and looked == [16, 16, 16, 2]
    x[20, 7] = torch.nan
    looked.clear()
    assert as_rows(x).has_missing and looked == [16, 16]


def test_work_is_done_ahead_and_no_further_than_asked():
    made = []
    results = ahead(lambda i: made.append(i) or i, range(10), depth=2)
    assert next(results) == 0
    deadline = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made == [0, 1, 2]
    assert list(results) == list(range(1, 10))


def test_an_error_is_that_of_its_item_and_a_thread_does_not_outlive_its_use():
    before = threading.active_count()
    results = ahead(lambda i: 1 / i, [2, 1, 0, 3])
    assert [next(results), next(results)] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError):
        next(results)
    stopped = ahead(lambda i: i, range(100))
    next(stopped)
    stopped.close()
    assert threading.active_count() == before


# ------------------------------------------------------------------------------------------ losses fetched together


class Line(nn.Module):
    """A model with one parameter, whose density is not finite from a batch on."""

    def __init__(self, last=None):
        super().__init__()
        self.w, self.last, self.seen = nn.Parameter(torch.tensor(0.0)), last, 0

    def forward(self, x):
        loc = self.w
        if torch.is_grad_enabled():
            self.seen += 1
            if self.last is not None and self.seen > self.last:
                loc = loc * torch.nan
        with batch_plate(x):
            pyro.sample("x", dist.Normal(loc, 1.0, validate_args=False).to_event(0), obs=x)


def nothing(x):
    pass


def line(at_once, monkeypatch, last=None, **options):
    monkeypatch.setattr("pyro_ae.engines.svi.fetched_at_once", lambda device: at_once)
    model = Line(last)
    method = svi(epochs=4, lr=0.1, **options)
    common = {"batch_size": 8, "seed": 0, "progress": False, "check": False, "compile": False}
    return model, lambda: fit(model, torch.linspace(1.0, 2.0, 60), guide=nothing, method=method, **common)


@pytest.mark.parametrize("options", [{}, {"clip": 0.5}], ids=repr)
def test_losses_fetched_together_are_the_same(options, monkeypatch):
    found = []
    for at_once in (1, 3, 100):
        model, run = line(at_once, monkeypatch, **options)
        found.append((run().history, model.w.item()))
    assert found[0] == found[1] == found[2]


def test_a_step_that_fails_is_left_out_before_anyone_looks(monkeypatch):
    kept = []
    for at_once in (1, 5):
        model, run = line(at_once, monkeypatch, last=10)
        with pytest.raises(NonFiniteError, match=r"the loss is nan at step (\d+) ") as raised:
            run()
        kept.append((model.w.item(), str(raised.value).split(" (epoch")[0]))
    assert kept[0] == kept[1]


def test_an_optimizer_that_cannot_leave_out_a_step_has_each_loss_fetched(monkeypatch):
    model, run = line(5, monkeypatch, last=12, optimizer=torch.optim.SGD)
    with pytest.raises(NonFiniteError):
        run()
    assert model.w.isfinite()
