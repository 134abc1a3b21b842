"""The first thing to run: a variational autoencoder of small images of digits, and a page about what came of it."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from . import datasets
from .bounds import iwae
from .cite import cite
from .density import log_weights
from .diagnostics import page, plots
from .engines.svi import svi
from .fit import fit
from .guides.amortized import Amortized
from .guides.full_rank import FullRank
from .guides.semi_amortized import SemiAmortized
from .losses import importance
from .models.vae import VAE
from .nn import MLP
from .posterior import Posterior
from .runtime import find_device, seeded

if TYPE_CHECKING:
    from .diagnostics.report import Report

LEVELS = 16
"""Pixels are whole numbers from 0 to this."""

LATENT, HIDDEN, EPOCHS, PARTICLES = 16, 256, 120, 16

REFINE, REFINED = 200, 50
"""Steps of gradient ascent on the code of a test image, and how many images have theirs refined."""


def likelihood(logits: Tensor) -> Distribution:
    """Grey levels 0 to 16 of each pixel: binomial, so that every level has its own probability.

    Arguments:
        logits: ``[*, 8, 8]``.
    """
    return dist.Binomial(LEVELS, logits=logits).to_event(2)


def _scaled(x: Tensor) -> Tensor:
    return x / LEVELS


def build(latent: int = LATENT) -> tuple[VAE, Amortized]:
    """The quickstart's model and guide, untrained; ``Posterior.load`` fills in what was learnt.

    Arguments:
        latent: size of the code of an image.

    Example:
        >>> model, guide = build()
        >>> model.latent
        16
    """
    if latent < 1:
        raise ValueError(f"the code of an image needs one dim at least, got latent={latent}")
    model = VAE(MLP(latent, [HIDDEN], (8, 8)), latent, likelihood)
    guide = Amortized(MLP((8, 8), [HIDDEN]), FullRank(HIDDEN, latent), inputs=_scaled)
    return model, guide


def run(
    out: str | Path = "quickstart",
    *,
    epochs: int = EPOCHS,
    particles: int = PARTICLES,
    latent: int = LATENT,
    refine: int = REFINE,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> Posterior:
    """Train on the embedded digits, print how well it went, and write ``report.html`` and ``posterior/``.

    Arguments:
        out: folder, made where it is not there.
        epochs: passes over the 1297 images, at most.
        particles: draws of the guide that the bound is over.
        latent: size of the code of an image.
        refine: steps of gradient ascent on the code of each test image after training; 0 leaves that out.
        seed: makes the run repeatable.
        device: as for ``fit``.
        progress: whether to show a progress bar.

    Raises:
        ValueError: for values out of range; before training, where the folder cannot be written.
    """
    out = Path(out)
    with seeded(seed):
        model, guide = build(latent)
    loss = importance(iwae, particles)
    method = svi(loss=loss, lr=1e-2, epochs=epochs, schedule="cosine", early_stopping=30)
    find_device(device)  # a mistake in it is said before anything is written
    _make_folder(out)
    digits = datasets.load("digits")
    assert digits.validation is not None and digits.test is not None
    train, held, test = (part["x"] * LEVELS for part in (digits.train, digits.validation, digits.test))
    print(
        f"Training a VAE on {len(train)} images of digits: importance-weighted bound of {particles} particles, "
        f"{epochs} epochs, {_duration(epochs * (0.08 + 0.01 * particles))} on a CPU. Ctrl-C ends it early and "
        "keeps the best.",
        flush=True,
    )
    with _one_thread():
        posterior = fit(
            model,
            train,
            guide=guide,
            method=method,
            batch_size=128,
            validation=held,
            device=device,
            seed=seed,
            progress=progress,
            check=False,  # the report, below, looks closer
        )
        if posterior.interrupted:
            print("Interrupted: what follows is about the best state so far.", flush=True)
        posterior.save(out / "posterior")
        with seeded(seed):
            _present(posterior, out, latent, refine, train, test, digits.test["y"])
    return posterior


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread: for arrays as small as these, several wait for each other, for minutes on a busy CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _duration(seconds: float) -> str:
    return f"about {math.ceil(seconds / 5) * 5} s" if seconds < 90 else f"about {seconds / 60:.0f} minutes"


def _make_folder(out: Path) -> None:
    """Find out before training whether the results can be written."""
    cure = "give another folder with --out"
    held = out / "posterior"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"cannot write to {str(out)!r}, for there is a file in its place: {cure}") from None
    except OSError as error:
        raise ValueError(f"cannot write to {str(out)!r} ({error.strerror or error}): {cure}") from None
    ours = not held.exists() or (held.is_dir() and (not os.listdir(held) or (held / "posterior.json").exists()))
    if not ours or (out / "report.html").is_dir():
        raise ValueError(f"{str(out)!r} holds something else that is called 'posterior' or 'report.html': {cure}")


def _independent_pixels(train: Tensor, test: Tensor) -> float:
    """Nats per image of the simplest rival: each pixel by itself, with the grey levels' frequencies in training."""
    counts = torch.stack([(train == level).sum(0) for level in range(LEVELS + 1)]) + 1.0
    log_frequency = (counts / counts.sum(0)).log()
    return log_frequency.gather(0, test.long()).sum((-2, -1)).mean().item()


