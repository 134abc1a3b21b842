"""The exported encoder: the codes of posterior.encode, for any number of rows, without this library."""

import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_ae import Posterior, fit, map_, svi
from pyro_ae.export import export_encoder
from pyro_ae.guides import full_rank, low_rank, mixture, point
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.models import deep_vae, ppca, vae
from pyro_ae.nn import MLP

LOADED = """
import sys, torch
encoder = torch.export.load(sys.argv[1]).module()
rows = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save([encoder(rows[:n]) for n in (1, 2, 16, 40)], sys.argv[3])
assert not {"pyro", "pyro_ae"} & set(sys.modules), "it needs what it was to do without"
"""


def quick(guide: object, data: object = None, model: object = None) -> Posterior:
    shown, _, x = vae.example()
    data = x if data is None else data
    return fit(model or shown, data, guide=guide, method=svi(steps=20), seed=0, progress=False, check=False)


def test_the_file_gives_the_codes_in_a_process_of_its_own(tmp_path: Path) -> None:
    model, guide, x = vae.example()
    posterior = quick(guide, model=model)
    rows = torch.bernoulli(torch.full((40, 12), 0.5))
    export_encoder(posterior, tmp_path / "encoder.pt2")
    torch.save(rows, tmp_path / "rows.pt")
    files = [str(tmp_path / name) for name in ("encoder.pt2", "rows.pt", "codes.pt")]
    subprocess.run([sys.executable, "-c", LOADED, *files], cwd=tmp_path, check=True)
    for found in torch.load(tmp_path / "codes.pt", weights_only=True):
        torch.testing.assert_close(found, posterior.encode(rows[: len(found)]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", [full_rank, low_rank, point], ids=lambda module: module.__name__)
def test_any_head_with_a_mean(family: object) -> None:
    head, features = family.example()
    posterior = quick(Amortized(MLP(12, [features.shape[1]]), head))
    x = torch.rand(3, 12)
    torch.testing.assert_close(export_encoder(posterior).module()(x), posterior.encode(x), atol=1e-5, rtol=0)


def test_a_plain_pyro_guide_and_normalisation() -> None:
    network = nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def guide(x: Tensor) -> None:
        pyro.module("encoder", network)
        factor = pyro.param("factor", torch.tensor([2.0, 3.0]), constraint=dist.constraints.positive)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(factor * network(x)[:, :2], 1.0).to_event(1))

    posterior = quick(guide)
    x = torch.rand(3, 12)
    torch.testing.assert_close(export_encoder(posterior).module()(x), posterior.encode(x), atol=1e-5, rtol=0)


def test_missing_values_are_filled_in() -> None:
    _, _, x = vae.example()
    x = torch.where(torch.rand(x.shape) < 0.3, torch.nan, x)
    posterior = quick(Amortized(MLP(12, [8], missing=True), MeanField(8, 2)), x)
    codes = posterior.encode(x[:5])
    assert codes.isfinite().all()
    torch.testing.assert_close(export_encoder(posterior).module()(x[:5]), codes, atol=1e-5, rtol=0)


def test_arguments_are_those_of_the_model() -> None:
    class Labelled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, label: Tensor, shift: float = 0.0) -> None:
            self.inner(x + shift * label.unsqueeze(-1))

    model, guide, x = ppca.example()
    data = {"x": x, "label": torch.ones(16), "shift": 0.5}
    posterior = quick(Labelled(guide), data, Labelled(model))
    encoder, few = export_encoder(posterior).module(), {"x": x[:3], "label": torch.zeros(3), "shift": 0.5}
    torch.testing.assert_close(encoder(**few), posterior.encode(few), atol=1e-5, rtol=0)


class Fixed(nn.Linear):
    """Of so many rows as it first sees."""

    def forward(self, x: Tensor) -> None:  # type: ignore[override]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(super().forward(x), 1.0).to_event(1))


class Noisy(nn.Linear):
    """Of another code at each call."""

    def forward(self, x: Tensor) -> None:  # type: ignore[override]
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(super().forward(x + torch.randn_like(x)), 1.0).to_event(1))


def test_what_cannot_be_exported_says_why() -> None:
    head, features = mixture.example()
    with pytest.raises(ValueError, match="'z' has no mean in closed form"):
        export_encoder(quick(Amortized(MLP(12, [features.shape[1]]), head)))
    with pytest.raises(ValueError, match=r"fixes the number of rows.*x\.shape\[0\]"):
        export_encoder(quick(Fixed(12, 2)))
    with pytest.raises(ValueError, match="not the same at each call"):
        export_encoder(quick(Noisy(12, 2)))
    deep, guide, x = deep_vae.example()
    with pytest.raises(ValueError, match="the guide samples 'z1', 'z2'"):
        export_encoder(quick(guide, x, deep))


def test_a_posterior_of_draws_has_no_encoder() -> None:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    posterior = fit(model, torch.zeros(4), method=map_(steps=5), progress=False, check=False)
    with pytest.raises(ValueError, match="no encoder to export"):
        export_encoder(posterior)
