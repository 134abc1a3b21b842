"""How good generated rows are: closed forms, brute force, and failures that are known."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.linalg
import torch
from torch import Tensor
from truth import exact_guide, ppca, untrained

from pyro_ae import batch_plate, datasets
from pyro_ae.diagnostics import quality
from pyro_ae.diagnostics.features import classifier_features, principal_features
from pyro_ae.diagnostics.quality import Quality, frechet_distance, generation_quality, precision_recall
from pyro_ae.latent_densities import gaussian
from pyro_ae.models.ppca import PPCA


def expected_coverage(n: int, m: int, k: int) -> float:
    """Of samples of one distribution: that not all of a row's k nearest neighbours are real."""
    return 1 - math.prod((n - i) / (m + n - i) for i in range(1, k + 1))


def brute_force(real: Tensor, generated: Tensor, k: int) -> tuple[float, ...]:
    def reach(x: Tensor) -> Tensor:
        apart = (x.unsqueeze(1) - x).norm(dim=-1)
        return apart.fill_diagonal_(torch.inf).sort(1).values[:, k - 1]

    apart = (real.unsqueeze(1) - generated).norm(dim=-1)
    in_real, in_generated = apart <= reach(real).unsqueeze(1), apart <= reach(generated)
    return tuple(
        float(v.double().mean()) for v in (in_real.any(0), in_generated.any(1), in_real.sum(0) / k, in_real.any(1))
    )


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("part", [1, 100, 2**22])
def test_as_by_brute_force(k: int, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "PART", part)
    real, generated = torch.randn(40, 3), 0.5 + torch.randn(30, 3)
    assert precision_recall(real, generated, k) == pytest.approx(brute_force(real, generated, k))


@pytest.mark.parametrize(("n", "m", "k"), [(40, 40, 3), (40, 20, 5), (25, 60, 1)])
def test_one_distribution(n: int, m: int, k: int) -> None:
    found = torch.tensor([precision_recall(torch.randn(n, 2), torch.randn(m, 2), k) for _ in range(400)])
    _, _, density, coverage = zip(found.mean(0).tolist(), (found.std(0) / 20).tolist(), strict=True)
    assert abs(density[0] - 1) < 4 * density[1]
    assert abs(coverage[0] - expected_coverage(n, m, k)) < 4 * coverage[1]
    if n == m:  # they are the same number, with the samples swapped
        assert abs(float(found[:, 0].mean() - found[:, 1].mean())) < 4 * float((found[:, 0] - found[:, 1]).std() / 20)
        assert float(found[:, 0].mean()) > 0.75


def modes(rows: int, kept: int = 4, noise: float = 0.1) -> Tensor:
    """Of four modes on a circle, the first few."""
    angle = torch.randint(kept, (rows,)) * math.pi / 2
    return torch.stack([angle.cos(), angle.sin()], -1) + noise * torch.randn(rows, 2)


def test_dropped_modes_lower_recall_alone() -> None:
    real = modes(1000)
    full, half = precision_recall(real, modes(1000)), precision_recall(real, modes(1000, kept=2))
    assert full.precision > 0.9 and full.recall > 0.9
    assert half.precision > 0.9 and half.density > 0.9
    assert half.recall == pytest.approx(0.5, abs=0.08) and half.coverage == pytest.approx(0.5, abs=0.08)


def test_noise_lowers_precision() -> None:
    real = modes(1000)
    noisy = precision_recall(real, modes(1000, noise=0.5))
    assert noisy.precision < 0.5 and noisy.density < 0.5
    assert noisy.recall > 0.9  # but not recall, as large generated balls cover what is real
    assert noisy.coverage < 0.8


def test_copies_of_one_row() -> None:
    real = torch.randn(500, 4)
    found = precision_recall(real, real[:1].expand(300, -1))
    assert found.precision == 1.0 and found.recall == 1 / 500
    assert found.coverage < 0.05


