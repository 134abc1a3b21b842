"""A posterior on disk: a folder of safetensors, netCDF and JSON. Nothing is pickled, and the data is not written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .data import Call, LoadedRows, Rows, as_rows
from .posterior import Posterior
from .program import Program, validation
from .sites import Layout, inspect_sites
from .types import Draws, Guide, Model

FORMAT, VERSION = "pyro_ae posterior", 1
MANIFEST, PARAMETERS, DRAWS = "posterior.json", "parameters.safetensors", "draws.nc"
CURE = "copy the folder anew from where it came, or save the posterior again"


def save(posterior: Posterior, path: Path) -> Path:
    """Write a posterior to a folder. One that holds a posterior is replaced, once all is written.

    Raises:
        ValueError: where the folder holds something else, or cannot be written.
    """
    try:
        target = path.resolve()  # a link goes on pointing to the folder
        _check_target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.parent / f".{target.name}.{uuid.uuid4().hex}"
        made.mkdir()
        try:
            _write(posterior, made)
            _take_place(made, target)
        finally:
            shutil.rmtree(made, ignore_errors=True)  # it has its new name where all went well
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {path}: {error}. Give a folder that you may write to") from error
    return path


def _check_target(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, and a posterior is a folder: give another name")
    names = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    known = MANIFEST in names and set(names) <= {MANIFEST, PARAMETERS, DRAWS}
    # even a damaged posterior may be replaced
    ours = known and FORMAT in (path / MANIFEST).read_text("utf-8", errors="replace")
    if names and not ours:
        held = ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")
        raise ValueError(f"{path} holds something other than a posterior ({held}): give a new or empty folder")


def _take_place(made: Path, target: Path) -> None:
    """Rename a folder to where another may stand, which is put back if that fails."""
    aside = made.with_name(made.name + ".old")
    replaced = target.exists()
    if replaced:
        os.replace(target, aside)
    try:
        os.replace(made, target)
    except BaseException:
        if replaced:
            os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _write(posterior: Posterior, folder: Path) -> None:
    from . import __version__

    program = posterior.program
    state = {name: tensor.cpu().contiguous() for name, tensor in program.parameters.state().items()}
    save_file(state, folder / PARAMETERS, metadata={"format": "pt"})
    groups: dict[str, Draws] = {}
    if posterior.draws is not None:
        groups = {"posterior": posterior.draws, "sample_stats": posterior.stats}
    for group, values in groups.items():
        _write_draws(folder / DRAWS, group, values)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "written_by": {"pyro_ae": __version__, "torch": str(torch.__version__), "pyro": pyro.__version__},
        "kind": "chains" if groups else "guide",
        "guide": None if program.guide is None else "automatic" if program.automatic_guide else "given",
        "method": posterior.method,
        "plate": program.plate,
        "total": program.total,
        "batch_size": posterior.batch_size,
        "interrupted": posterior.interrupted,
        "history": posterior.history,
        "sites": _sites(program.layout),
        "serial": program.layout.serial,
        "data": _schema(posterior.data),
        "draws": {group: {name: _name(v.dtype) for name, v in values.items()} for group, values in groups.items()},
        "files": {file.name: _checksum(file) for file in sorted(folder.iterdir())},
    }
    manifest["checksum"] = _own_checksum(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, default=float) + "\n", "utf-8")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _own_checksum(manifest: Mapping[str, Any]) -> str:
    """Of the manifest without its checksum, however it is indented."""
    rest = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, default=float).encode()).hexdigest()


def _write_draws(file: Path, group: str, values: Draws) -> None:
    """One group of the netCDF file, as ArviZ names and shapes it."""
    import xarray

    variables: dict[str, Any] = {}
    coords: dict[str, Any] = {}
    for i, (name, value) in enumerate(values.items()):
        # netCDF takes "/" for a group, and xarray a name that is also a dim for that dim's coordinates
        plain = "/" not in name and name not in ("chain", "draw") and "_dim_" not in name
        variable = name if plain else f"_dim_{i}_of"
        dims = ("chain", "draw", *(f"{variable}_dim_{k}" for k in range(value.dim() - 2)))
        # netCDF has no half precision, all of whose numbers float32 holds
        half = value.dtype in (torch.float16, torch.bfloat16)
        array = (value.float() if half else value).cpu().numpy()
        variables[variable] = xarray.Variable(dims, array, {"site": name})
        coords = {dim: np.arange(size) for dim, size in zip(dims[:2], array.shape[:2], strict=True)}
    mode: Any = "a" if file.exists() else "w"
    xarray.Dataset(variables, coords).to_netcdf(file, mode=mode, group=group, engine="h5netcdf")


def _sites(layout: Layout) -> dict[str, Any]:
    """What identifies the sites that have a density."""
    return {
        name: {
            "kind": site.kind,
            "shape": list(site.shape),
            "event": list(site.shape[len(site.batch) :]),
            "plates": sorted(p[0] for p in site.plates),
            "support": _support(site.support)[0],
            "bounds": _support(site.support)[1],
        }
        for name, site in layout.model.items()
        if site.kind in ("latent", "observed")
    }


def _support(support: Any) -> tuple[str | None, str]:
    """The name of a constraint and the numbers in it to six digits; how many dims it is over the event shape says."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if support is None:
        return None, ""
    numbers = {n: torch.as_tensor(v).flatten() for n, v in vars(support).items() if isinstance(v, int | float | Tensor)}
    texts = (f"{n}={', '.join(dict.fromkeys(f'{x:.6g}' for x in v[:1000].tolist()))}" for n, v in numbers.items())
    return type(support).__name__.lstrip("_"), " ".join(texts)


