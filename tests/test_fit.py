"""One fit for every model, and an error that names the cure for each mistake."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn
from truth import gaussian_mean, ppca

import pyro_ae
from pyro_ae import Posterior, batch_plate, fit, importance, iwae, nuts, svi
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.models import ppca as ppca_file
from pyro_ae.models import vae
from pyro_ae.nn import MLP
from pyro_ae.types import Recipe


def quick(**kwargs):
    return svi(**({"steps": 3} | kwargs))


# -- Pyro's own VAE tutorial, as it stands there but for the data ------------------------------------------


class Decoder(nn.Module):
    def __init__(self, z_dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(z_dim, hidden_dim)
        self.fc21 = nn.Linear(hidden_dim, 784)
        self.softplus = nn.Softplus()
        self.sigmoid = nn.Sigmoid()

    def forward(self, z):
        hidden = self.softplus(self.fc1(z))
        loc_img = self.sigmoid(self.fc21(hidden))
        return loc_img


class Encoder(nn.Module):
    def __init__(self, z_dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(784, hidden_dim)
        self.fc21 = nn.Linear(hidden_dim, z_dim)
        self.fc22 = nn.Linear(hidden_dim, z_dim)
        self.softplus = nn.Softplus()

    def forward(self, x):
        x = x.reshape(-1, 784)
        hidden = self.softplus(self.fc1(x))
        z_loc = self.fc21(hidden)
        z_scale = torch.exp(self.fc22(hidden))
        return z_loc, z_scale


class TutorialVAE(nn.Module):
    def __init__(self, z_dim=50, hidden_dim=400, use_cuda=False):
        super().__init__()
        self.encoder = Encoder(z_dim, hidden_dim)
        self.decoder = Decoder(z_dim, hidden_dim)
        if use_cuda:
            self.cuda()
        self.use_cuda = use_cuda
        self.z_dim = z_dim

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = x.new_zeros(torch.Size((x.shape[0], self.z_dim)))
            z_scale = x.new_ones(torch.Size((x.shape[0], self.z_dim)))
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            loc_img = self.decoder(z)
            pyro.sample("obs", dist.Bernoulli(loc_img).to_event(1), obs=x.reshape(-1, 784))

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_scale = self.encoder(x)
            pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))


@pytest.mark.parametrize("particles", [1, 4])
def test_pyros_vae_tutorial_runs_unchanged(particles):
    torch.manual_seed(0)
    x = torch.bernoulli(torch.rand(1, 1, 28, 28).round().expand(60, 1, 28, 28) * 0.9)
    own = TutorialVAE(z_dim=4, hidden_dim=16)
    before = own.decoder.fc1.weight.clone()
    method = svi(loss=importance(iwae, particles), lr=1e-2, epochs=12)
    posterior = fit(own.model, x, guide=own.guide, method=method, batch_size=20, seed=0, progress=False)
    loss = posterior.history["loss"]
    assert loss[-1] < 0.75 * loss[0]
    assert not torch.equal(own.decoder.fc1.weight, before), "what is learnt is in the user's own module"
    assert posterior.encode().shape == (60, 4)
    assert posterior.reconstruct().shape == (60, 784)
    assert posterior.generate(5).shape == (5, 784)
    assert len(pyro.get_param_store()) == 0


# -- methods -----------------------------------------------------------------------------------------------


def test_the_same_model_by_every_method_gives_the_same_kind_of_result():
    y = torch.randn(30) + 1
    fits = [
        fit(gaussian_mean, y, method=m, seed=0, progress=False)
        for m in (svi(steps=400, lr=0.05), nuts(draws=100, warmup=100, chains=2))
    ]
    for posterior in fits:
        assert isinstance(posterior, Posterior)
        assert posterior.sample(50)["mu"].shape == (50,)
        assert posterior.predict(draws=20)["y"].shape == (20, 30)
        assert posterior.log_likelihood(draws=10)["y"].shape == (10, 30)
    means = [p.sample()["mu"].mean() for p in fits]
    assert abs(means[0] - means[1]) < 0.3


def test_strings_are_short_for_engines():
    y = torch.randn(10)
    assert "nuts(draws=1000" in repr(nuts())
    posterior = fit(gaussian_mean, y, method=svi(steps=2), progress=False)
    assert posterior.method.startswith("svi(")
    with pytest.raises(ValueError, match="unknown method 'nutz'; did you mean 'nuts'.*'svi'"):
        fit(gaussian_mean, y, method="nutz")
    with pytest.raises(ValueError, match="method must be a name or an engine"):
        fit(gaussian_mean, y, method=3)


def test_a_recipe_is_taken_as_it_is():
    model, guide, x = ppca_file.example()
    posterior = fit(Recipe(model, guide, quick()), x, progress=False)
    assert posterior.guide is guide
    assert posterior.history["step"][-1] == 3


def test_a_model_without_data_and_one_without_a_plate():
    posterior = fit(lambda: pyro.sample("a", dist.Normal(3.0, 0.1)), None, method=quick(), progress=False)
    assert posterior.sample(4)["a"].shape == (4,)

    def plain(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a, 1.0).expand([len(y)]).to_event(1), obs=y)

    assert fit(plain, torch.zeros(5), method=quick(), progress=False).history["loss"]


def test_another_name_for_the_plate():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("patients", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.randn(12)
    with pytest.raises(ValueError, match="plate 'data'; the model's plates are: 'patients'"):
        fit(model, y, batch_size=4, progress=False)
    fit(model, y, batch_size=5, plate="patients", method=quick(), progress=False)


def test_global_state_is_left_alone():
    validates = torch.distributions.Distribution._validate_args
    dtype = torch.get_default_dtype()
    fit(gaussian_mean, torch.zeros(5), method=quick(), progress=False)
    fit(gaussian_mean, torch.zeros(5), method=nuts(5, 5, 1), progress=False)
    assert torch.distributions.Distribution._validate_args == validates
    assert pyro.poutine.util.is_validation_enabled()
    assert torch.get_default_dtype() == dtype
    assert len(pyro.get_param_store()) == 0


def test_modules_come_back_in_the_mode_they_were_in():
    model, guide, x = ppca_file.example()
    guide.eval()
    fit(model, x, guide=guide, method=quick(), progress=False)
    assert model.training
    assert not guide.training


def test_progress_bar_shows_loss(capsys):
    model, guide, x = ppca_file.example()
    fit(model, x, guide=guide, method=quick(), progress=True)
    assert "loss" in capsys.readouterr().err
    fit(model, x, guide=guide, method=quick(), progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.gpu
def test_on_a_gpu():
    model, guide, x = ppca_file.example()
    posterior = fit(model, x, guide=guide, method=quick(), batch_size=5, device="cuda", progress=False)
    assert next(model.parameters()).is_cuda
    assert posterior.encode().device.type == "cpu"


# -- mistakes ----------------------------------------------------------------------------------------------


def example_fit(x, **kwargs):
    model, guide, _ = ppca_file.example()
    return fit(model, x, guide=guide, **({"method": quick(), "progress": False} | kwargs))


@pytest.mark.parametrize("empty", [torch.zeros(0, 5), [], (), {}, {"x": torch.zeros(0, 5)}])
def test_empty_data(empty):
    with pytest.raises(ValueError, match="the data is empty"):
        example_fit(empty)


def test_rows_of_different_lengths():
    def model(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mu, 1.0).expand([len(x)]).to_event(1), obs=x)
        pyro.sample("y", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y)

    data = {"x": torch.zeros(6), "y": torch.zeros(4)}
    with pytest.raises(ValueError, match="'x' has 6, 'y' has 4"):
        fit(model, data, batch_size=2, progress=False)
    fit(model, data, method=quick(), progress=False)  # all at once they may differ


def test_site_names_that_differ():
    model, _, x = ppca_file.example()
    guide = Amortized(MLP(5, [8]), MeanField(8, 2), site="latent")
    with pytest.raises(ValueError, match="lacks 'z'; it samples 'latent'.*latent sites are 'z'"):
        fit(model, x, guide=guide, progress=False)


def test_a_guide_that_samples_an_observed_site():
    model, guide, x = ppca_file.example()

    def wrong(x):
        guide(x)
        with batch_plate(x):
            pyro.sample("x", dist.Normal(torch.zeros(5), 1.0).to_event(1))

    with pytest.raises(ValueError, match="the guide samples 'x', which the model observes"):
        fit(model, x, guide=wrong, progress=False)


def test_a_guide_that_forgets_the_plate():
    model, guide, x = ppca_file.example()

    def wrong(x):
        pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(2))

    with pytest.raises(ValueError, match="'z' stands in plates 'data' in the model but in none in the guide"):
        fit(model, x, guide=wrong, progress=False)


def test_integer_images():
    images = torch.randint(0, 256, (10, 28, 28), dtype=torch.uint8)
    for form in (images, images.numpy(), (images,)):
        with pytest.raises(ValueError, match="integer images: uint8.*255"):
            example_fit(form)


@pytest.mark.parametrize(("batch_size", "match"), [(17, "larger than the 16 rows"), (0, "at least 1"), (2.5, "whole")])
def test_batch_sizes(batch_size, match):
    with pytest.raises(ValueError, match=match):
        example_fit(ppca_file.example()[2], batch_size=batch_size)


def test_the_last_batch_may_be_smaller():
    posterior = example_fit(ppca_file.example()[2], batch_size=7, method=svi(epochs=2))
    assert posterior.history["step"] == [3, 6]


def test_a_model_without_the_plate():
    def model(x):
        with pyro.plate("rows", len(x)), pyro.plate("columns", 5, dim=-2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="plates are: 'columns', 'rows'.*batch_plate"):
        fit(model, torch.zeros(6, 2), guide=AutoNormal(model), batch_size=3, progress=False)


def test_a_model_of_fixed_size_in_minibatches_gets_a_hint():
    model, _, x = ppca_file.example()

    def fixed(x):
        with pyro.plate("data", 16):
            mu = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(mu[:, None], 1.0).expand([len(x), 5]).to_event(1), obs=x)

    with pytest.raises((ValueError, RuntimeError)) as error:
        fit(fixed, x, guide=AutoNormal(fixed), batch_size=4, progress=False)
    assert "minibatch of the 16 rows" in "".join(error.value.__notes__)


def test_local_latents_without_a_guide():
    model, _, x = ppca_file.example()
    with pytest.raises(ValueError, match=r"'z', in plate 'data'.*function of the rows(.|\n)*MeanField\(200, 2\)"):
        fit(model, x, progress=False)


def test_discrete_latents_without_a_guide():
    def model(y):
        k = pyro.sample("k", dist.Poisson(3.0))
        pyro.sample("y", dist.Normal(k, 1.0).expand([len(y)]).to_event(1), obs=y)

    with pytest.raises(ValueError, match="'k' are discrete.*TraceEnum_ELBO"):
        fit(model, torch.zeros(3), progress=False)


def test_values_outside_the_support_name_the_site():
    model, guide, x = vae.example()
    with pytest.raises(ValueError, match="support") as error:
        fit(model, x + 0.5, guide=guide, progress=False)
    assert any("'x'" in note for note in error.value.__notes__)


def test_frames_and_arrays_that_are_not_numbers():
    import numpy as np
    import pandas as pd

    with pytest.raises(ValueError, match="columns 'name' are not numbers"):
        example_fit(pd.DataFrame({"a": [1.0, 2.0], "name": ["x", "y"]}))
    with pytest.raises(ValueError, match="not numbers"):
        example_fit(np.array(["a", "b"]))
    with pytest.raises(ValueError, match="differ in length"):
        example_fit([[1.0], [1.0, 2.0]])


def test_other_arguments():
    x = ppca_file.example()[2]
    with pytest.raises(ValueError, match="validation must be data, or a fraction"):
        example_fit(x, validation=1.5)
    with pytest.raises(ValueError, match="the model must be a function"):
        fit("model", x)
    with pytest.raises(ValueError, match=r"RenyiELBO has no differentiable_loss: use importance\(renyi"):
        svi(loss=RenyiELBO(num_particles=2))
    with pytest.raises(ValueError, match="epochs or steps, not both"):
        svi(epochs=1, steps=1)
    with pytest.raises(ValueError, match="lr must be positive"):
        svi(lr=-1.0)
    with pytest.raises(ValueError, match="unknown schedule 'cosin'"):
        svi(schedule="cosin")
    for particles in (0, -1, 2.5):
        with pytest.raises(ValueError, match="particles must be"):
            importance(iwae, particles)
    with pytest.raises(ValueError, match="bound must be a function"):
        importance("iwae")


def test_nothing_to_train():
    model, x = ppca()
    with pytest.raises(ValueError, match="parameter to train"):
        fit(
            model,
            x,
            guide=lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)) if x is None else _exact(model, x),
            progress=False,
        )


def _exact(model, x):
    with batch_plate(x):
        pyro.sample("z", model.posterior(x))


def test_public_names():
    expected = (
        "Posterior PosteriorWarning batch_plate bayesian cite elbo ensemble entropy_sghmc feynman_kac fit hmc "
        "importance iwae laplace log_weights map_ match_prior mc_dropout nuts observe sghmc sgld sgnht svi "
        "swag to_jax"
    )
    assert " ".join(sorted(pyro_ae.__all__)) == expected


def test_networks_that_only_pyro_module_knows_are_the_fits_in_full():
    """Their buffers are state, and their mode is set: BatchNorm learns in training and holds still afterwards."""
    norm = nn.BatchNorm1d(5)

    def guide(x):
        pyro.module("norm", norm)
        with pyro.plate("data", len(x)):
            h = norm(x)
            pyro.sample("z", dist.Normal(h[:, :2], 1.0).to_event(1))

    model, x = ppca(rows=16)
    posterior = fit(model, x + 3.0, guide=guide, method=quick(), progress=False)
    assert "norm$$$running_mean" in posterior.program.parameters.state()
    assert norm.running_mean.abs().sum() > 0
    learnt = norm.running_mean.clone()
    assert posterior.encode(x[:1]).shape == (1, 2), "one row has no batch statistics"
    assert torch.equal(norm.running_mean, learnt)


def test_a_tensor_that_pyro_param_starts_from_is_left_alone():
    start = torch.tensor(0.0)

    def model(y):
        loc = pyro.param("loc", start)
        pyro.sample("y", dist.Normal(loc, 1.0).expand([len(y)]).to_event(1), obs=y)

    fits = [
        fit(model, torch.full((5,), v), guide=lambda y: None, method=svi(lr=0.1, steps=200), progress=False)
        for v in (1.0, -1.0)
    ]
    assert [round(f.params["loc"].item(), 1) for f in fits] == [1.0, -1.0]
    assert start == 0
