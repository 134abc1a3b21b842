# %% [markdown]
# # Coming from pythae
#
# [pythae](https://github.com/clementchadebec/benchmark_VAE) has 25 autoencoders, each a class with a configuration,
# and a pipeline that trains them. Here the likelihood, the encoder's distribution and the loss are three arguments.
# This page fits the same VAE and the same importance-weighted autoencoder both ways, measures them with one
# yardstick, says where numbers of pythae mean something else than one might think, and ends with a table of what is
# called what.
#
# Runs in about 30 seconds on a laptop.

# %%
import contextlib
import importlib.util
import logging
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_ae import batch_plate, datasets, elbo, fit, importance, iwae, log_weights, svi
from pyro_ae.diagnostics import plots
from pyro_ae.estimators import analytic_kl
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.latent_densities import flow, mixture
from pyro_ae.models.vae import VAE
from pyro_ae.nn import MLP

digits = datasets.load("digits")  # 8 x 8 pixels; pyro-ae datasets lists larger ones
x = (digits.train["x"] > 0.5).float().flatten(1)
test = (digits.test["x"] > 0.5).float().flatten(1)
latent, hidden, epochs, batch_size = 8, 100, 40, 100
print(f"{len(x)} digits to train on, {len(test)} to test on, {x.shape[1]} binary pixels each")

# %% [markdown]
# ## The VAE and the IWAE in pythae
#
# An encoder and a decoder are subclasses of pythae's. The encoder gives a mean and a log-variance, the decoder gives
# probabilities, and `reconstruction_loss="bce"` makes a likelihood of them. The bound is chosen by the class of the
# model.


# %%
def with_pythae(particles, seed=0):
    from pythae.models import IWAE, IWAEConfig, VAEConfig
    from pythae.models import VAE as PythaeVAE
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.pipelines import TrainingPipeline
    from pythae.trainers import BaseTrainerConfig

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(64, hidden), nn.ReLU())
            self.mean, self.log_variance = nn.Linear(hidden, latent), nn.Linear(hidden, latent)

        def forward(self, x):
            h = self.body(x)
            return ModelOutput(embedding=self.mean(h), log_covariance=self.log_variance(h))

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.logits = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, 64))

        def forward(self, z):
            return ModelOutput(reconstruction=self.logits(z).sigmoid())

    torch.manual_seed(seed)
    shared = {"input_dim": (64,), "latent_dim": latent, "reconstruction_loss": "bce"}
    if particles == 1:
        model = PythaeVAE(VAEConfig(**shared), Encoder(), Decoder())
    else:
        model = IWAE(IWAEConfig(number_samples=particles, **shared), Encoder(), Decoder())
    with tempfile.TemporaryDirectory() as folder:
        options = {"num_epochs": epochs, "per_device_train_batch_size": batch_size, "learning_rate": 1e-3}
        config = BaseTrainerConfig(output_dir=folder, no_cuda=True, seed=seed, **options)
        TrainingPipeline(model=model, training_config=config)(train_data=x)
    return model.eval()


@contextlib.contextmanager
def quiet():  # its progress bars and logs
    logging.disable()
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
    logging.disable(logging.NOTSET)


# %% [markdown]
# ## The same two here
#
# A `VAE` is a model: a Pyro function with a prior and a likelihood. Its likelihood is a distribution of the decoder's
# output, by default Bernoulli with logits. The guide is an encoder and a head. The bound is an argument of the
# method: `elbo` for the one, with the KL divergence in closed form as pythae has it, and `iwae` with ten particles
# for the other.


# %%
def with_fit(particles, seed=0):
    torch.manual_seed(seed)
    model = VAE(decoder=MLP(latent, [hidden], 64), latent=latent)
    guide = Amortized(MLP(64, [hidden]), MeanField(hidden, latent))
    loss = importance(iwae, particles) if particles > 1 else importance(elbo, estimator=analytic_kl)
    options = {"batch_size": batch_size, "seed": seed, "progress": False, "check": False}
    return fit(model, x, guide=guide, method=svi(loss=loss, lr=1e-3, epochs=epochs), **options)


