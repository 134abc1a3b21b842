"""Figures of a fit. Each draws into the axes that it is given, or into new ones of pyplot, and returns them."""

from .calibration import coverage, rank_ecdf
from .chains import energy, pair, rank, trace
from .codes import kl, latent_space
from .comparison import intervals
from .images import images, reconstructions, samples, traversal, uncertainty
from .predictive import predictive
from .training import history
from .weights import pareto_k, pareto_k_by_row

__all__ = [
    "coverage",
    "energy",
    "history",
    "images",
    "intervals",
    "kl",
    "latent_space",
    "pair",
    "pareto_k",
    "pareto_k_by_row",
    "predictive",
    "rank",
    "rank_ecdf",
    "reconstructions",
    "samples",
    "trace",
    "traversal",
    "uncertainty",
]