def test_an_outlier_fools_precision_and_not_density() -> None:
    real = torch.cat([torch.randn(500, 2), torch.tensor([[100.0, 0.0]])])
    generated = torch.tensor([50.0, 0.0]) + torch.randn(500, 2)
    found = precision_recall(real, generated)
    assert found.precision == 1.0
    assert found.density < 0.4 and found.coverage < 0.01


def test_order_shape_and_scale_do_not_matter() -> None:
    real, generated = torch.randn(60, 2, 3), 0.3 + torch.randn(50, 2, 3)
    found = precision_recall(real, generated)
    assert precision_recall(real[torch.randperm(60)], generated[torch.randperm(50)]) == found
    assert precision_recall(real.flatten(1), generated.flatten(1)) == found
    assert precision_recall(real, generated, features=lambda x: 8 * x.flatten(1)) == found
    assert precision_recall(real, generated, features=lambda x: x[:, 0, :1]) != found


def test_bad_samples_are_refused() -> None:
    x = torch.randn(10, 2)
    with pytest.raises(ValueError, match="10 real and 3 generated"):
        precision_recall(x, x[:3])
    with pytest.raises(ValueError, match=r"\(10, 2\) and \(10, 1\)"):
        precision_recall(x, x[:, :1])
    with pytest.raises(ValueError, match="1 of 10 generated rows have values that are missing"):
        precision_recall(x, x.index_fill(0, torch.tensor([3]), torch.nan))
    with pytest.raises(ValueError, match="neighbours must be"):
        precision_recall(x, x, 0)
    with pytest.raises(ValueError, match="features must give"):
        precision_recall(x, x, features=lambda rows: rows.sum())
    with pytest.raises(ValueError, match="features must give finite values"):
        precision_recall(x, x, features=lambda rows: rows.log())


# ------------------------------------------------------------------------------------------ Frechet distance


def with_moments(mean: Tensor, root: Tensor, rows: int) -> Tensor:
    """Rows whose mean and covariance ``root root'`` are exact."""
    z = torch.randn(rows, root.shape[1]).double()
    q = torch.linalg.qr(z - z.mean(0)).Q  # columns at right angles, of length 1 and mean 0
    return mean + (rows - 1) ** 0.5 * q @ root.T.double()


def test_the_distance_of_normals_with_known_moments() -> None:
    zero, one, scales = torch.zeros(3), torch.eye(3), torch.tensor([[0.5, 1.0, 4.0], [2.0, 1.0, 1.0]])
    x, delta = with_moments(zero, one, 50), torch.tensor([1.0, -2.0, 3.0])
    assert frechet_distance(x, with_moments(zero, one, 20)) == pytest.approx(0.0, abs=1e-5)
    assert frechet_distance(x, with_moments(delta, one, 70)) == pytest.approx(14.0, rel=1e-5)
    wide, narrow = (with_moments(zero, scale.diag(), 40) for scale in scales)
    assert frechet_distance(wide, narrow) == pytest.approx(1.5**2 + 0 + 3**2, rel=1e-5)
    turned = torch.linalg.qr(torch.randn(3, 3)).Q
    assert frechet_distance(x, with_moments(zero, turned, 40)) == pytest.approx(0.0, abs=1e-5)
    assert frechet_distance(wide @ turned.double(), narrow @ turned.double()) == pytest.approx(11.25, rel=1e-5)


def test_the_distance_is_that_by_the_root_of_a_matrix() -> None:
    a, b = torch.randn(60, 4) @ torch.randn(4, 4), 0.5 + torch.randn(30, 4) @ torch.randn(4, 4)
    s, t = (v.double().T.cov().numpy() for v in (a, b))
    apart = float((a.double().mean(0) - b.double().mean(0)).square().sum())
    wanted = apart + np.trace(s + t - 2 * np.real(scipy.linalg.sqrtm(s @ t)))
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-4)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    assert frechet_distance(a, b, features=lambda x: 3 * x) == pytest.approx(9 * wanted, rel=1e-4)


