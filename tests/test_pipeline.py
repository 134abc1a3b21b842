"""The autoencoder as scikit-learn's estimator: its own checks, and pipelines, searches and data frames."""

import copy

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

from pyro_ae import fit, map_, svi
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.guides.structured import Structured
from pyro_ae.models import bayesian_autoencoder, deep_vae, ppca
from pyro_ae.models.ppca import PPCA
from pyro_ae.nn import MLP
from pyro_ae.pipeline import Autoencoder
from pyro_ae.types import Recipe

QUIET = {"check": False}


def recipe(features: int) -> Recipe:
    guide = Amortized(MLP(features, [4], missing=True), MeanField(4, 2))
    return Recipe(PPCA(features, 2), guide, svi(steps=5))


def estimator(**options: object) -> Autoencoder:
    return Autoencoder(recipe, **{"seed": 0, "particles": 5, "options": QUIET} | options)


@pytest.fixture
def X() -> np.ndarray:
    return ppca.example()[2].numpy().astype(float)


def test_scikit_learn_finds_no_fault_but_that_the_evidence_is_sampled() -> None:
    found = check_estimator(estimator(), on_fail=None, on_skip=None)
    faults = {r["check_name"]: str(r["exception"]) for r in found if r["status"] == "failed"}
    assert set(faults) <= {"check_methods_sample_order_invariance", "check_methods_subset_invariance"}, faults
    assert all("score_samples" in text for text in faults.values()), faults
    assert len(found) > 30


def test_it_is_the_fit_and_its_posterior(X: np.ndarray) -> None:
    model, guide, _ = ppca.example()
    before = copy.deepcopy(model.state_dict())
    made = Autoencoder(model, guide, method=svi(steps=5), seed=3, particles=5, options=QUIET).fit(X)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)

    model, guide, _ = ppca.example()
    posterior = fit(model, X, guide=guide, method=svi(steps=5), seed=3, progress=False, check=False)
    np.testing.assert_array_equal(made.transform(X), posterior.encode(X).numpy())
    torch.manual_seed(3)
    np.testing.assert_array_equal(made.score_samples(X), posterior.log_evidence(X, 5).numpy())
    assert made.score(X) == pytest.approx(made.score_samples(X).mean())
    z = made.transform(X)
    decoded = torch.as_tensor(z) @ model.weight.T + model.mean
    np.testing.assert_allclose(made.inverse_transform(z), decoded.detach().numpy(), atol=1e-5)


def test_a_refit_starts_anew(X: np.ndarray) -> None:
    model, guide, _ = ppca.example()
    made = Autoencoder(model, guide, method=svi(steps=5), seed=0, options=QUIET)
    first = made.fit_transform(X)
    np.testing.assert_array_equal(made.fit_transform(X), first)
    assert not np.array_equal(made.set_params(method=svi(steps=50)).fit_transform(X), first)


def test_a_clone_is_unfitted_and_its_guide_knows_its_model(X: np.ndarray) -> None:
    model = PPCA(5, 2)
    guide = Structured(model, MLP(5, [4]), MeanField(4, 2))
    made = Autoencoder(model, guide, method=svi(steps=5), options=QUIET).set_output(transform="pandas").fit(X)
    new = clone(made)
    assert new.get_params().keys() == made.get_params().keys()
    assert new.model is not model and new.guide._model[0] is new.model
    for method in ("transform", "inverse_transform", "score_samples", "get_feature_names_out"):
        with pytest.raises(NotFittedError):
            getattr(new, method)(X) if method != "get_feature_names_out" else new.get_feature_names_out()
    assert isinstance(new.fit(X).transform(X), pd.DataFrame)
    posterior = new.posterior_
    assert posterior.guide._model[0] is posterior.model and posterior.model is not new.model


