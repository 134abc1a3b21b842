# %% [markdown]
# # Any JAX sampler on a Pyro model
#
# New samplers are often published in JAX first, and a Pyro model is no JAX function. `to_jax(model, data)` makes it
# one: it gives the log-density over unconstrained latents, an initial point, and the way back to the model's sites.
# This page checks that density against Pyro's own, gives it to two samplers of BlackJAX and one of NumPyro, puts their
# draws into ArviZ, and compares each with `fit(method=nuts(...))`. Then it shows what cannot be translated.
#
# Runs in about a minute on a laptop, nearly all of it in JAX's compiler. It needs `pip install blackjax`.

# %%
from functools import partial

import arviz as az
import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpyro.infer import AIES, MCMC
from pyro import poutine
from sklearn.datasets import load_breast_cancer

from pyro_ae import fit, nuts, to_jax
from pyro_ae.diagnostics import plots

# %% [markdown]
# ## A Pyro model as a function of JAX
#
# Eight schools, as one writes it in Pyro. Nothing is rewritten.


# %%
def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


data = {
    "y": torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]),
    "sigma": torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18]),
}
torch.manual_seed(0)
density = to_jax(schools, data)
print("initial point     ", {name: v.shape for name, v in density.initial.items()})
print("log p(x, z) + log|J|", density.log_density(density.initial))
print("tau there         ", density.constrain(density.initial)["tau"])

# %% [markdown]
# `log_density` and `constrain` are plain functions of a dict of arrays: `jax.jit`, `jax.grad` and `jax.vmap` work on
# them. The density is with respect to unconstrained values, so it includes the log-Jacobian of the map to the sites.
#
# ## Check it first
#
# A sampler draws from whatever it is given, and a wrong density gives a wrong posterior with perfect diagnostics. So at
# twenty random points the density is held against Pyro's: the log-probability of a trace, plus the log-Jacobian by
# hand. Only `tau` is constrained, as exp(v), and the log-derivative of that is v. The gradient is held against torch's.


# %%
def by_pyro(v):
    values = {"mu": v["mu"], "tau": v["tau"].exp(), "eta": v["eta"]}
    trace = poutine.trace(poutine.condition(schools, values)).get_trace(**data)
    return trace.log_prob_sum() + v["tau"]


points = {"mu": 5 * torch.randn(20), "tau": torch.randn(20), "eta": torch.randn(20, 8)}
value, gradient = jax.vmap(jax.value_and_grad(density.log_density))({n: jnp.array(v) for n, v in points.items()})
worst = worst_gradient = 0.0
for i in range(20):
    v = {name: p[i].clone().requires_grad_() for name, p in points.items()}
    expected = by_pyro(v)
    slopes = torch.autograd.grad(expected, list(v.values()))
    worst = max(worst, abs(float(value[i]) / expected.item() - 1.0))
    for name, slope in zip(v, slopes, strict=True):
        error = np.abs(np.asarray(gradient[name][i]) - slope.numpy()).max() / max(1.0, float(slope.abs().max()))
        worst_gradient = max(worst_gradient, float(error))
print(f"largest relative difference: density {worst:.1e}, gradient {worst_gradient:.1e}")
assert worst < 1e-5 and worst_gradient < 1e-4

# %% [markdown]
# They agree to the rounding of single precision. `to_jax(..., float64=True)` computes in double precision, to be called
# within `jax.enable_x64(True)`.
#
# ## The reference: `fit`
#
# `nuts` of `fit` uses the same density, with NumPyro's kernel. It is what the other samplers are compared with.

# %%
reference = fit(schools, data, method=nuts(draws=1000, warmup=500), seed=0, progress=False, check=False)
reference

# %% [markdown]
# ## BlackJAX's NUTS, all chains at once
#
# A sampler in BlackJAX is a function of a density. One chain is written down, with its warm-up, and `jax.vmap` makes it
# several. Chains start apart from one another, or R-hat could not tell that they come together.
#
# What these few draws cost is compilation, so the compiler is told to optimise less. Leave that out for a long run.

