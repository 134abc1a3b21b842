"""Figures: their labels, what they show, and that they leave nothing behind."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes

from pyro_ae import Posterior, batch_plate, fit, nuts, sghmc, svi
from pyro_ae.diagnostics import entries, page, plots
from pyro_ae.diagnostics.entries import label, pick
from pyro_ae.diagnostics.ranks import Coverage, Ranks
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.latent_densities import gaussian
from pyro_ae.models.bayesian_autoencoder import BayesianAutoencoder
from pyro_ae.models.vae import VAE
from pyro_ae.nn import MLP

HISTORY = {
    "step": [11.0, 22.0, 33.0],
    "epoch": [1.0, 2.0, 3.0],
    "loss": [300.0, 120.0, 100.0],
    "validation": [290.0, 125.0, 110.0],
    "log p(z)": [-20.0, -22.0, -23.0],
    "log p(x)": [-280.0, -100.0, -80.0],
    "log q(z)": [-10.0, 1.0, 5.0],
}
LEVELS = torch.linspace(0.05, 0.95, 19)

FIGURES: dict[str, Callable[[], Any]] = {
    "latent_space": lambda: plots.latent_space(torch.randn(30, 5), torch.arange(30) % 10),
    "latent_space by a number": lambda: plots.latent_space(torch.randn(30, 5), torch.rand(30)),
    "latent_space by many whole numbers": lambda: plots.latent_space(torch.randn(30, 2), torch.arange(30)),
    "latent_space, 2 dims, no labels": lambda: plots.latent_space(torch.randn(30, 2)),
    "latent_space, 1 dim, names": lambda: plots.latent_space(torch.randn(30, 1), ["cat", "dog", "cow"] * 10),
    "latent_space, all codes the same": lambda: plots.latent_space(torch.ones(30, 4)),
    "kl": lambda: plots.kl(torch.rand(40), ["active"] * 38 + ["mixed", "passive"]),
    "history": lambda: plots.history(HISTORY),
    "history without rows or validation": lambda: plots.history({"step": [1, 2], "loss": [2, 1]}, unit="nats"),
    "history without steps": lambda: plots.history({"loss": [2, 1], "validation": [3, 2]}),
    "history of one evaluation": lambda: plots.history({name: values[:1] for name, values in HISTORY.items()}),
    "pareto_k": lambda: plots.pareto_k(torch.tensor([0.1, 0.69, 0.71, -0.3])),
    "pareto_k, far off": lambda: plots.pareto_k([40.0, -torch.inf, torch.nan, torch.inf]),
    "pareto_k_by_row": lambda: plots.pareto_k_by_row([0.1, torch.nan, 0.9, -torch.inf], [3, 5, 7, 9]),
    "predictive": lambda: plots.predictive(torch.randn(100), 0.3),
    "rank_ecdf": lambda: plots.rank_ecdf(Ranks({"z": torch.randint(0, 51, (90, 2))}, 50)),
    "coverage": lambda: plots.coverage(Coverage(LEVELS, LEVELS**2, 50)),
    "coverage of several": lambda: plots.coverage({"z": Coverage(LEVELS, LEVELS[:, None].expand(-1, 2), 50)}),
    "intervals": lambda: plots.intervals({"a": {"z": torch.randn(50, 3)}, "b": {"z": torch.randn(40, 3)}}),
}


def every(axes: Any) -> list[Axes]:
    return list(np.ravel(axes))


@pytest.mark.parametrize("name", FIGURES)
def test_figures_have_labelled_axes(name: str, tmp_path: Path) -> None:
    axes = every(FIGURES[name]())
    axes[0].figure.savefig(tmp_path / "figure.png")
    assert axes[-1].get_xlabel()
    for part in axes:
        assert part.get_ylabel() or "1 dim" in name or name == "intervals"
        assert part.get_title(loc="left") or name == "intervals"
        sizes = [t.get_fontsize() for t in (part.xaxis.label, part.yaxis.label, *part.get_xticklabels())]
        assert min(sizes) >= 11
    if "history" in name:
        assert "nats" in axes[0].get_ylabel()


@pytest.mark.parametrize("name", ["latent_space", "kl", "pareto_k", "pareto_k_by_row", "predictive"])
def test_a_figure_goes_into_axes_that_are_given(name: str) -> None:
    _, (left, right) = pyplot.subplots(1, 2)
    arguments: dict[str, tuple] = {"latent_space": (torch.randn(9, 3),), "predictive": ([1.0, 2.0], 1.5)}
    drawn = getattr(plots, name)(*arguments.get(name, ([0.1, 0.8],)), axes=right)
    assert drawn is right and right.has_data() and not left.has_data()
    assert len(pyplot.get_fignums()) == 1


def test_a_page_closes_its_figures() -> None:
    assert [page.picture(make(), "a figure").count("<img") for make in FIGURES.values()] == [1] * len(FIGURES)
    assert not pyplot.get_fignums()


def test_ranks_that_are_uniform_lie_within_the_band() -> None:
    even, narrow = torch.arange(51).repeat(4), torch.tensor([0, 50]).repeat(102)
    for ranks, inside in ((even, True), (narrow, False)):
        axes = plots.rank_ecdf(Ranks({"z": ranks}, 50))
        (band,) = axes.collections
        edge = band.get_paths()[0].vertices
        line = axes.lines[-1].get_ydata()
        assert (np.abs(line).max() < np.abs(edge[:, 1]).max()) == inside


# -- images --------------------------------------------------------------------------------------------------


def shown(axes: Axes) -> torch.Tensor:
    (image,) = axes.get_images()
    return torch.as_tensor(np.ma.filled(image.get_array(), -1.0))


def test_images_are_shown_pixel_by_pixel() -> None:
    x = torch.rand(13, 8, 6)
    axes = plots.images(x, 1 - x, names=["image", "rebuilt"], columns=5)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["image", "rebuilt"] * 3
    assert axes.get_images()[0].get_interpolation() == "nearest"
    canvas = shown(axes)
    torch.testing.assert_close(canvas[:8, :6].float(), x[0])
    torch.testing.assert_close(canvas[9:17, 7:13].float(), 1 - x[1])
    box = axes.get_position()  # pixels are squares, and the axes are no larger than they
    width, height = axes.figure.get_size_inches()
    assert box.width * width / canvas.shape[1] == pytest.approx(box.height * height / canvas.shape[0])


def test_images_in_colour() -> None:
    x = torch.rand(3, 3, 8, 6)
    canvas = shown(plots.images(x))
    torch.testing.assert_close(canvas[:8, :6].float(), x[0].permute(1, 2, 0))
    assert (canvas[:, 6] == 1.0).all(), "white between the images"
    torch.testing.assert_close(shown(plots.images(x[:, :1])), shown(plots.images(x[:, 0])))


def test_images_of_another_range_are_stretched_to_it() -> None:
    (image,) = plots.images(16 * torch.rand(3, 8, 6).round()).get_images()
    assert image.get_clim() == (0.0, 16.0)
    assert plots.images(0.5 * torch.rand(3, 8, 6)).get_images()[0].get_clim() == (0.0, 1.0)


@pytest.fixture(scope="module")
def vae() -> Posterior:
    model = VAE(MLP(3, [16], (4, 4)), 3, lambda mean: dist.Normal(mean, 0.1).to_event(2))
    return fit(
        model,
        torch.rand(30, 4, 4),
        guide=Amortized(MLP((4, 4), [16]), MeanField(16, 3)),
        method=svi(steps=5),
        progress=False,
        seed=0,
    )


def test_images_of_a_posterior(vae: Posterior) -> None:
    x = vae.data.call().args[0]
    canvas = shown(plots.reconstructions(vae, n=4))
    torch.testing.assert_close(canvas[:4, :4].float(), x[0])
    torch.testing.assert_close(canvas[:4, 15:19].float(), x[29])
    assert plots.samples(vae, 12).has_data()
    above, below = plots.uncertainty(vae, n=3)
    assert above.get_images()[0].get_array().shape[1] == below.get_images()[0].get_array().shape[1]
    low, high = below.get_images()[0].get_clim()
    assert low == 0 and high == pytest.approx(float(np.nanmax(below.get_images()[0].get_array())), rel=1e-5)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        plots.reconstructions(vae, n=0)


def test_a_traversal_moves_one_dim(vae: Posterior) -> None:
    axes = plots.traversal(vae, row=7, dims=[2, 0], span=2.0, steps=3)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["dim 2", "dim 0"]
    canvas = shown(axes)
    code = vae.encode()[7]
    for line, d in enumerate([2, 0]):
        for step, value in enumerate([-2.0, 0.0, 2.0]):
            z = code.clone()
            z[d] = value
            with torch.no_grad():
                expected = vae.model.decoder(z)
            torch.testing.assert_close(canvas[5 * line : 5 * line + 4, 5 * step : 5 * step + 4].float(), expected)
    with pytest.raises(ValueError, match="no row 30: the data has 30"):
        plots.traversal(vae, row=30)
    with pytest.raises(ValueError, match="dims must be some of 0 to 2"):
        plots.traversal(vae, dims=[3])


# -- chains --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def funnel() -> Posterior:
    def model() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(3), (v / 2).exp()).to_event(1))

    return fit(model, None, method=nuts(draws=200, warmup=200, chains=2), seed=0, progress=False)


@pytest.mark.parametrize("names", [None, ["v"], ["x[1]", "v"], ["x"]])
def test_figures_of_chains(funnel: Posterior, names: list[str] | None, tmp_path: Path) -> None:
    expected = {None: ["v", "x[0]", "x[1]", "x[2]"]}.get(names and tuple(names)) or {
        ("v",): ["v"],
        ("x[1]", "v"): ["x[1]", "v"],
        ("x",): ["x[0]", "x[1]", "x[2]"],
    }[tuple(names or ())]
    trace, rank = plots.trace(funnel, names), plots.rank(funnel, names)
    assert [part.get_ylabel() for part in trace[:, 0]] == [part.get_ylabel() for part in rank] == expected
    counts = sum(patch.get_data().values.sum() for patch in rank[0].patches)
    assert counts == 400, "each draw has its rank"
    assert trace[-1, 1].get_xlabel() == "draw" and rank[-1].get_xlabel()
    if len(expected) > 1:
        pairs = plots.pair(funnel, names)
        assert pairs.shape == (min(len(expected), 3) - 1,) * 2
        pairs[0, 0].figure.savefig(tmp_path / "figure.png")
    else:
        with pytest.raises(ValueError, match="only v"):
            plots.pair(funnel, names)
    trace[0, 0].figure.savefig(tmp_path / "figure.png")


def test_the_energy_and_where_draws_diverged(funnel: Posterior) -> None:
    assert plots.energy(funnel).get_xlabel() == "energy (nats)"
    assert funnel.stats["diverging"].any()
    assert [text.get_text() for text in plots.pair(funnel)[0, 0].get_legend().get_texts()] == ["diverged"]


def test_draws_of_a_guide_are_one_chain(vae: Posterior) -> None:
    axes = plots.trace(vae, ["z[0, 1]"])
    assert axes.shape == (1, 2) and len(axes[0, 1].lines) == 1
    with pytest.raises(ValueError, match="records no energy"):
        plots.energy(vae)


def test_numbers_are_picked_from_every_site() -> None:
    draws = {"a": torch.arange(24.0).reshape(2, 2, 2, 3), "b": torch.zeros(2, 2)}
    assert label("a", [2, 3], 5) == "a[1, 2]"
    assert [name for name, _ in pick(draws, None, 3)] == ["a[0, 0]", "a[0, 1]", "b"]
    (found,) = pick(draws, ["a[1, 2]"], 1)
    assert found[0] == "a[1, 2]" and found[1].tolist() == draws["a"][:, :, 1, 2].tolist()
    for wrong in ("c", "a[2, 0]", "a[1]", "b[0]"):
        with pytest.raises(ValueError, match=re.escape(f"there is no '{wrong}'; the sites are 'a', 'b'")):
            list(pick(draws, [wrong], 3))


def test_numbers_of_a_large_network_are_picked_without_naming_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    monkeypatch.setattr(entries, "label", lambda name, shape, i: called.append(i) or f"{name}[{i}]")
    draws = {"w": torch.zeros(1, 2, 1000, 1000), "b": torch.zeros(1, 2, 1000)}
    assert [name for name, _ in pick(draws, None, 4)] == ["w[0]", "w[1]", "b[0]", "b[1]"] and len(called) == 4


def test_images_of_chains_that_drew_the_codes() -> None:
    def model(x: torch.Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mean = (z.sum(-1) + shift)[..., None, None].expand(*z.shape[:-1], 2, 3)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(2), obs=x)

    x = torch.randn(5, 2, 3)
    chains = fit(model, x, method=nuts(draws=20, warmup=20, chains=2), seed=0, progress=False)
    canvas = shown(plots.reconstructions(chains, n=2))
    torch.testing.assert_close(canvas[:2, 4:7].float(), x[4])
    torch.testing.assert_close(canvas[3:5, 4:7].float(), chains.reconstruct()[4])
    assert plots.uncertainty(chains, n=2).shape == (2,)
    assert plots.traversal(chains, row=4, steps=3).has_data()


def test_images_of_an_autoencoder_whose_weights_are_latent(tmp_path: Path) -> None:
    model = BayesianAutoencoder(MLP((4, 4), [6], 2), MLP(2, [6], (4, 4)), 2)
    x, new = torch.rand(9, 4, 4), torch.rand(5, 4, 4)
    method = sghmc(lr=1e-3, warmup=20, draws=5, thinning=1, chains=2)
    posterior = fit(model, x, method=method, seed=0, progress=False, check=False)
    canvas = shown(plots.reconstructions(posterior, new, n=5))
    torch.testing.assert_close(canvas[:4, 5:9].float(), new[1])
    found = posterior.uncertainty(new)
    torch.testing.assert_close(canvas[5:9, 5:9].float(), found.mean[1], rtol=1e-3, atol=1e-4)
    above, below = plots.uncertainty(posterior, new, n=5)
    torch.testing.assert_close(shown(above), canvas)
    spread = shown(below)
    torch.testing.assert_close(spread[:4, 5:9].float(), found.epistemic[1].sqrt(), rtol=1e-3, atol=1e-4)
    assert found.epistemic.min() > 0
    (image,) = below.get_images()
    assert image.get_cmap().name == "viridis" and image.get_clim() == pytest.approx((0.0, float(spread.max())))
    assert image.colorbar.ax.get_xlabel() == "standard deviation between draws"
    above.figure.savefig(tmp_path / "figure.png")
    assert plots.samples(posterior, 4, density=gaussian(), code="z").has_data()
    assert plots.images(model(size=4).detach(), names=["prior"]).has_data()
    with pytest.raises(ValueError, match="the rows have none; codes that are a function of latent weights"):
        plots.traversal(posterior)


# -- what cannot be shown ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: plots.images(torch.rand(3, 8)), "got [3, 8]"),
        (lambda: plots.images(torch.rand(3, 2, 8, 8)), "got [3, 2, 8, 8]"),
        (lambda: plots.images(torch.rand(3, 8, 8), torch.rand(4, 8, 8)), "all of one shape"),
        (lambda: plots.images(torch.rand(3, 8, 8), names=["a", "b"]), "1 bands, got 2"),
        (lambda: plots.latent_space(torch.rand(3)), "got [3]"),
        (lambda: plots.latent_space(torch.rand(3, 2), [1, 2]), "got [2]"),
        (lambda: plots.kl([[0.1]]), "got shape (1, 1)"),
        (lambda: plots.kl([0.1], ["active", "mixed"]), "1 dims, got 2"),
        (lambda: plots.history({}), "it has nothing"),
        (lambda: plots.pareto_k([]), "no k-hat"),
        (lambda: plots.pareto_k_by_row([0.1], [1, 2]), "1 values of k-hat"),
        (lambda: plots.predictive([1.0, torch.nan], 0.0), "finite statistic"),
        (lambda: plots.rank_ecdf(Ranks({"z": torch.zeros(10)}, 10), ["y"]), "there is no 'y'"),
        (lambda: plots.coverage({}), "no coverage"),
        (lambda: plots.intervals({}), "one posterior or more"),
    ],
)
def test_figures_refuse_what_they_cannot_show(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make()
