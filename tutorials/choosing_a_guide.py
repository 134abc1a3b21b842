# %% [markdown]
# # Choosing a guide: from mean-field to flows
#
# A guide is a family of distributions and, for latents of rows, an encoder that picks one of them for each row. This
# page fits four families to a posterior that is known and is not normal, looks at what each gets wrong, tells the
# encoder's fault from the family's, and does the same for latents that all rows share. It ends with what to try in
# which order.
#
# Runs in about 40 seconds on a laptop.

# %%
import time
from functools import partial

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_ae import batch_plate, diagnostics, elbo, fit, importance, iwae, log_weights, observe, svi
from pyro_ae.density import log_joint
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.flow import Flow
from pyro_ae.guides.full_rank import FullRank
from pyro_ae.guides.importance_weighted import ImportanceWeighted
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.guides.mixture import Mixture
from pyro_ae.guides.shared import Shared
from pyro_ae.nn import MLP

# %% [markdown]
# ## A posterior whose truth is known
#
# Two latents of each row are standard normal, and only z2 + z1^2 is seen, with noise. So the posterior of a row lies
# along a parabola: bent for a small x, and with two arms for a large one. With two latents the evidence is a sum over
# a grid, which is as good as exact.


# %%
def bent(x=None, *, size=1):
    with batch_plate(x, size):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        return observe("x", dist.Normal((z[..., 1] + z[..., 0] ** 2).unsqueeze(-1), 0.4).to_event(1), x)


points = torch.linspace(-5, 5, 201)
grid = torch.cartesian_prod(points, points)


@torch.no_grad()
def on_the_grid(x):
    """log p(x, z) of each row at each point, [points, rows]."""
    with pyro.plate("grid", len(grid), dim=-2):
        return log_joint(bent, {"z": grid.unsqueeze(1).expand(-1, len(x), -1)}, x)


torch.manual_seed(0)
x = bent(size=100)
joint = torch.cat([on_the_grid(part) for part in x.split(20)], 1)
evidence = joint.logsumexp(0) + 2 * (points[1] - points[0]).log()
print(f"log p(x): {evidence.mean():.3f} nats a row")

# %% [markdown]
# ## Four families behind the same encoder
#
# All have the same encoder, the same objective and the same number of steps, so only the head differs. Three numbers
# judge a guide: the gap log p(x) - ELBO, which is KL(q || p); the k-hat of each row's importance weights, of which one
# over 0.7 means that no practical number of draws makes up for the guide; and the error of the evidence by 1000
# weighted draws, which shows whether the guide's draws reach all of the posterior.

# %%
STEPS = 300


def fitted(head, encoder=None, loss=None, steps=STEPS):
    torch.manual_seed(0)
    guide = Amortized(encoder or MLP(1, [64, 64]), head(64, 2))
    method = svi(loss=loss or importance(elbo, 4), lr=1e-2, schedule="cosine", steps=steps)
    return fit(bent, x, guide=guide, method=method, seed=0, progress=False, check=False)


@torch.no_grad()
def judged(posterior):
    log_w, _ = log_weights(posterior.model, posterior.guide, x, particles=1000)
    k_hat = diagnostics.pareto_k(log_w)
    gap, error = evidence - log_w.mean(0), evidence - iwae(log_w)
    return float(gap.mean()), float(error.mean()), float(k_hat.median()), float((k_hat > 0.7).float().mean())


heads = {
    "MeanField": MeanField,
    "FullRank": FullRank,
    "Mixture of 4": partial(Mixture, components=4),
    "Flow, NSF": partial(Flow, flow="NSF", transforms=2, hidden_features=(64,)),
}
fitted(MeanField, steps=5)  # so that the first row does not pay for what is loaded once
posteriors, found = {}, {}
for name, head in heads.items():
    start = time.perf_counter()
    posteriors[name] = fitted(head)
    milliseconds = 1e3 * (time.perf_counter() - start) / STEPS
    found[name] = (*judged(posteriors[name]), milliseconds)


