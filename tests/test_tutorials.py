"""Every tutorial is a page of the documentation, whose build runs it: what that asks of it, and that it is a script."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted([*ROOT.glob("tutorials/*.py"), *ROOT.glob("tutorials/*/tutorial.py")])
each = pytest.mark.parametrize("file", TUTORIALS, ids=lambda file: str(file.relative_to(ROOT / "tutorials")))


def cells(file: Path) -> list[tuple[str, str]]:
    """(header, body) of each cell."""
    parts = re.split(r"^(# %%.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert not parts[0].strip(), "begins with a cell"
    return list(zip(parts[1::2], parts[2::2], strict=True))


def test_there_are_tutorials() -> None:
    assert len(TUTORIALS) > 10


@each
def test_has_a_title_figures_with_texts_and_a_way_on(file: Path) -> None:
    first, *_, last = cells(file)
    assert first[0] == "# %% [markdown]" and first[1].lstrip().startswith("# # ")
    assert last[0] == "# %% [markdown]" and "# ## Where to go next" in last[1]
    drawing = re.compile(r"^[^\s#].*(\bplots\.\w+\(|\bplt\.(subplots|figure)\(|\baz\.plot_)", re.MULTILINE)
    silent = [body for header, body in cells(file) if drawing.search(body) and "alt" not in header]
    assert not silent, f"no text that stands in for the picture of {silent}"


@each
def test_is_in_the_navigation(file: Path) -> None:
    navigation = (ROOT / "docs" / "pages.py").read_text(encoding="utf-8")
    page = file.relative_to(ROOT).with_suffix("").as_posix()
    assert f"\n{page}\n" in navigation


@pytest.mark.slow
@each
def test_runs_as_a_script(file: Path, tmp_path: Path) -> None:
    if file.stem == "from_pythae" and importlib.util.find_spec("pythae") is None:
        pytest.skip("needs pythae, of the extra docs")
    if file.stem == "jax_samplers" and importlib.util.find_spec("blackjax") is None:
        pytest.skip("needs blackjax, of the extra docs")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(file)],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
