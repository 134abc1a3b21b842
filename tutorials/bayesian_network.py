# %% [markdown]
# # A Bayesian network four ways, under one API
#
# A network that is trained in the usual way gives one set of weights and says nothing about how many others would have
# fitted as well. Here the weights of a small classifier become latent variables of a Pyro model, and the same model
# goes to SGHMC, a deep ensemble, Laplace's approximation and a single point by changing `method` alone; a variational
# last layer, which needs a model of its own, goes through the same `fit`. You will see what each says on ordinary rows,
# what on rows that are worse than those of the training, and what each costs.
#
# Runs in about 40 seconds on a laptop.

# %%
import time

import arviz
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

from pyro_ae import batch_plate, bayesian, ensemble, fit, laplace, map_, sghmc, svi
from pyro_ae.diagnostics import auroc, calibration_error
from pyro_ae.last_layer import bayesian_last_layer, last_layer_bound
from pyro_ae.nn import MLP
from pyro_ae.priors import fan_in

# %% [markdown]
# ## Sixty patients
#
# The breast cancer data of Wisconsin (UCI) come with scikit-learn: 569 tumours, 30 measurements of each, malignant or
# benign. With many rows all methods agree, and it matters little which one is used. So only 60 rows are for training
# here, and all others for testing. Measurements are standardised by the training rows.

# %%
torch.manual_seed(0)
raw = load_breast_cancer()
order = torch.randperm(len(raw.target))
train, test = order[:60], order[60:]
x_all, y_all = torch.tensor(raw.data, dtype=torch.float32), torch.tensor(raw.target)
x_all = (x_all - x_all[train].mean(0)) / x_all[train].std(0)
x, y, x_test, y_test = x_all[train], y_all[train], x_all[test], y_all[test]
print(f"{len(x)} rows to train on, {len(x_test)} to test on; {(y_test == 1).float().mean():.0%} of them are benign")

# %% [markdown]
# ## One model function
#
# `bayesian` turns the weights of any network into latent sites. Their prior decides a lot, as there are 662 weights for
# 60 rows: `fan_in(2.0)` gives each layer's outputs a standard deviation of about 2, so that the logits drawn from the
# prior are neither all near 0 nor all huge. `batch_plate` is the plate of the rows. The probabilities are named as well,
# to be looked at later.


# %%
def network(features):
    return bayesian(nn.Sequential(nn.Linear(features, 20), nn.Tanh(), nn.Linear(20, 2)), fan_in(2.0))