def show(names):
    print(f"{'':<26}{'gap, nats':>10}{'error':>8}{'k-hat':>8}{'> 0.7':>7}{'ms a step':>11}")
    for name in names:
        gap, error, k_hat, heavy, ms = found[name]
        print(f"{name:<26}{gap:10.3f}{error:8.3f}{k_hat:8.2f}{heavy:7.0%}{ms:11.1f}")


show(heads)

# %% [markdown]
# The gap falls from family to family. A normal, with correlations or without, leaves half a nat or more, and for about
# half of the rows or more no number of draws would make up for it. A mixture spends its components on the two arms,
# and how well depends on where they begin. The spline flow bends. Time goes the other way. The error shows what k-hat
# cannot: where no draw falls into one of two arms, no weight is large, and the evidence comes out too low.
#
# ## Resampling: a richer distribution without a richer family
#
# Draw 20 times from a mean-field guide, weigh the draws by the model, and keep one by its weight. That is a
# distribution, `ImportanceWeighted`, whose ELBO is the IWAE bound of 20 draws, and it can be wrapped around a guide
# after the fit. It can only choose among what the guide draws, though, so it matters how that guide was trained.

# %%
start = time.perf_counter()
wide = fitted(MeanField, loss=importance(iwae, 20))
milliseconds = 1e3 * (time.perf_counter() - start) / STEPS


def resampled(posterior):
    return posterior.with_guide(ImportanceWeighted(posterior.model, posterior.guide, 20))


posteriors["MeanField by IWAE"] = wide
posteriors["  the same, resampled"] = resampled(wide)
found["MeanField, resampled"] = (*judged(resampled(posteriors["MeanField"])), found["MeanField"][-1])
found["MeanField by IWAE"] = (*judged(wide), milliseconds)
found["  the same, resampled"] = (*judged(resampled(wide)), milliseconds)
show(["MeanField", "MeanField, resampled", "MeanField by IWAE", "  the same, resampled"])

# %% [markdown]
# Trained by the ELBO, the guide sits in one arm and is narrow, and resampling helps a little: what is never drawn is
# never chosen. Trained by IWAE of 20 draws, the guide itself is a poor fit by its own ELBO, as it spreads over both
# arms, and the resampled draws are near the posterior. The price is 20 runs of the model for a draw.
#
# ## Look at one row
#
# In blue the true posterior of the row whose x is nearest to 2, in orange 300 draws of each guide.

# %% mystnb={"image": {"alt": "Six panels with the true posterior density of one row, an arch with two heavy arms, and draws of six guides over it. Mean-field covers a part of one arm by an upright ellipse, and full-rank one arm by a tilted one. The mixture covers both arms unevenly in pieces, and the spline flow follows the arch. The guide that was trained by IWAE is a wide cloud over all of the arch, and its resampled draws follow the arch."}}
i = int((x[:, 0] - 2).abs().argmin())
density = (joint[:, i] - evidence[i]).exp().reshape(201, 201).T
figure, axes = plt.subplots(2, 3, figsize=(6, 4.4), layout="constrained", sharex=True, sharey=True)
torch.manual_seed(0)
for ax, (name, posterior) in zip(axes.flat, posteriors.items(), strict=True):
    z = posterior.sample(300, x[i : i + 1])["z"][:, 0]
    ax.contourf(points, points, density, levels=8, cmap="Blues")
    ax.scatter(*z.T, s=3, color="#D55E00", linewidths=0)
    ax.set_title(name.strip(), fontsize="medium")
    ax.set(xlim=(-3, 3), ylim=(-3, 3))
figure.supxlabel("z1")
_ = figure.supylabel("z2")

# %% [markdown]
# The two normals take one arm each, and which one is chance: the ELBO punishes draws where the posterior is small, and
# not what is left out. The mixture has both arms in uneven shares, and the flow follows the arch. The guide of IWAE is
# as wide as the arch, most of its draws are wasted, and those that are resampled are right.
#
# ## The encoder's fault, or the family's?
#
# A gap has two parts. Refine each row's distribution by itself, from where the encoder put it: what is gained was the
# encoder's fault, and what is left is the family's. Here are the full-rank head behind a linear encoder and behind the
# one from above, and the spline flow.

