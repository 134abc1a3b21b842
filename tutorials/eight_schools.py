# %% [markdown]
# # Eight schools: one model, three answers
#
# One Pyro function, fitted by variational inference, by the No-U-Turn sampler and by stochastic gradient Hamiltonian
# Monte Carlo. The three results are of one kind, so ArviZ sets them side by side. You will see where they differ, by
# how much, which of them says so by itself, and what a different way of writing the same model changes.
#
# Runs in about a minute on a laptop, half of which goes into compiling.

# %%
from time import perf_counter

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch

from pyro_ae import diagnostics, fit, importance, nuts, sghmc, svi
from pyro_ae.diagnostics import plots

# %% [markdown]
# ## The model
#
# Eight schools ran a coaching programme, and each reports its effect in points of a test, with a standard error
# (*Estimation in Parallel Randomized Experiments*, Rubin, 1981, https://www.jstor.org/stable/1164617). How much do the
# effects `theta` differ between schools? That is `tau`, and it is hard to tell from eight noisy numbers.


# %%
def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


data = {"y": [28.0, 8, -3, 7, -1, 1, 18, 12], "sigma": [15.0, 10, 16, 11, 9, 11, 10, 18]}

# %% [markdown]
# ## Three methods
#
# Only `method` changes. Without a guide `svi` makes one itself: a normal for each latent, independent of the others,
# in the space where latents are unconstrained. `check=False` leaves out the look that `fit` takes at its result, as we
# shall look closer.

# %%
methods = {
    "svi": svi(loss=importance(particles=16), lr=2e-2, steps=1200, schedule="cosine"),
    "nuts": nuts(draws=1000, warmup=200, chains=4),
    "sghmc": sghmc(lr=3e-2, draws=500, warmup=1000, thinning=6, chains=4),
}
fits, seconds = {}, {}
for name, method in methods.items():
    start = perf_counter()
    fits[name] = fit(schools, data, method=method, seed=0, progress=False, check=False)
    seconds[name] = perf_counter() - start

# %% [markdown]
# ## Side by side
#
# `to_arviz` gives every result the same groups and names. `az.summary` takes it from there.

# %%
torch.manual_seed(0)  # svi draws from its guide at this point
idata = {name: posterior.to_arviz(groups=["posterior", "sample_stats"]) for name, posterior in fits.items()}
names = ["mu", "tau", "theta"]
az.summary(idata["nuts"], var_names=names, round_to=2)[["mean", "sd", "mcse_mean", "ess_bulk", "r_hat"]]


# %% mystnb={"image": {"alt": "Medians and intervals of mu, tau and four schools' effects under svi, nuts and sghmc: nearly alike for the effects, and shorter for tau under svi."}}
def stacked(group):
    return {name: torch.tensor(group[name].values).flatten(0, 1) for name in ["mu", "tau", "theta"]}


draws = {name: stacked(found["posterior"]) for name, found in idata.items()}
axes = plots.intervals(draws, ["mu", "tau", "theta[0]", "theta[1]", "theta[2]", "theta[6]"])

# %% [markdown]
# `nuts` and `sghmc` agree. Under `svi` the interval of `tau`, the spread, is shorter at both ends, and with it those
# of the schools that are far from the others. To tell a difference from noise, put it beside the Monte Carlo standard
# errors (MCSE) of both means. To tell whether it matters, put it beside the posterior's standard deviation.


# %%
def against_nuts(name):
    one, other = (az.summary(idata[n], var_names=names, kind="stats", round_to="none") for n in (name, "nuts"))
    errors = [az.mcse(idata[n], var_names=names) for n in (name, "nuts")]
    mcse = np.hypot(*(np.concatenate([np.ravel(e[v].values) for v in names]) for e in errors))
    difference = one["mean"] - other["mean"]
    table = {"in sd": difference / other["sd"], "in MCSE": difference / mcse, "ratio of sds": one["sd"] / other["sd"]}
    return pd.DataFrame(table)


pd.concat({name: against_nuts(name) for name in ("svi", "sghmc")}, axis=1).round(2)

