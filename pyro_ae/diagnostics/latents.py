"""What the latents of the rows hold: how much each says of its row, and whether together they fill the prior."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import Normal

from ..data import Call
from ..program import Program, validation
from ..runtime import seeded
from ..sites import Recorder, elements_of, is_auxiliary, is_estimated, quote
from .groups import View
from .local import SLOW_PAIRS, Local, alike, average, is_slow, until
from .permutation import Discrepancy, permutation_test
from .rows import evenly, some_rows
from .units import Kinds, collapsed, kinds

if TYPE_CHECKING:
    from ..posterior import Posterior

TESTED = 1000
"""Rows, at most, that are tested against draws of the prior."""

LISTED = 50
"""Dimensions in a printed table, those of the largest KL."""


@dataclass(frozen=True)
class LatentSummary:
    """What the latent of a site holds, on some rows. Dimensions are those of the latent, flattened.

    Attributes:
        site: its name.
        shape: of the latent of a row.
        mean: of each row's posterior, ``[N, d]``.
        variance: of each row's posterior, ``[N, d]``.
        kl: of each row's posterior from the prior, in nats, ``[N, d]``; None where no dimension has its own.
        kl_by: how that is known: ``"closed form"``, ``"draws"``, or ``"normal fit"``, the divergence of a normal with
            the posterior's mean and variance, where the dimensions are tied together; ``""`` where it is not.
        row_kl: of the whole latent, in nats, ``[N]``. Where it depends on other latents, an average over their draws.
        kinds: active, mixed or passive, each ``[d]``; None where the prior has no variance.
        collapsed: the (0.01, 0.05)-collapsed, ``[d]``; None where ``kl`` is.
        rate: the mean of ``row_kl``.
        information: about which of the rows it was that a draw of the latent holds, in nats, of log N at most; None
            where the posterior of a row depends on other latents.
        information_error: its standard error over rows.
        saturated: whether it is so near to log N that, over more rows, it may be much larger.
        aggregate_kl: of the rows' posteriors together from the prior, in nats, which is the rate without the
            information; None where that is, and where the prior depends on other latents or on the row.
        mmd: between a draw of the latent for each row, and of the prior, in units of the prior's standard deviation;
            None where the prior cannot be drawn from.
        wasserstein: sliced, of order 2 and squared, between the same.
        notes: why something is None.
    """

    site: str
    shape: torch.Size
    mean: Tensor
    variance: Tensor
    kl: Tensor | None
    kl_by: str
    row_kl: Tensor
    kinds: Kinds | None
    collapsed: Tensor | None
    rate: float
    information: float | None
    information_error: float | None
    saturated: bool
    aggregate_kl: float | None
    mmd: Discrepancy | None
    wasserstein: Discrepancy | None
    notes: tuple[str, ...]

    @property
    def rows(self) -> int:
        return len(self.mean)

    def __str__(self) -> str:
        lines = [f"Latent '{self.site}' on {self.rows} rows, in nats a row:", f"  KL from the prior  {self.rate:.3f}"]
        if self.information is not None:
            least = f", near its bound log N = {math.log(self.rows):.2f}: more rows may show more"
            lines.append(
                f"  mutual information {self.information:.3f} +- {self.information_error:.3f}" + least * self.saturated
            )
        if self.aggregate_kl is not None:
            lines.append(f"  of all rows together, KL from the prior  {self.aggregate_kl:.3f}")
        if self.mmd is not None:
            lines += [f"  MMD from the prior  {self.mmd}", f"  sliced Wasserstein  {self.wasserstein}"]
        lines += [f"  ({note})" for note in self.notes]
        shown = (self.kl if self.kl is not None else self.mean.square()).mean(0).argsort(descending=True)[:LISTED]
        names = self.kinds.names if self.kinds is not None else ["-"] * self.mean.shape[1]
        lines.append(f"{'dim':>8}  kind     {'KL':>8}  mean variance" + f"   (KL by {self.kl_by})" * bool(self.kl_by))
        for i in shown.tolist():
            label = ",".join(str(int(k)) for k in np.unravel_index(i, tuple(self.shape))) if self.shape else "-"
            kl = "-" if self.kl is None else f"{float(self.kl[:, i].mean()):.3f}"
            fallen = "  collapsed" * (self.collapsed is not None and bool(self.collapsed[i]))
            lines.append(f"{label:>8}  {names[i]:<7}  {kl:>8}  {float(self.variance[:, i].mean()):.3f}{fallen}")
        if len(names) > len(shown):
            lines.append(f"{'...':>8}  and {len(names) - len(shown)} more, of a smaller KL")
        return "\n".join(lines)


@dataclass(frozen=True)
class LatentSummaries:
    """The latents of a model's rows.

    Attributes:
        sites: name to summary.
        skipped: name to why there is none.
    """

    sites: dict[str, LatentSummary]
    skipped: dict[str, str]

    def __str__(self) -> str:
        return "\n\n".join(
            [*map(str, self.sites.values()), *(f"'{n}' is left out: {w}." for n, w in self.skipped.items())]
        )


def latent_summary(
    posterior: Posterior,
    data: Any = None,
    *,
    rows: int = 1000,
    draws: int = 100,
    site: str | None = None,
    seed: int | None = 0,
) -> LatentSummary:
    r"""How much the latent of a row says of it, dimension by dimension, and how well all rows fill the prior.

    .. math::
        E_n KL\big(q(z \mid x_n) \,\|\, p(z)\big) = I_q(n; z) + KL\big(q(z) \,\|\, p(z)\big), \qquad
        q(z) = \frac{1}{N} \sum_n q(z \mid x_n)

    The rate on the left is what the ELBO pays for the latent. The mutual information is of the rows at hand, so it is
    log N at most: where it comes near, it says that the rows can be told apart, and no more. The second term is what
    rows from the prior cost: where it is large they differ from what the decoder has seen.

    References:
        ELBO surgery: yet another way to carve up the variational evidence lower bound (Hoffman and Johnson, 2016)
        http://approximateinference.org/accepted/HoffmanJohnson2016.pdf
        Be More Active! Understanding the Differences between Mean and Sampled Representations of Variational
        Autoencoders (Bonheme and Grzes, 2023) https://arxiv.org/abs/2109.12679
        Don't Blame the ELBO! A Linear VAE Perspective on Posterior Collapse (Lucas, Tucker, Grosse and Norouzi, 2019)
        https://arxiv.org/abs/1911.02469

    Arguments:
        posterior: with a guide that has a density for the latent of each row.
        data: rows; those of the fit by default.
        rows: how many of them, spread evenly; the cost grows with the square.
        draws: for each row, of what has no closed form and of other latents.
        site: the latent; the only one by default.
        seed: of the draws; the global random states stay as they were.

    Raises:
        ValueError: for a posterior of chains, or without latents for the rows; for a latent without a density, such as
            one that is a point, is drawn through another site, or whose density is an estimate; for several latents
            where none is named; for fewer than two rows or draws.

    Example:
        >>> from pyro_ae import fit, svi
        >>> from pyro_ae.models import ppca
        >>> model, guide, x = ppca.example()
        >>> posterior = fit(model, x, guide=guide, method=svi(steps=10), seed=0, progress=False)
        >>> latent_summary(posterior).kl.shape
        torch.Size([16, 2])
    """
    found = _summaries(posterior, data, rows, draws, site, seed)
    if len(found.sites) > 1:
        raise ValueError(
            f"the rows have the latents {quote(found.sites)}: name one with site=, or use latent_summaries"
        )
    return next(iter(found.sites.values()))


def latent_summaries(
    posterior: Posterior, data: Any = None, *, rows: int = 1000, draws: int = 100, seed: int | None = 0
) -> LatentSummaries:
    """A :func:`latent_summary` of each latent that the rows have, but of those without a density.

    Arguments:
        posterior: with a guide that has a density for the latents of each row.
        data: rows; those of the fit by default.
        rows: how many of them, spread evenly.
        draws: for each row.
        seed: of the draws; the global random states stay as they were.

    Raises:
        ValueError: where there is none to summarise.

    Example:
        >>> from pyro_ae import fit, svi
        >>> from pyro_ae.models import deep_vae
        >>> model, guide, x = deep_vae.example()
        >>> posterior = fit(model, x, guide=guide, method=svi(steps=10), seed=0, progress=False)
        >>> list(latent_summaries(posterior).sites)
        ['z2', 'z1']
    """
    return _summaries(posterior, data, rows, draws, None, seed)


# -- inside --------------------------------------------------------------------------------------------------


def _summaries(
    posterior: Posterior, data: Any, rows: int, draws: int, only: str | None, seed: int | None
) -> LatentSummaries:
    program = posterior.program
    if program.guide is None:
        raise ValueError("a summary of latents needs the density of a guide, and chains have none: fit with svi")
    posterior._need_local("latent_summary")
    if only is not None and only not in posterior.local:
        raise ValueError(f"no latent {only!r} for each row; there are {quote(posterior.local)}")
    if rows < 2 or draws < 2:
        raise ValueError(f"rows and draws must be at least 2, got {rows} and {draws}")
    with seeded(seed), torch.no_grad(), program.active(), validation(False):
        batch, index, view = some_rows(program, posterior._rows(data), rows)
        size = view.layout.plates[str(program.plate)] if index is None else len(index)
        if size < 2:
            raise ValueError("a summary of latents is a matter of at least two rows, got one")
        with Recorder() as q:
            program.guide.fn(*batch.args, **batch.kwargs)
        names = [n for n in view.layout.local(program.plate) if only in (None, n)]
        skipped = {n: why for n in names if (why := _why_not(n, view, q))}
        names = [n for n in names if n not in skipped]
        if not names:
            raise ValueError("no latent to summarise: " + "; ".join(f"'{n}': {why}" for n, why in skipped.items()))
        latents = [Local(n, view, str(program.plate), index) for n in names]
        first = average(program, batch, view, latents, draws)
        return LatentSummaries({s.name: _summary(s, program, batch, view, first, draws) for s in latents}, skipped)


def _why_not(name: str, view: View, q: Recorder) -> str:
    """Why a latent has no summary, with the cure; empty where it has."""
    if name in view.undrawn:
        return "it is summed out, so it has no draws"
    order = list(view.layout.model)
    above = [n for n in view.undrawn if order.index(n) < order.index(name)]
    if above:
        return f"its prior may depend on {quote(above)}, which has no draws as it is summed out"
    if name in view.subsampled:
        plate = view.subsampled[name]
        return f"its plate '{plate}' takes a new subsample in each run; pass batch_size to fit in place of that"
    if view.layout.model[name].enumerable or getattr(view.layout.model[name].support, "is_discrete", False):
        return "it is discrete, and this is about means, variances and densities"
    site, through = q.sites[name], [s for s in q.sites.values() if is_auxiliary(s)]
    cure = "fit, or posterior.with_guide, with a guide such as Amortized(encoder, MeanField(...))"
    if isinstance(elements_of(site["fn"]), Delta):
        if is_estimated(site) or any(map(is_estimated, through)):
            return f"its density in the guide is an estimate, known at the draw alone; {cure}"
        if through:
            return f"the guide draws it through {quote(s['name'] for s in through)}, which has the density; {cure}"
        return f"the guide gives it a point, which has no density; {cure}"
    if any(isinstance(s["mask"], Tensor) and not s["mask"].all() for s in (site, view.run.sites[name])):
        return "it is masked in some rows"
    return "its density in the guide is an estimate" if is_estimated(site) else ""


def _summary(
    latent: Local, program: Program, batch: Call, view: View, first: list[dict[str, Tensor]], draws: int
) -> LatentSummary:
    assert program.guide is not None
    name, found, notes = latent.name, latent.averages, []
    model = until(program.model.fn, name)
    q, alone = alike(program.guide.fn, batch, name, first)
    p, fixed = alike(model, batch, name, first)
    between = (found["square"] - found["mean"].square()).clamp(min=0.0) * draws / (draws - 1)
    variance, kl, by = found["within"] + between, found.get("kl"), latent.kl_by
    row_kl = found["row_kl"].sum(1) if kl is None else kl.sum(1)
    if kl is None and fixed and isinstance(elements_of(p["fn"]), Normal):
        ratio = variance / found["prior_variance"]
        shift = (found["mean"] - found["prior_mean"]).square() / found["prior_variance"]
        kl, by = 0.5 * (ratio + shift - 1 - ratio.log()), "normal fit"
    elif kl is None:
        notes.append("no KL of each dimension, as they are tied together")
    if not bool(torch.isfinite(variance).all() and torch.isfinite(row_kl).all()):
        raise ValueError(
            f"site '{name}': the variance of the guide, or its KL from the prior, is not finite in some rows: look at "
            "the rows for values that are not finite, and at the supports"
        )

    information = error = aggregate_kl = None
    if alone:
        each, aggregate_kl = _surgery(latent, q, p, fixed)
        information, error = float(each.mean()), float(each.std()) / math.sqrt(len(each))
        if aggregate_kl is None:
            notes.append("no KL of all rows together, as the prior is not the same for all")
    else:
        notes.append("no mutual information, as the guide's posterior of a row depends on other latents or on chance")

    spread, mmd, wasserstein = found.get("prior_variance"), None, None
    try:
        with Recorder({n: v for n, v in first[0].items() if n not in view.layout.local(program.plate)}) as run:
            model(*batch.args, **batch.kwargs)
    except NotImplementedError as failure:
        notes.append(f"no draws of the prior ({failure})")
    else:
        codes, prior = (latent.by_row(z.unsqueeze(0))[0] for z in (first[0][name], run.sites[name]["value"]))
        some = evenly(len(codes), TESTED).to(codes.device)
        scale = prior.std(0).clamp(min=1e-12)
        mmd, wasserstein = permutation_test(codes[some] / scale, prior[some] / scale)
        spread = prior.double().var(0) if spread is None else spread
    if spread is None:
        notes.append("no kinds, as the prior has no variance")

    def out(value: Tensor) -> Tensor:
        return value.to("cpu", torch.get_default_dtype())

    return LatentSummary(
        site=name,
        shape=latent.shape,
        mean=out(found["mean"]),
        variance=out(variance),
        kl=None if kl is None else out(kl),
        kl_by=by,
        row_kl=out(row_kl),
        kinds=None if spread is None else kinds(out(variance / spread)),
        collapsed=None if kl is None else collapsed(out(kl)),
        rate=float(row_kl.mean()),
        information=information,
        information_error=error,
        saturated=information is not None and information > max(math.log(len(row_kl)) - 2, math.log(len(row_kl)) / 2),
        aggregate_kl=aggregate_kl,
        mmd=mmd,
        wasserstein=wasserstein,
        notes=tuple(notes),
    )


def _surgery(latent: Local, q: dict, p: dict, fixed: bool) -> tuple[Tensor, float | None]:
    """What a draw says of which row it is from, for some or all rows ``[M]``; and KL(q(z) || p(z))."""
    slow = any(is_slow(site["fn"]) for site in (q, p))
    z = torch.cat(latent.kept)[: 1 if slow else None]
    by_row = latent.rows_first(z)
    copies, rows = by_row.shape[:2]
    most = (SLOW_PAIRS if slow else latent.most_pairs) // rows  # draws, each of which meets all rows
    of = evenly(rows, max(2, most)).to(z.device)
    draws = by_row[:, of].flatten(0, 1)
    log_q = latent.pairs(q["fn"], draws)
    aggregate = log_q.logsumexp(1) - math.log(rows)
    own = log_q.take_along_dim(of.repeat(copies).unsqueeze(1), 1).squeeze(1)
    each = (own - aggregate).double().reshape(copies, -1).mean(0)
    log_p = latent.pairs(p["fn"], draws[:2])
    if not fixed or not torch.allclose(log_p, log_p[:, :1].expand_as(log_p), rtol=1e-4, atol=1e-4):
        return each, None
    log_p = latent.by_row(p["fn"].log_prob(z)).sum(2)[:, of].flatten()
    return each, float((aggregate - log_p).double().mean())
