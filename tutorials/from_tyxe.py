# %% [markdown]
# # Coming from TyXe
#
# [TyXe](https://github.com/TyXe-BDL/TyXe) turns a network of PyTorch into a Bayesian one: network, prior, likelihood
# and inference are separate, and each can be exchanged. So they are here, where the model around the network is a
# Pyro function that you write. This page takes TyXe's own example, a curve with a gap in the data, through five
# methods, shows which of them know about the gap, and ends with a table of what is called what.
#
# Runs in about 40 seconds on a laptop.

# %%
import math
import time

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_ae import batch_plate, bayesian, ensemble, fit, laplace, map_, nuts, sghmc, svi
from pyro_ae.priors import normal

# %% [markdown]
# ## In TyXe
#
# This is the code, from the API of TyXe 0.0.2:
#
# ```python
# net = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1))
# prior = tyxe.priors.IIDPrior(dist.Normal(0.0, 1.0))
# likelihood = tyxe.likelihoods.HomoskedasticGaussian(len(x), scale=0.1)
#
# bnn = tyxe.VariationalBNN(net, prior, likelihood, tyxe.guides.AutoNormal)
# bnn.fit(loader, pyro.optim.Adam({"lr": 1e-2}), num_epochs=1000)
# mean, scale = bnn.predict(x_test, num_predictions=100)
#
# bnn = tyxe.MCMC_BNN(net, prior, likelihood, pyro.infer.mcmc.NUTS)
# bnn.fit(loader, num_samples=100, warmup_steps=100)
# ```
#
# It is not run on this page, as half of it does not run on a current Pyro. TyXe 0.0.2, of January 2023, was tried
# with Pyro 1.9.2, PyTorch 2.13 and Python 3.11:
#
# - `MCMC_BNN` works.
# - `VariationalBNN` with TyXe's own guide stops at the first step with `AttributeError: module 'pyro.util' has no
#   attribute 'deep_getattr'`. Pyro 1.9.1 still has that function, and with it the guide, local reparameterisation and
#   flipout run.
# - `VariationalBNN` with Pyro's `AutoNormal` works, but TyXe's reparameterisations do not apply to it.
# - The size of the data set is the first argument of a likelihood, though TyXe's README leaves it out.
#
# ## Here
#
# `bayesian` makes the weights of any network latent, with a prior. The likelihood is a distribution in a Pyro
# function. It need not know the data set's size, as `fit` counts the rows.

# %%
torch.manual_seed(0)
x = torch.cat([torch.empty(40).uniform_(-1.0, -0.7), torch.empty(40).uniform_(0.5, 1.0)])[:, None]
y = torch.cos(4.0 * x + 0.8) + 0.1 * torch.randn_like(x)
grid = torch.linspace(-2.0, 2.0, 161)[:, None]
truth = torch.cos(4.0 * grid + 0.8)

net = bayesian(nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1)), normal(0.0, 1.0))


def regression(x, y=None):
    mean = net(x)
    with batch_plate(x):
        pyro.deterministic("mean", mean, event_dim=1)
        pyro.sample("y", dist.Normal(mean, 0.1).to_event(1), obs=y)


net

# %% [markdown]
# ## One model, five methods
#
# What is a class in TyXe is an argument here. `svi` makes a mean-field guide by itself, which is `VariationalBNN`
# with `AutoNormal`, and `nuts` is `MCMC_BNN`, run by NumPyro's compiled kernel with all chains together. Stochastic
# gradient MCMC, a deep ensemble and Laplace's approximation are three more.

# %%
methods = {
    "nuts": nuts(draws=100, warmup=100, chains=2, max_tree_depth=7),
    "sghmc": sghmc(chains=4, warmup=1000, draws=50, thinning=20, lr=1e-4),
    "svi, mean field": svi(lr=1e-2, steps=1500),
    "ensemble": ensemble(members=10, steps=1000, lr=1e-2),
    "laplace": laplace(at=map_(steps=1000, lr=1e-2)),
}
posteriors, seconds = {}, {}
for name, method in methods.items():
    start = time.perf_counter()
    posteriors[name] = fit(regression, (x, y), method=method, seed=0, progress=False, check=False)
    seconds[name] = time.perf_counter() - start