def _schema(data: Rows | LoadedRows | None) -> dict[str, Any] | None:
    """Names, shapes and dtypes of the data, and its settings: enough to call the model, and none of its rows."""
    if isinstance(data, LoadedRows):
        args, kwargs = data.first()
        data = Rows("dict", kwargs) if kwargs else Rows("tuple", {str(i): v for i, v in enumerate(args)})
    if data is None:
        return None
    return {"form": data.form, "entries": {name: _entry(value) for name, value in data.entries.items()}}


def _entry(value: Any) -> dict[str, Any]:
    if not isinstance(value, Tensor):
        try:
            same = json.loads(json.dumps(value)) == value
        except (TypeError, ValueError):
            same = False
        return {"setting": value} if same else {"not_written": type(value).__name__}
    entry = {"shape": list(value.shape), "dtype": _name(value.dtype)}
    if value.dim() == 0:
        return entry | {"setting": value.item()}
    if value.is_floating_point():
        return entry | {"missing": bool(torch.isnan(value).any())}
    if value.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        return entry | {"range": [int(value.min()), int(value.max())]}  # models count groups by the largest index
    return entry


def _stand_in(manifest: Mapping[str, Any], fill: float) -> Rows:
    """Data as the first call of the fit had it, but for its values."""
    entries = {name: _value(entry, manifest["batch_size"], fill) for name, entry in manifest["data"]["entries"].items()}
    return Rows(manifest["data"]["form"], entries)


def _value(entry: Mapping[str, Any], batch_size: int | None, fill: float) -> Any:
    if "dtype" not in entry:
        return entry["setting"]
    shape, dtype = list(entry["shape"]), getattr(torch, entry["dtype"])
    if "setting" in entry:
        return torch.tensor(entry["setting"], dtype=dtype)
    if batch_size is not None:
        shape[0] = min(shape[0], batch_size)
    value = torch.full(shape, fill, dtype=dtype)
    if entry.get("missing"):
        value[0] = torch.nan
    if "range" in entry:  # from the largest down, so that even a few rows have it
        low, high = entry["range"]
        value = (high - torch.arange(value.numel()) % (high - low + 1)).reshape(shape).to(dtype)
    return value


