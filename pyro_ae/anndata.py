"""Cells by genes to rows for ``fit``, and codes back to where scanpy looks for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .coding import codes

if TYPE_CHECKING:
    from anndata import AnnData

    from .posterior import Posterior


def from_anndata(
    adata: AnnData, layer: str | None = None, batch_key: str | None = None, *, max_bytes: int = 2**32
) -> dict[str, Tensor]:
    """The cells of an ``AnnData`` as rows of ``model(x)``, or of ``model(x, batch)``.

    Arguments:
        adata: cells by genes, dense or sparse, in memory or backed by a file.
        layer: of ``adata.layers``, such as ``"counts"``; ``adata.X`` by default.
        batch_key: a column of ``adata.obs``, such as the donor.
        max_bytes: that the dense values may take.

    Returns:
        ``x``, ``[cells, genes]`` in single precision; and with a key ``batch``, ``[cells]``, the number of each cell's
        batch among the sorted ones.

    Raises:
        ValueError: for a layer or key that is not there, cells without a batch, and values that take too much memory.

    Example:
        >>> adata = pbmc  # doctest: +SKIP
        >>> posterior = fit(model, from_anndata(adata, layer="counts"), guide=guide, batch_size=128)  # doctest: +SKIP
        >>> to_anndata(posterior, adata)  # doctest: +SKIP
        >>> scanpy.pp.neighbors(adata, use_rep="X_ae")  # doctest: +SKIP
    """
    values = adata.X if layer is None else _entry(adata.layers, layer, "layers")
    size = 4 * adata.n_obs * adata.n_vars
    if size > max_bytes:
        raise ValueError(
            f"{adata.n_obs} cells of {adata.n_vars} genes take {size / 2**30:.3g} GiB dense, more than "
            f"max_bytes={max_bytes}: keep fewer genes, such as the highly variable ones, or allow for more"
        )
    if values is None:
        raise ValueError("adata.X is empty: name one of " + _known(adata.layers, "layers"))
    values = values.to_memory() if hasattr(values, "to_memory") else values  # sparse ones in a file
    dense = values.toarray() if hasattr(values, "toarray") else values
    rows = {"x": torch.from_numpy(np.array(dense, dtype=np.float32))}
    if batch_key is not None:
        column = _entry(adata.obs, batch_key, "obs")
        if column.isna().any():
            raise ValueError(f"{int(column.isna().sum())} cells have no {batch_key!r}: leave them out, or name one")
        rows["batch"] = torch.from_numpy(np.unique(column.to_numpy(), return_inverse=True)[1])
    return rows


def to_anndata(
    posterior: Posterior, adata: AnnData, key: str = "X_ae", *, data: Any = None, particles: int = 100
) -> None:
    """Write each cell's codes to ``adata.obsm[key]``, and a lower bound on its log p(x) to ``adata.obs``.

    The bound, in nats, is the column ``log_evidence`` with the key before it, such as ``"X_ae_log_evidence"``.

    Arguments:
        posterior: of a guide that is a function of the rows.
        adata: the cells of the data, in their order; it is written to.
        key: of the codes ``[cells, latent]``; those of several latents stand side by side.
        data: rows, such as ``from_anndata(adata)`` of other cells; those of the fit by default.
        particles: for the bound, which tightens with more of them.

    Raises:
        ValueError: where cells and rows differ in number, and as ``posterior.encode`` and ``log_evidence`` do.
    """
    rows = posterior._rows(data)
    if rows.size != adata.n_obs:
        raise ValueError(
            f"adata has {adata.n_obs} cells and the rows are {rows.size}: pass data=from_anndata(adata, ...) of its own"
        )
    with torch.no_grad():
        found = torch.cat([z.flatten(1) for z in codes(posterior, data, 100, None).values()], 1)
    evidence = posterior.log_evidence(data, particles)
    adata.obsm[key] = found.numpy()
    adata.obs[f"{key}_log_evidence"] = evidence.numpy()


def _entry(entries: Any, name: str, of: str) -> Any:
    if name not in entries:
        raise ValueError(f"adata.{of} has no {name!r}; there is {_known(entries, of)}")
    return entries[name]


def _known(entries: Any, of: str) -> str:
    return ", ".join(map(repr, entries.keys())) or "none"
