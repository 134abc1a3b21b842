"""A posterior as ArviZ wants it: groups of labelled arrays with the dims chain, draw and those of the plates."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro.distributions import Independent, MaskedDistribution
from torch import Tensor, nn

from ..data import Rows
from ..program import validation
from ..sites import Site
from ..types import Draws
from .groups import View, at_draws, from_prior, look, sizes

if TYPE_CHECKING:
    from ..posterior import Posterior

GROUPS = (
    "posterior",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "log_likelihood",
    "sample_stats",
    "observed_data",
    "constant_data",
)

LIMIT = 2 * 2**30
"""Bytes of all groups together above which the conversion is refused."""


def to_arviz(
    posterior: Posterior, draws: int | None = None, *, data: Any = None, groups: Iterable[str] | None = None
) -> Any:
    """The posterior as ArviZ's ``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x).

    Each site has the dims chain and draw, those of the plates that it stands in, then ``<site>_dim_<i>`` of its event.
    A guide's draws are one chain; its ``sample_stats`` hold ``lp``, the log joint density of data and latents,
    ``log_q``, that of the guide, and ``log_weight``, their difference: for each row where rows share no latent, so
    that each can be weighed by itself. ``log_likelihood`` is pointwise, without the scale of minibatches, and 0 for
    what is missing. A group that the model cannot give is left out, and ``attrs["left_out"]`` says why.

    Arguments:
        posterior: of any engine.
        draws: length of the dim draw. From a guide, 1000 by default; of each chain, all that it holds, or fewer that
            are spread evenly. The prior has 1000 by default.
        data: rows; those of the fit by default.
        groups: names of the groups to make; all by default.

    Raises:
        ValueError: for an unknown group; for one that was asked for and cannot be had; for groups that would take
            more than 2 GiB; for data that only a ``DataLoader`` brings.

    Example:
        >>> from pyro_ae import fit, svi
        >>> from pyro_ae.models import ppca
        >>> model, guide, x = ppca.example()
        >>> posterior = fit(model, x, guide=guide, method=svi(steps=10), progress=False)
        >>> dict(to_arviz(posterior, 50)["posterior"]["z"].sizes)
        {'chain': 1, 'draw': 50, 'data': 16, 'z_dim_0': 2}
    """
    asked = _check_groups(groups)
    if draws is not None and draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    program = posterior.program
    rows = posterior._rows(data)
    batch = rows.call()
    assert isinstance(rows, Rows)  # a DataLoader has no call
    held, stats = _held(posterior, draws, data)
    with torch.no_grad(), program.active(), validation(False):
        view = look(program, batch, held)
        constants = _constants(posterior, view, rows)
        left_out = view.left_out(chains=held is not None, stats=stats, constants=constants)
        chosen = _choose(asked, left_out)
        chains, length = (1, draws or 1000) if held is None else next(iter(held.values())).shape[:2]
        prior = draws or 1000
        _check_size(sizes(view, chains * length, prior), chosen, length)
        flat = None if held is None else {n: v.flatten(0, 1) for n, v in held.items()}
        made = at_draws(program, batch, view, chosen, flat, chains * length)
        from_priors = from_prior(program, batch, view, chosen, prior)
    if isinstance(from_priors, str):
        left_out |= dict.fromkeys(["prior", "prior_predictive"], from_priors)
        chosen, from_priors = _choose(asked, left_out), {}
    naming = _Naming(view, _row_plate(posterior, view, rows), rows.labels)
    variables = {}
    for found, shape in ((made, (chains, length)), (from_priors, (1, prior))):
        for group, values in found.items():
            variables[group] = naming.draws(group, {n: v.unflatten(0, shape) for n, v in values.items()})
    if held is not None:
        variables["sample_stats"] = naming.draws("sample_stats", stats)
    if "observed_data" in chosen:
        variables["observed_data"] = naming.observed(observed_values(view, rows))
    variables["constant_data"] = naming.rows(constants)
    attrs = _attrs(posterior)
    datasets = {group: naming.dataset(variables[group], attrs) for group in chosen}
    return container(datasets, attrs | {"left_out": "; ".join(f"{g}: {why}" for g, why in left_out.items())})


def container(datasets: Mapping[str, Any], attrs: Mapping[str, str]) -> Any:
    """Datasets as ``InferenceData`` where ArviZ has that, else as ``DataTree``."""
    import arviz
    import xarray

    if "InferenceData" in vars(arviz):  # hasattr would ask 1.x, which warns and then names DataTree
        return arviz.InferenceData(attrs=dict(attrs), **datasets)
    return xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=dict(attrs)), **datasets})


def _attrs(posterior: Posterior) -> dict[str, str]:
    from .. import __version__

    return {
        "inference_library": "pyro_ae",
        "inference_library_version": __version__,
        "inference_method": posterior.method,
        "created_at": datetime.now(UTC).isoformat(),
    }


def _check_groups(groups: Iterable[str] | None) -> list[str] | None:
    if groups is None:
        return None
    asked = [groups] if isinstance(groups, str) else list(groups)
    unknown = [g for g in asked if g not in GROUPS]
    if unknown:
        raise ValueError(f"unknown group {unknown[0]!r}; known are {', '.join(GROUPS)}")
    return [g for g in GROUPS if g in asked]


def _choose(asked: list[str] | None, left_out: Mapping[str, str]) -> list[str]:
    for group in ["posterior"] if asked is None else asked:
        if group in left_out:
            raise ValueError(f"there is no group {group!r} to be had: {left_out[group]}")
    return [g for g in GROUPS if g not in left_out] if asked is None else asked


def _held(posterior: Posterior, draws: int | None, data: Any) -> tuple[dict[str, Tensor] | None, dict[str, Tensor]]:
    """The draws of chains, ``[chains, draws, *shape]``, with what the sampler recorded of them."""
    if posterior.draws is None:
        return None, {}
    posterior.sample(1, data)  # refuses new rows where the chains drew latents of the old ones
    length = next(iter(posterior.draws.values())).shape[1]
    if draws is None or draws == length:
        return posterior.draws, posterior.stats
    if draws > length:
        raise ValueError(f"each chain holds {length} draws, fewer than {draws}: fit with nuts(draws=...) of more")
    index = torch.linspace(0, length - 1, draws).round().long()
    return {n: v[:, index] for n, v in posterior.draws.items()}, {n: v[:, index] for n, v in posterior.stats.items()}


def _check_size(sizes: Mapping[str, int], chosen: list[str], length: int) -> None:
    sizes = {group: size for group, size in sizes.items() if group in chosen}
    total = sum(sizes.values())
    if total > LIMIT:
        raise ValueError(
            f"the groups would take {total / 2**30:.3g} GiB, more than {LIMIT / 2**30:.3g} GiB, most of it "
            f"{max(sizes, key=lambda g: sizes[g])!r}: take fewer draws (draws={max(1, int(length * LIMIT / total))}), "
            "fewer rows (data=x[:100]) or fewer groups (groups=['posterior'])"
        )


# -- the data ------------------------------------------------------------------------------------------------


def _row_plate(posterior: Posterior, view: View, rows: Rows) -> str | None:
    """The plate that the rows of the data stand in: that of the fit, or the only one of their number."""
    plates = view.layout.plates
    if posterior.program.plate in plates:
        return posterior.program.plate
    fitting = [name for name, size in plates.items() if size == rows.size]
    return fitting[0] if len(fitting) == 1 else None


def sources_of(view: View, rows: Rows) -> dict[str, str]:
    """Observed site to the entry of the data that it observes, where there is one."""
    found: dict[str, str] = {}
    for name in view.observed:
        value = torch.as_tensor(view.run.sites[name]["value"])
        same = [n for n, v in rows.rows.items() if n not in found.values() and _equal(v, value)]
        same.sort(key=lambda n: rows.rows[n].data_ptr() != value.data_ptr())
        if same:
            found[name] = same[0]
    return found


def _equal(entry: Tensor, value: Tensor) -> bool:
    """Whether the values are those of the entry, but for what is missing there."""
    if entry.numel() != value.numel():
        return False
    entry, value = entry.flatten(), value.flatten()
    return bool(((entry == value) | (entry != entry)).all())


def observed_values(view: View, rows: Rows) -> dict[str, Tensor]:
    """What the observed sites observe, NaN where it is missing."""
    sources, out = sources_of(view, rows), {}
    for name in view.observed:
        site = view.run.sites[name]
        value = torch.as_tensor(site["value"])
        if name in sources:
            value = rows.rows[sources[name]].reshape(value.shape)
        elif rows.has_missing and value.is_floating_point():
            value = value.masked_fill(~_present(site["fn"], value), torch.nan)
        out[name] = value.expand(view.layout.model[name].shape)
    return out


def _present(distribution: Any, value: Tensor) -> Tensor:
    """Which elements a masked distribution has a density for."""
    while isinstance(distribution, Independent | torch.distributions.Independent):
        distribution = distribution.base_dist
    if not isinstance(distribution, MaskedDistribution):
        return torch.ones_like(value, dtype=torch.bool)
    mask = torch.as_tensor(distribution._mask).expand(distribution.batch_shape)
    return mask.reshape(mask.shape + (1,) * len(distribution.event_shape)).expand(value.shape)


def _constants(posterior: Posterior, view: View, rows: Rows) -> dict[str, Any]:
    """The entries of the data that are not observed, and the settings that are numbers, by the model's names."""
    names = dict(zip(rows.entries, rows.entries, strict=True))
    if rows.form in ("one", "tuple"):
        names |= dict(zip(rows.entries, _arguments(posterior.model, len(rows.entries)), strict=True))
    observed = set(sources_of(view, rows).values())
    numbers = (bool, int, float, np.number, np.bool_, Tensor)
    return {names[n]: v for n, v in rows.entries.items() if n not in observed and isinstance(v, numbers)}


