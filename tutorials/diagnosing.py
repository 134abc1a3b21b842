# %% [markdown]
# # Diagnosing a bad posterior, step by step
#
# A fit ends with a warning: this posterior is poor. What is wrong with it may be the training, the family of the guide,
# the encoder, or the model, and each has another cure. This page follows the evidence from the warning to the cause,
# applies the cure, and measures again; three times for the guide of an autoencoder, and once for chains. You will learn
# which diagnostic answers which question, and how to read each.
#
# Runs in about a minute on a laptop.

# %%
import textwrap
import warnings

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

from pyro_ae import PosteriorWarning, datasets, elbo, fit, importance, iwae, log_weights, nuts, svi
from pyro_ae.diagnostics import (
    amortisation_gap,
    annealed_importance_sampling,
    compare,
    latent_summary,
    pareto_k,
    plots,
    simulation_based_calibration,
)
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.full_rank import FullRank
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.guides.semi_amortized import SemiAmortized
from pyro_ae.losses import annealed
from pyro_ae.models.vae import VAE
from pyro_ae.nn import MLP
from pyro_ae.reference import reference
from pyro_ae.schedules import linear

# %% [markdown]
# ## A fit that warns
#
# The data are scikit-learn's digits of 8 x 8 pixels, with three grey levels so that each pixel is a binomial count of 0
# to 2. The model is a variational autoencoder with 8 latents, and nothing about it looks wrong. `fit` looks at what it
# gives back; the warning is caught here to be printed.

# %%
x = (datasets.load("digits").train["x"] * 2).round().flatten(1)  # [1297, 64]


def likelihood(logits):
    return dist.Binomial(2, logits=logits).to_event(1)


def make_model():
    return VAE(MLP(8, [64], 64), 8, likelihood)


def make_guide(head):
    return Amortized(MLP(64, [64]), head(64, 8), inputs=lambda x: x / 2)


def fit_and_listen(model, data, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PosteriorWarning)
        posterior = fit(model, data, seed=0, progress=False, **options)
    said = [str(w.message) for w in caught if issubclass(w.category, PosteriorWarning)]
    print(*[textwrap.fill(text, 100) for text in said] or ["No warning."])
    return posterior


torch.manual_seed(0)
train = {"lr": 2e-2, "epochs": 30}
first = fit_and_listen(make_model(), x, guide=make_guide(MeanField), method=svi(**train), batch_size=64)

# %% [markdown]
# ## What the report adds
#
# The warning comes from a quick look at 30 rows. The report takes 200, says what each number means for the use of the
# draws, and looks at the latents too.

# %%
report = first.report()
print(report)

# %% [markdown]
# k-hat is the shape of the tail of a row's importance weights. Up to 0.7 draws of the guide can be weighted to stand
# for the posterior; above, they cannot. It belongs to a row, so the rows that the guide fails on can be named.

# %% mystnb={"image": {"alt": "Pareto k-hat of 200 rows, spread over all of the data. Many are above the dashed line at 0.7, in no particular place."}}
axes = plots.pareto_k_by_row(report.rows["k_hat"], report.rows["row"])

# %% [markdown]
# The bad rows are everywhere, so it is not a few odd images. From here on one line a posterior is enough: on 100 rows,
# the ELBO, the importance-weighted bound (a better estimate of log p(x)), the gap between them, and k-hat.

# %%
some = x[::13]


@torch.no_grad()
def measure(name, posterior):
    log_w, _ = log_weights(posterior.model, posterior.guide, some, particles=300)
    k, low, high = pareto_k(log_w), elbo(log_w).mean(), iwae(log_w).mean()
    print(
        f"{name:<22} ELBO {low:7.2f}   IWAE {high:7.2f}   gap {high - low:5.2f} nats   k-hat: median {k.median():.2f}, "
        f"above 0.7 in {(k > 0.7).float().mean():.0%}"
    )


measure("first", first)

# %% [markdown]
# ## Finding 1: most of the code is not used
#
# The report counts dimensions that are active. `latent_summary` looks closer: how much each says of a row, as the KL of
# its posterior to the prior, averaged over rows.

# %%
summary = latent_summary(first, rows=200, draws=50)
print(summary)

# %% mystnb={"image": {"alt": "Bars of the KL of each of eight latent dimensions, largest first: two or three are above one nat and the others near zero."}}
axes = plots.kl(summary.kl.mean(0), summary.kinds.names)

# %% [markdown]
# Two of eight dimensions say something, and the others next to nothing: their posterior is the prior, or nearly so,
# for every row. The training gave them up early, when the decoder could not use them yet and their KL only cost.
# Where the decoder ignores a dimension the prior is its exact posterior, so **k-hat cannot see a collapse**: it is a
# fault of what was learnt, not of the guide. Had all eight collapsed, k-hat would be perfect.
#
# The usual cure is to let the weight of the KL grow from 0 to 1 in the first half of the training (*Ladder Variational
# Autoencoders*, Sonderby et al., 2016, https://arxiv.org/abs/1602.02282). `free_bits` is another.

