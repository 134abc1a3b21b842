"""Reproductions, and the command for them, on a paper that takes no time."""

import sys
from pathlib import Path

import pandas
import pytest

from pyro_ae import papers, reproduce
from pyro_ae.cli import main

Output = pytest.CaptureFixture[str]

PAPER = '''"""Seeds are numbers.

References:
    On Seeds (Sower, 1999) https://example.org/seeds

Nothing is trained.
"""
from pandas import DataFrame

SCALES = {"small": 1, "full": 100}
CLAIMS = {
    "a is as large as the scale": lambda table: (table.a >= 1).all(),
    "b is the seed's": lambda table: (table.b == 7).all(),
    "a is huge": lambda table: (table.a > 50).any(),
}
NOT_AT_SMALL = {"a is huge": "there a is 1"}
PAPER = [{"method": "theirs", "a": 99.5, "source": "Table 1"}]


def run(scale="small", seed=0, progress=False):
    return DataFrame({"method": ["ours", "baseline"], "a": [SCALES[scale], 1.25], "b": [seed, seed]})
'''


@pytest.fixture(autouse=True)
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only paper there is."""
    folder = tmp_path / "papers"
    folder.mkdir()
    (folder / "on_seeds.py").write_text(PAPER)
    monkeypatch.setattr(papers, "__path__", [str(folder)])
    monkeypatch.delitem(sys.modules, "pyro_ae.papers.on_seeds", raising=False)


def test_report_has_the_table_and_a_verdict_for_each_claim() -> None:
    report = reproduce.reproduce("on_seeds", seed=7)
    assert (report.name, report.scale, report.seed) == ("on_seeds", "small", 7)
    assert report.table.a.tolist() == [1.0, 1.25]
    assert list(report.claims.values()) == [True, True, False]
    assert report.failed == []
    assert report.excused == {"a is huge": "there a is 1"}
    assert reproduce.reproduce("on_seeds", seed=8).failed == ["b is the seed's"]


def test_what_fails_at_small_scale_is_excused_there_alone() -> None:
    assert reproduce.reproduce("on_seeds", "full", 7).claims == {claim: True for claim in _claims()}
    assert reproduce.reproduce("on_seeds", "full", 7).excused == {}


def _claims() -> list[str]:
    return list(reproduce.load("on_seeds").CLAIMS)


def test_report_as_text() -> None:
    lines = str(reproduce.reproduce("on_seeds", seed=8)).splitlines()
    assert lines[0] == "Seeds are numbers."
    assert "    On Seeds (Sower, 1999) https://example.org/seeds" in lines
    assert "on_seeds, scale small, seed 8: 0 s" in lines
    assert "holds    a is as large as the scale" in lines
    assert "FAILS    b is the seed's" in lines
    at = lines.index("FAILS    a is huge")
    assert lines[at + 1].strip() == "known at this scale: there a is 1"
    ours, theirs = (next(line.split() for line in lines if word in line.split()) for word in ("baseline", "theirs"))
    assert ours == ["baseline", "1.25", "8"] and theirs == ["theirs", "99.50", "Table", "1"]


def test_mistakes_are_answered() -> None:
    with pytest.raises(ValueError, match="no paper 'on_seed' to reproduce; did you mean 'on_seeds'"):
        reproduce.reproduce("on_seed")
    with pytest.raises(ValueError, match="no paper 'xyz' to reproduce; there are on_seeds"):
        reproduce.reproduce("xyz")
    with pytest.raises(ValueError, match="on_seeds has no scale 'medium'; it has 'small' and 'full'"):
        reproduce.reproduce("on_seeds", "medium")


def test_command_lists_the_papers(capsys: Output) -> None:
    assert main(["reproduce"]) == 0
    assert capsys.readouterr().out == "on_seeds  Seeds are numbers. Scales: small, full.\n"


def test_command_prints_the_report_and_writes_the_table(tmp_path: Path, capsys: Output) -> None:
    out = tmp_path / "table.csv"
    assert main(["reproduce", "on_seeds", "--scale", "full", "--seed", "7", "--out", str(out)]) == 0
    assert "on_seeds, scale full, seed 7" in capsys.readouterr().out
    table = pandas.read_csv(out)
    assert table.a.tolist() == [100, 1.25] and table.b.tolist() == [7, 7]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["on_sed"], "did you mean 'on_seeds'"), (["on_seeds", "--scale", "big"], "'small' and 'full'")],
)
def test_command_answers_mistakes(arguments: list[str], words: str, capsys: Output) -> None:
    assert main(["reproduce", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_command_finds_out_before_the_run_that_it_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setattr(reproduce, "reproduce", lambda *_, **__: pytest.fail("ran"))
    assert main(["reproduce", "on_seeds", "--out", str(tmp_path / "nowhere" / "table.csv")]) == 2
    assert "nowhere" in capsys.readouterr().err
