"""What single rows of the data do to a posterior: how it would change without them, from its draws alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..data import LoadedRows
from ..draws import log_likelihood as at_values
from ..runtime import seeded
from ..sites import quote
from .importance import FEWEST, pareto_k

if TYPE_CHECKING:
    from ..posterior import Posterior


class Influence(NamedTuple):
    """How expectations change when one row is left out.

    Attributes:
        change: of the expectation without each row, less that with it, ``[N, *shape]``.
        error: its Monte Carlo standard error, ``[N, *shape]``.
        pareto_k: k-hat of the weights 1 / p(row | latents), ``[N]``: above 0.7 the posterior moves too far for
            its draws to tell where, so that such a row is influential and the number itself is not to be trusted. NaN
            for fewer than 50 draws.
    """

    change: Tensor
    error: Tensor
    pareto_k: Tensor


class TTest(NamedTuple):
    """Whether numbers differ from zero beyond their spread; see :func:`t_test`.

    Attributes:
        mean: over the draws, ``[*shape]``.
        sd: the standard deviation over the draws, ``[*shape]``.
        p_value: of both sides, ``[*shape]``.
    """

    mean: Tensor
    sd: Tensor
    p_value: Tensor


def t_test(values: Tensor) -> TTest:
    r"""Student's t-test, number by number, of draws whose mean may be zero.

    .. math:: t = \frac{\bar v}{s / \sqrt{S}} \sim t_{S - 1} \quad \text{where the mean is } 0

    Draws must be independent, as the members of an ensemble are and the successive points of one chain are not.

    References:
        A Bayesian Approach To Analysing Training Data Attribution In Deep Learning (Nguyen, Seo and Oh, 2023)
        https://arxiv.org/abs/2305.19765

    Arguments:
        values: ``[S, *shape]``, two draws or more.

    Raises:
        ValueError: for fewer than two draws, or values that are not finite.

    Example:
        >>> t_test(torch.tensor([[1.0, -1.0], [1.1, 1.0], [0.9, 0.0]])).p_value.round(decimals=3)
        tensor([0.0030, 1.0000])
    """
    from scipy.stats import t

    if values.dim() < 1 or len(values) < 2:
        raise ValueError(f"a t-test needs two draws or more, got values of shape {tuple(values.shape)}")
    _need_finite("values", values)
    values = values.detach().cpu()
    mean, sd = values.double().mean(0), values.double().std(0)
    ratio = (mean / sd).nan_to_num(nan=0.0)  # where all are 0
    p = torch.as_tensor(2 * t.sf((ratio.abs() * len(values) ** 0.5).numpy(), len(values) - 1))
    return TTest(mean.to(values.dtype), sd.to(values.dtype), p.reshape(mean.shape).to(values.dtype))


def case_influence(values: Tensor, log_likelihood: Tensor, *, weighted: bool = False) -> Influence:
    r"""How posterior expectations change when one row is left out, for each row, from draws with all rows.

    .. math:: E_{-j}[f] - E[f] \approx -\text{Cov}\big(f(\theta), \log p(x_j \mid \theta)\big), \qquad
        E_{-j}[f] = \frac{E[f(\theta) / p(x_j \mid \theta)]}{E[1 / p(x_j \mid \theta)]}

    The first is the derivative in the weight of a row, and good where a row matters little. The second, ``weighted``,
    is what is left without the row, and noisy where a row matters much. Draws must be of the posterior; where a guide
    made them, this is what the rows would do to that guide's distribution if it were exact.

    References:
        Covariances, Robustness, and Variational Bayes (Giordano, Broderick and Jordan, 2018)
        https://arxiv.org/abs/1709.02536
        Practical Bayesian Model Evaluation Using Leave-One-Out Cross-Validation and WAIC
        (Vehtari, Gelman and Gabry, 2017) https://arxiv.org/abs/1507.04544

    Arguments:
        values: f at the draws, ``[S, *shape]``.
        log_likelihood: of each row at the same draws, ``[S, N]``, in nats.
        weighted: whether by weights 1 / p, in place of the derivative.

    Raises:
        ValueError: for shapes that do not match, fewer than 8 draws, and values that are not finite.

    Example:
        >>> theta = 3.0 + 0.1 * torch.randn(4000)  # the posterior of a mean, from 100 rows of variance 1
        >>> found = case_influence(theta, -0.5 * (torch.tensor([1.0, 5.0]) - theta.unsqueeze(1)) ** 2)
        >>> found.change.round(decimals=2)  # about (3 - x) / 100
        tensor([ 0.0200, -0.0200])
    """
    if log_likelihood.dim() != 2 or values.dim() < 1 or len(values) != len(log_likelihood):
        raise ValueError(
            f"expected values [S, *shape] and log_likelihood [S, N] at the same draws, got shapes "
            f"{tuple(values.shape)} and {tuple(log_likelihood.shape)}"
        )
    draws = len(values)
    if draws < 8:
        raise ValueError(f"the influence of rows is a covariance over draws and needs 8 or more, got {draws}")
    _need_finite("values", values)
    _need_finite("log_likelihood", log_likelihood)
    f = values.detach().cpu().double().reshape(draws, -1)
    logs = log_likelihood.detach().cpu().double()
    centred = f - f.mean(0)
    if weighted:
        weights = draws * (-logs).softmax(0)
        change = weights.T @ centred / draws

        def terms(part: slice) -> Tensor:  # by the delta method
            w = weights[part]
            return (w.T @ centred[part] - w.sum(0).unsqueeze(1) * change) / len(w) - centred[part].mean(0)
    else:
        slopes = logs - logs.mean(0)
        change = -slopes.T @ centred / (draws - 1)

        def terms(part: slice) -> Tensor:
            return -slopes[part].T @ centred[part] / len(slopes[part])

    # by means of batches, as successive draws of a chain may be alike
    size = max(2, round(draws**0.5))
    batches = torch.stack([terms(slice(i, i + size)) for i in range(0, draws - size + 1, size)])
    error = batches.std(0) / len(batches) ** 0.5
    shape = (logs.shape[1], *values.shape[1:])
    k = pareto_k(-logs) if draws >= FEWEST else torch.full((logs.shape[1],), torch.nan)
    dtype = torch.get_default_dtype()
    return Influence(change.reshape(shape).to(dtype), error.reshape(shape).to(dtype), k)


def influence(
    posterior: Posterior,
    quantity: str | Callable[[dict[str, Tensor]], Tensor],
    data: Any = None,
    draws: int | None = None,
    *,
    weighted: bool = False,
    seed: int = 0,
) -> Influence:
    """How the posterior expectation of a quantity changes when one row is left out, for each row.

    See :func:`case_influence` for the two ways. Nothing is fitted again, and parameters that were learnt by maximum
    likelihood are held as they are.

    References:
        Covariances, Robustness, and Variational Bayes (Giordano, Broderick and Jordan, 2018)
        https://arxiv.org/abs/1709.02536

    Arguments:
        posterior: of any engine, with a latent that rows share.
        quantity: a latent's name, or a function of draws, site to ``[S, *site]``, that gives ``[S, *shape]``.
        data: the rows that the posterior is of; those of the fit by default.
        draws: how many; as for ``posterior.sample`` by default.
        weighted: whether by weights 1 / p, in place of the derivative.
        seed: of the draws; the global random states stay as they were.

    Returns:
        :class:`Influence` with ``change`` ``[N, *shape]``.

    Raises:
        ValueError: for a model whose rows share no latent, an unknown latent, and observed sites without rows.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ae import fit, svi
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> y = torch.tensor([0.1, -0.3, 0.2, 0.0, 3.0])
        >>> posterior = fit(model, y, method=svi(steps=300), seed=0, progress=False)
        >>> int(influence(posterior, "mu").change.argmin())  # the outlier
        4
    """
    _need_shared(posterior)
    values, logs = _at_draws(posterior, data, draws, seed)
    if isinstance(quantity, str):
        if quantity not in values:
            raise ValueError(f"no latent '{quantity}' was drawn; there are {quote(values)}")
        return case_influence(values[quantity], logs, weighted=weighted)
    return case_influence(quantity(values), logs, weighted=weighted)


def attribution(
    posterior: Posterior,
    test: Any,
    data: Any = None,
    draws: int | None = None,
    *,
    weighted: bool = False,
    seed: int = 0,
) -> Influence:
    r"""How the expected loss on each test row changes when a training row is left out.

    .. math:: \tau(x_j \to x^*) = E_{-j}[-\log p(x^* \mid \theta)] - E[-\log p(x^* \mid \theta)]
        \approx \text{Cov}\big(\log p(x^* \mid \theta), \log p(x_j \mid \theta)\big)

    Positive where the training row helps. See :func:`case_influence` for the two ways.

    References:
        A Bayesian Approach To Analysing Training Data Attribution In Deep Learning (Nguyen, Seo and Oh, 2023)
        https://arxiv.org/abs/2305.19765
        Covariances, Robustness, and Variational Bayes (Giordano, Broderick and Jordan, 2018)
        https://arxiv.org/abs/1709.02536

    Arguments:
        posterior: of any engine, whose latents are all shared by the rows.
        test: rows in the form of the data.
        data: the rows that the posterior is of; those of the fit by default.
        draws: how many; as for ``posterior.sample`` by default.
        weighted: whether by weights 1 / p, in place of the derivative.
        seed: of the draws; the global random states stay as they were.

    Returns:
        :class:`Influence` with ``change`` ``[N, M]`` for M test rows, in nats.

    Raises:
        ValueError: for a model with latents for each row, or none, and observed sites without rows.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ae import fit, svi
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> posterior = fit(model, torch.randn(5), method=svi(steps=300), seed=0, progress=False)
        >>> attribution(posterior, torch.randn(7)).change.shape
        torch.Size([5, 7])
    """
    _need_shared(posterior)
    if posterior.local:
        raise ValueError(
            f"test rows have latents {quote(posterior.local)} of their own, which no draw is of: use influence with a "
            "function of the shared latents"
        )
    values, logs = _at_draws(posterior, data, draws, seed)
    return case_influence(-_by_row(posterior, values, test), logs, weighted=weighted)


def _at_draws(posterior: Posterior, data: Any, draws: int | None, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    with seeded(seed), torch.no_grad():
        values = posterior.sample(draws, data)
        return values, _by_row(posterior, values, data)


def _by_row(posterior: Posterior, values: dict[str, Tensor], data: Any) -> Tensor:
    """The log-likelihood of each row at draws, all observed sites together, ``[S, N]``."""
    program, rows = posterior.program, posterior._rows(data)
    if isinstance(rows, LoadedRows):
        raise ValueError("this needs all rows at once, and a DataLoader brings them in batches: pass data as a tensor")
    total: Tensor | None = None
    for name, logs in at_values(program, values, rows.call()).items():
        dims = [dim for plate, dim, _ in program.layout.model[name].plates if plate == program.plate]
        if not dims:
            raise ValueError(
                f"observed site '{name}' is not in plate '{program.plate}', so its rows cannot be told apart: put it "
                "there, or pass the plate's name to fit"
            )
        each = logs.movedim(dims[0], -1)
        each = each.flatten(1, -2).sum(1) if each.dim() > 2 else each
        total = each if total is None else total + each
    if total is None:
        raise ValueError("the model observes nothing, so there are no rows to leave out: condition it on data")
    return total


def _need_shared(posterior: Posterior) -> None:
    latents = posterior.program.layout.names("latent")
    if not set(latents) - set(posterior.local):
        raise ValueError(
            f"the rows share no latent (there are {quote(latents) if latents else 'none'}), so that leaving one out "
            "changes nothing for others while the parameters are held: make the shared ones latent, as bayesian does"
        )


def _need_finite(name: str, values: Tensor) -> None:
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ValueError(f"{name} has {bad} of {values.numel()} numbers that are NaN or infinite: look at those draws")