# %%
torch.manual_seed(0)
model = make_model()
loss = annealed(linear(0.0, 1.0, end=0.5), importance())
second = fit_and_listen(model, x, guide=make_guide(MeanField), method=svi(loss=loss, **train), batch_size=64)
print(", ".join(latent_summary(second, rows=200, draws=50).kinds.names))
measure("first", first)
measure("KL annealed", second)

# %% [markdown]
# The model is better by several nats a row, and all dimensions are in use. The posterior is no better, and the
# warning is still there: the gap and k-hat are about what they were. There is more now that a guide can be wrong
# about.
#
# ## Finding 2: the encoder is far from its family's best
#
# The gap from the ELBO to log p(x) has two parts. The *approximation gap* is what the best distribution of the guide's
# family leaves; the *amortisation gap* is what the encoder loses by giving each row another one than that.
# `amortisation_gap` tells them apart: it refines the distribution of each row by itself, by gradient ascent.

# %%
print(amortisation_gap(second, some, rows=20, steps=150, draws=1000))

# %% [markdown]
# Most of it is the encoder's, so a richer family alone would help little. What helps is a larger encoder, more rows,
# or longer training with a falling learning rate; or, with no training at all, `SemiAmortized`, which refines the
# encoder's answer for each row when it is asked, by some steps of gradient ascent. The decoder is held still from
# here on, so that log p(x) is the same for all that follows, and only guides differ.

# %%
model.requires_grad_(False)


def refined(posterior):
    return posterior.with_guide(SemiAmortized(model, posterior.guide, steps=30, lr=0.05, particles=8))


second_refined = refined(second)
measure("mean-field", second)
measure("mean-field, refined", second_refined)

# %% [markdown]
# Refining has closed more than two thirds of the gap, about what `amortisation_gap` had announced.
#
# ## Finding 3: what is left is the family's
#
# A mean-field guide has no correlations between the latents of a row, and `FullRank` has. Only the guide is trained
# now, with a learning rate that falls.

# %%
torch.manual_seed(0)
method = svi(lr=5e-3, epochs=30, schedule="cosine")
third = fit_and_listen(model, x, guide=make_guide(FullRank), method=method, batch_size=64)
gaps = amortisation_gap(third, some, rows=20, steps=150, draws=1000)
print(f"amortisation gap {gaps.amortisation.mean():.2f} nats, approximation gap {gaps.approximation.mean():.2f} nats")
third_refined = refined(third)
measure("full rank", third)
measure("full rank, refined", third_refined)

# %% [markdown]
# The approximation gap is about a third of what it was, and by itself that is worth little, since the amortisation gap
# is still there: the warning may well come back. With both cured, the gap is about a sixth of that of the mean-field
# guide, and k-hat is above 0.7 in few rows.
#
# ## Is it calibrated?
#
# k-hat and gaps look at weights. Simulation-based calibration asks another question: where the model makes a latent and
# then a row, how does the true latent rank among the guide's draws? If the draws are the posterior's, all ranks are
# equally likely, and the curves below stay within the band.

# %% mystnb={"image": {"alt": "Two panels of rank curves less uniform, over the rank. Above, for the mean-field guide, the curves leave the grey band by far; below, for the refined full-rank guide, they stay within or near it."}}
before, after = (simulation_based_calibration(p, 200, 50) for p in (second, third_refined))
figure, (above, below) = plt.subplots(2, 1, figsize=(6, 6), layout="constrained", sharey=True)
plots.rank_ecdf(before, ["z", "log p(x, z)"], most=5, axes=above).set_title("KL annealed, mean-field", loc="left")
plots.rank_ecdf(after, ["z", "log p(x, z)"], most=5, axes=below).set_title("full rank, refined", loc="left")
print(before)
print(after)

# %% [markdown]
# The mean-field guide fails for every latent: curves on one side of zero are of draws that are too low or too high,
# and ranks in the shape of a U are of draws that are too narrow. Of the refined guide no fault is found with these
# 200 rows. The rows are of the model's own making, though; real ones may be harder.
#
# ## Against long chains
#
# The last word on a row has a sampler that needs no guide. `reference` runs NUTS on p(z | x) of chosen rows with the
# model as it was learnt. Here those are the two rows of the hundred that are worst for the mean-field guide.

# %%
with torch.no_grad():
    worst = pareto_k(log_weights(model, second.guide, some, particles=300)[0]).topk(2).indices.sort().values
chains = reference(second, some, rows=worst, draws=400, warmup=200, chains=4, progress=False)
print("The chains are", chains.report().verdict)
for name, posterior in {"mean-field": second, "full rank, refined": third_refined}.items():
    print(compare(posterior, chains, draws=500, classify=False, names=(name, "NUTS")), "\n")

# %% [markdown]
# The mean-field guide is too narrow in many numbers and off by a standard deviation in some. The refined one is
# within a fraction of a standard deviation of NUTS everywhere, as the picture of one of the rows shows.

