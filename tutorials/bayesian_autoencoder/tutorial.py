# %% [markdown]
# # The Bayesian autoencoder, from prior to generation
#
# An autoencoder has thousands of weights, and here there are a few dozen images to fit them to. A posterior over the
# weights says how sure the network can be of what it reconstructs; but then the prior counts, and nobody can write
# down what N(0, 1) for each weight means for an image. *Model Selection for Bayesian Autoencoders* (Tran et al.,
# 2021, https://arxiv.org/abs/2106.06245) looks at the images that a prior draws, and tunes it until they are
# distributed as real ones are. This page does that, step by step.
#
# It runs in about a minute on digits of 8 x 8 pixels, which scikit-learn brings along: too small for much to be won.
# The same on MNIST and on faces, with what was measured, is on [a page of its own](README.md).

# %%
import matplotlib.pyplot as plt
import torch
from pyro.infer import Predictive
from pyro.poutine import uncondition

from pyro_ae import datasets, ensemble, fit, mc_dropout, sghmc, svi
from pyro_ae.diagnostics import anomaly_scores, auroc, plots
from pyro_ae.divergences import sliced_wasserstein
from pyro_ae.engines.prior_matching import match_prior
from pyro_ae.latent_densities import flow, gaussian, mixture, nearest
from pyro_ae.models.bayesian_autoencoder import BayesianAutoencoder
from pyro_ae.nn import MLP
from pyro_ae.priors import learnable, normal

# %% [markdown]
# ## Zeros to tune the prior on, other digits to learn
#
# The prior may be tuned on images of another kind than those that are modelled later, of which there may be few.

# %%
torch.manual_seed(0)
digits = datasets.load("digits")
images, labels = digits.train["x"], digits.train["y"]
zeros, others = images[labels == 0], images[labels != 0]
train, test = others[:100], digits.test["x"][digits.test["y"] != 0]
print(len(zeros), "zeros,", len(train), "digits to learn and", len(test), "to test on")

# %% [markdown]
# ## A prior that is a plain autoencoder, give or take
#
# `BayesianAutoencoder` makes the weights of any two networks latent. `bayesian=()` leaves them as parameters: a plain
# autoencoder, fitted by maximum likelihood. `learnable(loc="module", per="weight")` then makes a normal prior around
# the weights that it has found, with a mean and a variance for each of them, both of which can be trained.

# %%
plain = BayesianAutoencoder(MLP((8, 8), [32], 8), MLP(8, [32], (8, 8)), latent=8, bayesian=())
fit(plain, zeros, guide=lambda *_, **__: None, method=svi(steps=300, lr=1e-3), seed=0, progress=False)


def around(plain, log_variance):
    prior = learnable(loc="module", log_variance=log_variance, per="weight")
    parts = (plain.encoder.module, plain.decoder.module)
    return BayesianAutoencoder(*parts, latent=8, prior=prior, start="module")


model, narrow = around(plain, -2.0), around(plain, -6.0)
standard = BayesianAutoencoder(MLP((8, 8), [32], 8), MLP(8, [32], (8, 8)), latent=8, prior=normal())

# %% [markdown]
# ## What the prior draws, before and after
#
# Each draw of all weights encodes and decodes the same five zeros, so five images in a row are of one draw.
# `match_prior` trains the means and variances, so that images that are drawn like that are distributed as the zeros
# are. The distance between the two is the sliced Wasserstein distance here; `distributional_sliced_wasserstein` looks
# for the directions in which they differ, as in the paper, which takes a far smaller learning rate to come to the same.


# %%
def from_prior(model, x, draws=4):
    return Predictive(uncondition(model), num_samples=draws)(x)["x"].flatten(0, 1)


some = zeros[:5]
bands = {"zeros": zeros[:20], "N(0, 1)": from_prior(standard, some), "before": from_prior(model, some)}
for prior in (model, narrow):
    history = match_prior(
        prior,
        zeros,
        sliced_wasserstein(50),
        steps=200,
        samples=8,
        batch_size=50,
        lr=3e-3,
        optimizer=torch.optim.Adam,
        seed=0,
        progress=False,
    )["distance"]
    print(f"distance {history[0]:.3g} before, {sum(history[-10:]) / 10:.3g} after")
bands |= {"after": from_prior(model, some), "narrow, after": from_prior(narrow, some)}

# %% mystnb={"image": {"alt": "Rows of small images: zeros, and what each prior draws, four draws of the weights with five images each. N(0, 1) draws noise; the priors around an autoencoder draw zeros, blurred before matching and sharper after"}}
axes = plots.images(*bands.values(), names=list(bands), columns=20)

# %% [markdown]
# ## The posterior, by SGHMC
#
# From here on it is a model as any other: `fit` draws its posterior.