# %% [markdown]
# The mean of `tau` under `svi` is off by many standard errors, which is about a fifth of a standard deviation, and its
# standard deviation is too small by about a quarter. Its means of the effects are off by less than that, and the
# larger ones of these differences are no chance either: with a smaller spread, schools are drawn to one another. The
# differences of `sghmc` are what the noise of two samplers gives.
#
# ## What the reports say
#
# A report has the reasons for its verdict, and seconds show what each answer costs here.

# %%
for name in methods:
    report = fits[name].report()
    print(f"{name}: {seconds[name]:.1f} s, {report.verdict}")
    print("\n".join(f"  - {reason}" for reason in report.reasons))

# %% [markdown]
# Most of the seconds of `nuts` go into compiling, once for a model and its settings. A second fit with the same
# settings is spared that, as we shall see.
#
# The report of `svi` has no chains to compare it with. It goes by the importance weights p(data, z) / q(z): a k-hat
# over 0.5 says that the guide misses some of the tails, and one below 0.7 that weights can still bring them back.
# `diagnostics.compare` has the chains, and says what is missing.

# %%
print(diagnostics.compare(fits["svi"], fits["nuts"], names=("svi", "nuts")))

# %% [markdown]
# ## Why: a normal is too narrow for log tau
#
# The guide gives `log tau` a normal distribution, and takes it to be independent of the rest. The posterior of `log
# tau` has a long left tail, for the data do not rule out that all effects are the same. It is the wider one, and a
# normal that is fitted by the ELBO keeps to where most of the mass is.

# %% mystnb={"image": {"alt": "Densities of log tau. Those of nuts and sghmc have a long left tail down to -4 that the normal of svi does not follow."}}
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
bins = np.linspace(-6, 4, 51)
colours = {"svi": "#0072B2", "nuts": "#D55E00", "sghmc": "#009E73"}
for (name, values), style in zip(draws.items(), ["-", "--", ":"], strict=True):
    height, _ = np.histogram(values["tau"].log().numpy(), bins, density=True)
    axes.stairs(height, bins, label=name, color=colours[name], linestyle=style, linewidth=1.8)
axes.set(xlabel="log tau (tau in points of the test)", ylabel="posterior density")
_ = axes.legend(frameon=False)

# %% [markdown]
# As k-hat is below 0.7 the weights can mend it. They are in `sample_stats`, so no refit is needed. With 1000 draws the
# weighted mean is noisy, but near.

# %%
stats, tau = idata["svi"]["sample_stats"], idata["svi"]["posterior"]["tau"].values.ravel()
log_weight = stats["log_weight"].values.ravel()
weight = np.exp(log_weight - log_weight.max())
exact = draws["nuts"]["tau"].mean().item()
print(f"posterior mean of tau: svi {tau.mean():.2f}, weighted {np.average(tau, weights=weight):.2f}, nuts {exact:.2f}")

# %% [markdown]
# ## What sghmc is for
#
# With eight rows every step of `sghmc` sees all of them, and there is nothing to gain from it. It is for minibatches
# of data that `nuts` cannot look through at every step. It has no accept step, so its draws are biased by an amount
# that grows with the learning rate, however many there are. At lr=0.03 it is lost in the noise; a rate that is ten
# times larger shows it.

# %%
coarse = fit(
    schools,
    data,
    method=sghmc(lr=0.3, draws=500, warmup=500, thinning=3, chains=4),
    seed=0,
    progress=False,
    check=False,
)
print(f"tau: mean {coarse.sample()['tau'].mean():.2f} with lr=0.3, {draws['sghmc']['tau'].mean():.2f} with lr=0.03")
print("with lr=0.3 it is", coarse.report().verdict)

# %% [markdown]
# ## Start nuts where svi ended
#
# A fitted posterior is an `init` for chains: its draws are the initial points, and their spread is the initial mass
# matrix. It has to be of the same model.

