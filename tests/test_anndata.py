"""Cells by genes: to rows and back, for the real AnnData."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from torch import Tensor, nn

from pyro_ae import fit, svi
from pyro_ae.anndata import from_anndata, to_anndata
from pyro_ae.models import deep_vae, ppca

anndata = pytest.importorskip("anndata")
AnnData = anndata.AnnData


@pytest.fixture
def adata() -> AnnData:
    counts = np.random.default_rng(0).poisson(1.0, (16, 5))
    donors = ["b", "a", "c", "a"] * 4
    obs = pd.DataFrame({"donor": pd.Categorical(donors, ["c", "b", "a"])}, index=[f"cell {i}" for i in range(16)])
    return AnnData(np.log1p(counts).astype(np.float32), obs, layers={"counts": sparse.csr_matrix(counts)})


def test_rows_are_the_values_of_a_layer(adata: AnnData) -> None:
    rows = from_anndata(adata)
    assert list(rows) == ["x"] and rows["x"].dtype == torch.float32
    np.testing.assert_array_equal(rows["x"].numpy(), adata.X)
    rows["x"] += 1.0
    assert adata.X.min() == 0.0  # a copy
    counts = from_anndata(adata, "counts", "donor")
    np.testing.assert_array_equal(counts["x"].numpy(), adata.layers["counts"].toarray())
    assert counts["batch"].tolist() == [1, 0, 2, 0] * 4 and counts["batch"].dtype == torch.int64
    view = from_anndata(adata[3:5, 1:], "counts")["x"]
    np.testing.assert_array_equal(view.numpy(), adata.layers["counts"].toarray()[3:5, 1:])


@pytest.mark.parametrize("layer", [None, "counts"])
def test_values_in_a_file(adata: AnnData, layer: str | None, tmp_path: Path) -> None:
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    torch.testing.assert_close(from_anndata(backed, layer), from_anndata(adata, layer), rtol=0, atol=0)
    backed.file.close()


def test_codes_and_evidence_go_back(adata: AnnData) -> None:
    model, guide, _ = ppca.example()
    posterior = fit(model, from_anndata(adata), guide=guide, method=svi(steps=5), progress=False, check=False)
    torch.manual_seed(0)
    to_anndata(posterior, adata, particles=7)
    np.testing.assert_array_equal(adata.obsm["X_ae"], posterior.encode().numpy())
    torch.manual_seed(0)
    posterior.encode()
    np.testing.assert_array_equal(adata.obs["X_ae_log_evidence"].to_numpy(), posterior.log_evidence(None, 7).numpy())

    few = adata[4:7].copy()
    to_anndata(posterior, few, "X_few", data=from_anndata(few))
    np.testing.assert_allclose(few.obsm["X_few"], adata.obsm["X_ae"][4:7], atol=1e-6)
    with pytest.raises(ValueError, match="3 cells and the rows are 16: pass data=from_anndata"):
        to_anndata(posterior, few)


def test_a_model_that_takes_the_batch(adata: AnnData) -> None:
    class Shifted(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.shift = nn.Embedding(3, 5)

        def forward(self, x: Tensor, batch: Tensor) -> None:
            self.inner(x - self.shift(batch).detach())

    model, guide = map(Shifted, ppca.example()[:2])
    rows = from_anndata(adata, batch_key="donor")
    posterior = fit(model, rows, guide=guide, batch_size=8, method=svi(steps=5), progress=False, check=False)
    to_anndata(posterior, adata)
    assert adata.obsm["X_ae"].shape == (16, 2) and np.isfinite(adata.obs["X_ae_log_evidence"]).all()


def test_several_latents_stand_side_by_side() -> None:
    model, guide, x = deep_vae.example()
    posterior = fit(model, x, guide=guide, method=svi(steps=5), progress=False, check=False)
    adata = AnnData(x.numpy())
    to_anndata(posterior, adata)
    assert adata.obsm["X_ae"].shape == (16, sum(z.shape[1] for z in posterior.encode().values()))


def test_mistakes_are_named(adata: AnnData) -> None:
    with pytest.raises(ValueError, match=r"adata\.layers has no 'raw'; there is 'counts'"):
        from_anndata(adata, "raw")
    with pytest.raises(ValueError, match=r"adata\.obs has no 'batch'; there is 'donor'"):
        from_anndata(adata, batch_key="batch")
    with pytest.raises(ValueError, match="16 cells of 5 genes take .* more than max_bytes=300"):
        from_anndata(adata, max_bytes=300)
    adata.obs.loc["cell 3", "donor"] = None
    with pytest.raises(ValueError, match="1 cells have no 'donor'"):
        from_anndata(adata, batch_key="donor")
    adata.X = None
    with pytest.raises(ValueError, match=r"adata\.X is empty: name one of 'counts'"):
        from_anndata(adata)