# %% [markdown]
# ## One yardstick for both
#
# Networks trained by pythae are modules of torch, so they are a model and a guide of Pyro in a few lines.
# `log_weights` draws from such a guide and gives log p(x, z) - log q(z | x), one for each particle and row. With many
# particles, the importance-weighted bound of them is close to log p(x), and so it is measured for both.


# %%
def as_pyro(trained):
    decoder, encoder = trained.decoder, trained.encoder

    def model(x):
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder.logits(z)).to_event(1), obs=x)

    def guide(x):
        with batch_plate(x):
            out = encoder(x)
            pyro.sample("z", dist.Normal(out.embedding, (0.5 * out.log_covariance).exp()).to_event(1))

    return model, guide


@torch.no_grad()
def log_p(model, guide, particles=1000):
    torch.manual_seed(1)
    log_w, _ = log_weights(model, guide, test, particles=particles)
    return iwae(log_w)


def timed(train):
    start = time.perf_counter()
    trained = train()
    return trained, time.perf_counter() - start


here = {"VAE": 1, "IWAE, K = 10": 10}
posteriors, found = {}, {}
for name, particles in here.items():
    posterior, seconds = timed(partial(with_fit, particles))
    posteriors[name] = posterior
    found[name, "here"] = log_p(posterior.model, posterior.guide).mean(), seconds
pythae_models = {}
if importlib.util.find_spec("pythae"):
    with quiet():
        for name, particles in here.items():
            pythae_models[name], seconds = timed(partial(with_pythae, particles))
            found[name, "pythae"] = log_p(*as_pyro(pythae_models[name])).mean(), seconds
else:
    print("pythae is not installed: its half of this page did not run. pip install pythae")
print(f"{'':22}{'test log p(x), nats':>20}{'seconds':>9}")
for (name, library), (value, seconds) in found.items():
    print(f"{name:13}{library:9}{value:>20.2f}{seconds:>9.1f}")

# %% [markdown]
# The two libraries find the same to within about two tenths of a nat, and the bound with ten particles is worth more
# than that. So it should be, as it is the same mathematics; what is left is where the weights start. Seconds are
# those of this run, with what it takes to record a step; the README has what a step costs in larger ones.
#
# ## What pythae's losses are
#
# - A loss is **summed over the pixels and averaged over the batch**, as here: nats per row.
# - **`"mse"` is a likelihood too**, half the squared error, which is a normal of variance 1 without its constant. For
#   pixels between 0 and 1 that is a lot of noise. Here it is written out, and so can be learnt, as below.
# - **The loss of an IWAE is not the bound.** It is the average of log-weights under the normalised weights. The
#   gradient is right, the value is not: it lies above the bound, so it must not be compared with another loss or with
#   log p(x).
# - **`MIWAE` weights over the wrong axis.** `number_gradient_estimates` is what it weights over and `number_samples`
#   is what it averages, the other way round than in the paper and in its documentation. `PIWAE` does the same to its
#   encoder.
# - **`get_nll` gives the mean of log p(x)**, not of its negative, and goes through the rows one by one.
#
# The numbers that say so, of the models above, all in nats per test row:

