"""How unlike those of the fit a row is: scores of an autoencoder's draws, and what they are among normal rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..data import Rows, as_rows
from ..draws import draw, log_likelihood, row_chunks
from ..prediction import predict_moments
from ..program import validation
from ..runtime import seeded
from ..sites import quote
from ..types import Draws
from .conversion import observed_values
from .groups import look

if TYPE_CHECKING:
    from ..posterior import Posterior

Read: TypeAlias = "Callable[[Posterior, Draws, Rows], dict[str, Tensor]]"
"""A posterior, draws and some rows to scores of these rows, ``[n]``."""

ROWS = 1000
"""Rows that are worked on at once, where their number is free."""


class AnomalyScores(NamedTuple):
    """Scores of rows, ``[N]``, each larger for rows that are less like those of the fit; see :func:`anomaly_scores`.

    Attributes:
        nll: minus the log-density of the row, averaged over draws as a density, in nats.
        expected_nll: minus the row's log-density, averaged over draws.
        nll_variance: of the log-density over draws: how much they disagree about the row.
        error: squared distance of the row to its mean reconstruction.
        spread: variance of the reconstruction over draws, summed over the row's values.
    """

    nll: Tensor
    expected_nll: Tensor
    nll_variance: Tensor
    error: Tensor
    spread: Tensor


def anomaly_scores(posterior: Posterior, data: Any = None, *, draws: int = 100, seed: int = 0) -> AnomalyScores:
    r"""How unlike those of the fit each row is, as an autoencoder's draws of weights, codes or both have it.

    .. math:: \ell_s = \log p(x \mid \theta_s), \quad
        \text{nll} = -\log \frac{1}{S} \sum_s e^{\ell_s}, \quad
        \text{expected nll} = -\frac{1}{S} \sum_s \ell_s, \quad
        \text{nll variance} = \frac{1}{S} \sum_s (\ell_s - \bar\ell)^2

    .. math:: \text{error} = \sum_d (x_d - \bar m_d)^2, \quad
        \text{spread} = \frac{1}{S} \sum_{s, d} (m_{sd} - \bar m_d)^2, \quad m_s = E[x \mid \theta_s]

    A code is drawn given the row itself, so that these say how well a row is rebuilt; a prior of codes is no part of
    them. A likelihood can favour rows of another kind, such as simpler images: the variances are for these. Missing
    values count in none of them.

    References:
        Bayesian Autoencoders: Analysing and Fixing the Bernoulli likelihood for Out-of-Distribution Detection (Yong,
        Pearce and Brintrup, 2021) https://arxiv.org/abs/2107.13304
        Bayesian Variational Autoencoders for Unsupervised Out-of-Distribution Detection (Daxberger and
        Hernandez-Lobato, 2019) https://arxiv.org/abs/1912.05651

    Arguments:
        posterior: of any engine that can be given new rows, or None as data.
        data: rows; those of the fit by default.
        draws: to average over; as many as there are, where chains hold fewer.
        seed: of these draws; the global random states stay as they were.

    Raises:
        ValueError: for a model that observes nothing in the rows, or a site outside their plate; for a likelihood
            without a finite mean and variance, or of classes, and for latents without draws: use
            ``out_of_distribution`` with one score of the likelihood.

    Example:
        >>> from pyro_ae import fit, svi
        >>> from pyro_ae.models import ppca
        >>> model, guide, x = ppca.example()
        >>> posterior = fit(model, x, guide=guide, method=svi(steps=10), seed=0, progress=False)
        >>> normal, odd = anomaly_scores(posterior, x), anomaly_scores(posterior, x + 9.0)
        >>> bool(odd.error.min() > normal.error.max())
        True
    """
    with seeded(seed):
        return AnomalyScores(**by_row(posterior, data, draws, likelihood_scores, reconstruction_scores))


def conformal_p_values(scores: Tensor, reference: Tensor) -> Tensor:
    r"""The share of normal rows that score as high as a row does, which is a p-value that the row is normal.

    .. math:: p = \frac{1 + |\{n: r_n \ge s\}|}{1 + N}

    Where the row is one more of the normal rows, p is at most a with a probability of at most a, whatever the model and
    score are; that holds for rows that were held out, and not for those of the fit, which score lower.

    References:
        Testing for Outliers with Conformal p-values (Bates, Candes, Lei, Romano and Sesia, 2021)
        https://arxiv.org/abs/2104.08279

    Arguments:
        scores: ``[*batch]``, larger for what is less like a normal row.
        reference: scores of normal rows that were held out, ``[N]``.

    Returns:
        ``[*batch]``, from 1 / (1 + N) to 1.

    Raises:
        ValueError: for scores that are NaN, or no reference.

    Example:
        >>> conformal_p_values(torch.tensor([0.5, 9.0]), torch.tensor([0.0, 1.0, 2.0]))
        tensor([0.7500, 0.2500])
    """
    if reference.dim() != 1 or not len(reference):
        raise ValueError(f"reference must be scores [N] of a row or more, got shape {tuple(reference.shape)}")
    for name, values in (("scores", scores), ("reference", reference)):
        if bad := int(values.isnan().sum()):
            raise ValueError(f"{bad} of {values.numel()} {name} are NaN")
    lower = torch.searchsorted(reference.sort().values, scores.to(reference).contiguous())
    return (1 + len(reference) - lower) / (1 + len(reference))


@torch.no_grad()
def by_row(posterior: Posterior, data: Any, draws: int, *reads: Read) -> dict[str, Tensor]:
    """Scores of all rows, ``[N]`` by name, a part of them at a time, each part at the same draws for all of them."""
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    parts = [
        {name: score for read in reads for name, score in read(posterior, values, rows).items()}
        for values, rows in _parts(posterior, data, posterior._at_most(draws))
    ]
    return {n: torch.cat([p[n] for p in parts]).to(torch.get_default_dtype()) for n in parts[0]}


def likelihood_scores(posterior: Posterior, values: Draws, rows: Rows) -> dict[str, Tensor]:
    """The scores that are functions of a row's log-density at each draw."""
    found = log_likelihood(posterior.program, values, rows.call())
    if not found:
        raise ValueError("the model observes nothing in these rows, so they have no likelihood")
    density = torch.stack([_to_rows(posterior, n, v.double()) for n, v in found.items()]).sum(0)  # [draws, rows]
    return {
        "nll": math.log(len(density)) - density.logsumexp(0),
        "expected_nll": -density.mean(0),
        "nll_variance": density.var(0, correction=0),
    }


