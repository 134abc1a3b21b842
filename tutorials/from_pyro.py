# %% [markdown]
# # Coming from plain Pyro
#
# A model that runs in Pyro runs here as it stands. What changes is the code around it: the loop, the scale of minibatches,
# the param store, `Predictive`. This page does the same things both ways, on the same models, and compares the answers:
# variational inference, NUTS, and the variational autoencoder of Pyro's tutorial. Then it measures three traps of plain
# Pyro that are easy to fall into, and ends with a table of calls.
#
# Runs in about a minute on a laptop.

# %%
import time

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from sklearn.datasets import load_diabetes
from torch import nn

from pyro_ae import datasets, fit, importance, iwae, log_weights, nuts, svi
from pyro_ae.diagnostics import compare, plots

# %% [markdown]
# ## A regression, by Pyro's SVI and by `fit`
#
# How a disease progressed in 442 patients, given their age, sex, body mass index and blood pressure (of scikit-learn's
# diabetes data, standardised).

# %%
measured, progress = load_diabetes(return_X_y=True)
x = torch.tensor(((measured - measured.mean(0)) / measured.std(0))[:, :4], dtype=torch.float32)
y = torch.tensor((progress - progress.mean()) / progress.std(), dtype=torch.float32)


def regression(x, y=None):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1) + b, sigma), obs=y)


# %% [markdown]
# In Pyro: a guide, an optimiser with a schedule, an objective, a loop, and `Predictive` to get draws.


