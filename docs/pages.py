"""Pages that are made of the package itself: the API of its docstrings, and the zoo with its papers as a gallery."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pandas as pd

import charts
from pyro_ae import cite, reproduce

NAVIGATION = """

```{toctree}
:hidden:
:caption: Tutorials

tutorials/quickstart
tutorials/eight_schools
tutorials/own_model
tutorials/choosing_an_objective
tutorials/choosing_a_guide
tutorials/bayesian_network
tutorials/bayesian_autoencoder/tutorial
tutorials/bayesian_autoencoder/README
tutorials/diagnosing
tutorials/jax_samplers
```

```{toctree}
:hidden:
:caption: Coming from

tutorials/from_pyro
tutorials/from_numpyro
tutorials/from_pythae
tutorials/from_tyxe
```

```{toctree}
:hidden:
:caption: How to
:glob:

docs/how_to/*
```

```{toctree}
:hidden:
:caption: Reference

docs/tour
docs/which_method
docs/zoo/index
docs/api/index
tests/benchmarks/README
docs/compared
docs/limits
docs/CONTRIBUTING
CHANGELOG
```
"""

# What one calls, by what it is for. A folder stands for its files; those that no user calls are read in the source.
API = {
    "Fit a model": ["fit", "data", "plates", "datasets", "posterior", "prediction", "storage", "types"],
    "Engines": ["engines"],
    "Bounds, gradients and losses": [
        *("density", "bounds", "estimators", "losses", "divergences", "critics", "slices", "relaxations", "schedules"),
    ],
    "Models": ["models"],
    "Guides": ["guides"],
    "Networks and their weights": [
        *("nn", "bayesian", "priors", "last_layer", "normalisation", "processes", "continuous_bernoulli"),
    ],
    "Diagnostics": ["diagnostics", "reference"],
    "Other samplers": ["lowering.density", "energy"],
    "New rows and codes": ["generation", "latent_densities"],
    "With other tools": ["trackers", "pipeline", "export", "anndata"],
    "Papers and the command line": ["cite", "reproduce", "cli"],
}


INNER = {
    *(f"engines.{name}" for name in ("compiled", "numpyro_chains", "pyro_chains", "score", "stacked", "starts")),
    *("engines.stochastic", "engines.store", "engines.stream"),
    *(f"diagnostics.{name}" for name in ("after_fit", "chain_checks", "entries", "findings", "groups")),
    *(f"diagnostics.{name}" for name in ("guide_checks", "local", "page", "rows", "simulated", "plots.style")),
    *("nn.inputs",),
}


def write(docs: Path) -> None:
    """Write the pages below ``docs/api`` and ``docs/zoo``, where their text is not what it was."""
    pages = {f"api/{name}.rst": text for name, text in api().items()}
    pages |= {f"zoo/{name}.rst": text for name, text in zoo(docs).items()}
    for folder in ("api", "zoo"):
        for old in (docs / folder).glob("*.rst"):
            if f"{folder}/{old.name}" not in pages:
                old.unlink()
    for name, text in pages.items():
        path = docs / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def listed(lines: list[str]) -> list[str]:
    """Lines of a docstring in which each reference, which ends in an address, is an item of a list."""
    found: list[str] = []
    inside = fresh = False
    for line in lines:
        if not line.strip() or not line.startswith(" "):
            inside = line.strip() == "References:"
            fresh = True
            found.append(line)
        elif inside:
            indent = line[: len(line) - len(line.lstrip())]
            found.append(f"{indent}{'- ' if fresh else '  '}{line.strip()}")
            fresh = bool(re.search(r"https?://\S+$", line))
        else:
            found.append(line)
    return found


def title(text: str, line: str = "=") -> str:
    return f"{text}\n{line * len(text)}\n\n"


def first_paragraph(thing: object) -> str:
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


# ------------------------------------------------------------------------------------------------ the API


def modules(name: str) -> list[str]:
    """A module and, of a package, what it holds that has a docstring of its own."""
    module = importlib.import_module(f"pyro_ae.{name}")
    if not hasattr(module, "__path__"):
        return [name]
    inner = [found for info in pkgutil.iter_modules(module.__path__) for found in modules(f"{name}.{info.name}")]
    return [*([name] if module.__doc__ else []), *inner]


def public(module: ModuleType) -> list[str]:
    """Names of the documented classes and functions that a module defines."""
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and name != "example"
        and (inspect.isclass(thing) or inspect.isfunction(thing))
        and thing.__module__ == module.__name__
        and thing.__doc__
    ]


def api() -> dict[str, str]:
    pages = {}
    index = title("API") + "Names that ``pyro_ae`` itself gives are marked with a star.\n\n"
    import pyro_ae

    for group, names in API.items():
        index += title(group, "-")
        toc = []
        for name in (inner for outer in names for inner in modules(outer)):
            full = f"pyro_ae.{name}"
            module = importlib.import_module(full)
            members = public(module)
            if not members or name in INNER:
                continue
            toc.append(name)
            pages[name] = title(full) + f".. automodule:: {full}\n   :members: {', '.join(members)}\n"
            stars = [f":py:obj:`~{full}.{m}`" + (r"\ \*" if m in pyro_ae.__all__ else "") for m in members]
            index += f":doc:`{name}`: {first_paragraph(module)}\n  {', '.join(stars)}\n\n"
        index += ".. toctree::\n   :hidden:\n\n" + "".join(f"   {name}\n" for name in toc) + "\n"
    return pages | {"index": index}


# ------------------------------------------------------------------------------------------------ the zoo

GUIDES = """Pictures show draws of the guide over a posterior of two crescents, after 1500 steps with the ELBO of 8
particles. The table at the end says what the bound lacks of log p(x) there, in nats a row, and for which share of the
rows k-hat is over 0.7. More are in :doc:`the benchmarks </tests/benchmarks/README>`."""

ALT = {
    "models": "Digits that {} generated",
    "guides": "Draws of {} over the two crescents of the true posterior",
}

ELSEWHERE = {"BayesianAutoencoder": "/tutorials/bayesian_autoencoder/mnist_densities.png"}

CARD = """   .. grid-item-card:: {title}
      :link: {link}
      :link-type: {kind}
{picture}
      {text}

