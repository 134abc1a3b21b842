"""Posteriors you can trust from models you write as Pyro functions."""

from .bounds import elbo, iwae
from .cite import cite
from .data import observe
from .density import log_weights
from .engines.nuts import hmc, nuts
from .engines.svi import svi
from .fit import fit
from .losses import importance
from .lowering.density import to_jax
from .plates import batch_plate
from .posterior import Posterior

__version__ = "0.1.0"

__all__ = [
    "Posterior",
    "batch_plate",
    "cite",
    "elbo",
    "fit",
    "hmc",
    "importance",
    "iwae",
    "log_weights",
    "nuts",
    "observe",
    "svi",
    "to_jax",
]
