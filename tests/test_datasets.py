"""Data sets: what they hold, where they are found, and what is said where they are not.

The sets themselves are read where PYRO_AE_DATA names a folder of them. Downloads come from a server on this
machine; for those files that can be rebuilt from that folder byte by byte, against their published checksums.
"""

import gzip
import hashlib
import io
import random
import re
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch

from pyro_ae import datasets
from pyro_ae.datasets import Dataset, describe, load, names

ROWS = {  # train, validation, test, shape of a row, number of classes (None: no y; 0: regression)
    "digits": (1297, 250, 250, (8, 8), 10),
    "mnist": (50000, 10000, 10000, (28, 28), 10),
    "mnist_static_binarized": (50000, 10000, 10000, (28, 28), None),
    "fashion_mnist": (50000, 10000, 10000, (28, 28), 10),
    "omniglot": (23000, 1345, 8070, (28, 28), 1623),
    "frey_faces": (1000, 0, 956, (28, 28), None),
    "yale_faces": (1000, 0, 1319, (28, 28), None),
    "uci/boston": (455, 0, 51, (13,), 0),
    "uci/concrete": (927, 0, 103, (8,), 0),
    "uci/energy": (691, 0, 77, (8,), 0),
    "uci/kin8nm": (7373, 0, 819, (8,), 0),
    "uci/naval": (10741, 0, 1193, (16,), 0),
    "uci/power": (8611, 0, 957, (4,), 0),
    "uci/protein": (41157, 0, 4573, (9,), 0),
    "uci/wine": (1439, 0, 160, (11,), 0),
    "uci/yacht": (277, 0, 31, (6,), 0),
}


def held(root: Path, name: str) -> dict[str, np.ndarray]:
    path = root / datasets._SETS[name].file
    if not path.is_file():
        pytest.skip(f"PYRO_AE_DATA has no {datasets._SETS[name].file}")
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def splits(dataset: Dataset) -> dict[str, dict[str, torch.Tensor]]:
    return {part: tensors for part, tensors in vars(dataset).items() if isinstance(tensors, dict)}


def joined(dataset: Dataset, key: str) -> torch.Tensor:
    return torch.cat([tensors[key] for tensors in splits(dataset).values()])


def check(name: str, dataset: Dataset) -> None:
    """Shapes, types and ranges."""
    *sizes, row, classes = ROWS[name]
    found = splits(dataset)
    parts = ("train", "validation", "test")
    expected = {part: size for part, size in zip(parts, sizes, strict=True) if size}
    assert {part: len(tensors["x"]) for part, tensors in found.items()} == expected
    for part, tensors in found.items():
        assert list(tensors) == (["x"] if classes is None else ["x", "y"]), part
        x, y = tensors["x"], tensors.get("y")
        assert x.dtype == torch.float32 and x.shape[1:] == row and torch.isfinite(x).all(), part
        if len(row) == 2:
            assert 0 <= x.min() < 0.1 and 0.9 < x.max() <= 1, part
        if y is not None:
            assert y.dtype == (torch.int64 if classes else torch.float32) and y.shape == x.shape[:1], part
        if y is not None and classes:
            there = y.unique()
            assert set(there.tolist()) <= set(range(classes)), part
            assert part != "train" or len(there) == classes
    assert repr(dataset).startswith(f"Dataset '{name}'\n  train: x [{sizes[0]}, ")
    assert repr(dataset).endswith(f"\n  licence: {describe(name)['licence']}")


