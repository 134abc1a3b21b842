"""Coverage and scores, where their values are known."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from truth import exact_guide, ppca

from pyro_ae import Posterior, batch_plate, observe
from pyro_ae.data import as_rows
from pyro_ae.diagnostics.calibration import central_coverage, expected_coverage
from pyro_ae.diagnostics.ranks import Coverage
from pyro_ae.diagnostics.scores import auroc, crps, nll, out_of_distribution
from pyro_ae.program import Program

NORMAL = dist.Normal(0.0, 1.0)


def posterior_of(model: Callable, guide: Callable | None, data: Any, **state: Any) -> Posterior:
    """A guide as it is, not trained."""
    rows = as_rows(data)
    program = Program(model, guide, total=rows.size)
    program.build(rows.first(None))
    return Posterior(program, data=rows, method="given", **state)


# --------------------------------------------------------------------------------------------- coverage


def at(coverage: Coverage, level: float) -> Tensor:
    return coverage.coverage[int((coverage.levels - level).abs().argmin())]


def rows_of(scale: float, shift: float = 0.0, rows: int = 2000, dims: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Draws ``[199, rows, dims]``, truths and posterior means, of posteriors that differ from row to row."""
    mean = 5 * torch.randn(rows, dims)
    sd = torch.rand(rows, dims) + 0.5
    return mean + sd * (shift + scale * torch.randn(199, rows, dims)), mean + sd * torch.randn(rows, dims), mean


def test_draws_of_the_posterior_are_covered_as_they_should_be() -> None:
    draws, truths, means = rows_of(1.0)
    for found in (
        central_coverage(draws, truths),
        expected_coverage(draws, truths),
        expected_coverage(draws, truths, references=means),
    ):
        assert found.ok(0.001) and found.rows == 2000 and "of 2000 truths" in str(found)
        assert float(found.distance.max()) < 0.045
        lower, upper = found.band(0.999)[1:]
        wide = (1,) * (found.coverage.dim() - 1)
        assert (found.coverage >= lower.reshape(-1, *wide)).all() and (found.coverage <= upper.reshape(-1, *wide)).all()


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_coverage_of_another_scale_is_the_closed_form(scale: float) -> None:
    draws, truths, means = rows_of(scale)
    for level in (0.2, 0.5, 0.9):
        central = 2 * NORMAL.cdf(scale * NORMAL.icdf(torch.tensor((1 + level) / 2))) - 1
        assert at(central_coverage(draws, truths), level).tolist() == pytest.approx([float(central)] * 3, abs=0.045)
    unit_draws, unit_truths = scale * torch.randn(199, 4000, 3), torch.randn(4000, 3)
    found = expected_coverage(
        torch.cat([unit_draws, unit_draws.flip(0)]), unit_truths, references=torch.zeros_like(unit_truths)
    )
    # a ball around the mean; of unequal widths of the box the three are nearly a ball
    radius = dist.Chi2(3.0).sample((400_000,)).median()
    ball = (dist.Chi2(3.0).sample((400_000,)) < scale**2 * radius).double().mean()
    assert float(at(found, 0.5)) == pytest.approx(float(ball), abs=0.03)
    assert not found.ok() and not central_coverage(draws, truths).ok() and not expected_coverage(draws, truths).ok()


def test_shifted_draws_are_not_covered() -> None:
    draws, truths, means = rows_of(1.0, 0.7)
    assert not expected_coverage(draws, truths, references=means).ok() and not central_coverage(draws, truths).ok()


def test_random_references_do_not_see_the_prior() -> None:
    z = torch.randn(3000, 2)
    prior = torch.randn(199, 3000, 2)
    seen = z + 0.5 * torch.randn(3000, 2)  # what a reference may depend on
    assert expected_coverage(prior, z).ok() and not expected_coverage(prior, z, references=seen).ok()


def test_coverage_does_not_depend_on_units() -> None:
    draws, truths, _ = rows_of(0.8, rows=200)
    scale = torch.tensor([1.0, 1e3, 1e-3])
    one, other = (expected_coverage(d, t) for d, t in ((draws, truths), (draws * scale, truths * scale)))
    assert torch.allclose(one.coverage, other.coverage, atol=0.006)


