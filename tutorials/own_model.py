# %% [markdown]
# # Write your own model: counts with missing values
#
# A table of counts with gaps in it: how often each species was seen at each site, say. You will write a model for it
# as a Pyro module, fit it to a data frame as it is, and check it three ways: are the parameters of simulated data
# found again, are missing counts filled in better than by means, and do data that the model makes look like those
# observed? The same model then meets real counts, where a check fails and says what to change.
#
# Runs in about half a minute on a laptop.

# %%
import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from sklearn.impute import KNNImputer
from torch import nn

from pyro_ae import batch_plate, datasets, diagnostics, fit, importance, iwae, observe, svi
from pyro_ae.diagnostics import plots
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.full_rank import FullRank
from pyro_ae.nn import MLP

# %% [markdown]
# ## The model
#
# Each site has a few factors `z`. Each species has a loading on each factor, and an offset; together they give the log
# of the expected count. Three things make this a model for `fit`:
#
# - rows sit in `batch_plate`, the plate of the rows, so that minibatches are scaled to all of them;
# - counts are one event a row (`.to_event(1)`);
# - `observe` in place of `pyro.sample(..., obs=x)` leaves out what is missing (NaN), and samples where `x` is None.
#
# Called with `x` the model observes it, and called with `size` it makes new rows. Loadings and offsets are parameters,
# fitted by maximum likelihood; factors are latent.


# %%
class Factors(nn.Module):
    def __init__(self, offset, latent):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(len(offset), latent))
        self.offset = nn.Parameter(offset.clone())

    def counts(self, eta):
        return dist.Poisson(eta.exp())

    def forward(self, x=None, *, size=1):
        with batch_plate(x, size):
            z = pyro.sample("z", dist.Normal(self.weight.new_zeros(self.weight.shape[1]), 1.0).to_event(1))
            return observe("x", self.counts(z @ self.weight.T + self.offset).to_event(1), x)


# %% [markdown]
# ## Data whose truth is known
#
# A model makes its own test data. Here are 1000 sites and 12 species, of whose counts a fifth is removed at random. In
# a data frame a gap is NaN, and `fit` takes the data frame.

# %%
torch.manual_seed(0)
angle = torch.linspace(0.0, 3.0, 12)
truth = Factors(torch.tensor([0.5, 1.0, 1.5]).repeat(4), latent=2)
truth.weight.data = 0.6 * torch.stack([angle.cos(), angle.sin()], 1)
run = pyro.poutine.trace(truth).get_trace(size=1000)  # keeps the factors as well
factors, complete = run.nodes["z"]["value"].detach(), run.nodes["x"]["value"].detach()
gone = torch.rand_like(complete) < 0.2

sites = [f"site {n}" for n in range(1000)]
species = [f"species {n}" for n in range(12)]
frame = pd.DataFrame(complete.numpy(), index=sites, columns=species).mask(gone.numpy())
frame.iloc[:5, :6]

# %% [markdown]
# ## The guide
#
# The encoder has to know what is missing: a gap is filled with a zero before the network sees it, and a zero is a
# count too. `MLP(..., missing=True)` takes the mask beside the values. `inputs` takes the logarithm first, so that one
# large count does not drown the others.


# %%
def encoder(features, latent, missing=True):
    network = MLP(features, [64], missing=missing)
    return Amortized(network, FullRank(64, latent), inputs=lambda x: x.log1p())


offset = torch.tensor(frame.mean().to_numpy()).float().log()  # means of what is there: a start, not an answer
method = svi(loss=importance(iwae, particles=8), lr=1e-2, steps=800, schedule="cosine")
options = dict(batch_size=200, seed=0, progress=False, check=False)

# %% [markdown]
# Forget it, and the error says so.

# %%
try:
    fit(Factors(offset, 2), frame, guide=encoder(12, 2, missing=False), method=method, **options)
except ValueError as error:
    print(error)

# %%
torch.manual_seed(0)
model, guide = Factors(offset, latent=2), encoder(12, 2)
posterior = fit(model, frame, guide=guide, method=method, **options)
posterior

# %% [markdown]
# ## First check: are the parameters found again?
#
# Factors can be rotated without any change to the counts, so loadings can be compared after the best rotation alone.

