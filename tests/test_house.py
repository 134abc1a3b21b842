"""The rules that every file keeps, whatever is in it. A failure names all that break the rule, at once."""

import ast
import contextlib
import doctest
import importlib
import importlib.util
import inspect
import io
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pyro
import pytest

import discovery
import pyro_ae

ROOT = Path(__file__).parents[1]

# --------------------------------------------------------------------------------------- what is there


def tracked(*patterns: str) -> list[Path]:
    """Files under version control, and those that would be if they were added, relative to the checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        paths = {Path(name) for name in listing.split("\0") if name}
    except (OSError, subprocess.CalledProcessError):  # not a checkout
        paths = {path.relative_to(ROOT) for path in ROOT.glob("[!.]*/**/*")} | {Path("README.md")}
    named = [p for p in paths if not patterns or any(p.match(pattern) for pattern in patterns)]
    return sorted(path for path in named if (ROOT / path).is_file())


def sources() -> dict[str, tuple[ast.Module, bool]]:
    """Module name -> (its syntax tree, whether it is a package), for everything that is installed."""
    found = {}
    for name in discovery.names(*discovery.EVERYTHING):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None, name
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"), spec.origin)
        found[name] = tree, spec.submodule_search_locations is not None
    return found


def text_of(path: Path) -> str:
    return (ROOT / path).read_bytes().decode("utf-8", errors="ignore")


# -------------------------------------------------------------------------------------------- examples


def test_every_model_and_guide_has_an_example() -> None:
    missing = [name for name, module in discovery.modules() if not callable(getattr(module, "example", None))]
    assert not missing, f"no example() in {missing}"


# --------------------------------------------------------------------------------------------- imports

# Costly, or with effects of their own (zuko switches validation off): imported where they are used.
LAZY = ["arviz", "jax", "matplotlib", "numpyro", "pandas", "sklearn", "xarray", "zuko"]

STATE = """
import importlib, json, logging, random, sys, warnings
import numpy, pyro, torch

def state():
    return {
        "torch validation": torch.distributions.Distribution._validate_args,
        "pyro validation": [
            part.is_validation_enabled() for part in (pyro.distributions, pyro.infer, pyro.poutine)
        ],
        "default dtype": str(torch.get_default_dtype()),
        "warning filters": [str(entry) for entry in warnings.filters],
        "torch seed state": torch.get_rng_state().tolist(),
        "NumPy seed state": [str(part) for part in numpy.random.get_state(legacy=False)["state"].values()],
        "random seed state": str(random.getstate()),
        "root logger": [logging.root.level, *(str(handler) for handler in logging.root.handlers)],
        "torch threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "Pyro params": sorted(pyro.get_param_store()),
    }

before = state()
importlib.import_module(sys.argv[1])
after = state()
changed = [key for key in before if before[key] != after[key]]
print(json.dumps({"changed": changed, "modules": sorted(sys.modules)}))
"""


def test_import_is_light_and_changes_no_global_state(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STATE, "pyro_ae"]
    done = subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    heavy = sorted(set(LAZY) & set(found["modules"]))
    assert not heavy, f"import pyro_ae also imports {heavy}"
    assert not found["changed"], f"import pyro_ae changes {found['changed']}"


def imports(name: str, tree: ast.Module, is_package: bool, known: set[str]) -> set[str]:
    """Which of the known modules `name` imports when it is imported: not in functions or for types."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for statement in node.orelse:
                visit(statement)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            here = name if is_package else name.rpartition(".")[0]
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), here)
            submodules = {f"{base}.{alias.name}" for alias in node.names} & known
            found.update(submodules)
            if len(submodules) < len(node.names):  # some names are the package's own
                found.add(base)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return (found & known) - {name}


def graph() -> dict[str, set[str]]:
    trees = sources()
    return {name: imports(name, *source, set(trees)) for name, source in trees.items()}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_no_import_cycles() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " -> ".join(reversed(error.args[1])))


