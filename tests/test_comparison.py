"""Differences of two posteriors, against what they are in closed form."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import norm, wasserstein_distance
from test_report import scaled
from torch import Tensor
from truth import gaussian_mean, ppca, untrained

from pyro_ae import Posterior, batch_plate
from pyro_ae.diagnostics.comparison import Comparison, chosen_rows, compare
from pyro_ae.diagnostics.two_sample import c2st, effective_draws, interval_coverage, sliced_w1
from pyro_ae.divergences import sliced_wasserstein
from pyro_ae.guides import together

# --------------------------------------------------------------------------------------- functions of draws


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.5])
def test_classifier_comes_near_the_best_accuracy(shift):
    a, b = torch.randn(1500, 1), shift + torch.randn(1500, 1)
    best = norm.cdf(shift / 2)
    # its standard error is about 0.01, and it may fall somewhat short
    assert best - 0.045 < float(c2st(a, b)) < best + 0.035


def test_classifier_sees_shapes_that_moments_do_not():
    """A ring and a normal distribution of the same mean and covariance; and a correlation."""
    angle, radius = 2 * math.pi * torch.rand(800), 1.4142 + 0.1 * torch.randn(800)
    ring = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    assert float(c2st(torch.randn(800, 2), ring)) > 0.75
    correlated = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]])).sample((800,))
    assert float(c2st(torch.randn(800, 2), correlated)) > 0.68


def test_classifier_of_each_row_and_of_unequal_samples():
    a, b = torch.randn(400, 2, 2, 2), torch.randn(200, 2, 2, 2)
    b[:, 1, 1] += 4
    found = c2st(a, b)
    assert found.shape == (2, 2) and found[1, 1] > 0.95
    assert (found.flatten()[:-1] - 0.5).abs().max() < 0.12  # not the 2/3 of always saying a
    # whatever the units
    torch.testing.assert_close(c2st(1e4 * a[:, 1] - 3, 1e4 * b[:, 1] - 3), found[1], atol=0.02, rtol=0)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_coverage_of_a_wrong_scale(scale):
    levels = (0.5, 0.9)
    found = interval_coverage(scale * torch.randn(20_000, 3), torch.randn(20_000, 3), levels)
    exact = [2 * norm.cdf(scale * norm.ppf((1 + level) / 2)) - 1 for level in levels]
    torch.testing.assert_close(found, torch.tensor(exact).float().unsqueeze(-1).expand(2, 3), atol=0.02, rtol=0)


def test_coverage_interpolates_as_quantiles_do():
    a, b = torch.randn(101, 4).double(), torch.randn(99, 4).double()
    low, high = a.quantile(0.15, 0), a.quantile(0.85, 0)
    expected = ((b >= low) & (b <= high)).double().mean(0)
    torch.testing.assert_close(interval_coverage(a, b, [0.7])[0].double(), expected, atol=1e-6, rtol=0)


def test_sliced_distance_of_each_row_is_that_of_each_alone():
    a, b = torch.randn(300, 5, 2).double(), 1 + 2 * torch.randn(200, 5, 2).double()
    torch.manual_seed(1)
    found = sliced_w1(a, b)
    for i in range(5):
        torch.manual_seed(1)
        torch.testing.assert_close(found[i], sliced_wasserstein(50, 1.0)(a[:, i], b[:, i]))


def test_effective_draws_of_an_autoregression():
    """(1 - rho) / (1 + rho) of as many, and the worst number of a row counts."""
    rho, x = 0.8, [torch.randn(4, 3, 2)]
    for _ in range(1999):
        x.append(rho * x[-1] + (1 - rho**2) ** 0.5 * torch.randn(4, 3, 2))
    chains = torch.stack(x, 1).double()
    chains[:, :, 0] = torch.randn(4, 2000, 2)  # the first row is independent
    chains[:, :, 1, 1] = torch.randn(4, 2000)
    chains[:, :, 2, 0] = 1.0  # a number that is fixed says nothing
    found = effective_draws(chains)
    expected = 8000 * torch.tensor([1.0, 1 / 9, 1 / 9]).double()
    torch.testing.assert_close(found, expected, rtol=0.3, atol=0)
    assert found.max() <= 8000


@pytest.mark.parametrize(
    ("function", "a", "b", "match"),
    [
        (c2st, torch.zeros(60), torch.zeros(60), r"\[S, \*batch, d\]"),
        (c2st, torch.randn(60, 2), torch.randn(60, 3), "must agree in all but their number"),
        (c2st, torch.randn(60, 2), torch.randn(49, 2), "at least 50 draws"),
        (c2st, torch.full((60, 1), torch.nan), torch.randn(60, 1), "NaN or infinite"),
        (interval_coverage, torch.randn(60, 2), torch.full((60, 2), torch.inf), "NaN or infinite"),
        (interval_coverage, torch.randn(60, 2), torch.randn(60), "must agree"),
    ],
)
def test_refusals_of_draws(function, a, b, match):
    with pytest.raises(ValueError, match=match):
        function(a, b)


def test_refusals_of_levels_and_rows():
    with pytest.raises(ValueError, match="levels must lie between 0 and 1"):
        interval_coverage(torch.randn(60), torch.randn(60), levels=(90,))
    for rows in (0, [], [-1], [5], torch.zeros(1, 1)):
        with pytest.raises(ValueError, match="rows must be"):
            chosen_rows(5, rows)
    assert chosen_rows(5, None).tolist() == chosen_rows(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert chosen_rows(5, 1).tolist() == [0] and chosen_rows(5, [3, 1]).tolist() == [3, 1]


# --------------------------------------------------------------------------------------------- two posteriors


def off(scale: float, shift: float = 0.0, rows: int = 12) -> tuple[Posterior, Posterior]:
    """The exact posterior of PPCA with another scale, and as it is."""
    model, x = ppca(rows)
    return untrained(model, scaled(model, scale, shift), x), untrained(model, scaled(model, 1.0), x)


def test_a_posterior_does_not_differ_from_itself():
    _, exact = off(1.0)
    found = compare(exact, exact, rows=3)
    z = found.sites["z"]
    assert found.rows.tolist() == [0, 6, 11]
    assert (z.c2st - 0.5).abs().max() < 0.06 and z.c2st.shape == (3,)
    assert z.mean.shape == z.log_sd_ratio.shape == z.wasserstein.shape == (3, 2) and z.coverage.shape == (2, 3, 2)
    assert (z.effective == 1000).all()
    assert len(found.sentences) == 1 and "no clear difference" in found.sentences[0]


@pytest.mark.parametrize("scale", [0.6, 1.0, 1.7])
def test_wrong_scale(scale):
    a, b = off(scale)
    found = compare(a, b, draws=20_000, rows=3, classify=False)
    z = found.sites["z"]
    ones = torch.ones(3, 2)
    torch.testing.assert_close(z.log_sd_ratio, math.log(scale) * ones, atol=0.04, rtol=0)
    torch.testing.assert_close(z.wasserstein, abs(scale - 1) * math.sqrt(2 / math.pi) * ones, atol=0.04, rtol=0)
    torch.testing.assert_close(z.mean, 0 * ones, atol=0.05, rtol=0)
    for level, share in zip(found.levels, z.coverage, strict=True):
        exact = 2 * norm.cdf(scale * norm.ppf((1 + level) / 2)) - 1
        torch.testing.assert_close(share, exact * ones, atol=0.03, rtol=0)
    assert z.c2st.isnan().all()
    word = {0.6: "too narrow in 6 of 6 numbers, by 4", 1.0: "no clear difference", 1.7: "too wide in 6 of 6"}[scale]
    assert word in found.sentences[0]


def test_shift():
    a, b = off(1.0, shift=0.4)
    z = compare(a, b, draws=20_000, rows=3, classify=False).sites["z"]
    sd = b.sample(20_000)["z"].std(0)[chosen_rows(12, 3)]
    torch.testing.assert_close(z.mean, 0.4 / sd, atol=0.05, rtol=0.02)
    torch.testing.assert_close(z.wasserstein, 0.4 / sd, atol=0.05, rtol=0.02)
    assert "mean of the guide is off in 6 of 6" in " ".join(compare(a, b, rows=3, classify=False).sentences)


def test_worst_comes_first_and_says_where():
    draws = torch.randn(1000, 3, 2)
    other = torch.randn(1000, 3, 2)
    other[:, 1, 0] *= 0.3
    other[:, 2, 1] += 1.0
    found = compare({"z": other}, {"z": draws}, local=["z"], names=("this", "that"), rows=None)
    assert "z: this is too narrow in 1 of 6 numbers" in found.sentences[0] and "(row 1, dim 0)" in found.sentences[0]
    assert "70% at worst" in found.sentences[0]
    rest = " ".join(found.sentences[1:])
    assert "the mean of this is off in 1 of 6" in rest and "(row 2, dim 1)" in rest
    assert "a classifier tells this from that" in rest and "2 of 3 rows" in rest
    text = str(found)
    assert "How this differs from that on 3 rows" in text and all(t.split(":")[0] in text for t in found.sentences)


def test_shape_alone():
    """Means and spreads agree, and the classifier says that something differs."""
    z = torch.randn(1500, 1)
    bound = torch.cat([z, 0.9 * z + (1 - 0.81) ** 0.5 * torch.randn(1500, 1)], -1)
    found = compare({"w": torch.randn(1500, 2)}, {"w": bound})
    assert len(found.sentences) == 1 and "it is the shape that differs" in found.sentences[0]
    assert found.sites["w"].c2st.shape == () and found.rows is None
    assert found.sites["w"].sliced_wasserstein > 2 * found.sites["w"].wasserstein.mean()


def test_distances_are_scipys():
    a, b = torch.randn(300, 4), 1 + 2 * torch.randn(500, 4)
    found = compare({"w": a}, {"w": b}, classify=False).sites["w"].wasserstein
    expected = [wasserstein_distance(a[:, i].numpy(), b[:, i].numpy()) / float(b[:, i].std()) for i in range(4)]
    torch.testing.assert_close(found, torch.tensor(expected).float())


def test_chance_is_not_spoken_of():
    """Many numbers of few draws, so that the largest difference is well above any floor."""
    found = compare({"w": torch.randn(200, 500)}, {"w": torch.randn(200, 500)}, classify=False)
    assert found.sites["w"].mean.abs().max() > 0.25
    assert len(found.sentences) == 1 and "no clear difference" in found.sentences[0]


def chained(exact: Posterior, index: Tensor, rho: float, draws: int = 500) -> Posterior:
    """Draws of the posterior of some rows, as of four chains that move slowly."""
    x = exact.data.take(index)
    q = exact.model.posterior(x.entries["0"])
    noise = [torch.randn(4, len(index), 2)]
    for _ in range(draws - 1):
        noise.append(rho * noise[-1] + (1 - rho**2) ** 0.5 * torch.randn(4, len(index), 2))
    z = q.loc + torch.einsum("nij,csnj->csni", q.scale_tril, torch.stack(noise, 1))
    return Posterior(exact.program, data=x, method="nuts()", draws={"z": z})


def test_chains_on_some_rows():
    """The rows are those of the chains, and draws that depend on one another are not taken for many."""
    _, exact = off(1.0)
    chains = chained(exact, torch.tensor([2, 7, 9]), rho=0.9)
    found = compare(exact, chains)
    z = found.sites["z"]
    assert z.c2st.shape == (3,) and (z.c2st - 0.5).abs().max() < 0.15
    assert (z.effective < 250).all() and (z.effective >= 50).all()
    assert "no clear difference" in found.sentences[0]
    assert compare(chains, exact).sites["z"].mean.shape == (3, 2)
    few = compare(exact, chained(exact, torch.tensor([2, 7]), rho=0.9, draws=50), classify=False)
    assert "fewer than 50 independent draws" in few.sentences[0]


def test_some_of_the_chains_rows():
    _, exact = off(1.0)
    wrong = chained(exact, torch.arange(12), rho=0.0)
    wrong.draws["z"][:, :, 7] += 5
    found = compare(exact, wrong, rows=[0, 7, 2], classify=False).sites["z"]
    assert (found.mean.abs() > 1).tolist() == [[False, False], [True, True], [False, False]]


def test_rows_next_to_other_plates():
    """The rows' dim need not be the first of a site."""

    def model(x: Tensor) -> None:
        with pyro.plate("parts", 3, dim=-2), batch_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with batch_plate(x):
            pyro.sample("x", dist.Normal(z.sum(-3, keepdim=True), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("parts", 3, dim=-2), batch_plate(x):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    posterior = untrained(model, guide, torch.randn(5, 2))
    draws = torch.randn(500, 3, 5, 2)
    draws[:, 1, 4, 0] += 4
    found = compare(posterior, {"z": draws}, rows=[4, 1], classify=False).sites["z"]
    assert found.mean.shape == (2, 3, 2)
    assert (found.mean < -1).nonzero().tolist() == [[0, 1, 0]]


def test_latents_that_rows_share():
    model, guide, x = together.example()
    posterior = untrained(model, guide, x)
    found = compare(posterior, posterior, rows=3, classify=False)
    assert found.sites["mean"].mean.shape == (3,) and found.sites["mean"].c2st.shape == ()
    assert found.sites["z"].mean.shape == (3, 3) and found.sites["z"].c2st.shape == (3,)


def test_sites_of_one_side_are_named():
    found = compare({"w": torch.randn(60), "u": torch.randn(60)}, {"w": torch.randn(60)}, classify=False)
    assert found.left_out == ("u",) and "'u': not compared" in str(found)
    assert found.sites["w"].mean.shape == ()


def test_a_number_that_is_fixed_says_nothing():
    a, b = torch.randn(300, 2), torch.randn(300, 2)
    a[:, 0] = b[:, 0] = 1.0
    found = compare({"w": a}, {"w": b}).sites["w"]
    assert found.mean[0] == found.log_sd_ratio[0] == found.wasserstein[0] == 0
    assert torch.isfinite(found.c2st)


def test_global_random_states_stay():
    a, b = off(0.7)
    state = torch.get_rng_state()
    one, two = compare(a, b, rows=1, draws=200), compare(a, b, rows=1, draws=200)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, getattr(two.sites["z"], n)) for n, v in vars(one.sites["z"]).items())
    other = compare(a, b, rows=1, draws=200, seed=1)
    assert not torch.equal(other.sites["z"].mean, one.sites["z"].mean)


