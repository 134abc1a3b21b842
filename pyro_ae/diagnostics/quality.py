"""How good generated rows are: precision, recall and divergences, in a feature space that needs no download."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..data import LoadedRows
from ..divergences import energy_distance, mmd, sliced_wasserstein
from ..program import validation
from ..runtime import seeded
from ..sites import Recorder, quote
from .features import Features, classifier_features, principal_features
from .rows import evenly

if TYPE_CHECKING:
    from ..posterior import Posterior

PART = 2**22
"""Distances that are worked on at once."""

PAIRS = 2000
"""Rows of each sample, at most, whose distances to one another a divergence takes."""

SPLITS = 5
"""Random halvings that scores are averaged over."""


class PrecisionRecall(NamedTuple):
    """How two samples cover one another; see :func:`precision_recall`.

    Attributes:
        precision: share of the generated rows that are among real ones, in [0, 1].
        recall: share of the real rows that are among generated ones, in [0, 1].
        density: how many real neighbourhoods a generated row is in, by how many a real one would be; may exceed 1.
        coverage: share of the real neighbourhoods with a generated row in them, in [0, 1].
    """

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(
    real: Tensor, generated: Tensor, neighbours: int = 3, features: Callable[[Tensor], Tensor] | None = None
) -> PrecisionRecall:
    r"""Whether generated rows look real (precision, density), and whether all that is real is there (recall, coverage).

    .. math:: \text{precision} = \frac{1}{M} \sum_j 1\Big[y_j \in \bigcup_i B_k(x_i)\Big], \quad
        \text{recall} = \frac{1}{N} \sum_i 1\Big[x_i \in \bigcup_j B_k(y_j)\Big]

    .. math:: \text{density} = \frac{1}{k M} \sum_j \sum_i 1[y_j \in B_k(x_i)], \quad
        \text{coverage} = \frac{1}{N} \sum_i 1\big[\exists j: y_j \in B_k(x_i)\big]

    B_k(x) is the ball around a row that reaches to its k-th nearest neighbour in its own sample. For samples of one
    distribution the expected density is 1, and the expected coverage 1 - (N-1)...(N-k) / (M+N-1)...(M+N-k), which is
    about 1 - 2^-k for M = N. A single real outlier has a large ball, that raises precision, but density and coverage
    hardly. Their paper has k = 5, that of precision and recall k = 3.

    References:
        Improved Precision and Recall Metric for Assessing Generative Models (Kynkaanniemi, Karras, Laine, Lehtinen
        and Aila, 2019) https://arxiv.org/abs/1904.06991
        Reliable Fidelity and Diversity Metrics for Generative Models (Naeem, Oh, Uh, Choi and Yoo, 2020)
        https://arxiv.org/abs/2002.09797

    Arguments:
        real: ``[N, *row]``, N above ``neighbours``.
        generated: ``[M, *row]``, M above ``neighbours``.
        neighbours: k.
        features: rows ``[*, *row]`` to ``[*, d]``, whose Euclidean distances count; the rows as they are by default.

    Raises:
        ValueError: for too few rows, rows of different shape, and values that are not finite.

    Example:
        >>> real = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
        >>> precision_recall(real, torch.tensor([[0.5], [1.5], [2.5]]), neighbours=1)  # one of two modes
        PrecisionRecall(precision=1.0, recall=0.5, density=1.6666666666666667, coverage=0.5)
    """
    a, b = _pair(real, generated, features)
    if not isinstance(neighbours, int) or neighbours < 1:
        raise ValueError(f"neighbours must be a whole number of at least 1, got {neighbours!r}")
    if min(len(a), len(b)) <= neighbours:
        raise ValueError(
            f"the {neighbours} nearest neighbours of a row need {neighbours + 1} rows or more, got {len(a)} real and "
            f"{len(b)} generated rows"
        )
    reach, reach_generated = _reach(a, neighbours), _reach(b, neighbours)
    inside = torch.zeros(len(b))  # of how many real balls each generated row is
    found = covered = 0
    for distances, radius in zip(_distances(a, b), reach.split(_rows_at_once(b)), strict=True):
        within = distances <= radius.unsqueeze(1)
        inside += within.sum(0)
        covered += int(within.any(1).sum())
        found += int((distances <= reach_generated).any(1).sum())
    n, m = len(a), len(b)
    return PrecisionRecall(
        int((inside > 0).sum()) / m, found / n, float(inside.double().sum()) / (neighbours * m), covered / n
    )


def frechet_distance(real: Tensor, generated: Tensor, features: Callable[[Tensor], Tensor] | None = None) -> float:
    r"""The squared Frechet distance between normal distributions with the means and covariances of two samples.

    .. math:: \|\mu_1 - \mu_2\|^2 + \text{tr}\big(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1 \Sigma_2)^{1/2}\big)

    It is the squared Wasserstein distance of the two normals, in squared units of the features. It is FID only where
    these are those of the Inception network that FID is defined by. Fewer rows make it larger, by an amount that
    differs from model to model: compare samples of one size, as large as can be, in one feature space.

    References:
        The Frechet Distance between Multivariate Normal Distributions (Dowson and Landau, 1982)
        https://doi.org/10.1016/0047-259X(82)90077-X
        GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (Heusel, Ramsauer,
        Unterthiner, Nessler and Hochreiter, 2017) https://arxiv.org/abs/1706.08500
        Effectively Unbiased FID and Inception Score and Where to Find Them (Chong and Forsyth, 2020)
        https://arxiv.org/abs/1911.07023

    Arguments:
        real: ``[N, *row]``, N of at least 2.
        generated: ``[M, *row]``, M of at least 2.
        features: rows ``[*, *row]`` to ``[*, d]``; the rows as they are by default.

    Raises:
        ValueError: for too few rows, rows of different shape, and values that are not finite.

    Example:
        >>> real = torch.randn(1000, 3)
        >>> round(frechet_distance(real, real + torch.tensor([3.0, 0.0, 4.0])), 3)
        25.0
    """
    samples = [v.double() for v in _pair(real, generated, features)]
    if min(map(len, samples)) < 2:
        raise ValueError(f"a covariance needs two rows or more, got {len(real)} real and {len(generated)} generated")
    means = [v.mean(0) for v in samples]
    # R of X = QR is a root of the covariance, even of one that is singular; the singular values of R1 R2' are the
    # square roots of the eigenvalues of the product of both covariances
    roots = [torch.linalg.qr((v - m) / (len(v) - 1) ** 0.5, mode="r").R for v, m in zip(samples, means, strict=True)]
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    apart = (means[0] - means[1]).square().sum() + sum(r.square().sum() for r in roots) - 2 * cross
    return max(0.0, float(apart))


def _rows_at_once(b: Tensor) -> int:
    return max(1, PART // len(b))


def _distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """The distances of a part of ``a`` to all of ``b``, part by part; equal rows are at distance 0."""
    for part in a.split(_rows_at_once(b)):
        yield torch.cdist(part, b, compute_mode="donot_use_mm_for_euclid_dist")


def _reach(x: Tensor, neighbours: int) -> Tensor:
    """The distance of each row to its k-th nearest neighbour, ``[N]``; the nearest of all is the row itself."""
    return torch.cat([d.topk(neighbours + 1, largest=False).values[:, -1] for d in _distances(x, x)])


def _pair(real: Tensor, generated: Tensor, features: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
    """Both samples as finite rows ``[*, d]``."""
    if real.dim() < 1 or real.shape[1:] != generated.shape[1:]:
        raise ValueError(
            f"real and generated rows differ in shape: {tuple(real.shape)} and {tuple(generated.shape)}, of which all "
            "but the first dim must agree"
        )
    for name, rows in (("real", real), ("generated", generated)):
        bad = int((~torch.isfinite(rows.reshape(len(rows), -1))).any(1).sum()) if len(rows) else 0
        if bad:
            raise ValueError(
                f"{bad} of {len(rows)} {name} rows have values that are missing or infinite, which no distance can be "
                "taken of: leave such rows out, or fill them in"
            )
    with torch.no_grad():
        a, b = (rows.detach() if features is None else features(rows.detach()) for rows in (real, generated))
    for rows, found in ((real, a), (generated, b)):
        if features is not None and (found.dim() != 2 or len(found) != len(rows) or not torch.isfinite(found).all()):
            raise ValueError(f"features must give finite values [{len(rows)}, d] for as many rows, got {found}")
    a, b = (v.cpu().to(torch.get_default_dtype()).reshape(len(v), -1) for v in (a, b))
    return a, b


@dataclass(frozen=True)
class Scores:
    """What one sample scores against real rows.

    Attributes:
        precision: share of the sample that looks real.
        recall: share of the real rows that the sample can look like.
        density: as precision, and robust to real outliers; 1 is to be expected of real rows.
        coverage: as recall, and robust to generated outliers.
        mmd: squared maximum mean discrepancy, unbiased; about 0 for real rows.
        energy: energy distance, unbiased; about 0 for real rows.
        sliced_wasserstein: squared distance, averaged over lines; above 0 for real rows too, as samples are finite.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    mmd: float
    energy: float
    sliced_wasserstein: float


