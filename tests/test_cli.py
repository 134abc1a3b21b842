"""The command line, and the figures and the page that its quickstart makes."""

import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

import pyro_ae
from pyro_ae import Posterior, datasets, quickstart
from pyro_ae.cli import main
from pyro_ae.diagnostics import page
from pyro_ae.engines import svi

Output = pytest.CaptureFixture[str]

# ----------------------------------------------------------------------------------------- quickstart


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder that a short quickstart wrote to, and what it printed."""
    folder = tmp_path_factory.mktemp("short")
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryFile("w+") as stream:
        patch.chdir(folder)
        patch.setattr(sys, "stdout", stream)
        assert main(["quickstart", "--epochs", "2", "--particles", "2", "--latent", "3", "--refine", "5"]) == 0
        stream.seek(0)
        yield folder, stream.read()


def test_quickstart_says_what_it_does_and_what_came_of_it(short: tuple[Path, str]) -> None:
    folder, text = short
    assert re.match(r"Training a VAE on 1297 images.* 2 particles, 2 epochs, about 5 s", text)
    assert re.search(r"log p\(x\) of a test image is at least -\d+\.\d\d nats", text)
    assert re.search(r"The posterior of the codes is (good|usable|poor):\n  - ", text)
    assert re.search(r"Refined for each image by itself, it is (good|usable|poor):\n  - ", text)
    assert sorted(path.name for path in (folder / "quickstart").iterdir()) == ["posterior", "report.html"]


def test_lines_that_quickstart_prints_load_its_posterior(
    short: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, text = short
    monkeypatch.chdir(folder)
    lines = [line for line in text.splitlines() if line.startswith(("from ", "posterior = "))]
    assert len(lines) == 3
    namespace: dict[str, Any] = {}
    exec("\n".join(lines), namespace)
    posterior: Posterior = namespace["posterior"]
    test = datasets.load("digits").test
    assert test is not None
    x = test["x"] * 16
    printed = re.search(r"at least (-[\d.]+) nats", text)
    assert printed
    # other noise, so equal to a few Monte Carlo errors only
    assert posterior.log_evidence(x).mean().item() == pytest.approx(float(printed[1]), abs=1.0)
    assert posterior.generate(4).shape == (4, 8, 8)  # type: ignore[union-attr]


def test_next_steps_of_the_page_run(short: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, text = short
    monkeypatch.chdir(folder)
    load = "\n".join(line for line in text.splitlines() if line.startswith(("from ", "posterior = ")))
    exec(load + quickstart.USE, {"print": lambda *_: None})
    change = quickstart.CHANGE.replace("epochs=50", "epochs=1").replace("validation=0.2", "progress=False")
    assert change.count("epochs=1)") == change.count("progress=False") == 1
    exec(change, {})


def test_default_epochs_are_those_of_the_help(capsys: Output) -> None:
    with pytest.raises(SystemExit):
        main(["quickstart", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for value in (quickstart.EPOCHS, quickstart.PARTICLES, quickstart.LATENT):
        assert re.search(rf"\(default: {value}[),]", text)


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C at an optimiser step."""
    update = svi._Fit._update

    def interrupted(fit: Any, batch: Any) -> float:
        if fit.step == step:
            raise KeyboardInterrupt
        return update(fit, batch)

    monkeypatch.setattr(svi._Fit, "_update", interrupted)


