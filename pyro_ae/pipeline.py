"""An autoencoder as a step of a scikit-learn pipeline: codes by transform, log-evidence by score."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted, validate_data
from torch import Tensor, nn

from .coding import codes
from .draws import average, mean_or_value
from .fit import fit
from .generation import blank
from .posterior import Posterior
from .runtime import seeded
from .sites import Layout, quote
from .types import Engine, Guide, Model, Recipe


class Autoencoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""A model with codes, as an estimator of scikit-learn: to a pipeline what PCA is.

    ``transform`` gives the posterior mean of the codes and ``score_samples`` a lower bound on log p(x), by which
    ``GridSearchCV`` compares. Each fit trains a copy, so that what it is given stays as it is. NaN is a missing value.

    Arguments:
        model: a model of rows ``[N, features]``, or a ``Recipe``; or, without a guide, a function of the number of
            features that gives a recipe, as the steps before may change that number.
        guide: samples the codes of each row, with the model's arguments.
        method: as for ``fit``.
        batch_size: as for ``fit``.
        seed: of a fit, of the codes and of the score, which are the same at each call then.
        particles: for the bound on log p(x), which tightens with more of them.
        options: further arguments of ``fit``, such as ``{"validation": 0.1, "device": "cpu"}``.

    Attributes:
        posterior_: what the fit found.
        n_features_in_: columns of the data of the fit.
        feature_names_in_: their names, where it was a data frame.

    Example:
        >>> from pyro_ae import svi
        >>> from pyro_ae.models import ppca
        >>> from sklearn.pipeline import make_pipeline
        >>> from sklearn.preprocessing import StandardScaler
        >>> model, guide, x = ppca.example()
        >>> steps = make_pipeline(StandardScaler(), Autoencoder(model, guide, method=svi(steps=10), seed=0))
        >>> steps.fit_transform(x.numpy()).shape, steps.get_feature_names_out().tolist()
        ((16, 2), ['autoencoder0', 'autoencoder1'])
    """

    def __init__(
        self,
        model: Model | Recipe | Callable[[int], Recipe],
        guide: Guide | None = None,
        *,
        method: str | Engine = "svi",
        batch_size: int | None = None,
        seed: int | None = None,
        particles: int = 100,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.guide = guide
        self.method = method
        self.batch_size = batch_size
        self.seed = seed
        self.particles = particles
        self.options = options

    def fit(self, X: Any, y: Any = None) -> Autoencoder:
        """Train a copy of the model and the guide.

        Arguments:
            X: ``[N, features]``.
            y: not looked at.

        Raises:
            ValueError: as ``fit`` does, and for data that are not a table of numbers.
        """
        X = self._rows(X, reset=True)
        with seeded(self.seed):
            # together, as a guide or a loss may know the model
            model, guide, method = copy.deepcopy((self.model, self.guide, self.method))
            if guide is None and not isinstance(model, nn.Module | Recipe):
                model = _recipe(model, X.shape[1])
            options = {"progress": False} | dict(self.options or {})
            self.posterior_ = fit(model, X, guide=guide, method=method, batch_size=self.batch_size, **options)
        self.shapes_ = {site: z.shape[1:] for site, z in self._codes(X[:1]).items()}
        return self

    def transform(self, X: Any) -> NDArray:
        """The posterior mean of the codes of each row, ``[N, latent]``; those of several sites stand side by side.

        Arguments:
            X: ``[N, features]``.
        """
        return _side_by_side(self._codes(self._rows(X)))

    def inverse_transform(self, X: Any) -> NDArray:
        """The mean of the likelihood at codes, ``[N, features]``.

        Arguments:
            X: ``[N, latent]``, as :meth:`transform` gives them.

        Raises:
            ValueError: for codes that the model only computes from rows, and never samples.
        """
        check_is_fitted(self)
        z = torch.as_tensor(check_array(X), dtype=torch.get_default_dtype())
        if z.shape[1] != self._n_features_out:
            raise ValueError(
                f"X has {z.shape[1]} columns, and the codes of {type(self).__name__} have {self._n_features_out}"
            )
        parts = z.split([shape.numel() for shape in self.shapes_.values()], 1)
        found = {
            site: part.reshape(-1, *shape) for (site, shape), part in zip(self.shapes_.items(), parts, strict=True)
        }
        with seeded(self.seed):
            return _side_by_side(_decode(self.posterior_, found))

    def score_samples(self, X: Any) -> NDArray:
        """A lower bound on log p(x) of each row, ``[N]`` in nats.

        Arguments:
            X: ``[N, features]``.
        """
        X = self._rows(X)
        with seeded(self.seed):
            return self.posterior_.log_evidence(X, self.particles).numpy()

    def score(self, X: Any, y: Any = None) -> float:
        """The mean of :meth:`score_samples`.

        Arguments:
            X: ``[N, features]``.
            y: not looked at.
        """
        return float(self.score_samples(X).mean())

    @property
    def _n_features_out(self) -> int:
        return sum(shape.numel() for shape in self.shapes_.values())

    def _rows(self, X: Any, reset: bool = False) -> NDArray:
        if not reset:
            check_is_fitted(self)
        return validate_data(self, X, reset=reset, dtype=[np.float64, np.float32], ensure_all_finite="allow-nan")

    def _codes(self, X: NDArray) -> dict[str, Tensor]:
        with seeded(self.seed), torch.no_grad():
            return codes(self.posterior_, X, 100, None)

    def __sklearn_clone__(self) -> Autoencoder:
        # scikit-learn would copy the model and the guide one by one, and a guide that knows the model would lose it
        new = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy({name: v for name, v in vars(self).items() if not name.endswith("_")}))
        return new

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.non_deterministic = self.seed is None
        tags.transformer_tags.preserves_dtype = []
        return tags


def _recipe(make: Any, features: int) -> Recipe:
    made = make(features)
    if not isinstance(made, Recipe):
        raise ValueError(
            f"without a guide, a function is called with the number of features and gives a Recipe, and {make!r} gave "
            f"{type(made).__name__}: return Recipe(model, guide), or pass guide=... with a model"
        )
    return made


def _side_by_side(values: Mapping[str, Tensor]) -> NDArray:
    return torch.cat([v.flatten(1) for v in values.values()], 1).numpy()


def _decode(posterior: Posterior, codes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The likelihood's mean at codes ``[N, *event]``, averaged over draws of what all rows share."""
    program = posterior.program
    shared = [site for site in program.layout.names("latent") if site not in codes]
    drawn = posterior.sample(posterior._at_most(100)) if shared else {}
    values = {site: drawn[site] for site in shared}
    draws = len(values[shared[0]]) if shared else 1
    values |= {site: z.expand(draws, *z.shape) for site, z in codes.items()}

    def names(layout: Layout) -> list[str]:
        ignored = [site for site in codes if site not in layout.names("latent")]
        if ignored:
            raise ValueError(f"the model does not sample {quote(ignored)}, so it has no mean given codes there")
        return program.layout.names("observed")

    rows = len(next(iter(codes.values())))
    return average(program, values, blank(posterior, rows), names, mean_or_value, generate=True)