# %%
some = torch.arange(0, 100, 5)
judges = {
    "FullRank, linear encoder": fitted(FullRank, encoder=nn.Linear(1, 64)),
    "FullRank": posteriors["FullRank"],
    "Flow, NSF": posteriors["Flow, NSF"],
}
gaps = {
    name: diagnostics.amortisation_gap(posterior, rows=some, steps=60, log_evidence=evidence[some])
    for name, posterior in judges.items()
}
print(gaps["FullRank, linear encoder"])

# %% mystnb={"image": {"alt": "Bars of the gap in nats for three guides, split into the encoder's part and the family's part. Full-rank behind a linear encoder has a large part of either kind, full-rank behind the deeper encoder has the family's part alone, and the spline flow has little of either."}}
figure, axes = plt.subplots(figsize=(6, 2.8), layout="constrained")
family, encoder = (
    [float(getattr(g, part).mean()) for g in gaps.values()] for part in ("approximation", "amortisation")
)
labels = [name.replace(", linear", ",\nlinear") for name in gaps]
axes.barh(labels, family, color="#0072B2", label="family (approximation)")
axes.barh(labels, encoder, left=family, color="#E69F00", hatch="//", label="encoder (amortisation)")
axes.invert_yaxis()
axes.set_xlabel("log p(x) - ELBO, nats a row")
_ = axes.legend()

# %% [markdown]
# The linear encoder asks for a better encoder or longer training; a richer head would not mend it. Behind the deeper
# one nearly all of the gap is the family's, and only another family helps. Refining is local: what its steps do not
# reach, such as the other arm, is booked on the family, so that part is the larger behind the linear encoder.
#
# Without `log_evidence` the evidence is an importance-weighted estimate. It is too low where the guide misses an arm,
# and the gap then looks smaller than it is:

# %%
unaided = diagnostics.amortisation_gap(posteriors["MeanField"], rows=some, steps=60)
true = evidence[some] - unaided.elbo
print(f"MeanField: gap {unaided.total.mean():.3f} by its own draws, {true.mean():.3f} by the grid")

# %% [markdown]
# `diagnostics.annealed_importance_sampling` estimates the evidence without leaning on the guide, where there is no
# grid.
#
# ## Latents that all rows share
#
# `Shared` puts any head on all of a model's shared latents, in unconstrained space. The eight schools are the usual
# example: the effects theta are drawn around mu with spread tau. Given mu and tau the effects integrate out, so that
# the evidence and the posterior of tau are sums over a grid as well. The model can be written in two ways.

# %%
data = {
    "y": torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]),
    "sigma": torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18]),
}


def centred(y, sigma):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def non_centred(y, sigma):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


means, log_taus = torch.linspace(-25, 30, 276)[:, None, None], torch.linspace(-10, 6, 321)[:, None]
taus = log_taus.exp()
prior = dist.Normal(0.0, 5.0).log_prob(means) + dist.HalfCauchy(5.0).log_prob(taus) + log_taus
likelihood = dist.Normal(means, (taus**2 + data["sigma"] ** 2).sqrt()).log_prob(data["y"]).sum(-1)
cells = prior[..., 0] + likelihood  # [mu, log tau]
log_p = float(cells.logsumexp((0, 1)) + torch.tensor(0.2 * 0.05).log())
of_tau = (cells.logsumexp(0) - cells.logsumexp((0, 1))).exp() / 0.05  # density of log tau

