"""What every test gets: one thread a worker, seeds, a fresh param store, and global state put back."""

import os

# Read when NumPy, torch and Matplotlib are first imported, so set here, above those imports. Two workers on
# two cores: more threads than one each would only make them wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import sys
from collections.abc import Iterator
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    """Start from seed 0 and an empty param store; put back validation, dtype, device and figures."""
    torch_validates = torch.distributions.Distribution._validate_args
    pyro_validates = [(part, part.is_validation_enabled()) for part in (dist, infer, poutine)]
    dtype, device, gradients = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)  # torch, random and NumPy
    yield
    pyro.clear_param_store()
    for part, validates in pyro_validates:
        part.enable_validation(validates)
    torch.distributions.Distribution.set_default_validate_args(torch_validates)
    torch.set_default_dtype(dtype)
    if torch.get_default_device() != device:
        torch.set_default_device(device)
    torch.set_grad_enabled(gradients)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of the data sets, named by the environment variable PYRO_AE_DATA."""
    folder = os.environ.get("PYRO_AE_DATA")
    if not folder:
        pytest.skip("needs data sets: set PYRO_AE_DATA to the folder that holds them")
    if not Path(folder).is_dir():
        pytest.fail(f"PYRO_AE_DATA names {folder}, which is not a folder")
    return Path(folder)
