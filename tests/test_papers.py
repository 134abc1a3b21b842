"""Every paper's file: what it documents, and that its claims hold at small scale; and what some are made of."""

from pathlib import Path

import pytest
import torch
from pandas import DataFrame, read_csv
from truth import ladder

from pyro_ae import fit, svi
from pyro_ae.guides.bottom_up import BottomUp
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.nn import MLP
from pyro_ae.reproduce import load, names, paragraphs, reproduce

PAPERS = names()
MEASURED = Path(__file__).parents[1] / "docs" / "measured"


def test_there_are_papers() -> None:
    assert PAPERS


@pytest.mark.parametrize("name", PAPERS)
def test_says_what_it_claims_and_where_it_is_from(name: str) -> None:
    paper = load(name)
    sentence, references, *protocol = paragraphs(paper)
    assert sentence.endswith(".") and "\n" not in sentence
    assert references.startswith("References:\n") and "http" in references
    assert protocol
    assert "small" in paper.SCALES
    assert paper.CLAIMS
    assert paper.NOT_AT_SMALL.keys() < paper.CLAIMS.keys(), "excuses for what is no claim, or for all of them"


def holds(name: str, seed: int) -> None:
    paper, report = load(name), reproduce(name, seed=seed)
    assert not report.failed, f"does not hold: {report.failed}\n{report}"
    columns = {column for row in paper.PAPER for column in row} - {"source"}
    assert columns <= set(report.table), "the paper's numbers are in columns of the table"


@pytest.mark.parametrize("name", PAPERS)
def test_the_gallery_shows_a_table_of_this_paper(name: str) -> None:
    """``python docs/measure.py papers NAME`` writes it."""
    paper, table = load(name), read_csv(MEASURED / f"{name}.csv")
    failed = [claim for claim, check in paper.CLAIMS.items() if not check(table) and claim not in paper.NOT_AT_SMALL]
    assert not failed, failed


@pytest.mark.parametrize("name", PAPERS)
def test_claims_hold_at_small_scale(name: str) -> None:
    holds(name, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", PAPERS)
def test_claims_hold_for_other_seeds(name: str, seed: int) -> None:
    holds(name, seed)


def test_claims_about_the_iwae_fit_the_papers_numbers_and_not_the_reverse() -> None:
    paper = load("importance_weighted_autoencoder")
    table = DataFrame(paper.PAPER)
    assert [claim for claim, check in paper.CLAIMS.items() if not check(table)] == []
    swapped = table.assign(layers=3 - table.layers, method=table.method.map({"VAE": "IWAE", "IWAE": "VAE"}))
    assert [claim for claim, check in paper.CLAIMS.items() if check(swapped)] == []


@pytest.mark.parametrize("missing", [False, True])
def test_two_layers_of_linear_normals_have_their_evidence(missing: bool) -> None:
    """DeepVAE and BottomUp against the closed form."""
    model, x, exact = ladder(missing)
    guide = BottomUp((MLP(5, [16], missing=missing), MeanField(16, 3)), (MLP(3, [16]), MeanField(16, 2)))
    posterior = fit(model, x, guide=guide, method=svi(lr=1e-2, steps=500), seed=0, progress=False)
    torch.testing.assert_close(posterior.log_evidence(x, 3000), exact, atol=0.2, rtol=0)