# %%
tries = {
    "centred, MeanField": (centred, MeanField),
    "centred, FullRank": (centred, FullRank),
    "centred, Flow": (centred, partial(Flow, flow="NSF", transforms=1, hidden_features=(64,))),
    "non-centred, MeanField": (non_centred, MeanField),
}
spreads = {}
print(f"{'':<24}{'gap, nats':>10}{'error':>8}{'k-hat':>8}{'ms a step':>11}")
for name, (model, head) in tries.items():
    torch.manual_seed(0)
    method = svi(loss=importance(elbo, 4), lr=3e-2, schedule="cosine", steps=300)
    start = time.perf_counter()
    found = fit(model, data, guide=Shared(model, head), method=method, seed=0, progress=False, check=False)
    milliseconds = 1e3 * (time.perf_counter() - start) / 300
    with torch.no_grad():
        log_w, _ = log_weights(found.model, found.guide, data, particles=4000)
    spreads[name] = found.sample(4000)["tau"].log()
    gap, error, k_hat = log_p - log_w.mean(), log_p - iwae(log_w), diagnostics.pareto_k(log_w)
    print(f"{name:<24}{gap:10.2f}{error:8.2f}{k_hat:8.2f}{milliseconds:11.1f}")

# %% mystnb={"image": {"alt": "Densities of log tau of the eight schools. The exact one is broad with a long tail to small tau. Mean-field, full-rank and the flow on the centred model are all narrow peaks on its right side, the flow the broadest of them, and mean-field on the non-centred model covers most of it."}}
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.fill_between(log_taus[:, 0], of_tau, color="0.85", label="exact")
styles = [("#000000", ":"), ("#0072B2", "--"), ("#D55E00", "-."), ("#009E73", "-")]
for (name, values), (colour, style) in zip(spreads.items(), styles, strict=True):
    height, edges = torch.histogram(values, 60, range=(-4.0, 5.0), density=True)
    axes.plot((edges[1:] + edges[:-1]) / 2, height, color=colour, linestyle=style, label=name)
axes.set(xlabel="log tau", ylabel="density", xlim=(-4, 5))
_ = axes.legend(fontsize="small")

# %% [markdown]
# In the centred model the spread of theta depends on tau, a funnel. A normal cannot follow that, so it stays in the
# wide part, and the posterior of tau comes out far too narrow. Correlations help a little and a flow helps more, at a
# higher price, and none of them is near after this short training, nor the same from seed to seed. Writing the model
# differently gains more than any of these families: non-centred, the latents are nearly independent and nearly normal,
# and mean-field leaves a few tenths of a nat. What it misses is the long tail to small tau. With so few latents,
# `method="nuts"` takes seconds and needs no family.
#
# ## What to try, in which order
#
# | step | try | it costs | when |
# |---|---|---|---|
# | 1 | `MeanField`, then `posterior.report(x)` | the least | always first; on simple posteriors it is enough |
# | 2 | `diagnostics.amortisation_gap` | a short training on some rows | k-hat is large: whose fault is it? |
# | 3 | a deeper encoder, more steps | a little | the encoder's part is large |
# | 4 | another way to write the model | thought | funnels, scales, latents that are correlated by construction |
# | 5 | `importance(iwae, 20)`, then `ImportanceWeighted` | 20 runs of the model for a draw | the model is cheap, the latents are few |
# | 6 | `FullRank` or `LowRank` | about mean-field's, for few latents | correlated, of one mode |
# | 7 | `Flow(flow="NSF")`, `Flow(flow="MAF")`, `Planar` | a few times mean-field | bent; several modes ask for splines |
# | 8 | `Mixture` | a few times mean-field | a few separate modes |
# | 9 | `nuts`, or `reference` for some rows | minutes | few shared latents, or to check all of the above |
#
# Costs depend on the model: where the decoder is large, the head hardly counts, and draws do. For all families on
# three posteriors, with longer training, see the [benchmark of guides](../tests/benchmarks/README.md#guides).
#
# ## Where to go next
#
# - [Choosing an objective](choosing_an_objective.py): what trains the guide, and why IWAE makes it wide.
# - [Diagnosing a posterior](diagnosing.py): reports, k-hat and calibration.
# - [Eight schools](eight_schools.py): the same data by NUTS and by variational inference.
