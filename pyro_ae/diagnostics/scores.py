"""How good predictions are, by proper scores; and whether a posterior tells rows of another kind from its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ..prediction import Prediction
from ..runtime import seeded
from .anomaly import Read, by_row, likelihood_scores, reconstruction_scores

if TYPE_CHECKING:
    from ..posterior import Posterior

Score: TypeAlias = "Callable[[Posterior, Any], Tensor]"
"""A posterior and rows to a number for each, ``[N]``, larger for rows that are less like those of the fit."""


def nll(log_likelihood: Tensor) -> float:
    r"""The mean negative log predictive density, in nats.

    .. math:: -\frac{1}{N} \sum_n \log \frac{1}{S} \sum_s p(x_n \mid \theta_s)

    Arguments:
        log_likelihood: of each row at each draw, ``[S, *batch]``, as of ``posterior.log_likelihood(data)["x"]``.

    Returns:
        The mean over the batch; infinity where no draw allows for a row.

    Raises:
        ValueError: for no draws, no rows, NaN, or densities that are infinite.

    Example:
        >>> round(nll(torch.tensor([[0.2, 0.5], [0.6, 0.5]]).log()), 4)  # of probabilities 0.4 and 0.5
        0.8047
    """
    if log_likelihood.dim() < 2 or not log_likelihood.numel():
        raise ValueError(f"nll takes log-densities [S, *batch] of a row or more, got {tuple(log_likelihood.shape)}")
    log_likelihood = log_likelihood.double()
    if bad := int((log_likelihood.isnan() | (log_likelihood == math.inf)).sum()):
        raise ValueError(f"{bad} of {log_likelihood.numel()} log-densities are NaN or plus infinity")
    return float((math.log(len(log_likelihood)) - log_likelihood.logsumexp(0)).mean())


def crps(draws: Tensor, truths: Tensor) -> Tensor:
    r"""The continuous ranked probability score of draws, fair for their number.

    .. math:: \frac{1}{S} \sum_s |y_s - y| - \frac{1}{2 S (S - 1)} \sum_{s, t} |y_s - y_t|

    Its expectation is that of infinitely many draws, whatever S, so that it can compare predictions of different S; it
    may then be negative. It is in units of y, 0 for a certain and right prediction, and the absolute error for a point.

    References:
        Strictly Proper Scoring Rules, Prediction, and Estimation (Gneiting and Raftery, 2007)
        https://doi.org/10.1198/016214506000001437
        Fair Scores for Ensemble Forecasts (Ferro, 2014) https://doi.org/10.1002/qj.2270

    Arguments:
        draws: predictions ``[S, *batch]``, with S of at least 2.
        truths: ``[*batch]``.

    Returns:
        ``[*batch]``, smaller for better predictions.

    Raises:
        ValueError: for shapes that do not match, fewer than two draws, and numbers that are not finite.

    Example:
        >>> crps(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([1.0, 3.0]))
        tensor([0., 2.])
    """
    if draws.dim() < 1 or draws.shape[1:] != truths.shape or len(draws) < 2 or not draws.numel():
        raise ValueError(
            f"crps takes draws [S, *batch], two or more, and truths [*batch], got shapes {tuple(draws.shape)} and "
            f"{tuple(truths.shape)}"
        )
    for name, value in (("draws", draws), ("truths", truths)):
        if bad := int((~value.isfinite()).sum()):
            raise ValueError(f"{bad} of {value.numel()} {name} are NaN or infinite; leave them out")
    size, ordered = len(draws), draws.double().sort(0).values
    # in a sum over pairs the i-th smallest is the larger one of i - 1 and the smaller one of S - i
    weight = (2 * torch.arange(1, size + 1, device=draws.device) - size - 1).double() / (size * (size - 1))
    score = (ordered - truths).abs().mean(0) - torch.tensordot(weight, ordered, 1)
    return score.to(torch.get_default_dtype())


def auroc(inliers: Tensor, outliers: Tensor) -> float:
    r"""How well a score tells outliers from inliers: the area under the receiver operating characteristic.

    .. math:: P(s_{out} > s_{in}) + \tfrac{1}{2} P(s_{out} = s_{in})

    Arguments:
        inliers: scores ``[N]``, larger for what is less like an inlier.
        outliers: scores ``[M]``.

    Returns:
        1 where all outliers score above all inliers, 1/2 for scores that tell nothing.

    Raises:
        ValueError: for scores that are NaN, of another shape, or none.

    Example:
        >>> auroc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
        0.875
    """
    from sklearn.metrics import roc_auc_score

    for name, scores in (("inliers", inliers), ("outliers", outliers)):
        if scores.dim() != 1 or not len(scores):
            raise ValueError(f"auroc takes scores [N] of a row or more, got {name} of shape {tuple(scores.shape)}")
        if bad := int(scores.isnan().sum()):
            raise ValueError(f"{bad} of {len(scores)} scores of the {name} are NaN")
    scores = torch.cat([inliers.detach().double().cpu(), outliers.detach().double().cpu()])
    finite = scores.unique(return_inverse=True)[1]  # only their order counts, and scikit-learn refuses infinity
    labels = torch.cat([torch.zeros(len(inliers)), torch.ones(len(outliers))])
    return float(roc_auc_score(labels.numpy(), finite.numpy()))


@dataclass(frozen=True)
class OutOfDistribution:
    """How well a score tells other rows from those like the fit's.

    Attributes:
        auroc: 1 where all others score above all of its own, 1/2 for a score that tells nothing.
        inliers: scores of rows like those of the fit, ``[N]``.
        outliers: scores of other rows, ``[M]``.
        score: which it is.
    """

    auroc: float
    inliers: Tensor
    outliers: Tensor
    score: str

    def __str__(self) -> str:
        rows = f"{len(self.outliers)} other rows and {len(self.inliers)} of its own"
        return f"By {self.score}, AUROC is {self.auroc:.3f} over {rows}."


def out_of_distribution(
    posterior: Posterior,
    data: Any,
    other: Any,
    *,
    score: str | Score = "evidence",
    draws: int = 100,
    seed: int = 0,
) -> OutOfDistribution:
    """Whether a posterior tells rows of another kind from rows like those of the fit.

    A likelihood can be larger for rows of another kind than for a model's own, as for simpler images; the AUROC is then
    below 1/2, and shows it. Rows that were held out are the fairer inliers.

    References:
        Do Deep Generative Models Know What They Don't Know? (Nalisnick, Matsukawa, Teh, Gorur and Lakshminarayanan,
        2019) https://arxiv.org/abs/1810.09136

    Arguments:
        posterior: of any engine that can be given new rows.
        data: rows like those of the fit; None for these.
        other: rows of another kind, in the same form.
        score: ``"evidence"`` for -log p(x) by importance sampling with the guide, for models with latents of the rows;
            ``"reconstruction"`` for the mean of -log p(x | z) over draws; ``"nll"``, ``"nll_variance"``, ``"error"`` or
            ``"spread"`` as in ``anomaly_scores``; ``"entropy"`` for that of a predicted class; ``"disagreement"`` for
            the part of that entropy in which the draws differ (their mutual information); or a function of the
            posterior and rows.
        draws: that a score averages over.
        seed: of these draws; the global random states stay as they were.

    Raises:
        ValueError: for an unknown score; for one that is not a number for each row, or NaN.

    Example:
        >>> from pyro_ae import fit, svi
        >>> from pyro_ae.models import ppca
        >>> model, guide, x = ppca.example()
        >>> posterior = fit(model, x, guide=guide, method=svi(steps=10), seed=0, progress=False)
        >>> out_of_distribution(posterior, x, x + 9.0).auroc
        1.0
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    if isinstance(score, str) and score not in SCORES:
        raise ValueError(f"unknown score {score!r}; known are {', '.join(map(repr, SCORES))}, or a function")

    def evaluate(rows: Any) -> Tensor:
        found = SCORES[score](posterior, rows, draws) if isinstance(score, str) else score(posterior, rows)
        found = torch.as_tensor(found).detach().cpu()
        if found.dim() != 1 or found.isnan().any():
            what = f"shape {tuple(found.shape)}" if found.dim() != 1 else f"{int(found.isnan().sum())} NaN"
            raise ValueError(
                f"a score must be a number for each row, [N], and has {what}: is there a plate of the rows?"
            )
        return found

    with seeded(seed):
        inliers, outliers = evaluate(data), evaluate(other)
    name = score if isinstance(score, str) else getattr(score, "__name__", type(score).__name__)
    return OutOfDistribution(auroc(inliers, outliers), inliers, outliers, name)