def test_false_alarms_are_as_rare_as_stated() -> None:
    sets = 1000
    found = central_coverage(torch.randn(50, 100, sets), torch.randn(100, sets))
    assert float((found.p_values() < 0.05).double().mean()) < 0.05 + 4 * (0.05 * 0.95 / sets) ** 0.5
    assert float((found.p_values() < 0.05).double().mean()) > 0.01


@pytest.mark.parametrize(
    ("draws", "truths", "words"),
    [
        (torch.zeros(99, 20, 2), torch.zeros(20, 3), r"got shapes \(99, 20, 2\) and \(20, 3\)"),
        (torch.zeros(99, 5, 2), torch.zeros(5, 2), "10 of each or more"),
        (torch.zeros(4, 20, 2), torch.zeros(20, 2), "10 of each or more"),
        (torch.full((99, 20, 2), torch.nan), torch.zeros(20, 2), "draws are NaN"),
        (torch.zeros(99, 20), torch.zeros(20), "flatten the event dims"),
    ],
)
def test_coverage_refuses(draws: Tensor, truths: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        expected_coverage(draws, truths)


@pytest.mark.parametrize("levels", [[0.0, 0.5], [0.5, 0.2], [[0.5]]])
def test_levels_are_checked(levels: list) -> None:
    with pytest.raises(ValueError, match="levels must ascend inside"):
        central_coverage(torch.randn(99, 20), torch.randn(20), levels=torch.tensor(levels))


# ----------------------------------------------------------------------------------------------- scores


def test_nll_is_that_of_the_mixture_of_draws() -> None:
    p = torch.rand(7, 5, 2)
    assert nll(p.log()) == pytest.approx(float(-p.mean(0).log().mean()), rel=1e-5)
    assert nll(torch.tensor([[-1000.0], [-1000.0]])) == pytest.approx(1000.0)
    assert nll(torch.tensor([[-math.inf, 0.0], [0.0, 0.0]])) == pytest.approx(math.log(2) / 2)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(4), r"got \(4,\)"),
        (torch.zeros(4, 0), r"got \(4, 0\)"),
        (torch.tensor([[0.0, torch.nan]]), "1 of 2 log-densities are NaN"),
        (torch.tensor([[0.0, math.inf]]), "plus infinity"),
    ],
)
def test_nll_refuses(value: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        nll(value)


def crps_of_normal(mean: Tensor, sd: Tensor, y: Tensor) -> Tensor:
    z = (y - mean) / sd
    return sd * (z * (2 * NORMAL.cdf(z) - 1) + 2 * NORMAL.log_prob(z).exp() - math.pi**-0.5)


def test_crps_of_a_normal() -> None:
    mean, sd, y = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([1.0, 2.0, 0.1]), torch.tensor([0.3, -3.0, -2.0])
    found = crps(mean + sd * torch.randn(200_000, 3), y)
    assert found.tolist() == pytest.approx(crps_of_normal(mean, sd, y).tolist(), rel=0.02)


@pytest.mark.parametrize("size", [2, 3, 10])
def test_crps_is_fair_for_few_draws(size: int) -> None:
    y = torch.tensor(0.7)
    found = crps(torch.randn(size, 200_000), y.expand(200_000))
    wanted = float(crps_of_normal(torch.tensor(0.0), torch.tensor(1.0), y))
    assert float(found.mean()) == pytest.approx(wanted, abs=5 * float(found.std()) / 200_000**0.5)


def test_crps_is_the_sum_over_pairs() -> None:
    draws, y = torch.randn(6, 3, 2), torch.randn(3, 2)
    pairs = (draws[:, None] - draws[None]).abs().sum((0, 1)) / (2 * 6 * 5)
    assert torch.allclose(crps(draws, y), (draws - y).abs().mean(0) - pairs, atol=1e-6)


@pytest.mark.parametrize(
    ("draws", "truths", "words"),
    [
        (torch.zeros(1, 3), torch.zeros(3), "two or more"),
        (torch.zeros(4, 3), torch.zeros(2), "got shapes"),
        (torch.zeros(4, 0), torch.zeros(0), "got shapes"),
        (torch.zeros(4, 1), torch.tensor([torch.nan]), "1 of 1 truths are NaN"),
    ],
)
def test_crps_refuses(draws: Tensor, truths: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        crps(draws, truths)


def test_auroc_is_the_share_of_pairs() -> None:
    inliers, outliers = torch.randint(0, 6, (40,)).float(), torch.randint(2, 9, (30,)).float()
    larger, equal = (outliers[:, None] > inliers).double(), (outliers[:, None] == inliers).double()
    assert auroc(inliers, outliers) == pytest.approx(float((larger + equal / 2).mean()))
    assert auroc(outliers, inliers) == pytest.approx(1 - auroc(inliers, outliers))
    assert auroc(torch.tensor([0.0, 1.0]), torch.tensor([math.inf])) == 1


@pytest.mark.parametrize(
    ("inliers", "outliers", "words"),
    [
        (torch.zeros(0), torch.zeros(3), r"inliers of shape \(0,\)"),
        (torch.zeros(3), torch.zeros(3, 1), r"outliers of shape \(3, 1\)"),
        (torch.zeros(3), torch.tensor([torch.nan]), "1 of 1 scores of the outliers are NaN"),
    ],
)
def test_auroc_refuses(inliers: Tensor, outliers: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        auroc(inliers, outliers)


# ----------------------------------------------------------------------------------- rows of another kind


def test_evidence_tells_other_rows() -> None:
    model, x = ppca(100)
    posterior = posterior_of(model, exact_guide(model), x)
    other = x + 2 * torch.randn(60, 5).repeat(2, 1)[:100]
    found = out_of_distribution(posterior, None, other)
    evidence = model.marginal().log_prob
    assert torch.allclose(found.inliers, -evidence(x), atol=1e-3)
    assert found.auroc == pytest.approx(auroc(-evidence(x), -evidence(other)), abs=1e-3) and 0.7 < found.auroc < 1
    assert "AUROC" in str(found) and len(found.outliers) == 100
    assert out_of_distribution(posterior, x, x).auroc == pytest.approx(0.5, abs=0.01)
    bent = x.clone()
    bent[:, 0] += 8  # off the plane of the latents
    assert out_of_distribution(posterior, x, bent, score="reconstruction").auroc > 0.95


def test_reconstruction_is_a_mean_over_draws() -> None:
    model, x = ppca(10)
    found = out_of_distribution(
        posterior_of(model, exact_guide(model), x), x, x + 1, score="reconstruction", draws=4000
    )
    exact, w = model.posterior(x), model.weight
    residual = (x - model.mean - exact.mean @ w.T).square().sum(-1) + (w @ exact.covariance_matrix[0] @ w.T).trace()
    wanted = residual / (2 * 0.7**2) + 5 * math.log(0.7 * (2 * math.pi) ** 0.5)
    assert found.inliers.tolist() == pytest.approx(wanted.tolist(), rel=0.03)


def classifier(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    with batch_plate(x):
        observe("y", dist.Categorical(logits=(x.unsqueeze(-1) * w).sum(-2)), y)


def test_entropy_of_classes() -> None:
    x, y = torch.randn(20, 2), torch.randint(0, 3, (20,))
    posterior = posterior_of(
        classifier, None, (x, y), draws={"w": torch.tensor([[3.0, 0.0, -3.0], [0.0, 0.0, 0.0]]).expand(2, 30, 2, 3)}
    )
    sure, unsure = torch.tensor([[9.0, 0.0]]).expand(8, 2), torch.tensor([[0.0, 5.0]]).expand(8, 2)
    labels = torch.zeros(8).long()
    found = out_of_distribution(posterior, (sure, labels), (unsure, labels), score="entropy")
    assert found.auroc == 1.0 and found.outliers.tolist() == pytest.approx([math.log(3)] * 8, abs=1e-4)
    same = out_of_distribution(posterior, (sure, labels), (unsure, labels), score="disagreement")
    assert same.outliers.abs().max() < 1e-5  # all draws agree


def test_bad_scores_are_refused() -> None:
    model, x = ppca(12)
    posterior = posterior_of(model, exact_guide(model), x)
    with pytest.raises(ValueError, match="unknown score 'likelihood'; known are 'evidence'"):
        out_of_distribution(posterior, x, x, score="likelihood")
    with pytest.raises(ValueError, match="has not one categorical site"):
        out_of_distribution(posterior, x, x, score="entropy")
    with pytest.raises(ValueError, match=r"and has shape \(12, 5\)"):
        out_of_distribution(posterior, x, x, score=lambda posterior, rows: x)
    with pytest.raises(ValueError, match="12 NaN"):
        out_of_distribution(posterior, x, x, score=lambda posterior, rows: torch.full((12,), torch.nan))
