"""Every tutorial runs from top to bottom, in an empty folder and without a warning."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = sorted(Path(__file__).parent.parent.glob("tutorials/*/tutorial.py"))


@pytest.mark.parametrize("file", TUTORIALS, ids=lambda file: file.parent.name)
def test_tutorial_runs(file, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(file)],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg", "PYRO_AE_OUT": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("*.png"))
