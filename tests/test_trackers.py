"""Callbacks that log a fit: what they hand to each package, which may be there or not."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pyro_ae import Posterior, fit, svi
from pyro_ae.engines.run import Event
from pyro_ae.models import ppca
from pyro_ae.trackers import mlflow, tensorboard, wandb


def tracked(callback: Any) -> Posterior:
    model, guide, x = ppca.example()
    method = svi(epochs=3)
    options = {"batch_size": 8, "validation": x, "seed": 0, "progress": False, "check": False}
    return fit(model, x, guide=guide, method=method, callbacks=[callback], **options)


def rows_of(posterior: Posterior) -> list[tuple[dict[str, float], int]]:
    """What is to be logged: each entry of the history, and its step."""
    columns = posterior.history
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    assert len(rows) == 3 and {"loss", "validation"} < set(columns)
    return [(row, int(row["step"])) for row in rows]


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    """A stand-in for a package, with a list of the calls that were made."""
    fake = ModuleType(request.param)
    fake.calls = []
    log = lambda metrics, step, **options: fake.calls.append((metrics, step, options))
    fake.log_metrics = log
    fake.init = lambda **options: SimpleNamespace(log=log, options=fake.calls.append(("init", options)))
    monkeypatch.setitem(sys.modules, request.param, fake)
    return fake


@pytest.mark.parametrize("package", ["wandb"], indirect=True)
def test_wandb_begins_a_run_and_logs_each_evaluation(package: ModuleType) -> None:
    posterior = tracked(wandb(project="p", mode="offline"))
    begun, *logged = package.calls
    assert begun == ("init", {"project": "p", "mode": "offline"})
    assert logged == [(row, step, {}) for row, step in rows_of(posterior)]


def test_wandb_takes_a_run_and_needs_no_package_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    seen = []
    run = SimpleNamespace(log=lambda metrics, step: seen.append((metrics, step)))
    assert seen == [] and rows_of(tracked(wandb(run))) == seen
    with pytest.raises(ValueError, match=r"give project to wandb\.init"):
        wandb(run, project="p")


@pytest.mark.parametrize("package", ["mlflow"], indirect=True)
def test_mlflow_logs_each_evaluation_under_names_that_it_takes(package: ModuleType) -> None:
    posterior = tracked(mlflow("an id", synchronous=False))
    plain = [{n.replace("(", " ").rstrip(")"): v for n, v in row.items()} for row, _ in rows_of(posterior)]
    assert "log p x" in plain[0]
    assert [row for row, _, _ in package.calls] == plain
    assert [step for _, step, _ in package.calls] == posterior.history["step"]
    assert all(options == {"run_id": "an id", "synchronous": False} for _, _, options in package.calls)
    callback = mlflow()
    assert callback(Event(4, 1, {"net$$$w[0]": 1.0, "a.b/c d": 2.0}, {})) is None
    assert package.calls[-1] == ({"net w 0": 1.0, "a.b/c d": 2.0}, 4, {"run_id": None})


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = tensorboard(tmp_path / "run")
    posterior = tracked(callback)
    events = EventAccumulator(str(tmp_path / "run")).Reload()  # while the writer is open
    assert set(events.Tags()["scalars"]) == set(posterior.history)
    for name, values in posterior.history.items():
        found = events.Scalars(name)
        assert [e.value for e in found] == pytest.approx(values, rel=1e-6)
        assert [e.step for e in found] == posterior.history["step"]


@pytest.mark.parametrize(
    "make, command",
    [
        (lambda: tensorboard("runs"), "pip install tensorboard"),
        (lambda: wandb(project="p"), "pip install wandb"),
        (lambda: mlflow(), "pip install mlflow-skinny"),
    ],
)
def test_a_missing_package_is_named_before_the_fit(make: Any, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=command):
        make()


def test_a_package_that_is_broken_says_so_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text("import a_module_that_is_not_there")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        wandb(project="p")
