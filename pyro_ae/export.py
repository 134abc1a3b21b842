"""The encoder alone, as a program of torch that runs where neither Pyro nor this library is installed."""

from __future__ import annotations

from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .data import Call, LoadedRows, missing_values
from .draws import encode
from .program import Program, validation
from .sites import is_latent, quote

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from .posterior import Posterior


def export_encoder(posterior: Posterior, file: str | Path | None = None, *, data: Any = None) -> ExportedProgram:
    """What ``posterior.encode`` computes, by ``torch.export``: rows to the mean of their codes, any number of them.

    The program takes what the guide takes, in tensors on the device of the fit. ``torch.export.load(file).module()``
    runs it without this library, and ONNX, AOTInductor and ExecuTorch read it. It fills in missing values (NaN) where
    the rows that it is made from have some.

    Arguments:
        posterior: of a guide that reads one latent site off each row, by a distribution whose mean is known.
        file: to save the program to, such as ``"encoder.pt2"``.
        data: rows to make it from; those of the fit by default.

    Returns:
        A program from rows ``[N, ...]`` to codes ``[N, *event]``.

    Raises:
        ValueError: for a posterior without such a guide, and for a guide that is no graph; it says why.

    Example:
        >>> from pyro_ae import fit, svi
        >>> from pyro_ae.models import ppca
        >>> model, guide, x = ppca.example()
        >>> posterior = fit(model, x, guide=guide, method=svi(steps=10), progress=False)
        >>> encoder = export_encoder(posterior).module()
        >>> torch.allclose(encoder(x[:3]), posterior.encode(x[:3]))
        True
    """
    site = _site_of(posterior)
    rows = posterior._rows(data)
    missing = not isinstance(rows, LoadedRows) and rows.has_missing
    few = rows.first() if isinstance(rows, LoadedRows) else rows.take(slice(0, 8)).call()
    # twice, as torch takes the number of rows for fixed where it is 1
    batch = tree_map(lambda v: torch.cat([v, v]) if _is_rows(v) else v, few)
    size: Any = torch.export.Dim("rows", min=1)
    sizes: Any = torch.export.ShapesCollection()
    for value in filter(_is_rows, tree_leaves(batch)):
        sizes[value] = {0: size}
    encoder = _encoder(posterior.program, site, batch)
    try:
        with torch.no_grad(), posterior.program.active(), validation(False), missing_values(missing):
            exported = torch.export.export(encoder, batch.args, batch.kwargs, dynamic_shapes=sizes)
        found = exported.module()(*few.args, **few.kwargs).cpu()
    except Exception as error:  # torch has many kinds
        raise ValueError(f"the guide cannot be exported: {_why(error)}") from error
    if not torch.allclose(found, encode(posterior.program, few, 1)[site], rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ValueError("the guide cannot be exported: its codes are not the same at each call")
    if file is not None:
        torch.export.save(exported, file)
    return exported


def _site_of(posterior: Posterior) -> str:
    """The one site of the codes, whose mean the guide knows."""
    program, local = posterior.program, posterior.local
    if posterior.draws is not None or program.guide is None:
        raise ValueError("chains have no encoder to export: fit with svi and a guide that is a function of the rows")
    sites = [n for n, s in program.layout.guide.items() if s.kind in ("latent", "auxiliary")]
    if len(sites) != 1 or sites != local:
        raise ValueError(
            f"the guide samples {quote(sites) or 'nothing'}, and codes are the mean of one latent of each row: where "
            "there are more, encode averages over draws, which is no function to export"
        )
    return sites[0]


def _is_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _why(error: Exception) -> str:
    text = str(error).strip()
    if "specialized" in text or "Constraints violated" in text:
        return "it fixes the number of rows, as len(x) does; take x.shape[0], or batch_plate(x), for its plate"
    return text.splitlines()[0] if isinstance(error, ValueError) and text else f"torch.export says {text[:300]!r}"


def _encoder(program: Program, site: str, batch: Call) -> nn.Module:
    """A guide as a module, from rows to means, that holds its networks for torch to find."""
    guide, params = program.guide, program.parameters.constrained()
    assert guide is not None

    def means(*args: Any, **kwargs: Any) -> Tensor:
        with _Means(params) as found:
            guide.fn(*args, **kwargs)
        return found.means[site]

    # named one by one, as torch cannot make rows of ``**kwargs`` dynamic
    known = [Parameter(f"x{i}", Parameter.POSITIONAL_ONLY) for i in range(len(batch.args))]
    named = [Parameter(name, Parameter.KEYWORD_ONLY) for name in batch.kwargs]
    means.__signature__ = Signature([*known, *named])  # type: ignore[attr-defined]
    module = nn.Module()
    module.networks = nn.ModuleList(m for name, m in program.parameters._all_modules.items() if name != "model.")
    module.forward = means
    return module


class _Means(Messenger):
    """Latents at their means, in place of draws; and parameters as the networks hold them, or as constants."""

    def __init__(self, params: dict[str, Tensor]) -> None:
        super().__init__()
        self.params = params
        self.means: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if is_latent(msg):
            try:
                msg["value"] = self.means[msg["name"]] = msg["fn"].mean
            except NotImplementedError:
                raise ValueError(
                    f"the distribution of '{msg['name']}' has no mean in closed form, so that encode averages "
                    "over draws, which is no function to export"
                ) from None
            msg["done"] = True

    def _pyro_param(self, msg: Any) -> None:
        name = msg["name"]
        if "$$$" in name or name in self.params:  # of a network, by pyro.module, or by pyro.param
            msg["value"], msg["done"] = msg["args"][1] if "$$$" in name else self.params[name], True