# %%
if pythae_models:
    from pythae.data.datasets import BaseDataset
    from pythae.models import MIWAE, MIWAEConfig

    batch = BaseDataset(test, torch.zeros(len(test)))[:]

    @torch.no_grad()
    def shown(model):  # what it calls its loss, over 20 passes
        torch.manual_seed(0)
        return -sum(model(batch).loss for _ in range(20)) / 20

    trained = pythae_models["IWAE, K = 10"]
    model, guide = as_pyro(trained)
    with torch.no_grad():
        bounds = {k: log_p(model, guide, k).mean() for k in (1, 10)}
    print(f"IWAE, K = 10:           minus its loss {shown(trained):.2f}, the bound {bounds[10]:.2f}")
    print(f"                        log p(x) with 1000 particles {log_p(model, guide).mean():.2f}")
    for estimates, samples in ((1, 10), (10, 1)):
        config = MIWAEConfig(
            input_dim=(64,),
            latent_dim=latent,
            reconstruction_loss="bce",
            number_gradient_estimates=estimates,
            number_samples=samples,
        )
        other = MIWAE(config, trained.encoder, trained.decoder)
        print(f"MIWAE, M = {estimates:2}, K = {samples:2}:  minus its loss {shown(other):.2f}")
    print(f"                        the ELBO {bounds[1]:.2f}, which is what M = 10, K = 1 should give")
    print(f"get_nll of a VAE        {pythae_models['VAE'].get_nll(test[:50], 100):.2f} on 50 rows")

# %% [markdown]
# ## A likelihood is a distribution
#
# So what stands in a configuration there is a line of Python here. On grey pixels, "mse" is a normal of scale 1. Its
# scale can as well be learnt, one for each pixel, and then log-densities say how much was lost.

# %%
grey, grey_test = digits.train["x"].flatten(1), digits.test["x"].flatten(1)


class LearntScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = MLP(latent, [hidden], 64)
        self.log_scale = nn.Parameter(torch.zeros(64))

    def forward(self, z):
        mean = self.mean(z)
        return torch.stack([mean, self.log_scale.clamp(-4.0).expand_as(mean)], -1)


flat = (grey.mean(0) - grey_test).square().mean().sqrt()
print(f"the mean image, for comparison:                        error of a pixel {flat:.3f}")
likelihoods = {
    "mse, scale 1": (MLP(latent, [hidden], 64), lambda mean: dist.Normal(mean, 1.0).to_event(1)),
    "scale learnt": (LearntScale(), lambda both: dist.Normal(both[..., 0], both[..., 1].exp()).to_event(1)),
}
for name, (decoder, likelihood) in likelihoods.items():
    model = VAE(decoder, latent, likelihood)
    guide = Amortized(MLP(64, [hidden]), MeanField(hidden, latent))
    method = svi(epochs=epochs, lr=3e-3)
    posterior = fit(model, grey, guide=guide, method=method, batch_size=batch_size, seed=0, progress=False, check=False)
    rebuilt = posterior.reconstruct(grey_test)
    error = (rebuilt - grey_test).square().mean().sqrt()
    density = posterior.log_evidence(grey_test, particles=200).mean()
    print(f"{name}: log p(x) {density:8.2f} nats per test row, error of a rebuilt pixel {error:.3f}")

# %% [markdown]
# A scale of 1 is more noise than the whole range of a pixel, so nothing that a code could say is worth its price in
# nats: the images that it rebuilds are no better than the mean image, and the code has collapsed. With a scale that
# is learnt it has not. It is also why weights such as `beta` or `reg_weight` have to be tuned against "mse": they
# stand in for the variance that the likelihood lacks.
#
# ## Samplers are densities of the codes
#
# What pythae has as samplers, fitted to the codes after the training, is an argument of `generate`.

# %% mystnb={"image": {"alt": "Bands of generated digits, from the prior, from a mixture of Gaussians over the codes, and from a flow over the codes; most look like digits, those of the prior least often."}}
posterior = posteriors["VAE"]
torch.manual_seed(0)
bands = {
    "prior": posterior.generate(20, mean=True),
    "mixture": posterior.generate(20, density=mixture(10), mean=True),
    "flow": posterior.generate(20, density=flow(steps=200), mean=True),
}
axes = plots.images(*(band.reshape(-1, 8, 8) for band in bands.values()), names=list(bands), columns=10)

