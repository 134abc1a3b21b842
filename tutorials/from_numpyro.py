# %% [markdown]
# # Coming from NumPyro
#
# NumPyro samples fast because its models are functions of JAX. Here the model stays in Pyro and PyTorch, and its density is
# translated to JAX, where NumPyro's own NUTS samples it. This page writes eight schools and a mixture in both, compares what
# NUTS and SVI of the two libraries give and how long they take, and ends with a table of calls and with reasons to stay
# with NumPyro.
#
# Runs in about a minute on a laptop, most of it in JAX's compiler.

# %%
import time

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as numpyro_dist
import pyro
import pyro.distributions as dist
import torch
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import log_density
from sklearn.datasets import load_iris

from pyro_ae import fit, nuts, svi, to_jax
from pyro_ae.diagnostics import plots

# %% [markdown]
# ## The same model twice
#
# In NumPyro, with arrays of JAX:

# %%
y = np.array([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=np.float32)
sigma = np.array([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=np.float32)


def schools_in_numpyro(y, sigma):
    mu = numpyro.sample("mu", numpyro_dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", numpyro_dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(y)):
        eta = numpyro.sample("eta", numpyro_dist.Normal(0.0, 1.0))
        theta = numpyro.deterministic("theta", mu + tau * eta)
        numpyro.sample("y", numpyro_dist.Normal(theta, sigma), obs=y)


# %% [markdown]
# In Pyro, with tensors:


# %%
def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


# %% [markdown]
# ## NUTS
#
# Both run four chains at once, 500 draws of warm-up and 1000 after it. The kernel is the same code; NumPyro builds the density
# from its model, `fit` from the captured graph of the Pyro model. Each is run twice, with two seeds: the first run pays for
# the compiler. A second `mcmc.run` would compile its loop once more, so NumPyro gets what is its fastest form: the whole run
# within `jax.jit`. `fit` keeps what it compiled by the model's graph and the shapes of the data.


# %%
def numpyro_nuts(model, warmup, draws):
    kernel = NUTS(model, init_strategy=numpyro.infer.init_to_median)

    @jax.jit
    def run(key, *data):
        mcmc = MCMC(
            kernel, num_warmup=warmup, num_samples=draws, num_chains=4, chain_method="vectorized", progress_bar=False
        )
        mcmc.run(key, *data)
        return mcmc.get_samples(group_by_chain=True)

    return run


keys = list(jax.random.split(jax.random.key(0), 2))
arrays = jnp.array(y), jnp.array(sigma)
seconds = {"NumPyro": [], "fit": []}
run = numpyro_nuts(schools_in_numpyro, warmup=500, draws=1000)
for key in keys:
    start = time.perf_counter()
    draws = jax.block_until_ready(run(key, *arrays))
    seconds["NumPyro"].append(time.perf_counter() - start)
for seed in range(2):
    start = time.perf_counter()
    method = nuts(draws=1000, warmup=500, chains=4)
    chains = fit(schools, {"y": y, "sigma": sigma}, method=method, seed=seed, progress=False, check=False)
    seconds["fit"].append(time.perf_counter() - start)
for name, (first, second) in seconds.items():
    print(f"{name:<8} first run {first:5.1f} s, second {second:5.1f} s")

# %% [markdown]
# Draws of both go to ArviZ. The difference of two means is set against its standard error, from the Monte Carlo standard
# errors (MCSE) of both sides.

# %%
theirs = az.convert_to_dataset({name: np.asarray(v) for name, v in draws.items()})
ours = az.convert_to_dataset({name: v.numpy() for name, v in chains.draws.items()})
far = []
for name in ("mu", "tau", "eta"):
    a, b = (np.atleast_1d(d[name].mean(("chain", "draw")).values) for d in (ours, theirs))
    error = np.atleast_1d(np.hypot(az.mcse(ours)[name].values, az.mcse(theirs)[name].values))
    for i in range(len(a)):
        far.append(abs(a[i] - b[i]) / error[i])
        print(
            f"{name}{f'[{i}]' if len(a) > 1 else '':<4}{a[i]:7.2f} by fit {b[i]:7.2f} by NumPyro {far[-1]:5.1f} MCSEs apart"
        )
print(f"largest of {len(far)}: {max(far):.1f}, where about 2 is to be expected")

# %% [markdown]
# The same posterior, within the error of either. `fit` runs and captures the Pyro model each time, which NumPyro need not.
#
# ## SVI with a mean-field guide
#
# NumPyro's loop can be compiled as a whole, draws of the guide included. `svi` is torch: it records a step once and replays it,
# with Python between the steps. For a model as small as this NumPyro is by far the quicker of the two, once it is compiled.

# %%
steps = 2000
guide = AutoNormal(schools_in_numpyro, init_loc_fn=numpyro.infer.init_to_feasible)
inference = SVI(schools_in_numpyro, guide, numpyro.optim.Adam(0.01), Trace_ELBO())


@jax.jit
def train(key, *data):
    first, second = jax.random.split(key)
    params = inference.run(first, steps, *data, progress_bar=False).params
    return guide.sample_posterior(second, params, sample_shape=(4000,))


for which, key in zip(("first", "second"), keys, strict=True):
    start = time.perf_counter()
    by_numpyro = jax.block_until_ready(train(key, *arrays))
    print(f"NumPyro: {which:<6} run {time.perf_counter() - start:5.2f} s for {steps} steps")
start = time.perf_counter()
method = svi(steps=steps, lr=0.01)
approximate = fit(schools, {"y": y, "sigma": sigma}, method=method, seed=0, progress=False, check=False)
print(f"fit:                {time.perf_counter() - start:5.2f} s")
by_numpyro = {name: torch.tensor(np.asarray(v)) for name, v in by_numpyro.items() if name != "theta"}

# %% mystnb={"image": {"alt": "Medians with 50% and 90% intervals of mu, tau and three eta of eight schools. NUTS of NumPyro and of fit agree; the mean-field guides of NumPyro and of fit agree with each other, and have a narrower tau than NUTS."}}
sides = {
    "NUTS, NumPyro": {name: torch.tensor(np.asarray(v)).flatten(0, 1) for name, v in draws.items() if name != "theta"},
    "NUTS, fit": chains.sample(),
    "SVI, NumPyro": by_numpyro,
    "SVI, fit": approximate.sample(4000),
}
axes = plots.intervals(sides, ["mu", "tau", "eta[0]", "eta[1]", "eta[2]"])
axes.figure.set_size_inches(5, 5.5)
legend = axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)

# %% [markdown]
# The two guides agree up to the noise of the last steps, and both fall short of NUTS in `tau`, which no mean-field normal can
# follow. `approximate.report()` says so, and `nuts(init=approximate)` starts the chains from there.
#
# ## Discrete latents: a mixture
#
# The lengths of 150 petals of iris have two groups. In Pyro the group of a petal is a discrete latent, which `nuts` sums out.
# NumPyro does that too, with `infer={"enumerate": "parallel"}` and the package funsor; here its model has the sum written
# down, as `MixtureSameFamily`, so that the enumeration can be checked against something else. The densities are compared
# at random points.

# %%
petals = load_iris().data[:, 2].astype(np.float32)


def mixture(x):
    share = pyro.sample("share", dist.Beta(1.0, 1.0))
    with pyro.plate("component", 2):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
    low = pyro.sample("low", dist.Normal(2.0, 1.0))
    gap = pyro.sample("gap", dist.HalfNormal(3.0))
    means = torch.stack([low, low + gap], -1)
    with pyro.plate("data", len(x)):
        group = pyro.sample("group", dist.Bernoulli(share)).long()
        pyro.sample("x", dist.Normal(means[group], scale[group]), obs=x)


def mixture_in_numpyro(x):
    share = numpyro.sample("share", numpyro_dist.Beta(1.0, 1.0))
    with numpyro.plate("component", 2):
        scale = numpyro.sample("scale", numpyro_dist.HalfNormal(1.0))
    low = numpyro.sample("low", numpyro_dist.Normal(2.0, 1.0))
    gap = numpyro.sample("gap", numpyro_dist.HalfNormal(3.0))
    groups = numpyro_dist.Categorical(jnp.stack([1 - share, share], -1))
    parts = numpyro_dist.Normal(jnp.stack([low, low + gap], -1), scale)
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", numpyro_dist.MixtureSameFamily(groups, parts), obs=x)


density = to_jax(mixture, petals)


@jax.jit
@jax.vmap
def both(v):
    values = density.constrain(v)
    log_jacobian = v["scale"].sum() + v["gap"] + jnp.log(values["share"] * (1 - values["share"]))
    in_numpyro, _ = log_density(mixture_in_numpyro, (jnp.array(petals),), {}, values)
    return density.log_density(v), in_numpyro + log_jacobian


noise = dict(zip(density.initial, jax.random.split(jax.random.key(0), 4), strict=True))
points = {n: x + 0.5 * jax.random.normal(noise[n], (10, *x.shape)) for n, x in density.initial.items()}
enumerated, by_hand = both(points)
print(f"largest relative difference of 10 log-densities: {float(jnp.abs(enumerated / by_hand - 1).max()):.0e}")

# %% [markdown]
# The densities are equal to rounding, and so are the posteriors. Here is this one.

# %%
groups = fit(mixture, petals, method=nuts(draws=500, warmup=300), seed=0, progress=False, check=False)
az.summary(az.convert_to_dataset({name: v.numpy() for name, v in groups.draws.items()}))

# %% [markdown]
# The Pyro model needs no mark for it: `nuts` sums out each discrete latent with a finite list of values. For `svi`, mark it
# with `infer={"enumerate": "parallel"}` as in NumPyro.
#
# ## In NumPyro, and here
#
# | in NumPyro | here |
# |---|---|
# | `numpyro.sample`, `numpyro.plate`, `numpyro.deterministic` | `pyro.sample`, `pyro.plate`, `pyro.deterministic` |
# | `dist.Normal(jnp.zeros(3), 1).to_event(1)` | the same, with `torch.zeros(3)` |
# | `MCMC(NUTS(model), num_warmup=..., num_samples=..., num_chains=...)` | `nuts(warmup=..., draws=..., chains=...)` |
# | `chain_method="vectorized"` | always |
# | `numpyro.enable_x64()` | `nuts(float64=True)` |
# | `NUTS(dense_mass=True, target_accept_prob=0.9)` | `nuts(dense_mass=True, target_accept=0.9)` |
# | `init_strategy=init_to_median` | `nuts(init="median")`, or `"prior"`, `"uniform"`, a fitted posterior |
# | `SVI(model, guide, optim, Trace_ELBO()).run(key, steps, ...)` | `fit(model, data, guide=guide, method=svi(steps=...))` |
# | `TraceMeanField_ELBO()` | `svi(loss=importance(elbo, estimator=analytic_kl))` |
# | `RenyiELBO(alpha=0, num_particles=K)` | `svi(loss=importance(iwae, particles=K))` |
# | `AutoNormal`, `AutoMultivariateNormal`, `AutoIAFNormal` | none, `Shared(model, FullRank)`, `Shared(model, Flow)`; or Pyro's own |
# | `AutoLaplaceApproximation` | `method="laplace"` |
# | `numpyro.plate("data", N, subsample_size=B)` | `pyro.plate("data", len(x))` and `fit(..., batch_size=B)` |
# | `random_flax_module`, `random_nnx_module` | `bayesian(net)` of a `torch.nn.Module` |
# | `Predictive(model, samples)(key, ...)` | `posterior.predict(...)` |
# | `log_likelihood(model, samples, ...)` | `posterior.log_likelihood(...)` |
# | `az.from_numpyro(mcmc)` | `posterior.to_arviz()`, of any method |
# | `mcmc.print_summary()` | `posterior.report()` |
# | `jax.random.key(0)` | `fit(..., seed=0)` |
# | any kernel with `potential_fn` | the same kernel, by `to_jax(model, data)` |
#
# ## When to stay with NumPyro
#
# - The model is in JAX already, or uses JAX's libraries (diffrax, tinygp, flax ...). Only what PyTorch computes is translated here.
# - Control flow of JAX (`scan`, `cond`, `while_loop`) keeps a graph small. A Python loop over a long series is unrolled when it
#   is captured, and takes long to compile.
# - TPUs, or chains over several devices (`chain_method="parallel"`, sharded data). `nuts` runs its chains on one device.
# - Other kernels with a model behind them: `HMCECS` (subsampling with control variates), `HMCGibbs`, `DiscreteHMCGibbs`,
#   `MixedHMC`, `SteinVI`, nested sampling. Kernels that take a bare `potential_fn` work here by `to_jax`.
# - Small models, many fits: a loop of SVI that is compiled as a whole has no Python in it, and takes milliseconds.
#
# And to come here: the model or its network is in PyTorch, data come in minibatches, rows have latents with an encoder, or one
# model is to be fitted in several ways, with diagnostics that are the same for each.
#
# ## Where to go next
#
# - [Any JAX sampler](jax_samplers.py): BlackJAX and NumPyro's other kernels on a Pyro model.
# - [Eight schools](eight_schools.py): this model from its prior to a report.
# - [Coming from plain Pyro](from_pyro.py): the calls of Pyro, and what they are here.