# A part imports only from those above it. One that is not listed is held by the other two tests alone.
LAYERS = [
    *(
        "types",
        "cite",
        "arrays",
        "prefetch",
        "precision",
        "data",
        "datasets",
        "schedules",
        "settings",
        "plates",
        "nn",
        "heads",
        "spheres",
        "continuous_bernoulli",
        "flows",
        "priors",
        "bayesian",
        "normalisation",
        "runtime",
    ),
    *(
        "sites",
        "conjugate",
        "unconstrained",
        "particles",
        "enumeration",
        "density",
        "energy",
        "bounds",
        "divergences",
        "critics",
        "slices",
        "processes",
        "latent_densities",
        "estimators",
        "relaxations",
        "losses",
        "last_layer",
        "lowering",
        "parameters",
        "program",
        "draws",
        "prediction",
        "coding",
        "html",
        "diagnostics",
        "generation",
        "describe",
        "posterior",
        "export",
        "anndata",
    ),
    *("storage", "engines", "fit", "pipeline", "trackers", "reference", "quickstart", "reproduce", "cli"),
]


def test_core_is_layered() -> None:
    def layer(name: str) -> int | None:
        part = name.split(".")[1] if "." in name else ""
        return LAYERS.index(part) if part in LAYERS else None

    upward = []
    for name, found in graph().items():
        for other in sorted(found):
            low, high = layer(name), layer(other)
            if low is not None and high is not None and high > low:
                upward.append(f"{name} imports {other}")
    assert not upward, f"against the order of {LAYERS}: {upward}"


def test_core_does_not_import_the_zoo() -> None:
    zoo = (*discovery.ZOO, "pyro_ae.papers")
    outside = [*zoo, "pyro_ae.cli", "pyro_ae.quickstart"]  # the command line shows the zoo
    wrong = []
    for name, found in graph().items():
        if not any(within(name, part) for part in outside):
            wrong += [f"{name} imports {other}" for other in found if any(within(other, z) for z in zoo)]
    assert not wrong, sorted(wrong)


# ------------------------------------------------------------------------------------------ docstrings

SECTIONS = ["References:", "Arguments:", "Example:"]


def ours(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "").split(".")[0] == "pyro_ae"


def takes_arguments(thing: Any) -> bool:
    if inspect.isclass(thing):
        makers = [parent for parent in thing.__mro__ if {"__init__", "__new__"} & set(vars(parent))]
        if not any(ours(maker) for maker in makers):
            return False  # made by what another library wrote, and documented there
    return bool(inspect.signature(thing).parameters)


def docstring_faults(name: str, thing: Any, *, example: bool, references: bool) -> Iterator[str]:
    """What the docstring of a public class or function lacks."""
    own = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__  # not a parent's
    doc = inspect.cleandoc(own or "")
    if not doc.split("\n\n")[0].endswith("."):
        yield f"{name}: begins with no sentence that ends in a period"
    if inspect.isclass(thing) and (issubclass(thing, BaseException) or getattr(thing, "_is_protocol", False)):
        return  # not made by hand
    wanted = dict(zip(SECTIONS, [references, takes_arguments(thing), example], strict=True))
    at = {section: doc.splitlines().index(section) for section in SECTIONS if section in doc.splitlines()}
    yield from (f"{name}: no {section}" for section in SECTIONS if wanted[section] and section not in at)
    if list(at.values()) != sorted(at.values()):
        yield f"{name}: sections not in the order of {SECTIONS}"
    if "Example:" in at and ">>>" not in doc:
        yield f"{name}: Example: without >>>"


def is_documented_kind(thing: Any) -> bool:
    return (inspect.isclass(thing) or inspect.isfunction(thing)) and ours(thing)


def test_public_names_exist_and_are_documented() -> None:
    faults = []
    for name in pyro_ae.__all__:
        thing = getattr(pyro_ae, name, None)
        if not hasattr(pyro_ae, name):
            faults.append(f"pyro_ae.{name}: in __all__ but not there")
        elif is_documented_kind(thing):
            faults += docstring_faults(f"pyro_ae.{name}", thing, example=True, references=False)
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults)