# %% mystnb={"image": {"alt": "Two scatter plots of fitted against true parameters, loadings on the left and offsets on the right: all points lie near the diagonal."}}
u, _, v = torch.linalg.svd(model.weight.detach().T @ truth.weight.detach())
pairs = {"loading": (truth.weight, model.weight @ (u @ v)), "offset": (truth.offset, model.offset)}
figure, panels = plt.subplots(1, 2, figsize=(6, 3.2), layout="constrained")
for axes, (name, (true, found)) in zip(panels, pairs.items(), strict=True):
    true, found = true.detach(), found.detach()
    axes.axline((0, 0), slope=1, color="#BBBBBB", linestyle="--")
    axes.scatter(true, found, color="#0072B2", s=18)
    axes.set(xlabel=f"true {name} (log count)", ylabel=f"fitted {name}")
    print(f"{name}: mean absolute error {(true - found).abs().mean():.3f}, largest {(true - found).abs().max():.3f}")

# %% [markdown]
# ## Second check: the gaps
#
# `reconstruct` gives the expected count of every entry, those that are missing too, by what the row has. The counts
# that were removed are known here. A baseline is needed to say whether the errors are small: the mean of the species,
# that of the site, and their product over the overall mean, which is what independence of the two would give. And as
# counts are random, no error can be zero: the true expected counts have the smallest that there can be, on average.


# %%
def errors(complete, gone, filled):
    off = (filled - complete)[gone]
    return {"mean absolute": off.abs().mean().item(), "root mean square": off.square().mean().sqrt().item()}


def baselines(seen):
    column, row = seen.nanmean(0).expand_as(seen), seen.nanmean(1, keepdim=True).expand_as(seen)
    return {"column mean": column, "row mean": row, "row x column": row * column / seen.nanmean()}


torch.manual_seed(0)
seen = torch.tensor(frame.to_numpy()).float()
filled = baselines(seen) | {"this model": posterior.reconstruct(frame, draws=50)}
filled["true expected counts"] = (factors @ truth.weight.T + truth.offset).exp().detach()
pd.DataFrame({name: errors(complete, gone, value) for name, value in filled.items()}).T.round(2)

# %% [markdown]
# What is left of the way from the means to the truth is what the other counts of a site do not say about its factors.
# A number is not all that is known of a gap. `predict` draws counts for every entry, and the 90% intervals should hold
# at least 90% of the counts that were removed: at least, as counts are whole numbers.


# %%
def covered(posterior, seen, complete, gone, draws=200):
    low, high = posterior.predict(seen, draws)["x"].quantile(torch.tensor([0.05, 0.95]), dim=0)
    return ((low <= complete) & (complete <= high))[gone].float().mean().item()


print(f"{covered(posterior, seen, complete, gone):.1%} of the removed counts lie in their 90% interval")

# %% [markdown]
# The result goes back to where it came from, with the labels that it had.

# %%
expected = pd.DataFrame(filled["this model"].numpy(), index=frame.index, columns=frame.columns)
frame.fillna(expected).iloc[:5, :6].round(1)

# %% [markdown]
# ## Third check: data that the model makes
#
# `predictive_check` draws whole tables from the fitted model, leaves out what is missing in the data, and asks whether
# statistics of the data are where those of the tables are. A small p-value is bad news. The report is on the guide.

# %%
print(diagnostics.predictive_check(posterior, draws=200))
report = posterior.report()
print("\nverdict:", report.verdict)
print("\n".join(f"  - {reason}" for reason in report.reasons))

# %% [markdown]
# ## Real counts
#
# Simulated data cannot show that a model is wrong. The digits of scikit-learn can: each of their 64 values is a count,
# of the inked pixels in a block of 4 x 4, from 0 to 16. A quarter is removed at random.

# %%
torch.manual_seed(0)
digits = datasets.load("digits")
complete, test = (part["x"].flatten(1) * 16 for part in (digits.train, digits.test))
gone = torch.rand_like(complete) < 0.25
seen = complete.masked_fill(gone, float("nan"))
mean = seen.nanmean(0).clamp(0.05, 15.95)  # some blocks never have ink
method = svi(loss=importance(iwae, particles=4), lr=1e-2, epochs=25, schedule="cosine")
options["batch_size"] = 128


def fit_digits(model):
    return fit(model, seen, guide=encoder(64, 8), method=method, **options)


poisson = fit_digits(Factors(mean.log(), latent=8))
print(diagnostics.predictive_check(poisson, draws=100))