def load(path: Path, model: Model, guide: Guide | None = None, *, data: Any = None) -> Posterior:
    """Read a posterior that :func:`save` wrote; it is on the CPU, wherever it was fitted.

    Model and guide are run once, so that parameters are there that are made on the way: on the data where it is
    given, else on a stand-in of the same shapes. A load that fails leaves their modules as they were.

    Raises:
        ValueError: where the files are not a posterior, are damaged, or do not match the model; it says where.
    """
    manifest = _read_manifest(path)
    state, groups = _read_values(path, manifest)
    if manifest["guide"] is None:
        guide = None  # samplers do not look at it
    elif manifest["guide"] == "given" and guide is None:
        raise ValueError(f"the posterior in {path} was fitted with a guide: pass one of the same make as guide=...")
    rows = None if data is None else as_rows(data)
    if rows is None and manifest["data"] and all("setting" in e for e in manifest["data"]["entries"].values()):
        rows = _stand_in(manifest, 0.0)  # no rows, so nothing is missing from the file
    random_state = pyro.util.get_rng_state()
    try:
        program = _rebuild(path, manifest, model, guide, rows, state)
    finally:
        pyro.util.set_rng_state(random_state)
    return Posterior(
        program,
        data=rows,
        method=manifest["method"],
        history=manifest["history"],
        draws=groups.get("posterior"),
        stats=groups.get("sample_stats"),
        interrupted=manifest["interrupted"],
        batch_size=manifest["batch_size"],
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not path.is_dir():
        raise ValueError(f"there is no posterior at {path}: it is {'a file' if path.exists() else 'not there'}")
    try:
        manifest = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no posterior in {path}: the folder has no {MANIFEST}") from None
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): {CURE}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{file} is not of a posterior that Posterior.save wrote: give the folder of one")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{file} has format version {manifest.get('version')}, written by {manifest.get('written_by')}, and this "
            f"pyro_ae reads version {VERSION}: upgrade pyro_ae to load it"
        )
    if manifest.get("checksum") != _own_checksum(manifest):
        raise ValueError(f"{file} is damaged or was edited (its checksum differs): {CURE}")
    return manifest


