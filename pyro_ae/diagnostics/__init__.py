"""Whether to believe a posterior: functions of its draws, of log-weights, or of the posterior itself.

``posterior.report()`` is the place to begin; what is here looks closer.
"""

from . import plots
from .adversarial import adversarial_shift
from .amortisation import amortisation_gap
from .anomaly import anomaly_scores, conformal_p_values
from .attribution import attribution, case_influence, influence
from .bridge import bridge_sampling
from .calibration import calibration_error, central_coverage, expected_coverage, simulated_coverage
from .comparison import compare
from .elpd import loo, waic
from .evidence import annealed_importance_sampling, bidirectional
from .features import classifier_features, principal_features
from .importance import effective_sample_size, pareto_k
from .latents import latent_summaries, latent_summary
from .predictive import predictive_check
from .quality import frechet_distance, generation_quality, precision_recall
from .ranks import ecdf_band
from .scores import auroc, crps, nll, out_of_distribution
from .simulation import refit_calibration, simulation_based_calibration
from .two_sample import c2st, interval_coverage
from .units import active_units, collapsed, kinds

__all__ = [
    "active_units",
    "adversarial_shift",
    "amortisation_gap",
    "annealed_importance_sampling",
    "anomaly_scores",
    "attribution",
    "auroc",
    "bidirectional",
    "bridge_sampling",
    "c2st",
    "calibration_error",
    "case_influence",
    "central_coverage",
    "classifier_features",
    "collapsed",
    "compare",
    "conformal_p_values",
    "crps",
    "ecdf_band",
    "effective_sample_size",
    "expected_coverage",
    "frechet_distance",
    "generation_quality",
    "influence",
    "interval_coverage",
    "kinds",
    "latent_summaries",
    "latent_summary",
    "loo",
    "nll",
    "out_of_distribution",
    "pareto_k",
    "plots",
    "precision_recall",
    "predictive_check",
    "principal_features",
    "refit_calibration",
    "simulated_coverage",
    "simulation_based_calibration",
    "waic",
]
