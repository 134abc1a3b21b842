"""Ranks, their exact band and the test that they are uniform."""

from typing import Any

import pyro.distributions as dist
import pytest
import torch

from pyro_ae.diagnostics.ranks import Ranks, ecdf_band, inside, rank_points, ranks_of, shape_of, tails


def test_ranks_count_the_draws_below() -> None:
    draws = torch.randn(30, 4, 2)
    truths = torch.randn(4, 2)
    brute = [[sum(float(d) < float(truths[i, j]) for d in draws[:, i, j]) for j in range(2)] for i in range(4)]
    assert ranks_of(truths, draws).tolist() == brute


def test_ranks_of_discrete_numbers_are_uniform() -> None:
    p = Ranks({"k": ranks_of(torch.randint(0, 3, (400, 500)), torch.randint(0, 3, (20, 400, 500)))}, 20).p_values()["k"]
    assert 0.02 < float((p < 0.05).double().mean()) < 0.09


def exact_band_probability(replications: int, draws: int, band: Any) -> float:
    """By enumerating all histograms of ranks."""
    counts = torch.cartesian_prod(*[torch.arange(replications + 1)] * draws).double()
    counts = counts[counts.sum(1) <= replications]
    ecdf = counts.cumsum(1) / replications
    within = ((ecdf >= band.lower - 1e-6) & (ecdf <= band.upper + 1e-6)).all(1)
    counts = torch.cat([counts, replications - counts.sum(1, keepdim=True)], 1)
    cells = torch.full((draws + 1,), 1 / (draws + 1), dtype=torch.double)
    return float(dist.Multinomial(replications, cells).log_prob(counts[within]).exp().sum())


def test_probability_of_the_band_is_exact() -> None:
    points = rank_points(4).double() / 5
    for prob in (0.5, 0.8, 0.95):
        band = ecdf_band(12, 4, prob)
        assert exact_band_probability(12, 4, band) >= prob
    table = tails(points, 12)
    for level in (0.02, 0.1, 0.3):
        counts = [(row > level).nonzero().squeeze(-1) for row in table]
        lower, upper = (torch.stack([f(c) for c in counts]) / 12 for f in (torch.amin, torch.amax))
        found = float(inside(points, 12, torch.tensor([level])))
        same = type(ecdf_band(12, 4))(points, lower, upper)
        assert found == pytest.approx(exact_band_probability(12, 4, same), abs=1e-10)


@pytest.mark.parametrize(("replications", "draws"), [(200, 100), (50, 19), (300, 400)])
def test_band_and_test_have_their_level(replications: int, draws: int) -> None:
    sets = 2000
    ranks = Ranks({"z": torch.randint(0, draws + 1, (replications, sets))}, draws)
    ecdf, band = ranks.ecdf()["z"], ecdf_band(replications, draws)
    within = (ecdf >= band.lower[:, None] - 1e-6) & (ecdf <= band.upper[:, None] + 1e-6)
    error = 4 * (0.95 * 0.05 / sets) ** 0.5
    share = float(within.all(0).double().mean())
    assert 0.95 - error < share < 0.97 + error  # counts are whole numbers, so that the band is a little wide
    p = ranks.p_values()["z"]
    for level in (0.01, 0.05, 0.2):
        alarms, error = float((p <= level).double().mean()), 4 * (level * (1 - level) / sets) ** 0.5
        assert 0.7 * level - error < alarms < level + error
    assert torch.equal(p > 0.05, within.all(0)) or float((p > 0.05).double().mean()) == pytest.approx(share, abs=0.01)


def test_holm_is_by_hand() -> None:
    once = torch.randint(0, 21, (60, 1))  # two p-values that are equal, of which neither may be adjusted by less
    ranks = Ranks({"a": once.expand(60, 2), "b": torch.randint(0, 5, (60,))}, 20)
    p, adjusted = ranks.p_values(), ranks.adjusted()
    flat = torch.cat([p["a"], p["b"].reshape(1)])
    order = flat.argsort().tolist()
    wanted, largest = [0.0] * 3, 0.0
    for i, k in enumerate(order):
        largest = max(largest, min(1.0, (3 - i) * float(flat[k])))
        wanted[k] = largest
    assert torch.cat([adjusted["a"], adjusted["b"].reshape(1)]).tolist() == pytest.approx(wanted)
    assert not ranks.ok() and "b: sloped, as of draws that are too high" in ranks.findings()[0]


def test_shapes_have_words() -> None:
    truth, draws = torch.randn(500), torch.randn(99, 500)
    words = {
        "too narrow": shape_of(ranks_of(truth, draws / 2), 99),
        "too wide": shape_of(ranks_of(truth, draws * 2), 99),
        "too high": shape_of(ranks_of(truth, draws + 0.5), 99),
        "too low": shape_of(ranks_of(truth, draws - 0.5), 99),
    }
    assert all(word in text and ";" not in text for word, text in words.items()), words


@pytest.mark.parametrize(
    ("ranks", "draws"), [({"z": torch.zeros(5)}, 20), ({"z": torch.zeros(50)}, 3), ({}, 20)], ids=str
)
def test_too_few_are_refused(ranks: dict, draws: int) -> None:
    with pytest.raises(ValueError, match="10 replications and draws or more"):
        Ranks(ranks, draws)


def test_bad_draws_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 of 6 draws are NaN"):
        ranks_of(torch.zeros(2), torch.tensor([[0.0, 1.0], [0.0, torch.nan], [0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"got \(3,\) and \(2, 2\)"):
        ranks_of(torch.zeros(3), torch.zeros(2, 2))