def assert_same(one: Dataset, other: Dataset) -> None:
    assert splits(one).keys() == splits(other).keys() and one.train.keys() == other.train.keys()
    assert all(torch.equal(joined(one, key), joined(other, key)) for key in one.train)


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No folder of data sets, and an empty cache: this one."""
    monkeypatch.delenv("PYRO_AE_DATA", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(variable, "127.0.0.1")
    return tmp_path / "cache" / "pyro_ae"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


Publish = Callable[..., None]


@pytest.fixture
def publish(nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Publish]:
    """Have one set's files on a server of this machine, with the published checksums or with their own."""
    folder = tmp_path / "server"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()

    def publish(name: str, *contents: bytes, published: bool = False) -> None:
        files = []
        for content, (_, checksum, cached) in zip(contents, datasets._remote(name), strict=True):
            path = folder / name / cached.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            checksum = checksum if published else hashlib.sha256(content).hexdigest()
            files.append(f"{name} {checksum} http://127.0.0.1:{server.server_port}/{name}/{path.name}")
        monkeypatch.setattr(datasets, "_FILES", "\n".join(files))

    yield publish
    server.shutdown()
    thread.join()
    server.server_close()


def test_names_and_their_descriptions(nowhere: Path) -> None:
    assert names() == list(ROWS)
    for name, (*sizes, row, _) in ROWS.items():
        entries = describe(name)
        assert list(entries) == ["name", "shape", "source", "licence", "at hand"] and entries["source"], name
        assert entries["shape"] == " + ".join(str(n) for n in sizes if n) + f" x {list(row)}", name
    at_hand = {name: describe(name)["at hand"] for name in names()}
    assert at_hand.pop("digits") == "embedded"
    assert at_hand.pop("frey_faces") == at_hand.pop("yale_faces") == "no: only from PYRO_AE_DATA"
    assert set(at_hand.values()) == {"to be downloaded"}


def test_every_download_has_a_checksum_and_its_own_place_in_the_cache() -> None:
    files = [file for name in names() for file in datasets._remote(name)]
    assert len(files) == len(datasets._FILES.split()) // 3 == len({path for *_, path in files})
    for address, checksum, _ in files:
        assert re.fullmatch("md5:[0-9a-f]{32}|[0-9a-f]{64}", checksum), address
    assert [name for name in names() if not datasets._remote(name)] == ["digits", "frey_faces", "yale_faces"]


def test_import_is_light() -> None:
    source = Path(datasets.__file__).read_text(encoding="utf-8")
    assert not re.findall(r"^(?:import|from) (?:sklearn|pooch|PIL|pandas)\b.*", source, re.MULTILINE)


def test_digits_are_split_once_and_for_all(nowhere: Path) -> None:
    from sklearn.datasets import load_digits

    dataset = load("digits")
    check("digits", dataset)
    images, targets = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(1797)  # so no row is in two splits
    np.testing.assert_array_equal(joined(dataset, "x").flatten(1), images[order] / 16)
    np.testing.assert_array_equal(joined(dataset, "y"), targets[order])
    assert dataset.train["y"][:8].tolist() == [2, 8, 2, 6, 6, 7, 1, 9]
    assert_same(dataset, load("digits"))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist_is_in_order(name: str, data_root: Path) -> None:
    file = held(data_root, name)
    dataset = load(name, root=data_root)
    check(name, dataset)
    np.testing.assert_array_equal(joined(dataset, "y"), np.concatenate([file["y_train"], file["y_test"]]))
    for part, of in (("train", slice(50000)), ("validation", slice(50000, None))):
        x = (255 * splits(dataset)[part]["x"][::97]).round()
        np.testing.assert_array_equal(x, file["x_train"][of][::97])


def test_omniglot_is_split_by_drawer(data_root: Path) -> None:
    file = held(data_root, "omniglot")
    order = datasets._by_drawer(32460, 0)
    np.testing.assert_array_equal(np.sort(order[:24345]), file["train_idx_15per_char"])
    np.testing.assert_array_equal(order[24345:], file["test_idx_5per_char"])
    dataset = load("omniglot", root=data_root)
    check("omniglot", dataset)
    np.testing.assert_array_equal(joined(dataset, "y"), file["char"][order])
    np.testing.assert_array_equal((255 * joined(dataset, "x")).round(), file["x"][order])
    assert hashlib.sha256(file["x"].tobytes()).hexdigest() == datasets._OMNIGLOT_SHA256