# %% [markdown]
# ## How sure is it where there are no data?
#
# `uncertainty` is TyXe's `predict` in two parts: the variance of the likelihood, which more data would not take away,
# and that of the mean between draws of the weights, which they would. The noise is known here, so the second is all
# there is to see. It should be small at the data and larger in the gap, from -0.7 to 0.5.

# %% mystnb={"image": {"alt": "Four panels with the data in two clusters, the true curve, and each method's band of two standard deviations. NUTS, SGHMC and the ensemble have bands that are narrow at the data and open in the gap, NUTS most; the band of mean-field variational inference has about the same width everywhere. In the gap only that of NUTS comes near the true curve."}}
found = {name: posterior.uncertainty((grid, None)) for name, posterior in posteriors.items()}
gap = (grid[:, 0] > -0.7) & (grid[:, 0] < 0.5)
figure, panels = plt.subplots(2, 2, figsize=(6, 4.5), sharex=True, sharey=True, layout="constrained")
for axes, name in zip(panels.flat, list(methods)[:4], strict=True):
    mean, sd = found[name].mean[:, 0], found[name].epistemic.sqrt()[:, 0]
    axes.fill_between(grid[:, 0], mean - 2 * sd, mean + 2 * sd, color="#56B4E9", alpha=0.5, label="mean, 2 sd")
    axes.plot(grid[:, 0], mean, color="#0072B2")
    axes.plot(grid[:, 0], truth[:, 0], color="black", linestyle="--", linewidth=1, label="truth")
    axes.plot(x[:, 0], y[:, 0], ".", color="#D55E00", markersize=3, label="data")
    axes.set(title=name, ylim=(-3, 3))
figure.supxlabel("x")
figure.supylabel("y")
panels[0, 0].legend(fontsize="x-small", loc="lower left")
figure = None

# %% [markdown]
# The same in numbers: the standard deviation of the mean, on average at the data and in the gap, and the predictive
# log-density of new points there, which rewards both being right and knowing how wrong one may be.

# %%
torch.manual_seed(1)
places = {
    "data": torch.cat([torch.empty(200).uniform_(-1.0, -0.7), torch.empty(200).uniform_(0.5, 1.0)])[:, None],
    "gap": torch.empty(400).uniform_(-0.7, 0.5)[:, None],
}
new = {place: (at, torch.cos(4.0 * at + 0.8) + 0.1 * torch.randn_like(at)) for place, at in places.items()}
print(f"{'':17}{'sd of the mean':>16}{'log-density, nats':>24}{'':>10}")
print(f"{'':17}{'data':>8}{'gap':>8}{'data':>12}{'gap':>12}{'seconds':>10}")
for name, posterior in posteriors.items():
    line = f"{name:17}"
    for at, _ in new.values():
        line += f"{posterior.uncertainty((at, None)).epistemic.sqrt().mean():8.3f}"
    for rows in new.values():
        draws = posterior.log_likelihood(rows, draws=None if posterior.draws is not None else 500)["y"]
        line += f"{(draws.logsumexp(0) - math.log(len(draws))).mean():12.2f}"
    print(f"{line}{seconds[name]:10.1f}")

# %% [markdown]
# What this run shows:
#
# - **NUTS** is several times less sure in the gap than at the data. It has no bias but that of a short run, which
#   this is, and it is the most expensive.
# - **Mean-field variational inference** is about as sure in both places. That is no fault of the optimiser:
#   independent normal weights cannot do much better with one hidden layer, see *On the Expressiveness of Approximate
#   Inference in Bayesian Neural Networks* (Foong et al., 2020) https://arxiv.org/abs/1909.00719. TyXe's example uses
#   it too.
# - **SGHMC** is as sure as NUTS at the data and opens in the gap as well, but less, after so short a run. It is the
#   one that goes on to minibatches, and to networks for which NUTS is out of reach.
# - The **ensemble** opens in the gap too, but is too sure at the data, where all its members agree.
# - **Laplace's approximation** of all weights, with Kronecker factors, is far too wide: its draws leave the region
#   around the maximum where a normal is any good, and spoil the predictions at the data. That width scores well in
#   the gap is luck.
#
# Those that are sure of what they do not know lose many nats a point in the gap. But is NUTS to be trusted here? Its
# report says what it says of any posterior of so short a run:

