"""How much of a guide's gap is the encoder's, and how much its family's: each row refined by itself."""

from __future__ import annotations

import copy
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..bounds import elbo, iwae
from ..data import Call, LoadedRows
from ..density import Weights, refuse_shared, weigh
from ..draws import _refuse_points
from ..estimators import pathwise, score_function, sticking_the_landing
from ..particles import part_sizes
from ..program import Program, validation
from ..runtime import seeded
from ..sites import is_estimated
from ..types import Guide
from .importance import effective_sample_size
from .rows import chosen_rows

if TYPE_CHECKING:
    from ..posterior import Posterior

Refined = Literal["parameters", "features", "guide"]

RATES: dict[Refined, float] = {"parameters": 0.05, "features": 0.05, "guide": 0.003}
MEANING: dict[Refined, str] = {
    "parameters": "each row's distribution was refined by itself, so this is the best of the guide's family",
    "features": (
        "each row's features were refined and not all that follows from them, so the amortisation gap is at least "
        "this, and the approximation gap at most"
    ),
    "guide": (
        "the guide itself was trained further on these rows alone, so the amortisation gap is at least this, and the "
        "approximation gap at most"
    ),
}


@dataclass(frozen=True)
class Gaps:
    r"""How far the ELBO of each row is below its evidence, in two parts, in nats.

    .. math::
        \log p(x) - \mathcal{L}[q] = \underbrace{\log p(x) - \mathcal{L}[q^*]}_{\text{approximation}}
        + \underbrace{\mathcal{L}[q^*] - \mathcal{L}[q]}_{\text{amortisation}}

    The total is KL(q || p), the approximation gap KL(q* || p). A richer family makes the latter smaller; a better
    encoder, or longer training, the amortisation gap. An evidence that was not given is an importance-weighted bound:
    too low on average, as are the approximation gap and the total then, and by chance too high where weights are heavy.

    Attributes:
        rows: which of the data's rows, ``[n]``.
        elbo: of the guide, ``[n]``.
        refined: ELBO of what the guide became when each row was refined, ``[n]``.
        log_evidence: log p(x), given or estimated, ``[n]``.
        error: standard error of the amortisation gap, ``[n]``.
        how: what was refined: ``"parameters"`` of each row's distribution; the ``"features"`` that an encoder gave; or
            the ``"guide"``, trained further.
        given: whether the evidence was given.
    """

    rows: Tensor
    elbo: Tensor
    refined: Tensor
    log_evidence: Tensor
    error: Tensor
    how: Refined
    given: bool = False

    @property
    def amortisation(self) -> Tensor:
        """What refining gains, ``[n]``."""
        return self.refined - self.elbo

    @property
    def approximation(self) -> Tensor:
        """What is left after refining, ``[n]``."""
        return self.log_evidence - self.refined

    @property
    def total(self) -> Tensor:
        """The sum of both, ``[n]``."""
        return self.log_evidence - self.elbo

    def __str__(self) -> str:
        lines = [f"Gaps of {len(self.rows)} rows in nats: mean (worst row)"]
        for name in ("amortisation", "approximation", "total"):
            gap = getattr(self, name)
            worst = int(gap.argmax())
            lines.append(
                f"  {name:<13}  {float(gap.mean()):.3f}  ({float(gap[worst]):.3f}, row {int(self.rows[worst])})"
            )
        means = (float(v.mean()) for v in (self.elbo, self.refined, self.log_evidence))
        lines.append("  ELBO {:.3f}, refined {:.3f}, log p(x) {:.3f}".format(*means))
        said = MEANING[self.how] + ("." if self.given else "; log p(x) is importance-weighted, a lower bound.")
        return "\n".join([*lines, *textwrap.wrap(said[0].upper() + said[1:], 100)])