def test_models_and_guides_are_documented() -> None:
    faults = []
    for module_name, module in discovery.modules():
        for name, thing in vars(module).items():
            if name.startswith("_") or name == "example":
                continue
            if is_documented_kind(thing) and thing.__module__ == module_name:
                where, references = f"{module_name}.{name}", inspect.isclass(thing)
                faults += docstring_faults(where, thing, example=False, references=references)
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults)


# -------------------------------------------------------------------------------------- what docs show


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder to run in, and no progress bars on the screen."""
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stderr(io.StringIO()):
        yield


@pytest.mark.parametrize("name", discovery.names(*discovery.EVERYTHING))
@pytest.mark.usefixtures("elsewhere")
def test_doctests(name: str) -> None:
    report: list[str] = []
    write: Callable[[str], Any] = report.append
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for case in doctest.DocTestFinder().find(importlib.import_module(name), name):
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        runner.run(case, out=write)
    assert not report, "".join(report)


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """(first line's number, code) of each fenced block in the language."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


@pytest.mark.parametrize("path", tracked("README.md", "docs/*.md", "docs/how_to/*.md"), ids=str)
@pytest.mark.usefixtures("elsewhere")
def test_readme_python_blocks_run(path: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    # The empty lines before a block give tracebacks the README's own line numbers.
    for line, code in blocks(text_of(path), "python"):
        exec(compile("\n" * line + code, str(path), "exec"), namespace)


@pytest.mark.parametrize(
    "command",
    [
        "pip install -c constraints.txt -e . && pyro-ae quickstart",
        "pip install -c constraints.txt -e '.[test]' && pytest",
    ],
)
def test_readme_has_the_two_commands(command: str) -> None:
    assert command in [code.strip() for _, code in blocks(text_of(Path("README.md")), "bash")]


# ------------------------------------------------------------------------------------ what is in files

# Written so that neither matches its own source.
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|opt|home|Users)/[\w.]")
REGISTRY_HOST = re.compile(r"\b(?:pypi\.org|pythonhosted\.org|registry\.npmjs\.org|deb\.debian\.org)\b")
PICKLED = re.compile(
    r"\btorch\.(?:load|save)\(|allow_pickle\s*=\s*True|^\s*(?:import|from)\s+(?:pickle|cloudpickle|dill|joblib)\b",
    re.MULTILINE,
)


def matches(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    texts = {path: text_of(path) for path in paths}
    return [
        f"{path}:{text.count(chr(10), 0, match.start(0)) + 1}: {match[0].strip()}"
        for path, text in texts.items()
        for match in pattern.finditer(text)
    ]


def test_no_machine_paths_or_registry_hosts() -> None:
    found = matches(MACHINE_PATH, tracked()) + matches(REGISTRY_HOST, tracked())
    assert not found, found


def test_nothing_is_pickled() -> None:
    shipped = [path for path in tracked("*.py") if path.parts[0] in ("pyro_ae", "models", "guides")]
    found = matches(PICKLED, shipped)
    assert not found, f"tensors go into safetensors, draws into netCDF, the rest into JSON: {found}"


def test_files_are_short() -> None:
    limits = {"models": 150, "guides": 110}
    long = []
    for path in tracked("*.py"):
        length, limit = len(text_of(path).splitlines()), limits.get(path.parts[0], 420)
        if length > limit:
            long.append(f"{path}: {length} lines, at most {limit}")
    assert not long, long


def test_every_package_is_installed() -> None:
    """An editable install hides a package that pyproject.toml does not list; a wheel would lack it."""
    listed = tomllib.loads(text_of(Path("pyproject.toml")))["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in tracked("__init__.py") if path.parts[0] == "pyro_ae"}
    missing = sorted({".".join(folder.parts) for folder in folders} - set(listed))
    assert not missing, f"not in pyproject.toml's packages: {missing}"