# %%
print(posteriors["nuts"].report())
drawn = posteriors["nuts"].predict((grid[gap], None), draws=200, sites=["mean"])["mean"]
chains = drawn.reshape(2, 100, -1)
apart = (chains[0].mean(0) - chains[1].mean(0)).abs().max()
print(f"\nlargest difference between the two chains' mean curves in the gap: {apart:.2f}, sd {drawn.std(0).max():.2f}")

# %% [markdown]
# Hidden units can be exchanged, and signs of both layers turned, so chains need not agree on any weight, and R-hat of
# weights is to be read with that in mind. It is the curves that matter. Here those of the two chains differ by
# less than half of their standard deviation: enough to see which method knows about the gap, and too few draws for a
# number to report.

# %% [markdown]
# ## What is called what
#
# | in TyXe | here |
# |---|---|
# | `VariationalBNN(net, prior, likelihood, guide)` | `net = bayesian(net, prior)` within a Pyro function, and `fit(..., method="svi")` |
# | `MCMC_BNN(..., NUTS)` | `fit(..., method="nuts")` |
# | `PytorchBNN` | none: `fit` trains; `svi(loss=)` takes a loss of your own |
# | `IIDPrior(dist.Normal(0, 1))` | `bayesian(net, normal(0.0, 1.0))`, or a distribution of one weight |
# | `LayerwiseNormalPrior("radford")` | `fan_in()` |
# | `DictPrior`, `LambdaPrior` | a mapping of name patterns to priors; a function of name and tensor |
# | `hide=`, `expose=` of layers | `bayesian(net, deterministic=["0.bias"])`, by patterns of names |
# | none | `hierarchical()`, `horseshoe()`, `learnable()`; `match_prior` for what the prior's functions look like |
# | `HomoskedasticGaussian(n, scale)` | `pyro.sample("y", dist.Normal(net(x), scale).to_event(1), obs=y)` |
# | its `scale` with a prior | `scale = pyro.sample("scale", dist.HalfNormal(1.0))` before the plate |
# | `HeteroskedasticGaussian`, `Bernoulli`, `Categorical` | any distribution of Pyro |
# | `dataset_size` | the plate of the data: `fit` counts rows and scales minibatches |
# | `guides.AutoNormal`, Pyro's autoguides | none given: mean field; `guide=Shared(model, FullRank)`, a flow, or any of Pyro's |
# | `PretrainedInitializer` | `bayesian(net, start="module")` for samplers |
# | `fit(loader, optim, num_epochs)` | `fit(model, loader, method=svi(epochs=, optimizer=))`, or tensors and `batch_size=` |
# | `callback` | `fit(callbacks=[...])` |
# | `predict(x)`, aggregated | `posterior.uncertainty((x, None))`: mean, aleatoric, epistemic |
# | `predict(x, aggregate=False)` | `posterior.predict((x, None))` |
# | `evaluate(x, y)` | `posterior.log_likelihood((x, y))`; `nll`, `crps`, `calibration_error` in `pyro_ae.diagnostics` |
# | none | `sghmc`, `sgld`, `sgnht`, `ensemble`, `swag`, `laplace`, `mc_dropout`, `bayesian_last_layer` |
# | none | `posterior.save(path)`, `posterior.to_arviz()`, `posterior.report()` |
#
# What TyXe has and this library has not: `local_reparameterization` and `flipout`, which reduce the noise of
# gradients of a factorised guide over weights; `update_prior`, which makes a posterior the prior of a next task for
# continual learning; a cap on the guide's scales; and `PytorchBNN`, for a training loop of your own. Where you need
# those, take TyXe with Pyro 1.9.1 or older.
#
# ## Where to go next
#
# - [A Bayesian network](bayesian_network.py): minibatches, priors, classification and calibration
# - [Choosing a guide](choosing_a_guide.py): what is between mean field and everything
# - [Diagnosing](diagnosing.py): what the report says, and what to do about it