def test_columns_have_names_that_are_checked(X: np.ndarray) -> None:
    frame = pd.DataFrame(X, columns=list("abcde"), index=[f"row {i}" for i in range(16)])
    made = estimator().set_output(transform="pandas").fit(frame)
    codes = made.transform(frame)
    assert codes.columns.tolist() == ["autoencoder0", "autoencoder1"] and codes.index.equals(frame.index)
    assert made.n_features_in_ == 5 and made.feature_names_in_.tolist() == list("abcde")
    with pytest.raises(ValueError, match="feature names"):
        made.transform(frame.rename(columns={"a": "z"}))
    with pytest.raises(ValueError, match="4 features, but Autoencoder is expecting 5"):
        estimator().fit(X).transform(X[:, :4])
    with pytest.raises(ValueError, match="3 columns, and the codes of Autoencoder have 2"):
        made.inverse_transform(X[:, :3])


def test_missing_values_pass(X: np.ndarray) -> None:
    X[0, 0] = np.nan
    made = estimator().fit(X)
    assert np.isfinite(made.transform(X)).all() and np.isfinite(made.score_samples(X)).all()


def test_it_is_searched_over_in_a_pipeline(X: np.ndarray) -> None:
    steps = make_pipeline(StandardScaler(), estimator())
    search = GridSearchCV(steps, {"autoencoder__batch_size": [4, 8]}, cv=2, error_score="raise").fit(X)
    scores = search.cv_results_["mean_test_score"]
    assert np.isfinite(scores).all() and scores[0] != scores[1]
    best = search.best_estimator_
    assert best[-1].posterior_.batch_size == search.best_params_["autoencoder__batch_size"]
    assert best.transform(X).shape == (16, 2) and best.inverse_transform(best.transform(X)).shape == X.shape
    assert best.score(X) == pytest.approx(best[-1].score(best[0].transform(X)))


def test_several_latents_stand_side_by_side() -> None:
    model, guide, x = deep_vae.example()
    made = Autoencoder(model, guide, method=svi(steps=5), seed=0, options=QUIET).fit(x)
    sizes = {site: z.shape[1] for site, z in made.posterior_.encode(x).items()}
    z = made.transform(x)
    assert z.shape == (16, sum(sizes.values())) and list(sizes) == ["z2", "z1"]
    np.testing.assert_array_equal(z, made.transform(x))  # an average over draws, of one seed
    np.testing.assert_array_equal(made.inverse_transform(z), made.inverse_transform(z))
    moved = z.copy()
    moved[:, sizes["z2"] :] += 1.0
    assert not np.allclose(made.inverse_transform(moved), made.inverse_transform(z))


def test_codes_that_are_a_function_of_the_row_and_of_weights() -> None:
    model, guide, x = bayesian_autoencoder.example()
    made = Autoencoder(Recipe(model, guide, map_(steps=5)), options=QUIET).fit(x)
    decoded = made.inverse_transform(made.transform(x))
    np.testing.assert_allclose(decoded, made.posterior_.reconstruct(x).numpy(), atol=1e-5)


def test_codes_that_nothing_samples_are_not_decoded(X: np.ndarray) -> None:
    def model(x: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0)).unsqueeze(-1)
        with pyro.plate("data", len(x)):
            z = pyro.deterministic("z", w * x[:, :2], event_dim=1)
            pyro.sample("x", dist.Normal(z @ torch.ones(2, 5), 1.0).to_event(1), obs=x)

    made = Autoencoder(Recipe(model, None, map_(steps=5)), options=QUIET).fit(X)
    assert made.transform(X).shape == (16, 2)
    with pytest.raises(ValueError, match="does not sample 'z'"):
        made.inverse_transform(made.transform(X))


def test_a_function_without_a_guide_gives_a_recipe(X: np.ndarray) -> None:
    with pytest.raises(ValueError, match="gave PPCA: return Recipe"):
        Autoencoder(lambda features: PPCA(features, 2)).fit(X)
    with pytest.raises(ValueError, match="needs a guide"):
        Autoencoder(nn.Sequential(PPCA(5, 2)), options=QUIET).fit(X)