# %% [markdown]
# ## What is called what
#
# | in pythae | here |
# |---|---|
# | `VAE` | `VAE`, `Amortized(encoder, MeanField(...))`, `svi()` |
# | `reconstruction_loss="bce"`, `"mse"` | `likelihood=` a function to a distribution: `Bernoulli` by default, `Normal(mean, 1.0)` |
# | `AE` | `guides.point.Point` in place of `MeanField`, with the loss `annealed(0.0)` |
# | `BetaVAE(beta)` | `svi(loss=annealed(beta))` |
# | `DisentangledBetaVAE(C, beta)` | `svi(loss=capacity(linear(0.0, C, end=0.5), gamma=beta))` |
# | `BetaTCVAE(alpha, beta, gamma)` | `svi(loss=total_correlation(beta, alpha, gamma))`, with minibatch-weighted sampling only |
# | `FactorVAE` | not here; `total_correlation` penalises the same by another estimate |
# | `IWAE(number_samples=K)` | `svi(loss=importance(iwae, K))` |
# | `MIWAE`, M bounds of K samples | `svi(loss=importance(miwae(M, K)))` |
# | `PIWAE` | `svi(loss=piwae(M, K))` |
# | `CIWAE(beta)` | `svi(loss=importance(ciwae(beta), K))` |
# | `WAE_MMD` | `svi(loss=wasserstein(mmd(imq()), weight=...))` |
# | `INFOVAE_MMD(alpha, lbd)` | `svi(loss=info_vae(alpha=..., weight=...))` |
# | `Adversarial_AE` | `svi(loss=wasserstein(adversarial(critic)))` |
# | `VAE_LinNF`, `VAE_IAF` | the heads `Planar`, `Radial`, `Flow(flow="MAF")` in place of `MeanField` |
# | `SVAE` | the head `PowerSpherical`, with a uniform prior on the sphere in a model of your own |
# | `VAMP` | not here |
# | `NormalSampler` | `generate(n)` |
# | `GaussianMixtureSampler` | `generate(n, density=mixture(10))` |
# | `MAFSampler`, `IAFSampler` | `generate(n, density=flow())` |
# | `TrainingPipeline`, `BaseTrainerConfig` | `fit` and `svi(lr=, epochs=)` |
# | `eval_data=` | `fit(validation=)`, which also keeps the best state; `svi(early_stopping=True)` stops |
# | `scheduler_cls` | `svi(schedule="cosine")` |
# | `WandbCallback`, `MLFlowCallback` | `fit(callbacks=[trackers.wandb()])`, `trackers.mlflow()`, `trackers.tensorboard(folder)` |
# | `model.embed(x)`, `reconstruct`, `generate` | `posterior.encode(x)`, `reconstruct(x)`, `generate(n)` |
# | `get_nll` | `posterior.log_evidence(x)`, one for each row |
# | `AutoModel.load_from_folder` | `posterior.save(path)` and `Posterior.load(path, model, guide)`, nothing pickled |
#
# Losses are in `pyro_ae.losses`, bounds in `pyro_ae.bounds`, divergences in `pyro_ae.divergences`.
#
# What pythae has and this library has not: `VQVAE`, `VAEGAN`, `RAE_L2` and `RAE_GP`, `HVAE` and `RHVAE` with its
# sampler on the manifold, `PoincareVAE`, `VAMP` with its sampler, `FactorVAE`, `MSSSIM_VAE`; the two-stage,
# hyperspherical and PixelCNN samplers; networks that were tuned to MNIST, CIFAR and CelebA; training on several GPUs;
# Comet; and models on the Hugging Face Hub. For those, take pythae.
#
# What comes with the change: missing values, other likelihoods and priors, richer guides, gradients such as DReG, and
# a verdict on the result: `posterior.report(x)`.
#
# ## Where to go next
#
# - [Choosing an objective](choosing_an_objective.py): the losses of the table, measured
# - [Choosing a guide](choosing_a_guide.py): what the posterior of a code may look like
# - [Diagnosing](diagnosing.py): whether to trust the encoder, row by row