def classifier(net):
    def model(x, y=None):
        logits = net(x)
        pyro.deterministic("probabilities", logits.softmax(-1), event_dim=1)
        with batch_plate(x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return model


net = network(30)
net

# %% [markdown]
# ## Methods are arguments
#
# The first five lines fit the same model. `laplace` puts a normal around the maximum; over all weights with Kronecker
# factors for each layer, or over the last layer alone, which is the usual choice in practice. The variational last
# layer is another model: a network that is trained as usual, and a last layer whose weights are integrated out in
# closed form in its own bound. It is a recipe of model, guide and method, and `fit` takes it in place of a model.


# %%
def recipe(features):
    return bayesian_last_layer(MLP(features, [20]), 20, 2, "discriminative", noise=0.0)


def methods(features):
    model = classifier(net if features == 30 else network(features))
    at = map_(steps=500)
    return {
        "map": (model, at),
        "ensemble": (model, ensemble(members=10, steps=500)),
        "laplace": (model, laplace(structure="kronecker", at=at)),
        "laplace, last layer": (model, laplace(structure="full", sites=("w.2.*",), at=at)),
        "sghmc": (model, sghmc(lr=1e-3, chains=4, warmup=1000, draws=50, thinning=20)),
        "variational last layer": (recipe(features), svi(loss=last_layer_bound(), lr=5e-3, steps=500)),
    }


posteriors, seconds = {}, {}
for name, (model, method) in methods(30).items():
    start = time.perf_counter()
    posteriors[name] = fit(model, (x, y), method=method, seed=0, progress=False, check=False)
    seconds[name] = time.perf_counter() - start
posteriors["sghmc"]

# %% [markdown]
# ## What they predict
#
# `uncertainty` averages over all draws of the weights: the probabilities of the classes, and two entropies in nats.
# The *aleatoric* one is the mean entropy of the draws' predictions; it is what more training rows would not take away.
# The *epistemic* one is how much the draws disagree (the mutual information of class and weights), which more rows
# would take away. Beside them stand the negative log-likelihood (NLL) of the true class and the expected calibration
# error (ECE): how far confidence is from accuracy.


# %%
def scores(posterior, x):
    found = posterior.uncertainty((x, None))
    p = found.mean.clamp(min=1e-12)
    return {
        "accuracy": (p.argmax(1) == y_test).float().mean(),
        "NLL": -p.log().gather(1, y_test[:, None]).mean(),
        "ECE": calibration_error(found.mean, y_test),
        "aleatoric": found.aleatoric.mean(),
        "epistemic": found.epistemic.mean().clamp(min=0.0),
    }


print(f"{'':<24}accuracy    NLL    ECE  aleatoric  epistemic  seconds")
for name, posterior in posteriors.items():
    s = scores(posterior, x_test)
    print(
        f"{name:<24}{s['accuracy']:8.3f} {s['NLL']:6.3f} {s['ECE']:6.3f} {s['aleatoric']:10.3f} {s['epistemic']:10.3f}"
        f" {seconds[name]:8.1f}"
    )

# %% [markdown]
# Accuracy is nearly the same for all but one of them, and on these rows the single point does well: of a network with so
# strong a prior there is little that it could be wrong about. Three things are worth a closer look.
#
# - The ensemble is the point over again. Its ten members were started at random and ended at one function, as the prior
#   leaves one maximum (up to swapping hidden units) for so few rows, so that their disagreement is 0. An ensemble tells
#   as much as there are modes to be found.
# - Laplace's approximation over all weights is worse than the point. Its normal is as wide as the curvature at the
#   maximum says, but not all of the weights in it give a sensible network; over the last layer alone it does no harm.
# - The variational last layer trains its other weights without a prior, so it is the surest of all, and here that pays.
#
# ## Rows that are worse than those of training
#
# Now the instrument gets worse: noise is added to the test rows, in units of the training rows' standard deviation,
# while the true classes stay as they are. A method that knows what it does not know loses accuracy, as it must, and
# loses confidence with it. The NLL of a coin is log 2, about 0.69 nats: above it, one had better not have asked.

# %% mystnb={"image": {"alt": "Two panels over the noise on the test rows. Left: the NLL, which rises far above that of a coin for all but SGHMC and Laplace over all weights. Right: the epistemic uncertainty, which stays near zero for the point and the ensemble and rises with the noise for SGHMC."}}
levels = [0.0, 1.0, 2.0, 4.0]
noise = torch.randn(x_test.shape, generator=torch.Generator().manual_seed(0))
noisy = {name: [scores(p, x_test + level * noise) for level in levels] for name, p in posteriors.items()}

colours = ["#0072B2", "#E69F00", "#999999", "#56B4E9", "#D55E00", "#009E73"]
figure, axes = plt.subplots(1, 2, figsize=(6, 3.9), layout="constrained")
for name, colour, marker in zip(posteriors, colours, "osDv^P", strict=True):
    for part, key in zip(axes, ["NLL", "epistemic"], strict=True):
        style = {"color": colour, "marker": marker, "linestyle": "--" if name == "ensemble" else "-"}
        part.plot(levels, [s[key] for s in noisy[name]], label=name, **style)
axes[0].axhline(torch.tensor(2.0).log(), color="black", linewidth=0.8)
axes[0].annotate("a coin", (0.0, 0.72), fontsize=9)
axes[0].set(xlabel="noise (training sds)", ylabel="NLL (nats a row)")
axes[1].set(xlabel="noise (training sds)", ylabel="epistemic uncertainty (nats)")
legend = figure.legend(
    *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9, frameon=False
)

# %%
print("at noise 4                accuracy    NLL    ECE  epistemic  AUROC")
for name, posterior in posteriors.items():
    s = noisy[name][-1]
    clean, worse = (posterior.uncertainty((rows, None)).epistemic for rows in (x_test, x_test + 4.0 * noise))
    told = f"{auroc(clean, worse):.2f}" if s["epistemic"] > 1e-3 else "none"
    print(f"{name:<24} {s['accuracy']:9.3f} {s['NLL']:6.3f} {s['ECE']:6.3f} {s['epistemic']:10.3f} {told:>6}")

# %% [markdown]
# Away from the training rows the single point is far too sure of itself; so are the ensemble, both
# methods of the last layer, whose features are one point still, and most of all the variational one, which was the best
# calibrated on ordinary rows. SGHMC stays below a coin, and its draws disagree where they should: by their disagreement alone
# nearly every noisy row can be told from a clean one. Laplace over all weights is as cautious, and is so on
# ordinary rows too, where it should not be.
#
# ## Do the chains agree?
#
# Hidden units can be swapped, so that two chains may sit at the same network with its weights in another order. R-hat
# of the weights then says that the chains disagree, and means nothing. What must agree is what does not depend on the
# order, such as the predicted probabilities of the test rows.

# %%
chains = posteriors["sghmc"]
p = chains.predict((x_test, None), draws=200, sites=["probabilities"])["probabilities"][..., 1]
by_chain = p.reshape(4, 50, len(x_test)).numpy()  # all 200 draws, chain by chain
of_weights = [float(arviz.rhat(w)) for w in chains.draws["w.0.weight"].flatten(2).movedim(-1, 0).numpy()[:100]]
of_rows = [float(arviz.rhat(by_chain[:, :, i])) for i in range(100)]
print(f"R-hat of 100 weights: median {sorted(of_weights)[50]:.2f}, largest {max(of_weights):.2f}")
print(f"R-hat of 100 predictions: median {sorted(of_rows)[50]:.2f}, largest {max(of_rows):.2f}")
nll = [-torch.as_tensor(q.mean(0)).where(y_test == 1, 1 - torch.as_tensor(q.mean(0))).log().mean() for q in by_chain]
print("NLL of each chain by itself:", ", ".join(f"{value:.3f}" for value in nll))

# %% [markdown]
# ## A picture of doubt
#
# With two of the thirty measurements, the mean radius and the mean texture, the epistemic uncertainty can be drawn over
# the plane. Nothing is changed but the number of inputs.

# %% mystnb={"image": {"alt": "Four panels of the epistemic uncertainty over mean radius and mean texture, with the training rows and the line between the classes. The ensemble has none anywhere; both last layers have some along the line between the classes, far from the rows; SGHMC has more there, and some in most places without rows."}}
two = [0, 1]
line = torch.linspace(-5.0, 5.0, 41)
grid = torch.cartesian_prod(line, line)
figure, axes = plt.subplots(2, 2, figsize=(6, 6), layout="constrained", sharex=True, sharey=True)
shown = ["ensemble", "laplace, last layer", "variational last layer", "sghmc"]
for part, name in zip(axes.flat, shown, strict=True):
    model, method = methods(2)[name]
    posterior = fit(model, (x[:, two], y), method=method, seed=0, progress=False, check=False)
    found = posterior.uncertainty((grid, None))
    doubt = found.epistemic.clamp(min=0.0).reshape(41, 41).T
    filled = part.contourf(
        line, line, doubt, levels=torch.linspace(0.0, 0.35, 8).tolist(), cmap="cividis", extend="max"
    )
    part.contour(line, line, found.mean[:, 1].reshape(41, 41).T, levels=[0.5], colors="white", linewidths=1)
    part.scatter(*x[y == 1][:, two].T, s=14, marker="o", color="white", edgecolor="black", linewidths=0.5)
    part.scatter(*x[y == 0][:, two].T, s=22, marker="x", color="#E69F00", linewidths=1.2)
    part.set_title(name, fontsize=11)
for part in axes[1]:
    part.set_xlabel("mean radius (training sds)")
for part in axes[:, 0]:
    part.set_ylabel("mean texture (training sds)")
bar = figure.colorbar(filled, ax=axes, location="bottom", shrink=0.9, label="epistemic uncertainty (nats)")

# %% [markdown]
# The ensemble found one function again, and has no doubt anywhere. Both last layers doubt along the line between the
# classes where that leaves the rows, and nowhere else, however far from all rows. SGHMC doubts more there, and in most
# places where there are no rows.
#
# ## Which to take
#
# - `map_` where test rows are like those of training: of such rows, little more was to be had here.
# - A last layer, variational or by Laplace, where a network is large and its doubt on ordinary rows is wanted cheaply. It is
#   not to be asked about rows that are far from all it has seen.
# - `sghmc` where that is what will be asked: it was the only one that kept below a coin on noisy rows and near the point on
#   ordinary ones, where it is a little too careful. It goes on to minibatches with `batch_size=`, and has a step size that is
#   to be checked.
# - Laplace over all weights with care: of a network with few rows its normal is too wide.
#
# These are 60 rows and one network. `datasets.load("uci/yacht")` and the other regression sets of UCI (`pyro-ae datasets`
# lists them) go through the same functions with a normal likelihood.
#
# ## Where to go next
#
# - [The Bayesian autoencoder](bayesian_autoencoder/tutorial.py): a prior that is tuned on other data.
# - [Coming from TyXe](from_tyxe.py): regression with a gap, NUTS, and what is called what.
# - [Diagnosing a bad posterior](diagnosing.py): what chains and guides show when they fail.