# %%
start = perf_counter()
warm = fit(
    schools,
    data,
    method=nuts(draws=1000, warmup=200, chains=4, init=fits["svi"]),
    seed=0,
    progress=False,
    check=False,
)
print(f"{perf_counter() - start:.1f} s, as the kernel was compiled before")
for name, posterior in {"from the prior": fits["nuts"], "from svi": warm}.items():
    figures = posterior.report().figures
    print(
        f"{name}: bulk ESS {figures['ess_bulk']:.0f}, R-hat {figures['r_hat']:.3f}, "
        f"{figures['divergences']} divergences, {posterior.stats['n_steps'].double().mean():.1f} steps a draw"
    )

# %% [markdown]
# With ten latents a cold start finds its way as well, and the two do about the same. A warm start is for models where
# a warm-up from the prior is long.
#
# ## The same model, centred
#
# Say `theta` directly, normal around `mu` with the spread `tau`, and the model is the same while its latents are not.


# %%
def centred(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


both = {
    "nuts": fit(centred, data, method=methods["nuts"], seed=0, progress=False, check=False),
    "svi": fit(centred, data, method=methods["svi"], seed=0, progress=False, check=False),
}
for name, posterior in both.items():
    report = posterior.report()
    print(f"{name}, centred: {report.verdict}")
    print("\n".join(f"  - {reason}" for reason in report.reasons))

# %% [markdown]
# In these coordinates the posterior is a funnel: where `tau` is small all effects are forced together. A step that
# fits the wide part is too long for the neck, and chains diverge there. A normal that is independent in each latent
# cannot be a funnel at all, and settles in the part where it fits.

# %% mystnb={"image": {"alt": "Two panels of log tau against the effect of the first school. Grey points of the non-centred chains form a funnel that is narrow at small log tau. Centred chains and their divergences do not go down the neck; draws of centred mean-field inference are a small round cloud in the wide part."}}
figure, panels = plt.subplots(1, 2, figsize=(6, 3.5), sharex=True, sharey=True, layout="constrained")
true = draws["nuts"]
for axes, (name, posterior) in zip(panels, both.items(), strict=True):
    found = posterior.sample(1000)
    axes.scatter(true["theta"][::4, 0], true["tau"][::4].log(), s=6, color="#BBBBBB", label="nuts, non-centred")
    axes.scatter(found["theta"][:, 0], found["tau"].log(), s=5, color="#0072B2", alpha=0.5, label="centred")
    axes.set(title=f"{name}, centred", xlabel="theta[0] (points)", xlim=(-20, 35), ylim=(-5, 4))
bad = both["nuts"].stats["diverging"]
of = {name: values[bad] for name, values in both["nuts"].draws.items()}
panels[0].scatter(
    of["theta"][:, 0], of["tau"].log(), s=22, marker="x", color="#D55E00", linewidths=1.0, label="diverged"
)
panels[0].set_ylabel("log tau")
_ = panels[0].legend(loc="lower right", fontsize=8, markerscale=1.5)

# %%
rows = {"non-centred, nuts": true["tau"], "non-centred, svi": draws["svi"]["tau"]}
rows |= {f"centred, {name}": posterior.sample()["tau"] for name, posterior in both.items()}
quantiles = {name: np.quantile(values.numpy(), [0.05, 0.5, 0.95]) for name, values in rows.items()}
pd.DataFrame(quantiles, index=["5%", "50%", "95%"]).T.round(2)

# %% [markdown]
# ## What to conclude
#
# - Reach for `nuts` where it is quick enough, as it is here, and use it as the judge of the others.
# - Mean-field inference gave means of the effects that are good enough for most uses, and a spread that is too small
#   and too sure of itself. Its own report said to be careful, and weights mended most of the mean.
# - How a model is written decides more than the method. The centred form was bad for both, and both reports said so.
# - `sghmc` is for data that are too many for `nuts`, with a learning rate that was checked.
#
# ## Where to go next
#
# - [Choosing a guide](choosing_a_guide.py): heads that can bend, where mean-field cannot.
# - [Diagnosing a posterior](diagnosing.py): what reports look at, and what looks closer.
# - [Samplers of JAX](jax_samplers.py): the same density for any sampler of JAX.
