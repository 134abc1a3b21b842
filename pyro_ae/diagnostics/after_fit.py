"""The look at a posterior right after its fit: a warning where it is poor."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from ..data import Rows
from ..runtime import seeded
from ..types import PosteriorWarning
from .chain_checks import INDEPENDENT
from .findings import POOR, Findings
from .report import check

if TYPE_CHECKING:
    from ..posterior import Posterior

ENTRIES, ROWS, PARTICLES = 50, 30, 200
"""Few enough for a look that costs about a second."""
LARGEST = 2**16
"""Numbers in a site of all rows above which shared latents are left to the report."""


def warn_if_poor(posterior: Posterior) -> None:
    """Warn, once, of a posterior that is poor. Nothing is worked out where such warnings are ignored.

    Methods whose answer is meant as a point or a few are not looked at, nor is a guide that takes all of many rows at
    once: :meth:`~pyro_ae.posterior.Posterior.report` takes its time.

    Arguments:
        posterior: that ``fit`` is about to give back.
    """
    if _ignored() or posterior.method.split("(")[0] in INDEPENDENT or not _quick(posterior):
        return
    found = Findings()
    try:
        with seeded(0):
            check(found, posterior, None, ROWS, PARTICLES, entries=ENTRIES, latents=False)
    except (ValueError, RuntimeError, NotImplementedError):
        return  # what cannot be judged is no reason to lose a fit, and the report says why
    if found.worst < POOR or found.point:
        return
    reasons = " ".join(text for level, text in found.sentences if level == POOR)
    warnings.warn(
        f"This posterior is poor. {reasons} More in posterior.report(); fit(check=False) leaves this out.",
        PosteriorWarning,
        stacklevel=3,
    )


def _ignored() -> bool:
    for action, message, category, module, _ in warnings.filters:
        if message is None and module is None and issubclass(PosteriorWarning, category):
            return action == "ignore"
    return False


def _quick(posterior: Posterior) -> bool:
    if posterior.draws is not None:
        return True
    program, rows = posterior.program, posterior.data
    if not program.layout.names("latent") or not isinstance(rows, Rows):
        return False
    scored = [s for s in program.layout.model.values() if s.kind != "deterministic"]
    if all(any(name == program.plate for name, _, _ in site.plates) for site in scored):
        return True  # rows that can be looked at one by one
    largest = max(site.shape.numel() for site in scored)
    shown = program.layout.plates.get(str(program.plate), 1)
    return largest * max(1, (rows.size or 1) // shown) <= LARGEST