def _evidence(posterior: Posterior, rows: Any, draws: int) -> Tensor:
    return -posterior.log_evidence(rows, draws)


def _anomaly(field: str, read: Read) -> Callable[[Posterior, Any, int], Tensor]:
    return lambda posterior, rows, draws: by_row(posterior, rows, draws, read)[field]


def _entropy(posterior: Posterior, rows: Any, draws: int) -> Tensor:
    found = _classes(posterior, rows, draws)
    return found.aleatoric + found.epistemic


def _disagreement(posterior: Posterior, rows: Any, draws: int) -> Tensor:
    return _classes(posterior, rows, draws).epistemic


def _classes(posterior: Posterior, rows: Any, draws: int) -> Prediction:
    found = posterior.uncertainty(rows, posterior._at_most(draws))
    if not isinstance(found, Prediction) or found.aleatoric.dim() != 1 or found.mean.dim() != 2:
        raise ValueError(
            "entropy is that of a predicted class, and the model has not one categorical site: use score='evidence' or "
            "'reconstruction', or a function"
        )
    return found


SCORES: dict[str, Callable[[Posterior, Any, int], Tensor]] = {
    "evidence": _evidence,
    "reconstruction": _anomaly("expected_nll", likelihood_scores),
    "nll": _anomaly("nll", likelihood_scores),
    "nll_variance": _anomaly("nll_variance", likelihood_scores),
    "error": _anomaly("error", reconstruction_scores),
    "spread": _anomaly("spread", reconstruction_scores),
    "entropy": _entropy,
    "disagreement": _disagreement,
}
"""By name."""