def _weights(posterior: Posterior, x: Tensor, particles: int = 1000) -> Tensor:
    """Log-weights ``[particles, N]``, some rows at a time so that they fit into memory."""
    assert posterior.guide is not None
    with torch.no_grad():
        parts = [
            log_weights(posterior.model, posterior.guide, part, particles=particles)[0].cpu()
            for part in x.to(posterior.program.device).split(50)
        ]
    return torch.cat(parts, 1)


def _present(
    posterior: Posterior, out: Path, latent: int, refine: int, train: Tensor, test: Tensor, digit: Tensor
) -> None:
    """Measure on the test images, write the page and the posterior, and print where they are."""
    weights = _weights(posterior, test)
    bound = iwae(weights)
    mean, error = bound.mean().item(), bound.std().item() / math.sqrt(len(bound))
    rival = _independent_pixels(train, test)
    report = posterior.report(test)
    refined = None
    if refine:
        print(f"Refining the codes of {REFINED} test images by {refine} steps each.", flush=True)
        guide: Any = posterior.guide
        better = SemiAmortized(posterior.model, guide, steps=refine, lr=0.015, particles=8)
        refined = posterior.with_guide(better).report(test[:REFINED])
    argument = "" if latent == LATENT else f"latent={latent}"
    where = json.dumps(str(out / "posterior"))
    load = f"""from pyro_ae import Posterior
from pyro_ae.quickstart import build
posterior = Posterior.load({where}, *build({argument}))"""
    numbers = {
        "log p(x) of a test image, at least": f"{mean:.2f} nats",
        f"standard error over the {len(test)} test images": f"{error:.2f} nats",
        "the same bound, per pixel": f"{-mean / test[0].numel() / math.log(2):.3f} bits",
        "log p(x) where each pixel is coded by itself": f"{rival:.2f} nats",
    }
    text = _page(posterior, report, refined, numbers, load, test, digit)
    (out / "report.html").write_text(text, encoding="utf-8")
    print(f"""
log p(x) of a test image is at least {mean:.2f} nats (standard error {error:.2f}, {len(weights)} particles); with each
pixel coded by itself it is {rival:.2f}.
The posterior of the codes is {report.verdict}:""")
    print("\n".join(f"  - {reason}" for reason in report.reasons))
    if refined is not None:
        print(f"Refined for each image by itself, it is {refined.verdict}:")
        print("\n".join(f"  - {reason}" for reason in refined.reasons))
    print(f"""
A page with figures: {out / "report.html"}
The posterior: {out / "posterior"}, which these lines load:

{load}
""")