@pytest.mark.parametrize("name", ["frey_faces", "yale_faces"])
def test_faces_are_in_the_order_of_their_source(name: str, data_root: Path) -> None:
    file = held(data_root, name)
    dataset = load(name, root=data_root)
    check(name, dataset)
    x = (255 * joined(dataset, "x")).round()
    np.testing.assert_array_equal(x, file["x_28x28"][file["bae_prior_perm_seed0"][: len(x)]])


@pytest.mark.parametrize("name", [name for name in ROWS if name.startswith("uci/")])
def test_uci_splits_are_the_benchmarks(name: str, data_root: Path) -> None:
    file = held(data_root, name)
    np.random.seed(1)  # as the benchmark's own code
    for split, (train, test) in enumerate(zip(file["train_idx"], file["test_idx"], strict=True)):
        order = np.random.choice(range(len(file["y"])), len(file["y"]), replace=False)
        np.testing.assert_array_equal(order, np.concatenate([train, test]))
        np.testing.assert_array_equal(datasets._benchmark(len(order), split), order)
    last = load(name, split=split, root=data_root)
    check(name, last)
    np.testing.assert_array_equal(joined(last, "x"), file["X"][order].astype(np.float32))
    np.testing.assert_array_equal(joined(last, "y"), file["y"][order].astype(np.float32))
    with pytest.raises(ValueError, match=f"the splits 0 to {split}: split={split + 1} is none of them"):
        load(name, split=split + 1, root=data_root)
    assert_same(load(name, root=data_root), load(name, split=0, root=data_root))


def text(table: np.ndarray, row: str) -> bytes:
    return "".join(row % tuple(values) + "\n" for values in table).encode()


REBUILT = {  # header and format of a row
    "uci/boston": ("", "%8.5f %6.2f %7.3f %2d %7.4f %7.4f %6.2f %7.4f %3d %6.1f %6.2f %6.2f %6.2f %6.2f"),
    "uci/kin8nm": (",".join(f'"theta{i}"' for i in range(1, 9)) + ',"y"\n', ", ".join(["%.7e"] * 9)),
    "uci/protein": ('"RMSD",' + ",".join(f'"F{i}"' for i in range(1, 10)) + "\n", ",".join(["%.15g"] * 10)),
    "uci/wine": ("", " ".join(["%.15g"] * 12)),
}


@pytest.mark.parametrize("name", REBUILT)
def test_uci_downloads_have_the_published_checksum(name: str, data_root: Path, publish: Publish) -> None:
    file = held(data_root, name)
    columns = [file["y"], file["X"]] if name == "uci/protein" else [file["X"], file["y"]]
    header, row = REBUILT[name]
    publish(name, header.encode() + text(np.column_stack(columns), row), published=True)
    assert_same(load(name, split=4), load(name, split=4, root=data_root))