def _arguments(model: Any, count: int) -> list[str]:
    """Names of a model's first arguments, as its signature has them."""
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):
        names = []
    else:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [p.name for p in signature.parameters.values() if p.kind in kinds]
    return [*names, *(f"argument_{i}" for i in range(len(names), count))][:count]


# -- names and labels ----------------------------------------------------------------------------------------

Variables = dict[str, tuple[list[str], np.ndarray]]
"""Name to dims and values."""


class _Naming:
    """What the dims and coordinates of variables are called."""

    def __init__(self, view: View, row_plate: str | None, labels: tuple | None) -> None:
        self.view = view
        self.row_plate = row_plate
        self.rows_there = view.layout.plates.get(row_plate, -1) if row_plate is not None else -1
        self.labels = _labels(labels) if labels is not None and len(labels) == self.rows_there else None

    def draws(self, group: str, values: Draws) -> Variables:
        """Variables of ``[chain, draw, *shape]``."""
        sites = {n: self._site(group, n, v.shape[2:]) for n, v in values.items()}
        return {n: self._variable(n, _numpy(v), sites[n], ["chain", "draw"]) for n, v in values.items()}

    def observed(self, values: Draws) -> Variables:
        """Variables of ``[*shape]`` of a site."""
        return {n: self._variable(n, _numpy(v), self.view.layout.model[n], []) for n, v in values.items()}

    def rows(self, values: Mapping[str, Any]) -> Variables:
        """Entries of the data, whose first dim may be that of the rows."""
        out = {}
        for name, value in values.items():
            array = _numpy(torch.as_tensor(value))
            row = array.shape[:1] == (self.rows_there,)
            plates = ((str(self.row_plate), -1, self.rows_there),) if row else ()
            site = Site("observed", torch.Size(array.shape), torch.Size(array.shape[: len(plates)]), plates)
            out[name] = self._variable(name, array, site, [])
        return out

    def _site(self, group: str, name: str, shape: torch.Size) -> Site:
        if group != "sample_stats":
            return self.view.layout.model[name]
        common = self.view.common if name == "log_weight" else ()
        plates = tuple((plate, i - len(shape), size) for i, (plate, _, size) in enumerate(common))
        return Site("auxiliary", shape, shape, plates)

    def _variable(self, name: str, array: np.ndarray, site: Site, lead: list[str]) -> tuple[list[str], np.ndarray]:
        plates = {dim: (plate, size) for plate, dim, size in site.plates}
        dims, kept = list(lead), list(array.shape[: len(lead)])
        for i, size in enumerate(array.shape[len(lead) :]):
            dim = i - len(site.batch)
            if dim < 0 and size == 1 and dim not in plates and any(other < dim for other in plates):
                continue  # only keeps the place of a plate that the site is not in
            if dim < 0 and plates.get(dim, ("", -1))[1] == size:
                plate = plates[dim][0]
                dims.append(plate + "_" if plate in ("chain", "draw") else plate)
            else:
                dims.append(f"{name}_dim_{sum(d.startswith(name + '_dim_') for d in dims)}")
            kept.append(size)
        return dims, array.reshape(kept)

    def dataset(self, variables: Variables, attrs: Mapping[str, str]) -> Any:
        import xarray

        coords: dict[str, np.ndarray] = {}
        for dims, array in variables.values():
            coords |= {dim: np.arange(size) for dim, size in zip(dims, array.shape, strict=True)}
        if self.row_plate in coords and self.labels is not None:
            coords[self.row_plate] = self.labels
        named: dict[str, Any] = {}
        for name, variable in variables.items():
            name = name.replace("/", ".")  # netCDF and DataTree take a slash for a group
            while name in coords or name in named:  # xarray takes it for the labels of that dim
                name += "_"
            named[name] = variable
        return xarray.Dataset(named, coords=coords, attrs=dict(attrs))


def _numpy(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    half = value.dtype in (torch.float16, torch.bfloat16)  # netCDF has neither, nor NumPy the latter
    return (value.float() if half else value).numpy()


def _labels(labels: tuple) -> np.ndarray:
    """Labels as numbers, dates or text, which is what netCDF takes."""
    array = np.asarray(labels, dtype=object if any(isinstance(v, tuple) for v in labels) else None)
    if array.dtype != object and array.ndim == 1:
        return array
    try:
        return array.astype("datetime64[ns]")
    except (TypeError, ValueError):
        return np.asarray([" ".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in labels])
