# %% [markdown]
# # Choosing an objective: from the ELBO to IWAE to PIWAE
#
# A guide can be trained on the ELBO or on a tighter bound of several draws, and the gradient of either can be
# estimated in more than one way. This page measures what a tighter bound gains, what it costs the guide, and what
# repairs that: first where log p(x) is known exactly, then on a small autoencoder. It ends with a table of which
# objective to take.
#
# Runs in about 40 seconds on a laptop.

# %%
import copy

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_ae import batch_plate, datasets, elbo, fit, importance, iwae, log_weights, svi
from pyro_ae.bounds import ciwae, cubo, miwae
from pyro_ae.diagnostics import effective_sample_size, pareto_k
from pyro_ae.estimators import dreg
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.losses import piwae
from pyro_ae.models.ppca import PPCA
from pyro_ae.models.vae import VAE
from pyro_ae.nn import MLP

COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7"]  # of Okabe and Ito
MARKERS = ["o", "s", "^", "D", "v"]

# %% [markdown]
# ## A bound is a function of log-weights
#
# Draw z from the guide and weigh it: log w = log p(x, z) - log q(z | x). Every bound here is a function of K such
# log-weights of a row. The ELBO is their mean, and IWAE is the log of the mean weight.
#
# Probabilistic PCA has log p(x) in closed form, so it shows how far below it a bound lies. The model is held at the
# truth, and a mean-field guide is fitted to 200 rows. The posterior is correlated, so this guide cannot be exact.

# %%
torch.manual_seed(0)
linear = PPCA(features=6, latent=3, noise=0.7).requires_grad_(False)
rows = linear.marginal().sample((200,))
exact = linear.marginal().log_prob(rows)

guide = Amortized(MLP(6, [32]), MeanField(32, 3))
method = svi(loss=importance(elbo), steps=400, lr=1e-2, schedule="cosine")
fitted = fit(linear, rows, guide=guide, method=method, seed=0, progress=False, check=False)

with torch.no_grad():
    log_w, _ = log_weights(fitted.model, fitted.guide, rows, particles=4096)
print("log-weights", list(log_w.shape), "with a median k-hat of", f"{pareto_k(log_w).median():.2f}")

# %% [markdown]
# The same 4096 draws a row serve every K: they are split into groups of K, and the bound is averaged over the groups.