# %% [markdown]
# The check fails at once. A block has 16 pixels, and a Poisson count has no such limit: the largest that the model
# makes is far above. The likelihood has to change, which is one method of the class, with the logit in place of the
# log.


# %%
class BinomialFactors(Factors):
    def counts(self, eta):
        return dist.Binomial(16, logits=eta)


binomial = fit_digits(BinomialFactors((mean / (16 - mean)).log(), latent=8))
print(diagnostics.predictive_check(binomial, draws=100))

# %% [markdown]
# The largest count is right now. The data still have more zeros than the model makes, and a larger standard deviation:
# a binomial takes the 16 pixels of a block to be independent, and a stroke hits or misses most of them together. A
# beta-binomial has a parameter for that, here one for each block.


# %%
class BetaBinomialFactors(BinomialFactors):
    def __init__(self, offset, latent):
        super().__init__(offset, latent)
        self.log_precision = nn.Parameter(torch.full_like(offset, 2.0))

    def counts(self, eta):
        mean, precision = eta.sigmoid(), self.log_precision.exp()
        return dist.BetaBinomial(mean * precision + 1e-4, (1 - mean) * precision + 1e-4, 16)


beta = fit_digits(BetaBinomialFactors((mean / (16 - mean)).log(), latent=8))
print(diagnostics.predictive_check(beta, draws=100))

# %% [markdown]
# Nearer, and still not right: with some 60,000 counts the check sees what is small. Here are the three likelihoods on
# the gaps, beside the baselines, of which one is strong: the mean of the five images that are nearest. The last two
# columns, which the baselines do not have, are the share of the removed counts in their 90% interval, and log p of
# what is left of 100 test images, in nats an image, from below.

# %%
torch.manual_seed(0)
neighbours = torch.tensor(KNNImputer(n_neighbors=5, keep_empty_features=True).fit_transform(seen.numpy())).float()
fits = {"Poisson": poisson, "binomial": binomial, "beta-binomial": beta}
filled = {name: fitted.reconstruct(seen, draws=20) for name, fitted in fits.items()}
compared = baselines(seen) | {"5 neighbours": neighbours} | filled
table = pd.DataFrame({name: errors(complete, gone, value) for name, value in compared.items()}).T
test_seen = test[:100].masked_fill(torch.rand(100, 64) < 0.25, float("nan"))
for name, fitted in fits.items():
    table.loc[name, "covered"] = covered(fitted, seen, complete, gone, draws=100)
    table.loc[name, "log p"] = fitted.log_evidence(test_seen, particles=500).mean().item()
table.round(2)

# %% mystnb={"image": {"alt": "Ten digits in three rows: with a quarter of the blocks missing, filled in by the model, and complete. The filled digits can be read."}}
some = torch.stack([(digits.train["y"] == d).nonzero()[0, 0] for d in range(10)])
bands = {"seen": seen, "filled": torch.where(gone, filled["binomial"], seen), "complete": complete}
axes = plots.images(*(band[some].view(-1, 8, 8) / 16 for band in bands.values()), names=list(bands))

# %% [markdown]
# The guide has to be asked about as well. Here are the reasons for the beta-binomial.

# %%
report = beta.report(test_seen[:50])
print(report.verdict)
print("\n".join(f"  - {reason}" for reason in report.reasons))

# %% [markdown]
# As in the [quickstart](quickstart.py) the encoder is what is wrong, and `SemiAmortized` is what to try there. The
# bounds in the table are too low by a part of these gaps, which is little beside what the likelihoods differ by.
#
# ## What to conclude
#
# - All three fill gaps better than the means of rows and columns do. The nearest neighbours do it better still:
#   eight linear factors are not a good model of digits, and a network in place of the loadings would be the next thing
#   to try. What neighbours do not give is how sure one can be.
# - By the error alone the binomial would be the best of the three. By the probability that it gives to new images the
#   beta-binomial is, by far, and its intervals are wide enough. Choose by what you need.
# - Leaving gaps out is right where they come about at random given what is there. A count that is missing because it
#   was large needs a model of that.
#
# ## Where to go next
#
# - [A variational autoencoder, and whether to trust it](quickstart.py): a network in place of the loadings.
# - [Choosing an objective](choosing_an_objective.py): what the bound does to the parameters.
# - [A Pyro model as it stands](from_pyro.py): models that were there before.
