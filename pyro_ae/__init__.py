"""Posteriors you can trust from models you write as Pyro functions."""

from .bayesian import bayesian
from .bounds import elbo, iwae
from .cite import cite
from .data import observe
from .density import log_weights
from .engines.ensemble import ensemble, map_, swag
from .engines.feynman_kac import feynman_kac
from .engines.laplace import laplace
from .engines.mc_dropout import mc_dropout
from .engines.nuts import hmc, nuts
from .engines.prior_matching import match_prior
from .engines.sghmc import entropy_sghmc, sghmc
from .engines.sgld import sgld
from .engines.sgnht import sgnht
from .engines.svi import svi
from .fit import fit
from .losses import importance
from .lowering.density import to_jax
from .plates import batch_plate
from .posterior import Posterior
from .types import PosteriorWarning

__version__ = "0.1.0"

__all__ = [
    "Posterior",
    "PosteriorWarning",
    "batch_plate",
    "bayesian",
    "cite",
    "elbo",
    "ensemble",
    "entropy_sghmc",
    "feynman_kac",
    "fit",
    "hmc",
    "importance",
    "iwae",
    "laplace",
    "log_weights",
    "map_",
    "match_prior",
    "mc_dropout",
    "nuts",
    "observe",
    "sghmc",
    "sgld",
    "sgnht",
    "svi",
    "swag",
    "to_jax",
]