def _read_values(path: Path, manifest: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The parameters and the groups of draws, from files that are as they were written."""
    for name, checksum in manifest["files"].items():
        file = path / name
        try:
            found = _checksum(file)
        except OSError as error:
            raise ValueError(f"{file} is missing or cannot be read ({error}): {CURE}") from error
        if found != checksum:
            raise ValueError(f"{file} is damaged or of another posterior (its checksum differs): {CURE}")
    groups = {group: _read_draws(path / DRAWS, group, dtypes) for group, dtypes in manifest["draws"].items()}
    return load_file(path / PARAMETERS), groups


def _read_draws(file: Path, group: str, dtypes: Mapping[str, str]) -> dict[str, Tensor]:
    import xarray

    with xarray.open_dataset(file, group=group, engine="h5netcdf", decode_times=False) as dataset:
        arrays = {v.attrs["site"]: v.values for v in dataset.data_vars.values()}
    return {name: torch.tensor(arrays[name], dtype=getattr(torch, dtype)) for name, dtype in dtypes.items()}


def _rebuild(
    path: Path,
    manifest: Mapping[str, Any],
    model: Model,
    guide: Guide | None,
    rows: Rows | LoadedRows | None,
    state: Mapping[str, Tensor],
) -> Program:
    """A program with the parameters of the file, once model and guide are seen to be what was saved."""
    program = Program(model, guide, plate=manifest["plate"], total=manifest["total"])
    hint = "" if rows is not None else ". Where sites or shapes depend on the values of the data, pass data=..."
    with _unchanged_on_failure(program):
        batch = _build(path, program, manifest, rows)
        _refuse(path, _site_problems(program.layout, manifest), hint)
        _refuse(path, _dtype_problems(program, state), "")
        try:
            program.parameters.load(state)
        except ValueError as error:
            _refuse(path, [str(error)], hint)
        with program.active(), validation(False):
            again = inspect_sites(program.model, program.guide, batch)
        _refuse(path, _bound_problems(program.layout, again, manifest), hint)
    program.layout.serial = manifest["serial"]  # what a stand-in shows of this may not hold for the data
    return program


@contextmanager
def _unchanged_on_failure(program: Program) -> Iterator[None]:
    before = program.parameters.state()
    try:
        yield
    except BaseException:
        now = program.parameters.named() | program.parameters.buffers()
        with torch.no_grad():
            for name in now.keys() & before.keys():
                now[name].copy_(before[name])
        raise


def _build(path: Path, program: Program, manifest: Mapping[str, Any], rows: Rows | LoadedRows | None) -> Call:
    """Run the program once, on the data or on a stand-in for it, and say on what."""
    if rows is not None:
        size = manifest["batch_size"]
        first = rows.take(slice(0, size)) if size and isinstance(rows, Rows) and rows.size else rows
        batches, what = [first.to(program.device).first(None)], "the data"
    else:
        if manifest["data"] is None:
            raise ValueError(f"the posterior was without data when it was saved to {path}: pass data=...")
        for name, entry in manifest["data"]["entries"].items():
            if "not_written" in entry:
                raise ValueError(f"'{name}' is a {entry['not_written']}, which is not in {path}: pass data=...")
        batches = [_stand_in(manifest, fill).call() for fill in (0.0, 1.0)]
        what = "a stand-in for the data. If they are those of the fit, pass data=..."
    errors = []
    for batch in batches:
        try:
            with validation(rows is not None):
                program.build(batch, automatic=manifest["guide"] == "automatic")
            return batch
        except Exception as error:
            errors.append(error)
    try:  # where model and guide do not run together, the model's own sites may tell why
        with program.active(), validation(False):
            problems = _site_problems(inspect_sites(program.model, None, batches[0]), manifest)
    except Exception:
        problems = []
    _refuse(path, problems, "")
    kind = type(errors[0]).__name__
    raise ValueError(f"cannot load {path}: {kind} ({errors[0]}) in a run on {what}") from errors[0]


def _refuse(path: Path, problems: list[str], hint: str) -> None:
    if problems:
        raise ValueError(f"the model or guide does not match the posterior in {path}: {'; '.join(problems[:8])}{hint}")


def _site_problems(layout: Layout, manifest: Mapping[str, Any]) -> list[str]:
    ours, theirs = _sites(layout), manifest["sites"]
    problems = [f"site '{n}' is in the file but not in the model" for n in theirs if n not in ours]
    problems += [f"site '{n}' is in the model but not in the file" for n in ours if n not in theirs]
    for name in (n for n in ours if n in theirs):
        facts = ["kind", "event", "plates", "support"]
        if manifest["kind"] == "chains" and ours[name]["kind"] == "latent":
            facts.append("shape")  # draws are of the rows of the fit, while a guide may be given others
        for fact in facts:
            here, there = ours[name][fact], theirs[name][fact]
            if here != there:
                problems.append(f"site '{name}' has {fact} {here} here and {there} in the file")
    return problems


def _dtype_problems(program: Program, state: Mapping[str, Tensor]) -> list[str]:
    ours = program.parameters.named() | program.parameters.buffers()
    return [
        f"'{n}' is {_name(ours[n].dtype)} here and {_name(t.dtype)} in the file: convert its module"
        for n, t in state.items()
        if n in ours and ours[n].dtype != t.dtype
    ]


def _bound_problems(before: Layout, after: Layout, manifest: Mapping[str, Any]) -> list[str]:
    """Supports whose bounds differ from the file's, though neither latents nor parameters move them."""
    problems = []
    first, then = _sites(before), _sites(after)
    for name in (n for n in first if n in then):
        here, there = then[name]["bounds"], manifest["sites"][name]["bounds"]
        if first[name]["bounds"] == here != there:
            problems.append(f"site '{name}' has a support with {here} here and {there} in the file")
    return problems