# %%
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def spread(density, chains, key):
    """Starting points, uniform within 1 of the initial one."""
    leaves, tree = jax.tree.flatten(density.initial)
    keys = jax.random.split(key, len(leaves))
    moved = [x + jax.random.uniform(k, (chains, *x.shape), minval=-1.0) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def window_nuts(density, key, chains=4, warmup=500, draws=1000):
    def chain(key, start):
        first, second = jax.random.split(key)
        (state, tuned), _ = blackjax.window_adaptation(blackjax.nuts, density.log_density).run(first, start, warmup)
        kernel = blackjax.nuts(density.log_density, **tuned)

        def step(state, key):
            state, info = kernel.step(key, state)
            return state, (state.position, info.num_integration_steps, info.is_divergent)

        return jax.lax.scan(step, state, jax.random.split(second, draws))[1]

    first, second = jax.random.split(key)
    return quick(jax.vmap(chain))(jax.random.split(first, chains), spread(density, chains, second))


z, steps, divergent = window_nuts(density, jax.random.key(0))
print({name: draws.shape for name, draws in z.items()}, "and", int(divergent.sum()), "divergences")

# %% [markdown]
# ## Draws into ArviZ
#
# The draws are unconstrained: `z["tau"]` is the log of tau. `density.constrain`, mapped over chains and draws, makes
# them values of the model's sites, and ArviZ takes the dict as it is, as the dims chain and draw come first. (`az.from_dict`
# makes it one group of several.)


# %%
def to_dataset(density, z):
    values = jax.vmap(jax.vmap(density.constrain))(z)
    return az.convert_to_dataset({name: np.asarray(v) for name, v in values.items()})


by_window = to_dataset(density, z)
az.summary(by_window, var_names=["mu", "tau"], kind="all")

# %% [markdown]
# Now the comparison. Two samplers of one posterior differ by Monte Carlo error, so each difference of means is divided by
# the standard error that ArviZ gives of it (the root of the sum of both squared MCSEs). Of ten such numbers the largest
# should be about 1.5 to 3. Standard deviations are compared by their ratio, and the worst R-hat and ESS of all numbers are
# printed beside.


# %%
def compared(found, reference):
    rows = {}
    for name in found.data_vars:
        ours, theirs = found[name], reference[name]
        error = np.hypot(az.mcse(found)[name].values, az.mcse(reference)[name].values)
        far = np.abs(ours.mean(("chain", "draw")).values - theirs.mean(("chain", "draw")).values) / error
        ratio = ours.std(("chain", "draw")).values / theirs.std(("chain", "draw")).values
        rows[name] = far.max(), ratio.min(), ratio.max()
    far, low, high = zip(*rows.values(), strict=True)
    r_hat = max(float(v.max()) for v in az.rhat(found).data_vars.values())
    ess = min(float(v.min()) for v in az.ess(found).data_vars.values())
    print(
        f"R-hat {r_hat:.3f}   ESS {ess:5.0f}   means off by {max(far):.1f} standard errors at most   "
        f"sd ratio {min(low):.2f} to {max(high):.2f}"
    )


by_fit = az.convert_to_dataset({name: v.numpy() for name, v in reference.draws.items()})
compared(by_fit, by_fit)
compared(by_window, by_fit)
print("gradients:", int(reference.stats["n_steps"].sum()), "by fit,", int(steps.sum()), "by BlackJAX")

# %% [markdown]
# The first line is `fit` against itself, for its R-hat and ESS. The second is the same algorithm written by somebody else,
# with another adaptation of its step size, and it gives the same posterior.
#
# ## An ensemble of NumPyro, without gradients
#
# NumPyro's kernels take a `potential_fn`, which is minus the log-density. `AIES` is the affine-invariant ensemble sampler
# that astronomers know from emcee: walkers that propose moves from one another's positions. It is handy where a gradient
# is not to be trusted.

# %%
walkers = 4 * sum(v.size for v in density.initial.values())
kernel = AIES(potential_fn=lambda v: -density.log_density(v), moves={AIES.DEMove(): 0.5, AIES.StretchMove(): 0.5})
ensemble = MCMC(
    kernel,
    num_warmup=4000,
    num_samples=4000,
    thinning=20,
    num_chains=walkers,
    chain_method="vectorized",
    progress_bar=False,
)
ensemble.run(jax.random.key(0), init_params=spread(density, walkers, jax.random.key(1)))
by_ensemble = to_dataset(density, ensemble.get_samples(group_by_chain=True))
print(walkers, "walkers:")
compared(by_ensemble, by_fit)

# %% mystnb={"image": {"alt": "Medians with 50% and 90% intervals of mu, tau and the first four eta of eight schools by NUTS of fit, NUTS of BlackJAX and the ensemble of NumPyro: the three lie beside one another and agree."}}
sides = {"fit": by_fit, "BlackJAX NUTS": by_window, "ensemble": by_ensemble}
flat = {
    label: {n: torch.tensor(v.values).flatten(0, 1) for n, v in found.data_vars.items()}
    for label, found in sides.items()
}
axes = plots.intervals(flat, ["mu", "tau", "eta[0]", "eta[1]", "eta[2]", "eta[3]"])

# %% [markdown]
# The three agree. Walkers are not independent chains, as each moves by the others, so R-hat and ESS are rough guides here
# and no more. And the ensemble took 8000 steps of 40 walkers, 320,000 evaluations of the density, for about as many effective
# draws as NUTS had from some 40,000 gradients. With more dimensions that gets worse.
#
# ## A second model, and a sampler that neither Pyro nor NumPyro has
#
# Microcanonical Langevin Monte Carlo moves at constant energy and never rejects a step. BlackJAX has it, with a tuner of its
# step size and of the scale of each latent; the length L over which it forgets its direction is left at its default, the root
# of their number. (A third phase, `frac_tune3`, would tune that too.) The model is a logistic regression with a prior whose
# width is learnt: scikit-learn's breast cancer data, 569 rows and the first ten of its features, some nearly collinear.
#
# References: Microcanonical Hamiltonian Monte Carlo (Robnik, De Luca, Silverstein and Seljak, 2023)
# https://arxiv.org/abs/2212.08549

# %%
features, labels = load_breast_cancer(return_X_y=True)
x = torch.tensor(((features - features.mean(0)) / features.std(0))[:, :10], dtype=torch.float32)
y = torch.tensor(labels, dtype=torch.float32)


def logistic(x, y):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    b = pyro.sample("b", dist.Normal(0.0, 5.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), scale).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w + b), obs=y)