def amortisation_gap(
    posterior: Posterior,
    data: Any = None,
    *,
    rows: int | Sequence[int] | Tensor = 50,
    steps: int = 300,
    lr: float | None = None,
    particles: int = 8,
    draws: int = 2000,
    log_evidence: Tensor | None = None,
    seed: int = 0,
) -> Gaps:
    r"""How much of a guide's gap is the encoder's fault, and how much that of the family of distributions.

    .. math:: \mathcal{L}[q^*](x) = \max_{\lambda} \, E_{q_\lambda} \big[ \log p(x, z) - \log q_\lambda(z) \big]

    Every row's distribution is refined by itself, by gradient ascent from where the encoder put it, all rows at once,
    with the model as it is. What is refined depends on the guide. Where all its heads have parameters of a row, as
    ``MeanField`` and ``FullRank`` do, it is these, so that q* is the best of the family. For other heads of an
    ``Amortized`` guide, such as flows, for heads that see other latents, and where only part of the latents have such
    heads, it is the features that the encoder gave, which may reach less. Any other guide is trained further on the
    chosen rows and then put back as it was, which reaches still less. A row keeps what it had where refining did not
    help, by draws of their own. Neither model nor guide is changed.

    References:
        Inference Suboptimality in Variational Autoencoders (Cremer, Li and Duvenaud, 2018)
        https://arxiv.org/abs/1801.03558

    Arguments:
        posterior: of a guide over latents that each row has for itself.
        data: rows; those of the fit by default.
        rows: how many of them, spread evenly, or which.
        steps: of Adam, whose steps get smaller to nothing.
        lr: first size of a step; by default 0.05 for what is the rows' own, and 0.003 for a guide's parameters.
        particles: draws of each row for a gradient.
        draws: of each row for each ELBO; twice as many for the evidence.
        log_evidence: log p(x) of the chosen rows ``[n]``, from a better source such as annealed importance sampling; by
            default the importance-weighted bound of the guide or of what it became, whichever has the larger effective
            sample size.
        seed: the global random states stay as they were.

    Raises:
        ValueError: for a posterior of chains, a guide that is a point or has parameters for each row, latents that rows
            share, weights that are not finite, or an evidence of the wrong shape.

    Example:
        >>> from pyro_ae import fit, svi
        >>> from pyro_ae.models import ppca
        >>> model, guide, x = ppca.example()
        >>> posterior = fit(model, x, guide=guide, method=svi(steps=10), seed=0, progress=False)
        >>> gaps = amortisation_gap(posterior, rows=4, steps=100)
        >>> gaps.how, bool((gaps.amortisation > 0).all())
        ('parameters', True)
    """
    for name, value in {"steps": steps, "lr": lr or RATES["guide"], "particles": particles, "draws": draws - 1}.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive{', and draws at least 2' * (name == 'draws')}, got {value!r}")
    program = posterior.program
    if posterior.draws is not None or program.guide is None:
        raise ValueError("there is no guide whose gap could be found: chains are not amortised. Fit with svi")
    held = posterior._rows(data)
    if isinstance(held, LoadedRows):
        raise ValueError("the rows are chosen from all, and a DataLoader brings them in batches: pass data=tensors")
    posterior._need_local("amortisation_gap")
    index = chosen_rows(held.need_size(), rows)
    if log_evidence is not None and log_evidence.shape != index.shape:
        raise ValueError(f"log_evidence is of the {len(index)} chosen rows, [n], got shape {tuple(log_evidence.shape)}")
    batch = held.take(index).call()
    with seeded(seed), program.active(), validation(False):
        rowwise = _Rowwise(program, batch, len(index))
        judged, chosen = rowwise(program.guide.fn, draws, seed), rowwise(program.guide.fn, draws, seed + 1)
        if not torch.isfinite(judged).all():
            bad = int((~torch.isfinite(judged)).any(0).sum())
            raise ValueError(f"the guide's weights are not finite in {bad} of {len(index)} rows: look at the supports")
        how, free, refining = _refinable(program, batch)
        with refining as guide:
            _ascend(rowwise, guide, free, steps, lr or RATES[how], particles)
            after = rowwise(guide, draws, seed)
            more = rowwise(guide, draws, seed + 1)
    better = elbo(more) > elbo(chosen)  # by other draws than it is judged by
    after, more = torch.where(better, after, judged), torch.where(better, more, chosen)
    pairs = [torch.cat(pair) for pair in ((judged, chosen), (after, more))]
    # not the larger bound, which would be one that a few heavy weights made too large
    worth = [effective_sample_size(pair) for pair in pairs]
    weighted = torch.where(worth[0] > worth[1], iwae(pairs[0]), iwae(pairs[1]))
    evidence = weighted if log_evidence is None else log_evidence.detach().to(weighted)
    error = (after - judged).std(0) / math.sqrt(draws)
    found = {"elbo": elbo(judged), "refined": elbo(after), "log_evidence": evidence, "error": error}
    dtype = torch.get_default_dtype()
    return Gaps(index, **{n: v.cpu().to(dtype) for n, v in found.items()}, how=how, given=log_evidence is not None)


class _Rowwise:
    """Log-weights of each row."""

    def __init__(self, program: Program, batch: Call, rows: int) -> None:
        self.model, self.batch, self.rows = program.model.fn, batch, rows  # unscaled: these rows are all there are
        try:
            self.layout = program.inspect(batch)
        except (ValueError, RuntimeError) as error:
            error.add_note(
                f"These were {rows} rows: a guide with parameters for each row cannot be given some of them."
            )
            raise

    def weigh(self, guide: Guide, particles: int) -> Weights:
        weights = weigh(self.model, guide, self.batch, particles, layout=self.layout)
        refuse_shared(weights, "amortisation_gap")
        _refuse_points(weights)
        if weights.passes[0].sizes[-1:] != (self.rows,):
            raise ValueError(
                "some latents are shared by all rows, so no row has a gap of its own: amortisation_gap is for models "
                "in which every latent is the rows'"
            )
        return weights

    @torch.no_grad()
    def __call__(self, guide: Guide, draws: int, seed: int) -> Tensor:
        """``[draws, rows]``, from the same noise for the same seed."""
        with seeded(seed):
            parts = [self.weigh(guide, k).log_weights for k in part_sizes(draws, self.layout)]
        return torch.cat([part.reshape(len(part), -1, self.rows).sum(1) for part in parts])