@dataclass(frozen=True)
class Quality:
    """What generated rows score, and what perfect ones would.

    Attributes:
        generated: scores of generated rows against one half of the real ones, averaged over random halvings.
        real: the same for the other half of the real rows, which is as large: what perfect samples would score.
        spread: the standard deviation of the real half's scores over the halvings.
        features: what the feature space is.
        site: whose rows they are.
        rows: how many there are in each half.
        neighbours: k.
    """

    generated: Scores
    real: Scores
    spread: Scores
    features: str
    site: str
    rows: int
    neighbours: int

    def __str__(self) -> str:
        columns = [asdict(scores) for scores in (self.generated, self.real, self.spread)]
        lines = [
            f"{self.rows} generated rows of '{self.site}' against as many real ones, k = {self.neighbours}.",
            f"{'':<20}{'generated':>12}{'other real':>12}{'+-':>12}",
            *(f"{name:<20}" + "".join(f"{column[name]:>12.4g}" for column in columns) for name in columns[0]),
        ]
        about = (
            f"Features: {self.features}. This is not FID: numbers of different feature spaces cannot be compared, nor "
            "those of different numbers of rows."
        )
        return "\n".join([*lines, *textwrap.wrap(about, 100)])


@torch.no_grad()
def generation_quality(
    posterior: Posterior,
    data: Any = None,
    n: int = 1000,
    features: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    *,
    labels: Tensor | None = None,
    neighbours: int = 3,
    site: str | None = None,
    **options: Any,
) -> Quality:
    """How good the rows are that a posterior generates, beside what real rows score among themselves.

    The real rows are split into random halves: one is the reference, the other the yardstick. This is not FID: the
    feature space is the user's, or one made of the data at hand, and scores of different feature spaces cannot be
    compared. A model that repeats the rows it was trained on looks perfect unless ``data`` is held out.

    References:
        Reliable Fidelity and Diversity Metrics for Generative Models (Naeem, Oh, Uh, Choi and Yoo, 2020)
        https://arxiv.org/abs/2002.09797

    Arguments:
        posterior: of any engine, whose model generates rows.
        data: real rows, best held out; those of the fit by default.
        n: how many of them at most, spread evenly; as many are generated.
        features: rows ``[*, *row]`` to ``[*, d]``. By default whitened principal components of the real rows, at
            most 50 and a tenth of the rows.
        seed: of all draws; the global random states stay as they were.
        labels: of the rows of ``data``, ``[N]``. A small network is then trained on every second row to tell them
            apart, its last hidden layer is the feature space, and the other rows are scored.
        neighbours: k of precision, recall, density and coverage.
        site: the observed site whose rows are compared, where there are several.
        options: of :meth:`~pyro_ae.posterior.Posterior.generate`, such as ``mean=``, ``density=`` and ``code=``.

    Raises:
        ValueError: for missing values, too few rows, features that do not fit, or a site that is not observed.

    Example:
        >>> from pyro_ae import fit, svi
        >>> from pyro_ae.models import ppca
        >>> model, guide, x = ppca.example()
        >>> posterior = fit(model, x, guide=guide, method=svi(steps=10), seed=0, progress=False)
        >>> generation_quality(posterior).rows
        8
    """
    if features is not None and labels is not None:
        raise ValueError("features and labels are two ways to a feature space: give one of them")
    with seeded(seed):
        real, site, kept = _real(posterior, data, n if labels is None else 2 * n, site)
        if labels is None:
            space = features or principal_features(real, most=min(50, max(2, len(real) // 10)))
        else:
            labels = torch.as_tensor(labels)
            if labels.dim() != 1 or len(labels) <= int(kept.max()):
                raise ValueError(f"labels must be one for each row of data, got shape {tuple(labels.shape)}")
            seen = classifier_features(real[1::2], labels[kept][1::2])
            real = real[::2]
            whitened = principal_features(seen(real), most=10**9)
            space = Features(lambda rows: whitened(seen(rows)), f"{seen.about}, whitened")
        half = len(real) // 2
        if half <= neighbours:
            raise ValueError(
                f"{len(real)} real rows to score are two halves of {half}, and the {neighbours} nearest neighbours of "
                f"a row need more than {neighbours}: give more rows, or fewer neighbours"
            )
        made = posterior.generate(2 * half, **options)
        generated = made[site] if isinstance(made, dict) else made
        a, b = _pair(real, generated, space)
        a, b = (v / a.var(0).mean().sqrt().clamp_min(1e-12) for v in (a, b))  # kernels expect a variance of about 1
        found = []
        for _ in range(SPLITS):
            order, some = torch.randperm(len(a)), torch.randperm(len(b))[:half]
            reference, other = a[order[:half]], a[order[half : 2 * half]]
            found.append([_scores(reference, sample, neighbours) for sample in (b[some], other)])
    scores = torch.tensor(found, dtype=torch.double)  # [splits, 2, scores]
    generated_scores, real_scores = (Scores(*row) for row in scores.mean(0).tolist())
    about = space.about if isinstance(space, Features) else f"{getattr(space, '__name__', type(space).__name__)}, given"
    spread = Scores(*scores[:, 1].std(0).tolist())
    return Quality(generated_scores, real_scores, spread, about, site, half, neighbours)


def _scores(real: Tensor, sample: Tensor, neighbours: int) -> list[float]:
    few, some = real[:PAIRS], sample[:PAIRS]
    divergences = [float(d(few, some)) for d in (mmd(), energy_distance(), sliced_wasserstein())]
    return [*precision_recall(real, sample, neighbours), *divergences]


def _real(posterior: Posterior, data: Any, n: int, site: str | None) -> tuple[Tensor, str, Tensor]:
    """Some real rows ``[n, *row]``, the site that observes them, and which rows of the data they are."""
    rows = posterior._rows(data)
    if isinstance(rows, LoadedRows):
        raise ValueError("this compares rows at once, and a DataLoader brings them in batches: pass data as a tensor")
    if rows.has_missing:
        raise ValueError("the data has missing values (NaN), and whole rows are compared: pass complete rows as data")
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    size = rows.need_size()
    index = evenly(size, n)
    args, kwargs = rows.take(index).call()
    with posterior.program.active(), validation(False), Recorder() as run:
        posterior.program.model.fn(*args, **kwargs)
    observed = posterior.program.layout.names("observed")
    if not observed:
        raise ValueError("the model observes nothing, so there are no real rows to compare with")
    if site is None and len(observed) > 1:
        raise ValueError(f"the model observes {quote(observed)}: name one of them as site")
    site = observed[0] if site is None else site
    if site not in observed:
        raise ValueError(f"site '{site}' is not observed; there are {quote(observed)}")
    real = run.sites[site]["value"].detach()
    if real.dim() < 1 or len(real) != len(index):
        raise ValueError(f"site '{site}' has shape {tuple(real.shape)}, which is not one row for each of {len(index)}")
    return real.cpu().to(torch.get_default_dtype()), site, index