density = to_jax(logistic, (x, y))
reference = fit(logistic, (x, y), method=nuts(draws=500, warmup=500), seed=0, progress=False, check=False)
by_fit = az.convert_to_dataset({name: v.numpy() for name, v in reference.draws.items()})


# %%
@quick
@jax.vmap
def tune(key, start):
    first, second = jax.random.split(key)
    state = blackjax.mclmc.init(position=start, logdensity_fn=density.log_density, rng_key=first)
    state, tuned, _ = blackjax.mclmc_find_L_and_step_size(
        mclmc_kernel=blackjax.mclmc.build_kernel(),
        num_steps=5000,
        state=state,
        rng_key=second,
        logdensity_fn=density.log_density,
        frac_tune3=0.0,
    )
    return state, tuned


@jax.jit
@partial(jax.vmap, in_axes=(0, 0, 0, None))
def draw(key, state, tuned, factor):
    kernel = blackjax.mclmc(
        density.log_density,
        L=tuned.L,
        step_size=factor * tuned.step_size,
        inverse_mass_matrix=tuned.inverse_mass_matrix,
    )

    def ten(state, key):
        state = jax.lax.fori_loop(0, 10, lambda i, s: kernel.step(jax.random.fold_in(key, i), s)[0], state)
        return state, state.position

    return jax.lax.scan(ten, state, jax.random.split(key, 1000))[1]


keys = jax.random.split(jax.random.key(0), 4)
state, tuned = tune(keys, spread(density, 4, jax.random.key(1)))
print("step sizes:", ", ".join(f"{step:.2f}" for step in tuned.step_size))
compared(by_fit, by_fit)
by_mclmc = to_dataset(density, draw(keys, state, tuned, 1.0))
compared(by_mclmc, by_fit)