def test_covariances_may_be_singular() -> None:
    line, other = torch.tensor([[3.0], [4.0]]), torch.tensor([[-4.0], [3.0]])  # at a right angle to one another
    along, across = (with_moments(torch.zeros(2), root, 10) for root in (line, other))
    assert frechet_distance(along, 2 * along) == pytest.approx(25.0, rel=1e-5)
    assert frechet_distance(along, across) == pytest.approx(50.0, rel=1e-5)
    few = torch.randn(3, 20)  # fewer rows than numbers
    assert frechet_distance(few, few) == pytest.approx(0.0, abs=1e-4)
    assert frechet_distance(few, few + 1) == pytest.approx(20.0, rel=1e-4)
    with pytest.raises(ValueError, match="got 3 real and 1 generated"):
        frechet_distance(few, few[:1])


# -------------------------------------------------------------------------------------------- feature spaces


def test_principal_features_are_white() -> None:
    mix = torch.randn(6, 6)
    x = torch.randn(500, 6) @ mix + 3.0
    found = principal_features(x, share=1.0)(x)
    torch.testing.assert_close(found.T.cov(), torch.eye(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    exact = torch.linalg.solve(x.T.cov().double(), (x - x.mean(0)).double().T).T  # distances are Mahalanobis'
    expected = ((x - x.mean(0)).double() * exact).sum(1)
    torch.testing.assert_close(found.double().square().sum(1), expected, atol=1e-3, rtol=1e-3)
    few = torch.randn(500, 3) * torch.tensor([10.0, 10.0, 0.1])
    assert principal_features(few).about.startswith("2 principal")
    assert principal_features(few, most=1)(few).shape == (500, 1)
    with pytest.raises(ValueError, match="that differ"):
        principal_features(torch.ones(5, 2))


def test_classifier_features_see_what_labels_are_told_by() -> None:
    x = torch.randn(600, 10)
    y = (x[:, 0] > 0).long()
    z = classifier_features(x[:300], y[:300])(x[300:])
    apart, wide = z[y[300:] == 1].mean(0) - z[y[300:] == 0].mean(0), z.std(0)
    assert float((apart.abs() / wide).max()) > 1.0
    with pytest.raises(ValueError, match="two kinds"):
        classifier_features(x, torch.zeros(600))
    with pytest.raises(ValueError, match="one for each of the 600 rows"):
        classifier_features(x, y[:3])


# ------------------------------------------------------------------------------------------ posteriors


def quality_of(change: str, **options: object) -> Quality:
    """PPCA as it is, without its first latent, or with more noise, against rows of it as it is."""
    torch.manual_seed(0)
    model, x = ppca(800)
    wrong = PPCA(features=5, latent=2, noise=2.0 if change == "noise" else 0.7)
    wrong.load_state_dict({k: v for k, v in model.state_dict().items()}, strict=True)
    with torch.no_grad():
        if change == "noise":
            wrong.log_noise.add_(1.0)
        if change == "narrow":
            wrong.weight[:, 0] = 0.0
    return generation_quality(untrained(wrong, exact_guide(wrong), x), **options)  # type: ignore[arg-type]


def test_a_perfect_model_scores_as_real_rows_do() -> None:
    found = quality_of("none")
    assert found.rows == 400 and found.site == "x" and found.neighbours == 3
    for name, value in vars(found.generated).items():
        real, spread = getattr(found.real, name), getattr(found.spread, name)
        assert abs(value - real) < 5 * spread, name
    assert found.real.coverage == pytest.approx(expected_coverage(400, 400, 3), abs=0.03)
    assert found.real.density == pytest.approx(1.0, abs=0.1)
    assert abs(found.real.mmd) < 0.01 and abs(found.real.energy) < 0.01


def test_wrong_models_are_found() -> None:
    perfect, noisy, narrow = map(quality_of, ("none", "noise", "narrow"))
    assert noisy.generated.precision < perfect.generated.precision - 0.2
    assert narrow.generated.recall < perfect.generated.recall - 0.1
    for wrong in (noisy, narrow):
        assert wrong.generated.mmd > 5 * abs(wrong.real.mmd)
        assert wrong.generated.energy > 5 * abs(wrong.real.energy)
        assert wrong.generated.sliced_wasserstein > 2 * wrong.real.sliced_wasserstein


def test_a_seed_repeats_it_and_leaves_the_random_state_alone() -> None:
    model, x = ppca(60)
    posterior = untrained(model, exact_guide(model), x)
    before = torch.get_rng_state()
    found = generation_quality(posterior)
    assert torch.equal(torch.get_rng_state(), before)
    assert generation_quality(posterior) == found
    assert generation_quality(posterior, seed=1) != found


def test_other_feature_spaces_and_what_is_said_of_them() -> None:
    model, x = ppca(200)
    posterior = untrained(model, exact_guide(model), x)
    text = str(generation_quality(posterior))
    assert "not FID" in text and "cannot be compared" in text and "components (whitened) of 5 numbers" in text

    def first_three(rows: Tensor) -> Tensor:
        return rows[:, :3]

    own = generation_quality(posterior, features=first_three)
    assert "first_three, given" in str(own)
    scaled = generation_quality(posterior, features=lambda rows: 1000 * rows[:, :3])  # divergences have no unit
    assert scaled.generated.mmd == pytest.approx(own.generated.mmd, rel=1e-3)
    told = generation_quality(posterior, labels=(x[:, 0] > 0).long())
    assert generation_quality(posterior, n=20).features.startswith("2 principal")  # a tenth of the rows
    assert told.rows == 50 and "trained to tell 2 labels apart" in told.features
    assert told.real.coverage == pytest.approx(expected_coverage(50, 50, 3), abs=0.12)


def test_rows_of_another_density_of_codes() -> None:
    """The codes of rows that are spread out are too: a normal density of them is nearer than the prior."""
    model, x = ppca(800)
    center = model.mean
    posterior = untrained(model, exact_guide(model), center + 3 * (x - center))
    prior, fitted = generation_quality(posterior), generation_quality(posterior, density=gaussian(), code="z")
    assert fitted.generated.recall > prior.generated.recall + 0.1
    assert fitted.generated.energy < 0.5 * prior.generated.energy
    means = generation_quality(posterior, density=gaussian(), mean=True)
    assert means.generated.recall < fitted.generated.recall


def test_digits_of_a_normal_distribution_are_found_out() -> None:
    data = datasets.load("digits").train
    x = data["x"].flatten(1) + 0.01 * torch.randn(len(data["x"]), 64)
    mean, scale = x.mean(0), torch.linalg.cholesky(x.T.cov())

    def model(x: Tensor | None = None, *, size: int = 1) -> None:
        with batch_plate(x, size):
            pyro.sample("x", dist.MultivariateNormal(mean, scale_tril=scale), obs=x)

    posterior = untrained(model, None, x)
    for labels in (None, data["y"]):
        found = generation_quality(posterior, n=600, labels=labels)
        assert found.generated.coverage < found.real.coverage - 10 * found.spread.coverage
        assert found.generated.density < found.real.density - 5 * found.spread.density


def test_bad_posteriors_are_refused() -> None:
    model, x = ppca(60)
    posterior = untrained(model, exact_guide(model), x)
    with pytest.raises(ValueError, match="missing values"):
        generation_quality(posterior, x.index_fill(0, torch.tensor([1]), torch.nan))
    with pytest.raises(ValueError, match="2 real rows"):
        generation_quality(posterior, x[:2])
    with pytest.raises(ValueError, match="n must be at least 2"):
        generation_quality(posterior, n=1)
    with pytest.raises(ValueError, match="'y' is not observed; there are 'x'"):
        generation_quality(posterior, site="y")
    with pytest.raises(ValueError, match="give one of them"):
        generation_quality(posterior, features=lambda v: v, labels=x[:, 0] > 0)
    with pytest.raises(ValueError, match="labels must be one for each row"):
        generation_quality(posterior, labels=(x[:, 0] > 0)[:50])

    def two(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    several = untrained(two, None, (x[:, 0], x[:, 1]))
    with pytest.raises(ValueError, match="'x' and 'y'|'x', 'y'"):
        generation_quality(several)
    assert generation_quality(several, site="y").site == "y"