# %% mystnb={"image": {"alt": "Intervals of the eight latents of one image under the mean-field guide, the refined full-rank guide and NUTS. The refined guide lies over NUTS; the mean-field guide is shifted in several dimensions."}}
row = some[worst[:1]]
draws = {
    "mean-field": second.sample(500, row)["z"][:, 0],
    "full rank, refined": third_refined.sample(500, row)["z"][:, 0],
    "NUTS": chains.sample()["z"][:, 0],
}
axes = plots.intervals({name: {"z": z} for name, z in draws.items()})
axes.set_xlabel("latent of one image: median, 90% and 50% intervals")
axes.figure.set_size_inches(6, 6.5)

# %% [markdown]
# ## Log p(x) without the guide's help
#
# All gaps above rest on an estimate of log p(x) that the guide itself gave. Annealed importance sampling moves chains
# along a path of densities from the prior to the posterior, so that it does not matter how poor the guide is.

# %%
found = annealed_importance_sampling(second, some, rows=10, chains=8, temperatures=100, start="prior")
print(f"annealed importance sampling    {found.log_evidence.mean():.2f} nats a row, from the prior")
for name, posterior, particles in (
    ("mean-field, one draw", second, 1),
    ("mean-field, 1000 draws", second, 1000),
    ("full rank, refined, 1000 draws", third_refined, 1000),
):
    print(f"{name:<31} {posterior.log_evidence(some[found.index], particles).mean():.2f}")

# %% [markdown]
# The three that take more than one draw agree within a few tenths of a nat, so the estimates that the gaps rest on
# were sound to that extent. Each is a lower bound on average, and the largest is the best. With one draw the
# mean-field guide is far below: the mean of that is its ELBO. Had annealing come out above the rest by nats, the
# guides would have missed a part of the posterior, which weights cannot show.

# %% [markdown]
# ## The same for chains
#
# Chains have no guide and no weights; what is looked at is whether they agree (R-hat), how much their draws are worth
# (effective sample size, ESS), and whether the sampler went where it should (divergences, E-BFMI). The model is
# Neal's funnel: the log-variance v of nine numbers is itself unknown, as in any hierarchy with few data for each group.
# Nothing is observed, so that the truth is known: v has mean 0 and standard deviation 3.
#
# `centred` is a dial between two ways to write the same model. At 1 the sampler moves in the numbers themselves, at 0
# in the numbers over their scale. As a tensor in the data it leaves the program as it is, so that the second fit does
# not have to be compiled again.


# %%
def funnel(centred):
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("entries", 9):
        own = pyro.sample("own", dist.Normal(0.0, (centred * v / 2).exp()))
        pyro.deterministic("x", own * ((1 - centred) * v / 2).exp())


sampler = nuts(draws=400, warmup=300, chains=4)
centred = fit_and_listen(funnel, {"centred": torch.tensor(1.0)}, method=sampler)

# %%
print(centred.report())

# %% mystnb={"image": {"alt": "Draws of v against the first of the nine numbers, in the shape of a funnel whose narrow neck at the lower end is cut off."}}
axes = plots.pair(centred, ["own[0]", "v"])

# %% [markdown]
# The neck of the funnel is missing. Its curvature is too high for a step that suits the rest: trajectories diverge
# there or turn back, and the chains creep along v, which is what the low effective sample size and E-BFMI say. There
# are few divergences, and R-hat alone could be taken for chains that are merely short. More draws would be slow to
# mend this; other coordinates mend it at once.

# %%
other = fit_and_listen(funnel, {"centred": torch.tensor(0.0)}, method=sampler)
print(other.report())
for name, posterior in {"centred": centred, "non-centred": other}.items():
    v = posterior.draws["v"]
    print(f"{name:<12} sd of v {v.std():.2f} (truth 3.00), below -6 in {(v < -6).float().mean():.1%} (truth 2.3%)")

# %% [markdown]
# The non-centred chains find the right standard deviation and the right share of draws in the neck; the centred ones
# had none there. Which way is better depends on the data: where each group has many, it is the centred one.
#
# ## In short
#
# | what is seen | where to look | what it may be | cure |
# |---|---|---|---|
# | a warning | `posterior.report()` | | |
# | k-hat above 0.7 in many rows | `amortisation_gap` | the encoder | longer training, larger encoder, `SemiAmortized` |
# | | | the family | `FullRank`, `Mixture`, `Flow` |
# | k-hat is good, the model is not | `latent_summary`, `kinds`, `collapsed` | collapse | `annealed`, `free_bits`, another decoder |
# | all seems good | `simulation_based_calibration`, `reference` and `compare` | what weights cannot see | as above, or `nuts` |
# | log p(x) is in doubt | `annealed_importance_sampling`, `bidirectional` | too few draws | more draws, a nearer guide |
# | divergences, low ESS, R-hat above 1.01 | `plots.pair`, `plots.trace` | curvature that varies | reparameterise, raise `target_accept` |
#
# A verdict of this kind is about the posterior of the model that was written. Whether the model fits the data is
# another question, for `predictive_check` and `loo`.
#
# ## Where to go next
#
# - [Choosing a guide](choosing_a_guide.py): families side by side.
# - [Choosing an objective](choosing_an_objective.py): what the bound does to the model and to the guide.
# - [Eight schools](eight_schools.py): chains and guides on a hierarchy with data.