"""


def card(title: str, link: str, text: str, picture: str = "", alt: str = "", kind: str = "doc") -> str:
    shown = f"      :img-top: {picture}\n      :img-alt: {alt}\n" if picture else ""
    return CARD.format(title=title, link=link, text=text, picture=shown, kind=kind)


def grid(cards: list[str], columns: str = "1 2 2 3") -> str:
    return f".. grid:: {columns}\n   :gutter: 3\n\n" + "".join(cards)


def zoo(docs: Path) -> dict[str, str]:
    papers = {name: paper(docs, name) for name in reproduce.names()}
    index = title("The zoo") + (
        "A method is a point in model x guide x objective x engine. Here is what there is on the first two axes, and "
        "the papers whose comparisons are reproduced. A paper's page shows what ``pyro-ae reproduce`` measures at the "
        "scale that runs within seconds; claims that do not hold there are said to fail, and why.\n\n"
    )
    index += title("Models", "-") + grid(parts(docs, "models")) + "\n"
    index += title("Guides", "-") + GUIDES + "\n\n" + grid(parts(docs, "guides")) + "\n"
    index += rows(pd.read_csv(docs / "measured" / "guides.csv"))
    index += title("Papers", "-")
    cards = [card(name_of(reference_of(name)), name, *about_card(name)) for name in papers]
    index += grid(cards) + "\n.. toctree::\n   :hidden:\n\n" + "".join(f"   {name}\n" for name in papers)
    return papers | {"index": index}


def parts(docs: Path, package: str) -> list[str]:
    """A card for each class of the models or the guides, with its reference, and a picture where there is one."""
    cards = []
    for name in modules(package):
        module = importlib.import_module(f"pyro_ae.{name}")
        for member in public(module):
            thing = getattr(module, member)
            if inspect.isclass(thing):
                source = cite(thing).splitlines()
                text = first_paragraph(thing) + ("\n\n      *" + name_of(source[0]) + "*" if source else "")
                picture = ELSEWHERE.get(member, f"/docs/_static/{member}.png")
                shown = docs.parent.joinpath(picture[1:]).exists()
                picture, alt = (picture, ALT[package].format(member)) if shown else ("", "")
                cards.append(card(member, f"/docs/api/{name}", text, picture, alt))
    return cards


def reference_of(name: str) -> str:
    return " ".join(reproduce.paragraphs(reproduce.load(name))[1].split("\n", 1)[1].split())


def name_of(reference: str) -> str:
    """Title of the first reference, without authors and address."""
    return re.split(r" \((?=[^()]*\d{4}\))", reference)[0]


def about_card(name: str) -> tuple[str, str, str]:
    sentence = reproduce.paragraphs(reproduce.load(name))[0]
    return sentence, f"{name}.png", f"Measured results of {name_of(reference_of(name))}"


def paper(docs: Path, name: str) -> str:
    module = reproduce.load(name)
    sentence, references, *protocol = reproduce.paragraphs(module)
    table = pd.read_csv(docs / "measured" / f"{name}.csv")
    alt = charts.draw(table, docs / "zoo" / f"{name}.png")
    text = title(name_of(reference_of(name))) + sentence + "\n\n"
    text += "\n".join("| " + line.strip() for line in references.splitlines()[1:]) + "\n\n"
    text += f".. code-block:: bash\n\n   pyro-ae reproduce {name}\n\n"
    text += f".. image:: {name}.png\n   :alt: {alt}\n\n"
    text += title("What was measured", "-") + rows(table) + title("Claims", "-")
    for claim, check in module.CLAIMS.items():
        excuse = module.NOT_AT_SMALL.get(claim, "")
        why = f" {excuse[:1].upper()}{excuse[1:]}." if excuse else ""
        text += f"- {'holds' if check(table) else '**fails**'}: {claim}.{why}\n"
    if module.PAPER:
        text += "\n" + title("What the paper printed", "-") + rows(pd.DataFrame(module.PAPER))
    return text + "\n" + title("How it was measured", "-") + "\n\n".join(without_table(protocol)) + "\n"


def without_table(protocol: list[str]) -> list[str]:
    """The paragraphs of a docstring, without the table that is shown in full above them."""
    return [p.removesuffix("::") + ("." if p.endswith("::") else "") for p in protocol if not p.startswith(" ")]


def rows(table: pd.DataFrame) -> str:
    cells = [[number(value) for value in line] for line in table.astype(object).itertuples(index=False)]
    text = ".. list-table::\n   :header-rows: 1\n\n"
    for line in [list(map(str, table.columns)), *cells]:
        text += "".join(f"   {'* -' if i == 0 else '  -'} {cell}\n" for i, cell in enumerate(line))
    return text + "\n"


def number(value: object) -> str:
    if pd.isna(value):  # type: ignore[call-overload]
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:#.3g}" if abs(value) < 1000 else f"{value:.0f}"