# %%
def in_pyro(model, steps, batch):
    """A mean-field guide, trained with a learning rate that falls from 0.05 to a hundredth of that."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoNormal(model)
    options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.01 ** (1 / steps)}
    schedule = pyro.optim.ExponentialLR(options)
    inference = SVI(model, guide, schedule, Trace_ELBO())
    for _ in range(steps):
        inference.step(*batch())
        schedule.step()
    draws = Predictive(guide, num_samples=4000, parallel=True)(x, y)
    return {name: v.reshape(4000, -1).squeeze(-1) for name, v in draws.items()}


start = time.perf_counter()
by_pyro = in_pyro(regression, 500, lambda: (x, y))
print(f"Pyro: {time.perf_counter() - start:.1f} s for 500 steps and the draws")

# %% [markdown]
# Here: one call. The guide is the same mean-field normal, which is what `fit` makes where it is given none. Steps are recorded
# once and then replayed without Pyro's handlers.


# %%
def falling(done):
    return 0.01**done


start = time.perf_counter()
method = svi(steps=500, lr=0.05, schedule=falling)
posterior = fit(regression, (x, y), method=method, seed=0, progress=False, check=False)
by_fit = posterior.sample(4000)
print(f"fit:  {time.perf_counter() - start:.1f} s for 500 steps and the draws")
posterior

# %%
difference = compare(by_fit, by_pyro, names=("fit", "Pyro"), classify=False)
print(*difference.sentences, sep="\n")

# %% [markdown]
# The two optimise the same objective with other random numbers, and end at nearly the same guide.
#
# One habit is worth having: `(x * w).sum(-1)` in place of `x @ w`. It holds where `w` has a dimension of particles on its left, so
# that many are run at once. Pyro needs that for `vectorize_particles=True`; a model without it still runs here, particle by
# particle, with a warning.
#
# ## NUTS
#
# The same model again. Pyro's NUTS runs the handlers at every leapfrog step, and its chains need a process each. `nuts` captures
# the density once and gives it to NumPyro's compiled kernel, all chains in one call. A first call pays for the compiler; a second
# with the same model and shapes, such as other data or another seed, does not.

# %%
pyro.set_rng_seed(0)
start = time.perf_counter()
mcmc = MCMC(NUTS(regression), num_samples=200, warmup_steps=200, disable_progbar=True)
mcmc.run(x, y)
print(f"Pyro: {time.perf_counter() - start:5.1f} s for one chain of 200 + 200")

for run in ("first", "second"):
    start = time.perf_counter()
    chains = fit(regression, (x, y), method=nuts(draws=1000, warmup=500), seed=0, progress=False, check=False)
    print(f"fit:  {time.perf_counter() - start:5.1f} s for four chains of 500 + 1000, {run} run")

# %%
difference = compare(chains, mcmc.get_samples(), names=("fit", "Pyro"), classify=False)
print(*difference.sentences, sep="\n")

# %% mystnb={"image": {"alt": "Medians with 50% and 90% intervals of the intercept, the noise and the four weights by NUTS of Pyro, NUTS of fit, SVI of Pyro and SVI of fit: all four lie beside one another and agree."}}
sides = {"NUTS, Pyro": mcmc.get_samples(), "NUTS, fit": chains.sample(), "SVI, Pyro": by_pyro, "SVI, fit": by_fit}
axes = plots.intervals(sides, ["b", "sigma", "w[0]", "w[1]", "w[2]", "w[3]"])
axes.figure.set_size_inches(5, 6)
legend = axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)

# %% [markdown]
# Each method gives the same answer in both libraries, and this posterior is one that a mean-field normal can hold. Whether it can
# is a question that `fit` answers without chains to compare with:

# %%
report = posterior.report()
print(report.verdict, *report.reasons, sep="\n- ")

# %% [markdown]
# ## The variational autoencoder of Pyro's tutorial
#
# This is the class of https://pyro.ai/examples/vae.html, with digits of 8 x 8 pixels in place of 28 x 28. It calls
# `pyro.module`, takes the size of its plate from the batch, and knows nothing of this library.


# %%
class Encoder(nn.Module):
    def __init__(self, z_dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(64, hidden_dim)
        self.fc21 = nn.Linear(hidden_dim, z_dim)
        self.fc22 = nn.Linear(hidden_dim, z_dim)
        self.softplus = nn.Softplus()

    def forward(self, x):
        x = x.reshape(-1, 64)
        hidden = self.softplus(self.fc1(x))
        return self.fc21(hidden), torch.exp(self.fc22(hidden))


class Decoder(nn.Module):
    def __init__(self, z_dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(z_dim, hidden_dim)
        self.fc21 = nn.Linear(hidden_dim, 64)
        self.softplus = nn.Softplus()

    def forward(self, z):
        return torch.sigmoid(self.fc21(self.softplus(self.fc1(z))))


class VAE(nn.Module):
    def __init__(self, z_dim=8, hidden_dim=100):
        super().__init__()
        self.encoder = Encoder(z_dim, hidden_dim)
        self.decoder = Decoder(z_dim, hidden_dim)
        self.z_dim = z_dim

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = x.new_zeros(torch.Size((x.shape[0], self.z_dim)))
            z_scale = x.new_ones(torch.Size((x.shape[0], self.z_dim)))
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            loc_img = self.decoder(z)
            pyro.sample("obs", dist.Bernoulli(loc_img, validate_args=False).to_event(1), obs=x.reshape(-1, 64))

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_scale = self.encoder(x)
            pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))


digits = datasets.load("digits")
train, test = ((split["x"] > 0.5).float() for split in (digits.train, digits.test))
epochs, rows = 20, 100

# %%
pyro.clear_param_store()
pyro.set_rng_seed(0)
vae = VAE()
start = time.perf_counter()
inference = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 3e-3}), loss=Trace_ELBO())
for _ in range(epochs):
    for batch in train[torch.randperm(len(train))].split(rows):
        inference.step(batch)
seconds = time.perf_counter() - start
elbo = -sum(inference.evaluate_loss(test) for _ in range(10)) / (10 * len(test))
print(f"Pyro: {seconds:.1f} s, ELBO of the test digits {elbo:.2f} nats each")

torch.manual_seed(0)
ours = VAE()
start = time.perf_counter()
method = svi(loss=Trace_ELBO(), lr=3e-3, epochs=epochs)
images = fit(ours.model, train, guide=ours.guide, method=method, batch_size=rows, seed=0, progress=False, check=False)
seconds = time.perf_counter() - start
log_w, _ = log_weights(ours.model, ours.guide, test, particles=10)
print(f"fit:  {seconds:.1f} s, ELBO of the test digits {log_w.mean():.2f} nats each")
print(f"      log p(x) of a test digit, by 200 draws: {images.log_evidence(test, particles=200).mean():.2f} nats")

# %% [markdown]
# The two differ by less than seeds do: over eight of them the mean was -22.1 nats for either, with a standard deviation of 0.2 to
# 0.3 between seeds. Pyro's ELBOs are losses as they are, but for `RenyiELBO` (below), and so are bounds that Pyro does not have, such as
# `svi(loss=importance(iwae, particles=50))`. The result knows more than the parameters: evidence of each row, codes, new
# rows, a report.
#
# ## Trap 1: the scale of a minibatch
#
# Where latents are shared by all rows, as the weights of the regression are, a minibatch of B rows must count N/B times. Pyro
# does that if the plate is told both sizes. If it is not, as in the model above, the loop below runs all the same, and what it
# finds is the posterior of B rows. `fit` knows N and B and scales the sites in the plate, so the model stays as it is. All three
# are compared with NUTS on all rows.


# %%
def subsampled(x, y):
    """The model, with the scale written in."""
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x), subsample_size=50) as rows:
        pyro.sample("y", dist.Normal((x[rows] * w).sum(-1) + b, sigma), obs=y[rows])


def some():
    rows = torch.randperm(len(x))[:50]
    return x[rows], y[rows]


method = svi(steps=400, lr=0.05, schedule=falling)
scaled = fit(regression, (x, y), method=method, batch_size=50, seed=0, progress=False, check=False)
found = {
    "NUTS, all rows": chains.sample(),
    "Pyro, batches, plate(len(x))": in_pyro(regression, 400, some),
    "Pyro, plate(subsample_size=50)": in_pyro(subsampled, 400, lambda: (x, y)),
    "fit, batch_size=50": scaled.sample(4000),
}
for name, draws in found.items():
    spread = torch.cat([draws["b"].std()[None], draws["w"].std(0)])
    print(f"{name:<32} sd of b and w: {', '.join(f'{s:.3f}' for s in spread.tolist())}")
print(f"sqrt(442 / 50) = {(442 / 50) ** 0.5:.2f}")

# %% [markdown]
# Without the scale each standard deviation is too large by about sqrt(N/B). No error, no warning, and a good fit to look at. With it
# both come near; the rest is the noise of small batches, which more steps would average out.
#
# ## Trap 2: one param store for all
#
# Pyro keeps parameters by name in one store of the process. A second guide with the same names takes over what the first has
# learnt, unless the store is cleared; a notebook cell that is run twice goes on where it was.


# %%
def mean(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def mean_guide(x):
    pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.1))


pyro.clear_param_store()
for value in (5.0, -5.0):
    inference = SVI(mean, mean_guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(200):
        inference.step(torch.full((20,), value))
    print(f"Pyro: data at {value:+.0f}: loc is {pyro.param('loc').item():+.2f} after 200 steps from 0")
for value in (5.0, -5.0):
    method = svi(steps=200, lr=0.02)
    found = fit(mean, torch.full((20,), value), guide=mean_guide, method=method, seed=0, progress=False, check=False)
    print(f"fit:  data at {value:+.0f}: loc is {found.params['loc'].item():+.2f} after 200 steps from 0")
print("in Pyro's store still:", list(pyro.get_param_store()))

# %% [markdown]
# The second run should mirror the first. Pyro's does not, because it did not start from 0: it began where the first had ended,
# and `torch.tensor(0.0)` in the guide was not looked at. Each `fit` has a store of its own, `posterior.params`, and leaves Pyro's alone.
#
# ## Trap 3: an importance-weighted bound of a minibatch
#
# `RenyiELBO(alpha=0)` is the importance-weighted bound. It takes the logarithm of an average of weights, and in a subsampled plate
# the weights hold the scale N/B: then N/B stands inside the logarithm, and what comes out is no bound. Here is a model whose
# log-evidence is known: one normal latent for each of 1000 rows of two numbers. The guide is a bit off and a bit wide.

# %%
torch.manual_seed(0)
N, B, K = 1000, 100, 100
loadings, noise = torch.tensor([[1.0, 0.5]]), 0.5
v = torch.randn(N, 1) @ loadings + noise * torch.randn(N, 2)
truth = dist.MultivariateNormal(torch.zeros(2), loadings.T @ loadings + noise**2 * torch.eye(2)).log_prob(v).sum()
precision = 1 + (loadings @ loadings.T).item() / noise**2


def factor(v, rows=None):
    with pyro.plate("data", len(v), subsample=rows):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("v", dist.Normal(z @ loadings, noise).to_event(1), obs=v if rows is None else v[rows])


def factor_guide(v, rows=None):
    with pyro.plate("data", len(v), subsample=rows):
        chosen = v if rows is None else v[rows]
        mean = chosen @ loadings.T / noise**2 / precision
        pyro.sample("z", dist.Normal(mean + 0.1, 1.3 * precision**-0.5).to_event(1))


options = {"num_particles": K, "vectorize_particles": True, "max_plate_nesting": 1}
bounds = {"ELBO": Trace_ELBO(**options), "RenyiELBO(alpha=0)": RenyiELBO(alpha=0, **options)}
values = {"log p, exactly": [truth.item()]}
batches = [rows for _ in range(5) for rows in torch.randperm(N).split(B)]
with torch.no_grad():
    for name, bound in bounds.items():
        values[f"{name}, all rows"] = [-bound.loss(factor, factor_guide, v) for _ in range(5)]
        values[f"{name}, minibatches"] = [-bound.loss(factor, factor_guide, v, rows) for rows in batches]
    ours = importance(iwae, particles=K)
    values["importance(iwae), all rows"] = [-ours(factor, factor_guide, v).item() for _ in range(5)]
    values["importance(iwae), minibatches"] = [-ours(factor, factor_guide, v, rows).item() for rows in batches]
for name, found in values.items():
    print(f"{name:<32}{sum(found) / len(found):9.1f} nats")

# %% mystnb={"image": {"alt": "Bounds on the log-evidence of 1000 rows, for all rows and for minibatches. The ELBO lies below the exact value both ways, and importance(iwae) just below it both ways. RenyiELBO lies just below it for all rows and far above it for minibatches."}}
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
for place, name in enumerate(["ELBO", "RenyiELBO(alpha=0)", "importance(iwae)"]):
    for kind, marker, color, off in (("all rows", "o", "#0072B2", -0.14), ("minibatches", "s", "#D55E00", 0.14)):
        found = values[f"{name}, {kind}"]
        label = kind if place == 0 else None
        axes.plot(sum(found) / len(found), place + off, marker, color=color, markersize=8, label=label)
axes.axvline(truth.item(), color="#222222", linestyle="--", label="log p, exactly")
axes.set_yticks(range(3), ["Pyro's ELBO", "Pyro's RenyiELBO(0)", "importance(iwae)"])
axes.set(xlabel="nats, of all rows", ylim=(2.5, -0.5))
axes.spines[["top", "right"]].set_visible(False)
legend = axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

# %% [markdown]
# On all rows both are right. On minibatches `RenyiELBO` is nearly 200 nats above what it is meant to bound from below, so to
# maximise it is not to fit the model. `importance` keeps N/B outside of the logarithm, in a `fit` with `batch_size` as well, and
# minibatches average to the value of all rows. Where a latent is shared by the rows of a minibatch no such bound exists, and
# `fit` says so with an error that names the latent.
#
# ## In Pyro, and here
#
# | in Pyro | here |
# |---|---|
# | `SVI(model, guide, optim, Trace_ELBO())`, a loop of `step` | `fit(model, data, guide=guide, method="svi")` |
# | `Trace_ELBO(num_particles=K)` | the same as `svi(loss=...)`, or `importance(elbo, particles=K)` |
# | `RenyiELBO(alpha=0, num_particles=K)` | `importance(iwae, particles=K)`, right for minibatches |
# | `TraceEnum_ELBO()` and `config_enumerate` | latents with `infer={"enumerate": "parallel"}` are summed out in any loss; `TraceEnum_ELBO` also goes |
# | `pyro.optim.Adam({"lr": 1e-3})` | `svi(lr=1e-3)`, any optimiser of torch or Pyro as `optimizer=` |
# | `AutoNormal(model)` | no guide at all, or `AutoNormal(model)`, or `Shared(model)` |
# | `AutoMultivariateNormal`, `AutoLowRankMultivariateNormal` | the same, or `Shared(model, FullRank)`, `Shared(model, LowRank)` |
# | `AutoNormalizingFlow`, `AutoIAFNormal` | the same, or `Shared(model, Flow)` |
# | `AutoLaplaceApproximation`, `AutoDelta` | `method="laplace"`, `method="map"` |
# | `pyro.plate("data", N, subsample_size=B)` | `pyro.plate("data", len(x))` and `fit(..., batch_size=B)` |
# | `poutine.scale(scale=N / B)` | not needed; `losses.annealed(beta)` for a weight of the KL |
# | `pyro.clear_param_store()` | not needed |
# | `pyro.get_param_store()` | `posterior.params` |
# | `Predictive(model, guide=guide, num_samples=S)(x)` | `posterior.sample(S)`, `posterior.predict(x, S)` |
# | `Predictive(model, posterior_samples=...)` | `posterior.predict(x)` |
# | `MCMC(NUTS(model), num_samples, warmup_steps, num_chains)` | `fit(model, data, method=nuts(draws=..., warmup=..., chains=...))` |
# | the same kernel, where the model cannot be captured | `nuts(backend="pyro")` |
# | `mcmc.summary()`, `az.from_pyro(mcmc)` | `posterior.report()`, `posterior.to_arviz()` |
# | `psis_diagnostic(model, guide, ...)` | `posterior.report(x).rows["k_hat"]`, row by row |
# | `pyro.set_rng_seed(0)` | `fit(..., seed=0)`, which leaves the global state alone |
# | `pyro.get_param_store().save(path)` | `posterior.save(path)`, `Posterior.load(path, model)` |
#
# ## What stays the same
#
# Models, guides, distributions, plates, `to_event`, `pyro.param`, `pyro.module`, `PyroModule`, handlers and enumeration are Pyro's.
# A model still runs by itself, and `poutine.trace`, `pyro.render_model` or `Predictive` work on it as before. What needs
# its own loop, such as an objective between several models, is better written in plain Pyro. Models whose control flow depends on
# their latents run here by `svi` and `nuts(backend="pyro")`, and are not compiled.
#
# ## Where to go next
#
# - [Your own model](own_model.py): from a Pyro function to a checked posterior.
# - [Choosing a guide](choosing_a_guide.py): what mean-field misses, and what to put in its place.
# - [Any JAX sampler](jax_samplers.py): the density of a Pyro model, for samplers that Pyro does not have.