gradients = {"NUTS": int(reference.stats["n_steps"].sum()), "MCLMC": 4 * 10 * 1000 * 2}
for name, found in (("NUTS", by_fit), ("MCLMC", by_mclmc)):
    ess = min(float(v.min()) for v in az.ess(found).data_vars.values())
    print(
        f"{name}: {gradients[name]} gradients after the warm-up, {1000 * ess / gradients[name]:.0f} effective draws in 1000"
    )

# %% [markdown]
# A step of MCLMC takes two gradients. It gets more effective draws from a gradient than NUTS does here; that is one model, with
# the warm-ups not counted. The means agree: of 12 numbers the largest difference should be about 2 standard errors.
#
# ## What R-hat does not see
#
# MCLMC has no accept step, so its draws are of a slightly different density, by an amount that grows with the step size.
# Chains that all draw from that density agree with one another. Here is the same run with steps that are three times as
# long as the tuner chose.

# %%
by_long = to_dataset(density, draw(keys, state, tuned, 3.0))
compared(by_long, by_fit)

# %% mystnb={"image": {"alt": "Medians with 50% and 90% intervals of the scale and four weights of the logistic regression. NUTS and MCLMC agree; MCLMC with steps three times as long has intervals that are too narrow."}}
sides = {"NUTS": by_fit, "MCLMC": by_mclmc, "MCLMC, step x 3": by_long}
flat = {
    label: {n: torch.tensor(v.values).flatten(0, 1) for n, v in found.data_vars.items()}
    for label, found in sides.items()
}
axes = plots.intervals(flat, ["scale", "w[0]", "w[2]", "w[3]", "w[6]"])

# %% [markdown]
# The chains of the long steps agree, and hold standard deviations that are about a fifth too small. R-hat, ESS and
# divergences say nothing about that. A sampler without an accept step is to be compared with one that has it, at least once
# for a kind of model; `fit(method=nuts(...))` is that here. BlackJAX also has `adjusted_mclmc`, with the accept step.
#
# ## What cannot be translated
#
# The model is run once, and its computations are captured as a graph of torch's operations. More than 200 of them have a
# translation, with linear algebra, special functions and enumerated discrete latents among them. What has none is an error
# that names the operation, before anything is sampled, and the site where the operation is part of a site's log-density.


# %%
def spectrum():
    signal = pyro.sample("signal", dist.Normal(torch.zeros(8), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(torch.fft.rfft(signal).abs(), 0.1).to_event(1), obs=torch.ones(5))


def smooth():
    prior = dist.Normal(torch.zeros(8), 1.0).to_event(1)
    pyro.sample("signal", dist.TransformedDistribution(prior, dist.transforms.DiscreteCosineTransform()))


def branch():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z if z > 0 else 2 * z, 1.0), obs=torch.tensor(1.0))


def count():
    k = pyro.sample("k", dist.Poisson(3.0))
    pyro.sample("y", dist.Normal(k, 1.0), obs=torch.tensor(1.0))


for model in (spectrum, smooth, branch, count):
    try:
        to_jax(model)
    except ValueError as error:
        print(f"{model.__name__}: {error}\n")

# %% [markdown]
# An operation can be entered in `pyro_ae.lowering.jax_ops.OPS`: a function of the operation's arguments, with arrays for
# tensors. The branch becomes `torch.where`, or runs as it is by `nuts(backend="pyro")`. A count without bounds is summed
# out by hand, or truncated.
#
# Two more limits. The data and the parameters of networks are those of the call, as constants: call `to_jax` again when they
# change. And all of the data is in the density, so kernels that subsample need a density of their own.
#
# ## Where to go next
#
# - [Eight schools](eight_schools.py): the same model by `fit`, from its prior to model comparison.
# - [Coming from NumPyro](from_numpyro.py): the same model in both, and when to stay there.
# - [Diagnosing](diagnosing.py): what a report says of chains and of guides.