def test_naval_download(data_root: Path, publish: Publish) -> None:
    file = held(data_root, "uci/naval")
    unused = 0.975 + 0.001 * (np.arange(11934) // 9 % 26)
    table = text(np.column_stack([file["X"], file["y"], unused]), "   %.7e" * 18)
    checksum = "de0ea69da1efaab8b9655ffed828547d10dd68c1fb8c6e0163e6a988def393a6"
    assert hashlib.sha256(table).hexdigest() == checksum  # as published, of the file in the archive
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("UCI CBM Dataset/README.txt", "no table")
        archive.writestr("UCI CBM Dataset/data.txt", table)
    publish("uci/naval", content.getvalue())
    assert_same(load("uci/naval"), load("uci/naval", root=data_root))


def test_static_mnist_download_has_the_published_checksum(data_root: Path, publish: Publish) -> None:
    name = "mnist_static_binarized"
    file = held(data_root, name)
    contents = []
    for part in ("train", "valid", "test"):
        line = np.full((len(file[part]), 2 * 784), ord(" "), np.uint8)
        line[:, ::2] = np.unpackbits(file[part], axis=1) + ord("0")
        line[:, -1] = ord("\n")
        contents.append(line.tobytes())
    publish(name, *contents, published=True)
    dataset = load(name, root=data_root)
    check(name, dataset)
    ink = [int(tensors["x"].sum()) for tensors in splits(dataset).values()]
    assert ink == [int(tensors["x"].count_nonzero()) for tensors in splits(dataset).values()]
    assert ink == [5118041, 1028036, 1038896]
    assert_same(load(name), dataset)


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


def test_idx_download(publish: Publish) -> None:
    gray = np.broadcast_to((np.arange(60000) % 256).astype(np.uint8)[:, None, None], (60000, 28, 28))
    label = (np.arange(60000) % 10).astype(np.uint8)
    contents = [gzip.compress(idx(v), 1) for v in (gray, label, gray[:10000], label[:10000])]
    publish("mnist", *contents)
    dataset = load("mnist")
    assert dataset.validation is not None
    assert dataset.validation["x"][3, 2, 1] == (50003 % 256) / torch.tensor(255.0)
    assert dataset.validation["y"][:3].tolist() == [0, 1, 2]


def test_omniglot_download(publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    white = np.ones((105, 105), bool)
    white[:, :15] = False  # of 28 columns, four
    png = io.BytesIO()
    Image.fromarray(white).save(png, "PNG")
    contents = []
    for folder, drawing in (("images_background", "0002_03"), ("images_evaluation", "1623_20")):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr(f"{folder}/Alphabet/character02/{drawing}.png", png.getvalue())
            archive.writestr(f"__MACOSX/{folder}/._{drawing}.png", b"")
        contents.append(content.getvalue())
    publish("omniglot", *contents)
    with pytest.raises(ValueError, match="omniglot: .* not those of this data set"):
        load("omniglot")
    expected = np.zeros((32460, 28, 28), np.uint8)
    expected[[22, 32459], :, :4] = 255
    monkeypatch.setattr(datasets, "_OMNIGLOT_SHA256", hashlib.sha256(expected.tobytes()).hexdigest())
    dataset = load("omniglot")
    assert dataset.test is not None
    assert dataset.test["x"][-1].sum() == dataset.test["x"].sum() == 28 * 4
    assert dataset.test["y"][-1] == 1622


def test_download_then_the_cache(nowhere: Path, tmp_path: Path, publish: Publish) -> None:
    row = "\t".join(["1.5", "2 3", "4 ", " 5e-1", "6", "7.25"])  # the blanks of these tables are mixed
    publish("uci/yacht", "\r\n".join([row] * 308).encode())
    assert describe("uci/yacht")["at hand"] == "to be downloaded"
    dataset = load("uci/yacht", split=19)
    assert dataset.train["x"][0].tolist() == [1.5, 2, 3, 4, 0.5, 6] and dataset.train["y"][0] == 7.25
    assert describe("uci/yacht")["at hand"] == "in the cache"
    (nowhere / "uci/yacht/data.txt").write_text("1 2 3")  # damaged, so downloaded again
    assert_same(load("uci/yacht", split=19), dataset)
    (tmp_path / "server/uci/yacht/data.txt").unlink()
    assert_same(load("uci/yacht", split=19), dataset)


def test_no_global_random_state_is_touched(publish: Publish) -> None:
    publish("uci/yacht", "\n".join(["1 2 3 4 5 6 7"] * 308).encode())
    states = lambda: str([random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()])
    before = states()
    load("digits")
    load("uci/yacht", split=3)
    assert states() == before


def test_wrong_checksum_is_refused(nowhere: Path, publish: Publish) -> None:
    publish("mnist", *[b"1 2 3"] * 4, published=True)
    with pytest.raises(ValueError, match=r"/train-images-.* has not the checksum md5:f68b3.*/mnist.npz"):
        load("mnist")
    assert not [path for path in nowhere.rglob("*") if path.is_file()]


def test_download_that_is_not_the_set(publish: Publish) -> None:
    publish("uci/yacht", b"1 2 3 4\n5 6 7 8")
    with pytest.raises(ValueError, match=r"does not hold uci/yacht.*\[308, 6\].*\[2, 3\]"):
        load("uci/yacht")


def test_offline_says_both_ways(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "http://127.0.0.1:9/data.txt"  # where nobody listens
    monkeypatch.setattr(datasets, "_FILES", f"uci/yacht {'0' * 64} {address}")
    why = f"{address} cannot be downloaded to {nowhere / 'uci/yacht/data.txt'} (ConnectionError)"
    how = "connect to the network, or set PYRO_AE_DATA to a folder that holds uci_regression/yacht.npz"
    with pytest.raises(FileNotFoundError, match=re.escape(f"uci/yacht is not at hand, and {why}: {how}")):
        load("uci/yacht")
    with pytest.raises(FileNotFoundError, match="no safe download of it: set PYRO_AE_DATA to a folder that"):
        load("frey_faces")


def test_unknown_name() -> None:
    for function in (load, describe):
        with pytest.raises(ValueError, match=r"'boston' \(did you mean 'uci/boston'\?\); .* digits, mnist,"):
            function("boston")
        with pytest.raises(ValueError, match="no data set 'svhn'; the names are"):
            function("svhn")


def test_split_is_for_uci_alone(nowhere: Path) -> None:
    with pytest.raises(ValueError, match="digits has one split, which is fixed: leave out split=0"):
        load("digits", split=0)
    for split in (-1, 20, 0.5, "3"):
        with pytest.raises(ValueError, match="uci/yacht has the splits 0 to 19: split="):
            load("uci/yacht", split=split)  # type: ignore[arg-type]


FACES = np.zeros((1965, 28, 28), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x_28x20": FACES}, r"should have {'x_28x28': 'uint8 .* and has {'x_28x20': 'uint8 "),
        ({"x_28x28": FACES[:5]}, r"does not hold frey_faces.*uint8 \[1965, 28, 28\].*uint8 \[5, 28, 28\]"),
        ({"x_28x28": FACES / 255}, r"does not hold frey_faces.*uint8 \[1965.*float64 \[1965"),
        ({"x_28x28": np.array([{}, None])}, "cannot be read as an .npz file of plain arrays: .*allow_pickle"),
        (b"PK\x03\x04 and no more", "cannot be read as an .npz file of plain arrays"),
        (b"not an archive", "cannot be read as an .npz file of plain arrays"),
    ],
    ids=["missing", "shape", "dtype", "objects", "truncated", "text"],
)
def test_file_that_is_not_the_set(
    content: bytes | dict[str, np.ndarray], message: str, nowhere: Path, tmp_path: Path
) -> None:
    path = tmp_path / "frey_faces" / "frey_faces.npz"
    path.parent.mkdir()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message) as caught:
        load("frey_faces", root=tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.usefixtures("nowhere")
def test_root_goes_before_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, folder in enumerate(("variable", "argument")):
        (tmp_path / folder / "frey_faces").mkdir(parents=True)
        np.savez(tmp_path / folder / "frey_faces" / "frey_faces.npz", x_28x28=FACES + 255 * value)
    monkeypatch.setenv("PYRO_AE_DATA", str(tmp_path / "variable"))
    assert describe("frey_faces")["at hand"] == "in PYRO_AE_DATA"
    assert load("frey_faces").train["x"].unique() == 0
    assert load("frey_faces", root=tmp_path / "argument").train["x"].unique() == 1
    monkeypatch.setenv("PYRO_AE_DATA", str(tmp_path / "none"))
    for function in (load, describe):
        with pytest.raises(ValueError, match="PYRO_AE_DATA names .*none: that is no folder"):
            function("frey_faces")
    with pytest.raises(ValueError, match="root names .*none: that is no folder"):
        load("frey_faces", root=tmp_path / "none")
    load("digits")  # embedded: no folder is looked for