# %%
sampler = sghmc(lr=3e-5, chains=1, warmup=1500, thinning=40, draws=20)
posterior = fit(model, train, method=sampler, batch_size=50, seed=0, progress=False, check=False)
print(posterior)

# %% mystnb={"image": {"alt": "Ten test digits, their mean reconstructions under the tuned prior, and maps of the standard deviation between draws of the weights"}}
axes = plots.uncertainty(posterior, test, n=10)

# %% [markdown]
# The last row is the standard deviation of the mean image between draws of the weights: what more images would take
# away. `posterior.uncertainty(test)` gives it as a tensor, beside the likelihood's own variance.
#
# ## Other priors and other posteriors, by one argument each
#
# The paper starts all variances at exp(-6), and matching hardly changes them. That narrow a prior draws better zeros,
# and holds the weights so near to those of zeros that a hundred other digits cannot move them. What a prior is worth is
# seen on images that were held out, and not in what it draws.


# %%
def held_out(posterior):
    log_p = posterior.log_likelihood(test, draws=20 if posterior.draws is None else None)["x"]
    return float((log_p.logsumexp(0) - torch.tensor(float(len(log_p))).log()).mean())


def of(model, method):
    return fit(model, train, method=method, batch_size=50, seed=0, progress=False, check=False)


table = {
    "tuned, SGHMC": held_out(posterior),
    "tuned from narrow, SGHMC": held_out(of(narrow, sampler)),
    "N(0, 1), SGHMC": held_out(of(standard, sampler)),
    "tuned, ensemble": held_out(of(model, ensemble(members=5, steps=500, lr=3e-3))),
    "tuned, mean-field VI": held_out(of(model, svi(steps=500, lr=3e-3))),
    "tuned, MC dropout": held_out(of(model, mc_dropout(steps=500, lr=3e-3, draws=20))),
}
for name, value in table.items():
    print(f"{name:<26}{value:8.2f} nats per test image")

# %% [markdown]
# ## New images
#
# Codes have no prior of their own here, as they are a function of the image. So new images come of a density that is
# fitted to the codes of the training images; which one is a choice after the fit, for any autoencoder.

# %%
densities = {
    "normal": gaussian(),
    "mixture": mixture(10),
    "Dirichlet process": mixture(20, dirichlet_process=True),
    "neighbours": nearest(),
    "flow": flow(steps=200),
}
made = [posterior.generate(20, density=density, mean=True) for density in densities.values()]

# %% mystnb={"image": {"alt": "Test digits above new digits decoded from a normal, a mixture, a Dirichlet process mixture, neighbours and a flow of the codes"}}
axes = plots.images(test[:20], *made, names=["test", *densities], columns=20)

# %% [markdown]
# ## What it has not seen
#
# Draws of the weights agree on what they were fitted to. Where they do not, or where the image is no likely one of
# theirs, it is an anomaly. Here those are digits upside down.

# %%
normal_rows, odd_rows = (anomaly_scores(posterior, x) for x in (test, test.flip(1)))
for name in ("nll", "error", "spread"):
    print(f"AUROC by {name}: {auroc(getattr(normal_rows, name), getattr(odd_rows, name)):.2f}")

# %% [markdown]
# ## Against the number of images
#
# A prior counts most where there are few. Bars are standard errors over draws of the images; the comparison with a
# dozen other autoencoders, at the sizes of the paper, is `pyro-ae reproduce bayesian_autoencoder --scale faces`.

# %% mystnb={"image": {"alt": "Nats per test image against 20 and 100 training images, with bars of the standard error, for the tuned prior and N(0, 1)"}}
sizes, seeds = (20, 100), 2
short = sghmc(lr=3e-5, chains=1, warmup=800, thinning=40, draws=10)
figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
for (prior, chosen), marker in zip({"tuned": model, "N(0, 1)": standard}.items(), "os", strict=True):
    found = torch.zeros(seeds, len(sizes))
    for seed in range(seeds):
        rows = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))]
        for i, size in enumerate(sizes):
            found[seed, i] = held_out(
                fit(chosen, rows[:size], method=short, batch_size=20, seed=seed, progress=False, check=False)
            )
    axes.errorbar(sizes, found.mean(0), found.std(0) / seeds**0.5, marker=marker, capsize=3, label=prior)
axes.set(xlabel="training images", ylabel="nats per test image", xscale="log")
axes.minorticks_off()
axes.set_xticks(sizes, [str(size) for size in sizes])
legend = axes.legend(title="prior")

# %% [markdown]
# ## Where to go next
#
# - [The same at full size, on MNIST and on faces](README.md), with what was measured and what fell short.
# - [A Bayesian network four ways](../bayesian_network.py): the same samplers on a classifier.
# - [Diagnosing a bad posterior](../diagnosing.py), step by step.