# %%
sizes = [1, 4, 16, 64, 256, 1024, 4096]
bounds = {
    "elbo": lambda k: elbo,
    "ciwae(0.5)": lambda k: ciwae(0.5),
    "miwae(4, K/4)": lambda k: miwae(4, k // 4) if k > 1 else elbo,
    "iwae": lambda k: iwae,
    "cubo(2)": lambda k: cubo(2),
}
gaps = {
    name: [float((make(k)(log_w.unflatten(0, (k, -1))).mean(0) - exact).mean()) for k in sizes]
    for name, make in bounds.items()
}
print(f"{'nats above log p(x), K =':<24}" + "".join(f"{k:>9}" for k in sizes))
for name, found in gaps.items():
    print(f"{name:<24}" + "".join(f"{gap:9.3f}" for gap in found))

# %% mystnb={"image": {"alt": "Five bounds against the number of draws K, in nats above log p(x). The ELBO is flat below zero, CIWAE halves its distance, MIWAE and IWAE rise to zero from below, and the estimate of CUBO rises from the ELBO to above zero and keeps rising."}}
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.axhline(0, color="0.5", linestyle=":")
axes.annotate("log p(x)", (1, 0.01), color="0.35")
for (name, found), colour, marker in zip(gaps.items(), COLOURS, MARKERS, strict=True):
    axes.plot(sizes, found, color=colour, marker=marker, label=name)
axes.set(xscale="log", xlabel="K, draws a row", ylabel="bound - log p(x), nats a row")
axes.set_xticks(sizes, [str(k) for k in sizes])
axes.minorticks_off()
_ = axes.legend()

# %% [markdown]
# - `elbo` does not depend on K. More draws make it less noisy, not tighter.
# - `iwae` closes the gap as K grows, although the guide stays what it is. At first, four times the draws leave less
#   than half of the gap.
# - `miwae(M, K/M)` averages M bounds of K/M draws each: it is the `iwae` of a smaller K. `ciwae(0.5)` is half-way
#   between `elbo` and `iwae`, so it never closes more than half.
# - `cubo` is an upper bound, but of the whole distribution of weights. From a few draws its estimate is too low, at K
#   = 1 it is the ELBO, and it still rises at 4096. It needs the square of the weights to have a mean. A k-hat about
#   0.5, as here, says that it may have none: the bound itself is infinite then, and says nothing about log p(x).
#
# ## What breaks first: the gradient of the guide
#
# As K grows, the bound depends less on the guide: with enough draws any guide would do. So the guide's gradient, the
# signal, shrinks like 1/K, while its noise shrinks only like 1/sqrt(K). *Tighter Variational Bounds are Not
# Necessarily Better* (Rainforth et al., 2018, https://arxiv.org/abs/1802.04537) calls their ratio the signal-to-noise
# ratio.
#
# To measure it, take one row and 4000 copies of it, each with a location and a scale of its own. The copies do not see
# each other, so one backward pass gives 4000 independent draws of the gradient. The guide is put half a standard
# deviation away from the posterior's mean and made a fifth too wide; it is the same for every objective. The model's
# gradient is that of the mean of x, of which each copy has its own, too.

# %%
copies = 4000
row = rows[:1].expand(copies, -1)
posterior = linear.posterior(rows[:1])
sd = posterior.covariance_matrix.reshape(-1, 3, 3)[0].diagonal().sqrt()
start = [posterior.loc + 0.5 * sd * torch.tensor([1.0, -1.0, 1.0]), (1.2 * sd).log()]

twin = copy.deepcopy(linear)
twin.mean = nn.Parameter(linear.mean.expand(copies, -1).clone())


def gradients(loss):
    """Of the guide's numbers and of the model's, [copies, numbers]."""
    loc, log_scale = (value.expand(copies, -1).clone().requires_grad_() for value in start)

    def copied(x):
        with batch_plate(x):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    found = loss(twin, copied, row)
    sides = found if isinstance(found, tuple) else (found, found)  # piwae has a loss for the model, one for the guide
    of_model = torch.autograd.grad(sides[0], [twin.mean], retain_graph=True)
    return torch.cat(torch.autograd.grad(sides[1], [loc, log_scale]), 1), of_model[0]


def signal_to_noise(found):
    """Root mean square over the numbers; a mean of 4000 draws has a noise of its own, which is taken off."""
    return float((found.mean(0).square() / found.var(0) - 1 / copies).mean().clamp(min=0).sqrt())


draws = [1, 4, 16, 64]
objectives = {
    "elbo": lambda k: importance(elbo, k),
    "iwae": lambda k: importance(iwae, k),
    "iwae, dreg": lambda k: importance(iwae, k, dreg),
    "piwae(K/4, 4)": lambda k: piwae(max(k // 4, 1), min(k, 4)),
}
ratios = {name: [[signal_to_noise(g) for g in gradients(make(k))] for k in draws] for name, make in objectives.items()}
for i, side in enumerate(("guide", "model")):
    print(f"{side + ', K =':<16}" + "".join(f"{k:>8}" for k in draws))
    for name, found in ratios.items():
        print(f"{name:<16}" + "".join(f"{ratio[i]:8.2f}" for ratio in found))

# %% mystnb={"image": {"alt": "Two panels of signal-to-noise ratios against the number of draws, on logarithmic axes. For the guide the ratio of IWAE falls, that of the ELBO rises, that of IWAE with DReG ends above its start, and that of PIWAE rises after four draws. For the model all four rise together."}}
figure, axes = plt.subplots(1, 2, figsize=(6, 3.6), layout="constrained", sharex=True, sharey=True)
for i, side in enumerate(("guide", "model")):
    for (name, found), colour, marker in zip(ratios.items(), COLOURS, MARKERS, strict=False):
        axes[i].plot(draws, [ratio[i] for ratio in found], color=colour, marker=marker, label=name)
    axes[i].set(title=f"gradient of the {side}", xlabel="draws a row", xscale="log", yscale="log")
    axes[i].set_xticks(draws, [str(k) for k in draws])
    axes[i].set_yticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
    axes[i].minorticks_off()
axes[0].set_ylabel("signal-to-noise ratio")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
_ = figure

# %% [markdown]
# With the ELBO more draws help both sides. With IWAE they help the model and drown the guide's gradient: at 64 draws
# its noise is more than ten times its signal. Two repairs:
#
# - `dreg` is another estimator of the same gradient of the same bound (*Doubly Reparameterized Gradient Estimators for
#   Monte Carlo Objectives*, Tucker et al., 2019, https://arxiv.org/abs/1810.04152). Its ratio starts higher, and with
#   64 draws it is above its start. That holds for weights of finite variance: with a guide that is too narrow it may
#   fall again.
# - `piwae(M, K)` gives the model the IWAE of all M * K draws, and the guide the mean of M bounds of K draws. With K
#   fixed at 4 the guide's ratio rises with M, and the model keeps its own.
#
# ## Training with each
#
# Now an autoencoder of binary digits, where the model learns as well. All four objectives spend 16 draws a row, on two
# seeds. The test log-evidence says how good the model is: it is estimated with 1000 draws, so it is a lower bound, and
# a little lower for a worse guide. Three numbers say how good the encoder is: KL(q || p) = log p(x) - ELBO, the
# effective sample size of 1000 draws, and the share of rows whose k-hat is over 0.7.

# %%
digits = datasets.load("digits")
train, test = ((part["x"] > 0.5).float().flatten(1) for part in (digits.train, digits.test))
losses = {
    "elbo": importance(elbo, 16),
    "iwae": importance(iwae, 16),
    "iwae, dreg": importance(iwae, 16, dreg),
    "piwae(4, 4)": piwae(4, 4),
}
columns = ["log p(x)", "ELBO", "KL(q || p)", "ESS", "k-hat > 0.7"]
table = torch.zeros(2, len(losses), len(columns))
for seed in range(2):
    for i, loss in enumerate(losses.values()):
        torch.manual_seed(seed)
        model, guide = VAE(MLP(8, [64], 64), latent=8), Amortized(MLP(64, [64]), MeanField(64, 8))
        method = svi(loss=loss, epochs=15, lr=1e-2, schedule="cosine")
        found = fit(model, train, guide=guide, method=method, batch_size=128, seed=seed, progress=False, check=False)
        with torch.no_grad():
            log_w, _ = log_weights(found.model, found.guide, test, particles=1000)
        evidence, mean = iwae(log_w).mean(), elbo(log_w).mean()
        ess, heavy = effective_sample_size(log_w).median(), (pareto_k(log_w) > 0.7).float().mean()
        table[seed, i] = torch.stack([evidence, mean, evidence - mean, ess, heavy])

print(f"{'':<14}" + "".join(f"{c:>17}" for c in columns) + "    (seed 0 / seed 1)")
for i, name in enumerate(losses):
    pairs = zip(*table[:, i].tolist(), ("6.2f", "6.2f", "4.2f", "3.0f", "3.0%"), strict=True)
    print(f"{name:<14}" + "".join(f"{f'{a:{form}} /{b:{form}}':>17}" for a, b, form in pairs))

# %% mystnb={"image": {"alt": "Test log-evidence against KL divergence of the encoder for four objectives and two seeds. The ELBO is lowest in both, IWAE is far better in log-evidence with by far the largest divergence, and IWAE with DReG and PIWAE are a little better than IWAE in log-evidence with a smaller divergence."}}
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for i, name in enumerate(losses):
    axes.plot(table[:, i, 2], table[:, i, 0], MARKERS[i], color=COLOURS[i], label=name, markersize=8)
axes.set(xlabel="KL(q || p), nats a row (better to the left)", ylabel="test log p(x), nats a row")
_ = axes.legend()

# %% [markdown]
# - The model: the three tighter bounds beat the ELBO by more than a nat on both seeds. This is a short training, in
#   which the ELBO is also the slowest to learn; with more epochs the distance gets smaller.
# - The encoder: that of the ELBO is the nearest to its posterior, by KL and by effective sample size. That of IWAE is
#   the farthest by both, so that most of what the model has won, or all of it, is lost again in its own ELBO. IWAE
#   does not ask for a q that is near in KL, but for one from which 16 draws cover the posterior.
# - `dreg` and `piwae` have a better model *and* a better encoder than plain IWAE, from the same number of draws. So a
#   part of the damage is noise in the gradient, and can be repaired.
# - k-hat orders them in another way, as it looks at the largest weights alone: `dreg` has fewer rows over 0.7 than
#   IWAE, and `piwae` has as many or more. "Better encoder" is more than one number.
#
# If draws of the posterior are wanted after training with IWAE, resample them:
# `posterior.with_guide(ImportanceWeighted(posterior.model, posterior.guide, 16))` is the distribution that the bound
# of 16 draws was about. [Choosing a guide](choosing_a_guide.py) measures it.
#
# ## What breaks next: rows that share a latent
#
# A minibatch of B rows stands for N by a factor of N/B. For latents of each row it stands outside the bound, and any
# bound will do. A latent that all rows share, such as the mean below, puts it inside: the log-weight itself must be
# scaled up. The ELBO is linear in log-weights, so that averages out. For IWAE it does not, and `fit` refuses it.

# %%
torch.manual_seed(0)
y = dist.Normal(1.5, 1.0).sample((100,))


def shared(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with batch_plate(y):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


tight = svi(loss=importance(iwae, 8), steps=200)
try:
    fit(shared, y, method=tight, batch_size=10, seed=0, progress=False)
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# Here is why, by hand. The guide is 1.5 times as wide as the exact posterior, and the rows are split into minibatches
# in 2000 random ways. The log-weights have the likelihood of B rows times N/B in them, and each bound is averaged over
# the minibatches. An importance-weighted loss that scales each site, and takes the log of the mean after that, does
# this.

# %%
width = (1 / 4 + len(y)) ** -0.5
truth = dist.MultivariateNormal(torch.zeros(100), torch.eye(100) + 4.0).log_prob(y)
q = dist.Normal(y.sum() * width**2, 1.5 * width)
mu = q.sample((8, 2000, 1))
order = torch.stack([torch.randperm(100) for _ in range(2000)])

print(f"log p(y) = {truth:.2f}")
for size in (100, 50, 10):
    batches = y[order].unflatten(1, (-1, size))  # [2000, minibatches, rows]
    likelihood = dist.Normal(mu.unsqueeze(-1), 1.0).log_prob(batches).sum(-1)
    log_w = dist.Normal(0.0, 2.0).log_prob(mu) - q.log_prob(mu) + 100 / size * likelihood
    print(f"B = {size:>3}: elbo {elbo(log_w).mean():8.2f}, iwae {iwae(log_w).mean():8.2f}")

# %% [markdown]
# The ELBO is the same for any minibatch size. "IWAE" is below log p(y) with all rows, and rises above it with
# minibatches: it is no bound any more, and a fit that maximises it is rewarded for noise. Give such a model all rows
# at once, which `fit` accepts for any bound, or the ELBO.

# %%
whole = fit(shared, y, method=tight, seed=0, progress=False, check=False)
with torch.no_grad():
    log_w, _ = log_weights(whole.model, whole.guide, y, particles=1000)
print(f"all rows at once: iwae of 1000 draws {iwae(log_w):.2f}, log p(y) {truth:.2f}")

# %% [markdown]
# ## Which objective when
#
# | you want | take | why |
# |---|---|---|
# | a first fit, or draws from the guide as they are | `importance(elbo)` | the nearest encoder, cheapest, right for any model |
# | the same with less noise near the end | `importance(elbo, estimator=sticking_the_landing)` | no noise where the guide is exact |
# | the best model, and a usable encoder | `piwae(4, 4)` or `importance(iwae, 16, dreg)` | both sides keep a gradient with signal |
# | a tight bound without choosing M and K | `importance(ciwae(0.5), 16)` | half of each |
# | log p(x) of test rows | `posterior.log_evidence(x, particles=1000)` | IWAE after training, whatever the training was |
# | a guide that covers the posterior | `importance(renyi(0.5), 16)` or `importance(cubo(2), 16)` | large weights cost more; look at k-hat first |
# | discrete latents | `importance(iwae, 16, score_function())` | VIMCO; or sum them out by enumeration |
# | latents that rows share, in minibatches | `importance(elbo)` | nonlinear bounds are refused, as above |
#
# Each goes to `svi(loss=...)`, and costs K runs of the decoder a step; the encoder runs once. The full comparison,
# with the claims of the paper checked over seeds, is `pyro-ae reproduce tighter_bounds`.
#
# ## Where to go next
#
# - [Choosing a guide](choosing_a_guide.py): when the family of the guide is at fault, and not the objective.
# - [Diagnosing a posterior](diagnosing.py): k-hat, effective sample sizes and calibration, and what to do about them.
# - [Your own model](own_model.py): from a Pyro function to a report.
