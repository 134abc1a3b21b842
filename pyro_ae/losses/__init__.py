"""Losses: what svi minimises, as functions of (model, guide, batch)."""

from .aggregate import aggregate, info_vae, wasserstein
from .fisher import fisher
from .importance import importance, piwae
from .kl import annealed, autogen, capacity, free_bits, soft_free_bits, total_correlation
from .moments import aggregate_moments
from .wake_sleep import wake_sleep

__all__ = [
    "aggregate",
    "aggregate_moments",
    "annealed",
    "autogen",
    "capacity",
    "fisher",
    "free_bits",
    "importance",
    "info_vae",
    "piwae",
    "soft_free_bits",
    "total_correlation",
    "wake_sleep",
    "wasserstein",
]