def _page(
    posterior: Posterior,
    report: Report,
    refined: Report | None,
    numbers: dict[str, str],
    load: str,
    test: Tensor,
    digit: Tensor,
) -> str:
    """What came of the fit, for who looks at it in a browser."""
    some = torch.stack([(digit == d).nonzero()[:2, 0] for d in range(10)], 1).flatten()  # two of each digit
    rebuilt = posterior.reconstruct(test[some]) / LEVELS
    samples = posterior.generate(40, mean=True) / LEVELS
    parts = [
        page.paragraph(
            "A variational autoencoder of handwritten digits (8 x 8 pixels, 17 grey levels), trained with an "
            f"importance-weighted bound. What follows is about {len(test)} images that it was not trained on."
        ),
        page.verdict(report.verdict, report.reasons, on="Posterior of the codes"),
        page.paragraph(
            "The verdict is on whether draws of the guide, z given an image, can stand for the true posterior "
            "p(z | x), as they are or weighted. A model may rebuild and make images well, as below, while its guide is "
            "too simple to say how uncertain each code is."
        ),
        page.table(numbers),
        page.section(
            "Reconstructions",
            page.picture(
                plots.images(test[some] / LEVELS, rebuilt, names=["image", "rebuilt"], title="Test images"),
                "Two test images of each digit. Under each is the mean of the likelihood, averaged over draws of its "
                "code: what is left of the image when it is squeezed through the code.",
            ),
        ),
        page.section(
            "New digits",
            page.picture(
                plots.images(samples, title="Digits that nobody wrote"),
                "Codes drawn from the prior, and the mean of the likelihood given each.",
            ),
        ),
        page.section(
            "Latent space",
            page.picture(
                plots.latent_space(posterior.encode(test), digit, title="Codes of the test images"),
                "Each figure is the mean code of a test image of that digit. The fit has seen no labels.",
            ),
        ),
        *report.sections(),
        *([] if refined is None else [_refined(refined)]),
        page.section(
            "Next steps",
            page.paragraph("Load the posterior and use it:"),
            page.code(load + USE),
            page.paragraph("Put another guide, bound or model in its place, and compare:"),
            page.code(CHANGE),
            page.listing(
                [
                    "`pyro-ae datasets` lists larger data sets, and `pyro_ae.datasets.load` loads them.",
                    "`pyro-ae cite VAE` gives the reference of a method.",
                ]
            ),
        ),
        page.section("How to cite", page.listing(_references())),
    ]
    return page.page("Quickstart: an autoencoder of digits", parts)


def _refined(report: Report) -> str:
    return page.section(
        "What the encoder leaves on the table",
        page.paragraph(
            "An encoder answers for all images with one network. Here its answer was refined for each of "
            f"{report.figures.get('rows', REFINED)} images by itself, by gradient ascent on the ELBO (the guide "
            "`SemiAmortized`): the same model, the same family of distributions, nothing trained."
        ),
        page.verdict(report.verdict, report.reasons, on="Posterior of the refined codes"),
        *(page.picture(p.draw(), p.caption) for p in report.pictures[:1]),
    )


def _references() -> list[str]:
    parts = [VAE, iwae, plots.pareto_k]
    return list(dict.fromkeys(line for part in parts for line in cite(part).splitlines()))


USE = """

from pyro_ae import datasets
x = datasets.load("digits").test["x"] * 16
posterior.encode(x)         # the code of each image
posterior.reconstruct(x)    # each image through its code
posterior.generate(10)      # new images
posterior.log_evidence(x)   # log p(x) of each, from below
print(posterior.report(x))  # can it be trusted?

from pyro_ae.guides.semi_amortized import SemiAmortized
guide = SemiAmortized(posterior.model, posterior.guide, steps=200, lr=0.015, particles=8)
refined = posterior.with_guide(guide, data=x)  # each code, refined for its image
print(refined.report(x[:20]))"""

CHANGE = """from pyro_ae import datasets, elbo, fit, importance, svi
from pyro_ae.quickstart import build
model, guide = build(latent=8)
x = datasets.load("digits").train["x"] * 16
method = svi(loss=importance(elbo), lr=2e-3, epochs=50)
other = fit(
    model, x, guide=guide, method=method,
    batch_size=128, validation=0.2,
)"""