def _ascend(rowwise: _Rowwise, guide: Guide, free: list[Tensor], steps: int, lr: float, particles: int) -> None:
    """Adam on the ELBOs of all rows, which do not see each other where each has free numbers of its own."""
    optimizer = torch.optim.Adam(free, lr=lr)
    for step in range(steps):
        with torch.enable_grad():
            weights = rowwise.weigh(guide, particles)
            bound = _estimator(weights)(elbo, weights).sum()
            gradients = torch.autograd.grad(bound, free, allow_unused=True)
        for p, gradient in zip(free, gradients, strict=True):
            p.grad = None if gradient is None else -gradient.nan_to_num(0.0, 0.0, 0.0)
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.step()


def _estimator(weights: Weights) -> Callable[[Any, Weights], Tensor]:
    """The gradient with the least noise that the guide's sites have; it has none where q is the posterior."""
    run = weights.passes[0]
    if not all(site["fn"].has_rsample for site in run.latents):
        return score_function()
    return pathwise if any(is_estimated(site) for site in run.drawn.scored) else sticking_the_landing


# -- what is refined -----------------------------------------------------------------------------------------


def _refinable(program: Program, batch: Call) -> tuple[Refined, list[Tensor], AbstractContextManager[Guide]]:
    """What is refined, the tensors to be moved, and the guide that has them in their place."""
    assert program.guide is not None
    guide: Any = program.guide.fn
    if all(hasattr(guide, name) for name in ("rows", "features", "site_heads")):
        with torch.no_grad():
            features = guide.features(guide.rows(batch.args, batch.kwargs))
        outputs = _parameters(program, guide, batch, features)
        if outputs:
            leaves = {head: output.clone().requires_grad_() for head, output in outputs.items()}
            return "parameters", list(leaves.values()), _with_parameters(guide, leaves)
        if isinstance(features, Tensor):
            leaf = features.clone().requires_grad_()
            return "features", [leaf], _with_features(guide, leaf)
    parameters = program.parameters
    stored = parameters.sampled_by(guide, batch) - parameters.sampled_by(program.model.fn, batch)
    own = [p for name, p in parameters.trainable().items() if name.startswith("guide.") or name in stored]
    if not own:
        raise ValueError(
            "the guide has no parameters that could be refined: write it as Amortized(encoder, head), or as a module "
            "whose parameters can be trained"
        )
    return "guide", own, _put_back(guide, own)


def _parameters(program: Program, guide: Any, batch: Call, features: Any) -> dict[Any, Tensor]:
    """Heads to the parameters of each row, where every latent has such a head and is given the features alone."""
    heads = dict(guide.site_heads)
    latents = {name for name, site in program.layout.guide.items() if site.kind in ("latent", "auxiliary")}
    if set(heads) != latents or not all(hasattr(h, "linear") and hasattr(h, "distribution") for h in heads.values()):
        return {}
    calls: list[tuple[Any, Any, Tensor]] = []
    with ExitStack() as stack, torch.no_grad():
        for head in heads.values():

            def note(_: Any, inputs: Any, output: Tensor, head: Any = head) -> None:
                calls.append((head, inputs[0], output))

            stack.callback(head.linear.register_forward_hook(note).remove)
        guide(*batch.args, **batch.kwargs)
    plain = len(calls) == len(heads) and all(torch.equal(seen, features) for _, seen, _ in calls)
    return {head: output for head, _, output in calls} if plain else {}


@contextmanager
def _with_parameters(guide: Any, leaves: dict[Any, Tensor]) -> Iterator[Guide]:
    with ExitStack() as stack:
        for head, leaf in leaves.items():
            hook = head.linear.register_forward_hook(lambda module, inputs, output, leaf=leaf: leaf)
            stack.callback(hook.remove)
        yield guide


@contextmanager
def _with_features(guide: Any, leaf: Tensor) -> Iterator[Guide]:
    twin = copy.copy(guide)  # shares the networks
    twin.features = lambda x: leaf
    yield twin


@contextmanager
def _put_back(guide: Any, parameters: list[Tensor]) -> Iterator[Guide]:
    before = [(p.detach().clone(), p.grad) for p in parameters]
    try:
        yield guide
    finally:
        for p, (value, gradient) in zip(parameters, before, strict=True):
            p.data.copy_(value)
            p.grad = gradient
