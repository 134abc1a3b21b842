"""Room for the draws of chains: in memory, or in a file that is mapped into it where they are too many."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

GIB = 2**30


class Store:
    """Flat draws ``[chains, draws, d]``, one after the other.

    Arguments:
        chains: how many draws are kept at once.
        draws: how many times.
        size: d.
        dtype: as which they are kept.
        memory: GiB that they may take before they go to a file.
        file: where to keep them, whatever they take; else a temporary file, which is gone with the draws.

    Raises:
        ValueError: where there is no room on disk either; it says how much is needed.

    Example:
        >>> store = Store(2, 10, 3, torch.float16)
        >>> store.keep(0, torch.ones(2, 3))
        >>> store.values.dtype, store.values.shape
        (torch.float16, torch.Size([2, 10, 3]))
    """

    def __init__(
        self, chains: int, draws: int, size: int, dtype: torch.dtype, memory: float = 4.0, file: Path | None = None
    ) -> None:
        self.shape = (chains, draws, size)
        numbers = chains * draws * size
        need = numbers * dtype.itemsize
        if file is None and need <= memory * GIB:
            self.values = torch.zeros(self.shape, dtype=dtype)
            return
        folder = Path(tempfile.gettempdir()) if file is None else file.parent
        free = shutil.disk_usage(folder).free
        if need > free and not (file and file.exists()):
            fits = int(free / (chains * size * dtype.itemsize))
            raise ValueError(
                f"{chains} chains x {draws} draws x {size:,} latents as {str(dtype).removeprefix('torch.')} take "
                f"{need / GIB:.3g} GiB, and {folder} has {free / GIB:.3g} GiB free: keep at most {fits} draws of each "
                "chain (draws=..., with a larger thinning=...), fewer chains, or dtype=torch.float16"
            )
        if file is not None:
            self.values = torch.from_file(str(file), shared=True, size=numbers, dtype=dtype).view(self.shape)
            return
        with tempfile.NamedTemporaryFile(dir=folder, prefix="pyro_ae-draws-") as temporary:
            # the mapping outlives the name, and the space is freed with the last tensor on it
            self.values = torch.from_file(temporary.name, shared=True, size=numbers, dtype=dtype).view(self.shape)

    def keep(self, index: int, values: Tensor) -> None:
        """Put down draw number ``index`` of all chains, ``[chains, d]``."""
        self.values[:, index].copy_(values)