def reconstruction_scores(posterior: Posterior, values: Draws, rows: Rows) -> dict[str, Tensor]:
    """The scores that are functions of the mean of a row's likelihood at each draw."""
    program, batch = posterior.program, rows.call()
    if undrawn := [n for n in program.layout.names("latent") if n not in values]:
        raise ValueError(
            f"there are no draws of {quote(undrawn)} to rebuild a row with: use out_of_distribution with score='nll', "
            "'nll_variance' or 'reconstruction', for which they are summed out"
        )
    moments = predict_moments(program, values, batch)
    with program.active(), validation(False):
        seen = observed_values(look(program, batch), rows)
    errors: list[Tensor] = []
    spreads: list[Tensor] = []
    for name, x in seen.items():
        mean, _, epistemic = moments[name]
        if not mean.shape == epistemic.shape == x.shape:
            raise ValueError(
                f"site '{name}' is of classes, which have no distance: use out_of_distribution with score='nll', "
                "'reconstruction', 'entropy' or 'disagreement'"
            )
        x, events = x.cpu(), len(program.layout.model[name].batch)
        for scores, value in ((errors, (x - mean).square()), (spreads, epistemic)):
            there = value.double().masked_fill(x.isnan(), 0.0).unsqueeze(-1).flatten(events).sum(-1)
            scores.append(_to_rows(posterior, name, there))
    return {"error": torch.stack(errors).sum(0), "spread": torch.stack(spreads).sum(0)}


def _parts(posterior: Posterior, data: Any, draws: int) -> Iterator[tuple[Draws, Rows]]:
    """Rows few enough to be worked on at once, and the draws that are theirs."""
    program, rows = posterior.program, posterior._rows(data)
    if posterior.local and posterior.draws is None:
        for batch in row_chunks(program, rows, draws):
            yield draw(program, draws, batch), _as_rows(batch)
        return
    values = posterior.sample(draws, data)
    if posterior.local or (isinstance(rows, Rows) and rows.size is None):  # draws of the latents of all rows
        yield values, _as_rows(rows.call())
        return
    for batch in rows.batches(ROWS, shuffle=False, device=program.device):
        yield values, _as_rows(batch)


def _as_rows(batch: Any) -> Rows:
    rows = as_rows(batch.kwargs or batch.args)
    assert isinstance(rows, Rows)
    return rows


def _to_rows(posterior: Posterior, name: str, value: Tensor) -> Tensor:
    """Values of a site ``[*, *batch]``, summed over all plates but that of the rows, ``[*, N]``."""
    program = posterior.program
    site = program.layout.model[name]
    place = [dim for plate, dim, _ in site.plates if plate == program.plate]
    if not place:
        raise ValueError(f"site '{name}' stands outside plate '{program.plate}', so that it has no score for each row")
    others = [dim for dim in range(-len(site.batch), 0) if dim != place[0]]
    return value.sum(others) if others else value