def test_refusals():
    _, exact = off(1.0)
    normal = {"w": torch.randn(60, 2)}
    with pytest.raises(ValueError, match="share no site"):
        compare(normal, {"u": torch.randn(60, 2)})
    with pytest.raises(ValueError, match="a point, without a spread"):
        compare({"w": torch.zeros(60, 2)}, normal)
    with pytest.raises(ValueError, match=r"shape \(2,\) on one side, \(3,\) on the other"):
        compare(normal, {"w": torch.randn(60, 3)})
    with pytest.raises(ValueError, match="draws must be at least 50"):
        compare(exact, exact, draws=9)
    with pytest.raises(ValueError, match="at least 50 draws") as caught:
        compare({"w": torch.randn(9, 2)}, normal)
    assert "site 'w'" in str(caught.value.__notes__)
    with pytest.raises(ValueError, match="of 5 rows, where the other side or the data has 12"):
        compare(exact, {"z": torch.randn(60, 5, 2)})
    with pytest.raises(ValueError, match=r"neither side has draws \[draws, rows"):
        compare(normal, normal, local=["z"])


def test_guides_with_parameters_for_each_row():
    model, x = ppca(6)

    def each(x: Tensor) -> None:
        loc = pyro.param("loc", 10 * torch.arange(6.0).unsqueeze(-1).expand(6, 2).clone())
        with pyro.plate("data", 6):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    found = compare(untrained(model, each, x), {"z": torch.randn(500, 6, 2)}, rows=[4, 1], classify=False)
    torch.testing.assert_close(found.sites["z"].mean, torch.tensor([[40.0], [10.0]]).expand(2, 2), atol=0.3, rtol=0.1)


def test_no_warning_is_left_over():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(compare({"w": torch.randn(60)}, {"w": torch.randn(60)}), Comparison)


def test_a_posterior_over_shared_latents():
    y = torch.randn(20)

    def guide(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    found = compare(untrained(gaussian_mean, guide, y), {"mu": torch.randn(800)})
    assert found.rows is None and "no clear difference" in found.sentences[0]
