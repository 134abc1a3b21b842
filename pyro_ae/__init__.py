"""Posteriors you can trust from models you write as Pyro functions."""

from .bayesian import bayesian
from .bounds import elbo, iwae
from .cite import cite
from .data import observe
from .density import log_weights
from .engines.ensemble import ensemble, map_, swag
from .engines.laplace import laplace
from .engines.nuts import hmc, nuts
from .engines.sghmc import entropy_sghmc, sghmc
from .engines.sgld import sgld
from .engines.sgnht import sgnht
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
    "bayesian",
    "cite",
    "elbo",
    "ensemble",
    "entropy_sghmc",
    "fit",
    "hmc",
    "importance",
    "iwae",
    "laplace",
    "log_weights",
    "map_",
    "nuts",
    "observe",
    "sghmc",
    "sgld",
    "sgnht",
    "svi",
    "swag",
    "to_jax",
]
