"""A posterior that is saved and loaded into a model of other weights is the same; what does not fit is refused."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_ae import Posterior, fit, nuts, storage, svi
from pyro_ae.data import as_rows
from pyro_ae.guides import together
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.models.ppca import PPCA
from pyro_ae.models.vae import VAE
from pyro_ae.nn import MLP
from pyro_ae.runtime import seeded

X = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
quick = partial(fit, method=svi(steps=4, lr=0.05), seed=0, progress=False)


def amortized(latent: int = 2, site: str = "z", hidden: int = 6, missing: bool = False) -> tuple[Any, Any]:
    return PPCA(5, latent), Amortized(MLP(5, [hidden], missing=missing), MeanField(hidden, latent), site=site)


def normalised() -> tuple[Any, Any]:
    encoder = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU())
    return VAE(MLP(2, [6], 5), 2, lambda y: dist.Normal(y, 1.0).to_event(1)), Amortized(encoder, MeanField(6, 2))


class TutorialVAE(nn.Module):  # as in Pyro's tutorial: its methods are model and guide
    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.encoder = nn.Linear(2, 5), nn.Linear(5, 2)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.5).to_event(1))


def methods() -> tuple[Any, Any]:
    vae = TutorialVAE()
    return vae.model, vae.guide


def functions() -> tuple[Any, Any]:
    """Parameters with constraints, and a network that only pyro.module knows."""
    decoder = nn.Linear(2, 5)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        scale = pyro.param("scale", lambda: torch.rand(5) + 0.1, constraint=constraints.positive)
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.randn(2))
        width = pyro.param("width", lambda: torch.rand(2), constraint=constraints.interval(0.0, 2.0))
        pyro.sample("z", dist.Normal(loc, width).to_event(1))

    return model, guide


Y, GROUP = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
SETTINGS = {"settings": {"width": 5.0, "names": ["tau", "mu"]}, "spread": torch.tensor(10.0), "centred": True}
SCHOOLS = {"y": Y, "sigma": torch.full((8,), 12.0), "group": GROUP} | SETTINGS


def schools(y: Any, sigma: Any, group: Any, settings: Any, spread: Any, centred: bool = False) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, spread))
    tau = pyro.sample(settings["names"][0], dist.HalfCauchy(settings["width"]))
    with pyro.plate("groups", int(group.max()) + 1):  # as many as the largest index says
        effect = pyro.sample("effect/a", dist.Normal(mu, tau if centred else 1.0))
    with pyro.plate("schools", len(y)):
        pyro.sample("y", dist.Normal(effect[..., group], sigma), obs=y)


short = nuts(draws=6, warmup=4, chains=2, max_tree_depth=3)

ROUNDS: dict[str, tuple[Callable[[], tuple[Any, Any]], Any, dict[str, Any]]] = {
    "amortised": (amortized, X, {}),
    "minibatches": (amortized, X, {"batch_size": 8, "method": svi(epochs=2)}),
    "missing values": (lambda: amortized(missing=True), torch.where(X > 1.5, torch.nan, X), {}),
    "batch norm": (normalised, X, {}),
    "methods": (methods, X, {}),
    "functions": (functions, X, {}),
    "together": (lambda: together.example()[:2], X[:, :3], {}),
    "per row": (lambda: (model := PPCA(5, 2), AutoNormal(model)), X, {}),
    "automatic": (lambda: (schools, None), SCHOOLS, {}),
    "no data": (lambda: (lambda scale=2.0: pyro.sample("z", dist.Normal(0.0, scale)), None), None, {}),
    "settings": (lambda: (lambda scale: pyro.sample("z", dist.Normal(0.0, scale)), None), {"scale": 3.0}, {}),
}


def fitted(pair: tuple[Any, Any], data: Any, **options: Any) -> Posterior:
    return quick(pair[0], data, guide=pair[1], **options)


def made(case: str) -> Posterior:
    return fitted(ROUNDS[case][0](), ROUNDS[case][1], **ROUNDS[case][2])


def drawn(posterior: Posterior, data: Any = None, what: str = "sample") -> Any:
    with seeded(7):
        return getattr(posterior, what)(data=data)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name].nan_to_num(7.0), other[name].nan_to_num(7.0)), name


def refused(message: str, path: Path, *pair: Any, data: Any = None) -> None:
    with pytest.raises(ValueError, match=message):
        Posterior.load(path, *pair, data=data)


@pytest.mark.parametrize("case", ROUNDS)
@pytest.mark.parametrize("with_data", [False, True], ids=["alone", "with data"])
def test_round_trip(tmp_path: Path, case: str, with_data: bool) -> None:
    make, data, _ = ROUNDS[case]
    posterior = made(case)
    posterior.interrupted = with_data
    path = posterior.save(tmp_path / "deep" / "p")
    other = fitted(make(), data, method=svi(steps=1, lr=1e-9), seed=1)
    assert any(not torch.equal(v, drawn(other)[n]) for n, v in drawn(posterior).items()), "else reading nothing passes"
    model, guide = make()
    random_state = torch.get_rng_state()
    loaded = Posterior.load(path, model, guide, data=data if with_data else None)
    assert torch.equal(random_state, torch.get_rng_state()), "load drew from the global random state"
    assert not len(pyro.get_param_store()), "load wrote to the global param store"
    assert (loaded.data is None) == (not with_data and case not in ("no data", "settings"))
    given = data if loaded.data is None else None
    state = posterior.program.parameters.state()
    assert case != "batch norm" or state["guide.encoder.1.num_batches_tracked"] > 1
    assert_same(loaded.program.parameters.state(), state)
    assert_same(drawn(loaded, given), drawn(posterior))
    assert_same(loaded.params, posterior.params)
    assert torch.equal(drawn(loaded, given, "log_evidence"), drawn(posterior, None, "log_evidence"))
    assert loaded.history == posterior.history and loaded.history["loss"]
    assert (loaded.batch_size, loaded.interrupted) == (posterior.batch_size, with_data)
    assert loaded.program.automatic_guide == (guide is None) == posterior.program.automatic_guide
    loaded.data = loaded.data or as_rows(data)
    assert repr(loaded) == repr(posterior)
    again = loaded.save(tmp_path / "again")
    assert (again / "parameters.safetensors").read_bytes() == (path / "parameters.safetensors").read_bytes()


def test_chains(tmp_path: Path, chains: Posterior) -> None:
    path = chains.save(tmp_path / "p")
    loaded = Posterior.load(path, schools, lambda **kwargs: None)  # a guide is not looked at
    assert loaded.guide is None and loaded.draws and chains.draws
    assert_same(loaded.draws, chains.draws)
    assert_same(loaded.stats, chains.stats)
    assert loaded.draws["mu"].shape == (2, 6) and loaded.stats["tree_depth"].dtype == torch.int64
    assert_same(drawn(loaded), drawn(chains))
    assert_same(drawn(loaded, SCHOOLS, "predict"), drawn(chains, None, "predict"))
    assert repr(Posterior.load(path, schools, data=SCHOOLS)) == repr(chains)


def test_draws_of_any_name_and_dtype(tmp_path: Path, chains: Posterior) -> None:
    draws = {
        "a/b": torch.randn(2, 3, 2, 2, dtype=torch.float64),
        "draw": torch.tensor([[0.1, torch.nan, torch.inf]] * 2),
        "chain": torch.randn(2, 3, 4),
        "w_dim_0": torch.randint(9, (2, 3, 4)),
        "w": torch.randn(2, 3, 4).half(),
        "b": torch.randn(2, 3).bfloat16(),
    }
    Posterior(chains.program, data=chains.data, method="", draws=draws).save(tmp_path / "p")
    assert_same(Posterior.load(tmp_path / "p", schools).draws or {}, draws)


def test_chains_hold_local_draws_of_the_rows_of_the_fit_only(tmp_path: Path) -> None:
    posterior = quick(PPCA(5, 2), X[:4], method=short)
    path = posterior.save(tmp_path / "p")
    assert_same(drawn(Posterior.load(path, PPCA(5, 2))), drawn(posterior))
    refused(r"site 'z' has shape \[3, 2\] here and \[4, 2\] in the file", path, PPCA(5, 2), data=X[:3])


def test_data_loader(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=5)
    posterior = fitted(amortized(), loader, method=svi(epochs=1))
    loaded = Posterior.load(posterior.save(tmp_path / "p"), *amortized())
    assert_same(drawn(loaded, X), drawn(posterior, X))
    loaded = Posterior.load(tmp_path / "p", *amortized(), data=X[:3])  # a guide is for any rows
    assert loaded.sample(2)["z"].shape == (2, 3, 2)
    assert loaded.program.total == len(X), "rows are still scaled as in the fit"


def test_files(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()  # an empty folder will do
    path = fitted(amortized(), torch.full((3, 5), 1234.5)).save(tmp_path / "p")
    assert [f.name for f in tmp_path.iterdir()] == ["p"], "temporary folders are left"
    assert sorted(f.name for f in path.iterdir()) == [PARAMETERS, JSON]
    manifest = json.loads((path / JSON).read_text())
    assert "1234.5" not in (path / JSON).read_text(), "the data was written"
    assert manifest["data"]["entries"] == {"0": {"shape": [3, 5], "dtype": "float32", "missing": False}}
    assert [manifest[name] for name in ("kind", "guide", "total", "plate")] == ["guide", "given", 3, "data"]
    assert (manifest["sites"]["z"]["event"], manifest["sites"]["x"]["kind"]) == ([2], "observed")


def test_a_posterior_is_replaced_and_else_nothing(tmp_path: Path) -> None:
    first, second = made("amortised"), made("functions")
    path, link, other, file = (tmp_path / name for name in ("p", "link", "other", "file"))
    first.save(path)
    link.symlink_to(path)
    assert second.save(link) == link and link.is_symlink()
    assert_same(Posterior.load(path, *functions()).params, second.params)
    (path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"p holds something other than a posterior \(notes.txt, .*empty folder"):
        first.save(path)
    assert (path / "notes.txt").read_text() == "mine"
    other.mkdir()
    (other / "posterior.json").write_text('{"format": "of someone else"}')
    with pytest.raises(ValueError, match=r"other holds something other than a posterior \(posterior.json"):
        first.save(other)
    file.touch()
    for below, message in {file: "file is a file", file / "below": "cannot write .*below: .*Give a folder"}.items():
        with pytest.raises(ValueError, match=message):
            first.save(below)
    assert {f.name for f in tmp_path.iterdir()} == {"file", "link", "other", "p"}


@pytest.mark.parametrize("fails", ["mkdir", "replace", "second replace", "save_file"])
def test_a_save_that_fails_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    path = made("functions").save(tmp_path / "p")
    before = {f.name: f.read_bytes() for f in path.iterdir()}
    replace, calls = os.replace, []

    def denied(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if fails == "second replace" and len(calls) != 2:
            return replace(*args)
        raise PermissionError(13, "Permission denied")

    where = {"mkdir": Path, "save_file": storage}.get(fails, os)
    monkeypatch.setattr(where, fails.split()[-1], denied)
    with pytest.raises(ValueError, match="cannot write .*p: .*Permission denied.*Give a folder that you may write to"):
        made("amortised").save(path)
    assert {f.name: f.read_bytes() for f in path.iterdir()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["p"]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


JSON, PARAMETERS, DRAWS = "posterior.json", "parameters.safetensors", "draws.nc"
DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "truncated JSON": (JSON, truncate, "posterior.json is damaged.*save the posterior again"),
    "no JSON": (JSON, Path.unlink, "no posterior in .*p: the folder has no posterior.json"),
    "another format": (JSON, partial(edit, format="x"), "posterior.json is not of a posterior"),
    "a later version": (JSON, partial(edit, version=2), "posterior.json has format version 2.*upgrade pyro_ae"),
    "an edit": (JSON, partial(edit, total=7), "posterior.json is damaged or was edited"),
    "truncated parameters": (PARAMETERS, truncate, "parameters.safetensors is damaged.*save the"),
    "a byte more": (PARAMETERS, lambda f: f.write_bytes(f.read_bytes() + b"?"), "parameters.safetensors is damaged"),
    "no parameters": (PARAMETERS, Path.unlink, "parameters.safetensors is missing.*copy the folder"),
    "truncated draws": (DRAWS, truncate, "draws.nc is damaged"),
    "no draws": (DRAWS, Path.unlink, "draws.nc is missing"),
}


@pytest.fixture(scope="module")
def chains() -> Posterior:
    return quick(schools, SCHOOLS, method=short)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(tmp_path: Path, chains: Posterior, damage: str) -> None:
    name, spoil, message = DAMAGE[damage]
    path = chains.save(tmp_path / "p")
    Posterior.load(path, schools)
    spoil(path / name)
    refused(message, path, schools)
    refused("no posterior at .*nowhere: it is not there", tmp_path / "nowhere", schools)
    if damage in ("truncated JSON", "no draws"):  # it can be saved anew
        Posterior.load(chains.save(path), schools)


def tiny(family: Any = dist.Normal, size: int = 2, second: float = 1.0, width: float = 0.0, **names: str) -> Any:
    def model(x: Tensor) -> None:
        scale = pyro.param("width", torch.tensor(width)) if width else 1.0
        mu = pyro.sample(names.get("latent", "mu"), family(torch.zeros(size), second).to_event(1))
        with pyro.plate(names.get("plate", "data"), len(x)):
            mean = mu.sum(-1, keepdim=True) * torch.ones(5)
            pyro.sample(names.get("observed", "x"), dist.Normal(mean, scale).to_event(1), obs=x)

    return model


OTHER: dict[str, tuple[Any, Any, str]] = {
    "size": (tiny(), tiny(size=3), r"site 'mu' has event \[3\] here and \[2\] in the file"),
    "site": (tiny(), tiny(latent="nu"), "site 'mu' is in the file but not in the model; site 'nu' is in the model but"),
    "support": (tiny(), tiny(dist.LogNormal), "site 'mu' has support GreaterThan here and Real in the file"),
    "bounds": (tiny(dist.Uniform), tiny(dist.Uniform, second=5.0), "'mu' has a support with .*=5 here and .*=1 in"),
    "observed site": (tiny(), tiny(observed="y"), "site 'x' is in the file but not in the model; site 'y'"),
    "plate": (tiny(), tiny(plate="rows"), r"site 'x' has plates \['rows'\] here and \['data'\] in the file"),
    "parameter too few": (tiny(width=1.0), tiny(), "'width' is in the file but not in the model or guide"),
    "parameter too many": (tiny(), tiny(width=1.0), "'width' is missing from the file"),
}


@pytest.mark.parametrize("part", OTHER)
def test_a_model_that_is_another_is_refused(tmp_path: Path, part: str) -> None:
    model, other, message = OTHER[part]
    path = quick(model, X).save(tmp_path / "p")
    Posterior.load(path, model)
    refused(f"does not match the posterior in .*p: .*{message}", path, other)
    refused(message, path, other, data=X)


def test_networks_of_other_sizes_are_refused(tmp_path: Path) -> None:
    path = made("amortised").save(tmp_path / "p")
    refused("fitted with a guide: pass one of the same make as guide=", path, PPCA(5, 2))
    latent = r"site 'z' has event \[3\] here and \[2\] in the file"
    refused(latent, path, *amortized(latent=3))
    refused(latent, path, PPCA(5, 3), amortized()[1])  # they do not even run together
    refused("the guide must sample exactly the latent sites.*'w'", path, PPCA(5, 2), amortized(site="w")[1])
    refused(r"'guide.encoder.layers.0.weight' is \(7, 5\) here and \(6, 5\) in the file", path, *amortized(hidden=7))
    model = PPCA(5, 2)
    model.mean.data = model.mean.data.double()
    refused("'model.mean' is float64 here and float32 in the file", path, model, amortized()[1])


def test_a_stand_in_is_like_the_first_batch(tmp_path: Path) -> None:
    def model(x: Tensor) -> None:
        dist.Uniform(x[:, 0], x[:, 1])  # which zeros are not valid for
        assert len(x) <= 8 and torch.isnan(x).any()
        tiny()(torch.zeros(len(x), 5))

    data = torch.tensor([[0.0, 1.0, torch.nan]] * 20)
    Posterior.load(quick(model, data, batch_size=8).save(tmp_path / "p"), model)

    def no_zeros(x: Tensor) -> None:
        torch.multinomial(x[0].abs(), 1)
        tiny()(x)

    Posterior.load(quick(no_zeros, X).save(tmp_path / "p"), no_zeros)


@pytest.mark.filterwarnings("ignore:the model or guide does not broadcast")
def test_what_runs_one_by_one_still_does(tmp_path: Path) -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mu.sum() * x.mean(), 1.0))  # the sum mixes particles, which zeros hide

    posterior = quick(model, X)
    loaded = Posterior.load(posterior.save(tmp_path / "p"), model)
    assert posterior.program.layout.serial and loaded.program.layout.serial == posterior.program.layout.serial


def test_a_load_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = made("batch norm").save(tmp_path / "p")
    model, guide = normalised()
    model.decoder.extra = nn.Linear(2, 2)
    before = {n: t.clone() for n, t in (model.state_dict() | guide.state_dict()).items()}
    refused("'model.decoder.extra.weight' is missing from the file", path, model, guide)
    assert_same(model.state_dict() | guide.state_dict(), before)


def test_bounds_may_depend_on_parameters_and_latents(tmp_path: Path) -> None:
    def model(x: Tensor) -> None:
        top = pyro.param("top", lambda: torch.rand(()) + 1.0, constraint=constraints.positive)
        a = pyro.sample("a", dist.Uniform(0.0, top))
        b = pyro.sample("b", dist.Uniform(0.0, a))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x.mean())

    posterior = quick(model, X)
    assert_same(drawn(Posterior.load(posterior.save(tmp_path / "p"), model), X), drawn(posterior))


def test_data_is_asked_for_where_the_file_cannot_do_without(tmp_path: Path) -> None:
    def with_setting(x: Tensor, dtype: torch.dtype) -> None:
        tiny()(x.to(dtype))

    def with_values(x: Tensor) -> None:
        torch.linalg.cholesky(x.T @ x)
        tiny()(x)

    def with_shape(x: Tensor) -> None:
        tiny(size=int(x.max()) + 3)(x)

    for name, (model, data, message) in {
        "setting": (with_setting, {"x": X, "dtype": X.dtype}, "'dtype' is a dtype, which is not in .*: pass data="),
        "values": (with_values, X, "cannot load .*values: .*linalg.cholesky.* in a run on a stand-in.*pass data="),
        "shape": (with_shape, X, r"site 'mu' has event \[3\] here and \[5\] in the file.*pass data="),
    }.items():
        posterior = quick(model, data)
        path = posterior.save(tmp_path / name)
        with pytest.raises(ValueError, match=message):
            Posterior.load(path, model)
        assert_same(drawn(Posterior.load(path, model, data=data)), drawn(posterior))
    again = Posterior.load(tmp_path / "shape", model, data=X)
    again.data = None
    refused("was without data when it was saved to .*again: pass data=", again.save(tmp_path / "again"), model)