@pytest.mark.parametrize("step", [0, 15])  # before the first evaluation, and after it
def test_interrupted_training_still_writes_everything(
    step: int, short: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    interrupt_at(step, monkeypatch)
    out = tmp_path / "out"
    if step:  # where an earlier one was
        shutil.copytree(short[0] / "quickstart", out)
    assert main(["quickstart", "--epochs", "50", "--particles", "1", "--latent", "2", "--out", str(out)]) == 0
    assert "Interrupted: what follows is about the best state so far." in capsys.readouterr().out
    assert "interrupted by hand" in (out / "report.html").read_text()
    assert Posterior.load(out / "posterior", *quickstart.build(2)).interrupted


def test_interrupted_elsewhere_is_130_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "fit", interrupted)
    assert main(["quickstart", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.strip() == "pyro-ae: interrupted"


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "fit", lambda *_, **__: pytest.fail("trained before it looked"))


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("place", ["file", "file/inside", "other", "page"])
def test_folder_that_is_taken_is_refused_before_training(place: str, tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other" / "posterior").mkdir(parents=True)
    (tmp_path / "other" / "posterior" / "thesis.tex").write_text("mine")
    (tmp_path / "page" / "report.html").mkdir(parents=True)
    assert main(["quickstart", "--out", str(tmp_path / place)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pyro-ae: error: ") and place in error and "--out" in error
    assert "Traceback" not in error


@pytest.mark.usefixtures("no_training")
def test_folder_that_cannot_be_written_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    def denied(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)  # who is root may write anywhere
    assert main(["quickstart", "--out", str(tmp_path)]) == 2
    assert "Permission denied" in capsys.readouterr().err


@pytest.mark.usefixtures("no_training")
def test_device_that_is_not_there_is_refused_before_training(tmp_path: Path, capsys: Output) -> None:
    assert main(["quickstart", "--out", str(tmp_path / "out"), "--device", "abacus"]) == 2
    assert "cannot compute on device 'abacus'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------- the other commands


@pytest.mark.parametrize("command", [[], ["quickstart"], ["datasets"], ["cite"]])
def test_help(command: list[str], capsys: Output) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "examples:\n  pyro-ae " in text
    assert max(map(len, text.splitlines())) <= 100


def test_version(capsys: Output) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"pyro-ae {pyro_ae.__version__}\n"


def test_no_command_gives_the_help(capsys: Output) -> None:
    assert main([]) == 0
    assert "quickstart" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--epochs=0", "--particles=x", "--latent=-1", "--seed=-1", f"--seed={2**64}"])
def test_numbers_out_of_range(option: str, capsys: Output) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["quickstart", option])
    assert exit_.value.code == 2
    assert "must be a whole number of at least" in capsys.readouterr().err


def test_datasets(capsys: Output) -> None:
    assert main(["datasets"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "name"
    assert [line.split()[0] for line in lines[: lines.index("")]] == datasets.names()
    assert re.search(r"^digits .*\[8, 8\] .*embedded", "\n".join(lines), re.MULTILINE)


def test_datasets_of_a_folder_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setenv("PYRO_AE_DATA", "no such folder")
    assert main(["datasets"]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("vae", "pyro_ae.models.vae.VAE"),
        ("VAE", "pyro_ae.models.vae.VAE"),
        ("iwae", "pyro_ae.bounds.iwae"),
        ("amortized", "pyro_ae.guides.amortized.Amortized"),
        ("mean_field", "pyro_ae.guides.mean_field"),
        ("pyro_ae.bounds.iwae", "pyro_ae.bounds.iwae"),
        ("pyro_ae.models.ppca", "pyro_ae.models.ppca"),
        ("svi", "pyro_ae.engines.svi.svi"),
        ("pyro_ae.diagnostics.plots.pareto_k", "pyro_ae.diagnostics.plots.pareto_k"),
    ],
)
def test_cite(name: str, full: str, capsys: Output) -> None:
    assert main(["cite", name]) == 0
    title, *references = capsys.readouterr().out.splitlines()
    assert title == full
    assert references and all("http" in line for line in references)


def test_cite_everything(capsys: Output) -> None:
    assert main(["cite"]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [line for line in lines if not line.startswith(" ")]
    assert titles == sorted(titles)
    assert {"pyro_ae.models.vae.VAE", "pyro_ae.bounds.elbo", "pyro_ae.engines.nuts.nuts"} <= set(titles)


@pytest.mark.parametrize(("name", "meant"), [("iwea", "'iwae'"), ("pyro_ae.bounds.elbi", "'elbo'"), ("xqz", "cite")])
def test_cite_of_what_is_not_there(name: str, meant: str, capsys: Output) -> None:
    assert main(["cite", "vae", name]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert repr(name) in output.err and meant in output.err


def test_cite_of_what_has_no_references(capsys: Output) -> None:
    assert main(["cite", "pyro_ae.plates.batch_plate"]) == 2
    assert "no References" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ page


class Checker(HTMLParser):
    """Collects faults of a page: tags that do not match, and what would be fetched from elsewhere."""

    VOID = ("meta", "img", "br", "hr", "input", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.seen: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> is not closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            fetched = name in ("src", "srcset", "data", "poster") or (name == "href" and tag != "a")
            if fetched and not (value or "").startswith("data:"):
                self.faults.append(f"<{tag}> fetches {value}")
            if name.startswith("on"):
                self.faults.append(f"<{tag}> has the script {name}")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_of_the_quickstart_is_whole_and_self_contained(short: tuple[Path, str]) -> None:
    text = (short[0] / "quickstart" / "report.html").read_text(encoding="utf-8")
    checked = Checker(text)
    assert not checked.faults
    assert checked.seen.count("img") == checked.seen.count("figure") == 8
    assert checked.seen.count("h1") == 1 and "script" not in checked.seen
    assert not re.search(r"url\(|@import", text)
    for words in (
        "Posterior of the codes: ",
        "Reconstructions",
        "New digits",
        "Latent space",
        "Posterior of the refined codes: ",
        "Training",
        "Next steps",
        "How to cite",
    ):
        assert words in checked.text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_page_escapes_what_it_is_given() -> None:
    nasty = '<script>alert("1 & 2")</script>'
    figure = Figure(figsize=(1, 1))
    parts = [
        page.section(nasty, page.paragraph(nasty), page.code(nasty), page.table({nasty: nasty}), page.listing([nasty])),
        page.verdict(nasty, [nasty]),
        page.picture(figure, nasty),
    ]
    checked = Checker(page.page(nasty, parts))
    assert not checked.faults
    assert "script" not in checked.seen
    assert checked.text.count(nasty) == 11


def test_page_sets_code_and_links() -> None:
    text = page.listing(["see `a < b` at https://example.org/a?b=1&c=2"])
    assert "<code>a &lt; b</code>" in text
    assert '<a href="https://example.org/a?b=1&amp;c=2">https://example.org/a?b=1&amp;c=2</a>' in text
