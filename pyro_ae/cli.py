"""The command line: ``pyro-ae quickstart``, ``pyro-ae datasets``, ``pyro-ae cite``, ``pyro-ae reproduce``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from . import __version__

# What a command needs is imported by the command, so that --help and mistakes are answered quickly.


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and give its exit code.

    Arguments:
        argv: the arguments; those of the process by default.

    Returns:
        0; 2 for a user's mistake, 130 after Ctrl-C. As ever with argparse, ``--help`` and arguments that it cannot
        read raise ``SystemExit``.

    Example:
        >>> main(["cite", "iwae"])
        pyro_ae.bounds.iwae
          Importance Weighted Autoencoders (Burda, Grosse and Salakhutdinov, 2016) https://arxiv.org/abs/1509.00519
        0
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.run is None:
        parser.print_help()
        return 0
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\npyro-ae: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # such as by `| head`; without this Python would complain about it on its way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"pyro-ae: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyro-ae",
        description="Posteriors you can trust from models you write as Pyro functions.",
        epilog="examples:\n  pyro-ae quickstart\n  pyro-ae datasets\n  pyro-ae cite VAE iwae\n  pyro-ae reproduce\n\n"
        "'pyro-ae COMMAND --help' says more about a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pyro-ae {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    quickstart = _command(
        commands,
        "quickstart",
        _quickstart,
        "train an autoencoder on images that come with the package, and look at what came of it",
        "Trains a variational autoencoder on 1297 small images of handwritten digits, with an importance-weighted "
        "bound, in about a minute. Says how good its posterior is on images it has not seen, and "
        "writes a page with figures and the posterior itself. Needs no network. Ctrl-C ends the training early and "
        "keeps the best so far.",
        ["pyro-ae quickstart", "pyro-ae quickstart --epochs 10 --out short", "pyro-ae quickstart --latent 2 --seed 1"],
    )
    quickstart.add_argument(
        "--out",
        metavar="DIR",
        default="quickstart",
        help="folder for report.html and posterior/ (default: %(default)s)",
    )
    quickstart.add_argument(
        "--epochs", type=_whole(1), metavar="N", help="passes over the images, at most (default: 120, about 30 s)"
    )
    quickstart.add_argument(
        "--particles", type=_whole(1), metavar="K", help="draws of the guide in the bound (default: 16)"
    )
    quickstart.add_argument("--latent", type=_whole(1), metavar="D", help="size of an image's code (default: 16)")
    quickstart.add_argument(
        "--refine",
        type=_whole(0),
        metavar="N",
        help="steps by which the codes of test images are refined after training (default: 200, about 20 s)",
    )
    quickstart.add_argument(
        "--seed", type=_whole(0), default=0, metavar="N", help="makes the run repeatable (default: 0)"
    )
    quickstart.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, ... (default: a GPU where there is one)"
    )

    _command(
        commands,
        "datasets",
        _datasets,
        "list the data sets: shapes, where they come from, and whether they are at hand",
        "Lists the data sets that pyro_ae.datasets.load knows. Those that are not embedded are looked for in the "
        "folder that the environment variable PYRO_AE_DATA names, and downloaded when they are first loaded.",
        ["pyro-ae datasets", "PYRO_AE_DATA=~/data pyro-ae datasets"],
    )

    cite = _command(
        commands,
        "cite",
        _cite,
        "give the references of a model, guide, objective or engine",
        "Prints the papers behind parts of the package, as their docstrings give them. A name is that of a class or "
        "function, of the file it is in, or a dotted one; upper and lower case are the same.",
        ["pyro-ae cite vae", "pyro-ae cite iwae amortized", "pyro-ae cite pyro_ae.bounds.elbo", "pyro-ae cite"],
    )
    cite.add_argument("names", nargs="*", metavar="NAME", help="what to cite (default: everything)")

    reproduce = _command(
        commands,
        "reproduce",
        _reproduce,
        "run a paper's comparison, and check its claims",
        "Runs a paper's method and its baselines under one protocol, checks the paper's claims on the results, and "
        "prints them beside the paper's own numbers. Without a name it lists the papers.",
        [
            "pyro-ae reproduce",
            "pyro-ae reproduce importance_weighted_autoencoder",
            "pyro-ae reproduce importance_weighted_autoencoder --scale full --seed 1 --out table.csv",
        ],
    )
    reproduce.add_argument("name", nargs="?", metavar="NAME", help="which paper (default: list them)")
    reproduce.add_argument(
        "--scale",
        default="small",
        metavar="SCALE",
        help="small, within seconds; full, the paper's own; or another that the paper has (default: %(default)s)",
    )
    reproduce.add_argument(
        "--seed", type=_whole(0), default=0, metavar="N", help="makes the run repeatable (default: 0)"
    )
    reproduce.add_argument("--out", metavar="FILE", help="where to write the table, as CSV")
    return parser


def _command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], None],
    short: str,
    text: str,
    examples: Sequence[str],
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=short,
        description=text,
        epilog="\n  ".join(["examples:", *examples]),
        formatter_class=_Help,
    )
    parser.set_defaults(run=run)
    return parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """Wraps the description, and leaves the examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value < 2**63:  # more than that torch cannot be seeded with
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return value

    return parse


# ------------------------------------------------------------------------------------------ commands


def _quickstart(arguments: argparse.Namespace) -> None:
    from .quickstart import run

    options = {name: getattr(arguments, name) for name in ("epochs", "particles", "latent", "refine")}
    given = {name: value for name, value in options.items() if value is not None}
    run(arguments.out, seed=arguments.seed, device=arguments.device, **given)


def _datasets(arguments: argparse.Namespace) -> None:
    from . import datasets

    rows = [datasets.describe(name) for name in datasets.names()]
    columns = ["name", "shape", "at hand", "source"]
    lines = [columns, *([row[c] for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print('\nLoad one with pyro_ae.datasets.load("digits"). Shapes are train + validation + test x row.')


def _cite(arguments: argparse.Namespace) -> None:
    from .cite import cite

    known = _citable()
    found: dict[str, Any] = {}
    for name in arguments.names:
        found |= _resolve(name, known)  # all of them first: no half an answer before an error
    if not arguments.names:
        found = {name: thing for name, thing in sorted(known.items()) if not inspect.ismodule(thing)}
    texts = {name: cite(thing) for name, thing in found.items()}
    for name, text in texts.items():
        print(name, *text.splitlines(), sep="\n  ")


def _reproduce(arguments: argparse.Namespace) -> None:
    from .reproduce import load, names, paragraphs, reproduce

    if arguments.name is None:
        papers = {name: load(name) for name in names()}
        width = max(map(len, papers))
        for name, paper in papers.items():
            print(f"{name:{width}}  {paragraphs(paper)[0]} Scales: {', '.join(paper.SCALES)}.")
        return
    if arguments.out:
        open(arguments.out, "a").close()  # a file that cannot be written is better known before the run
    report = reproduce(arguments.name, arguments.scale, arguments.seed, progress=True)
    print(report)
    if arguments.out:
        report.table.to_csv(arguments.out, index=False)


def _citable() -> dict[str, Any]:
    """Dotted name to whatever has references: in the core, the models and the guides, and in the papers' files."""
    import pyro_ae

    from . import guides, models, papers
    from .cite import references

    names = {info.name for info in pkgutil.walk_packages(pyro_ae.__path__, "pyro_ae.") if not info.ispkg}
    for package in (models, guides, papers):
        names |= {info.name for info in pkgutil.iter_modules(package.__path__, package.__name__ + ".")}
    found: dict[str, Any] = {}
    for name in sorted(names):
        module = importlib.import_module(name)
        inside = {
            f"{name}.{key}": thing
            for key, thing in vars(module).items()
            if getattr(thing, "__module__", None) == name and references(thing)
        }
        if inside or references(module):
            found |= {name: module} | inside
    return found


def _resolve(name: str, known: dict[str, Any]) -> dict[str, Any]:
    """What a name stands for: the whole or the end of a dotted one, in any case; things before files."""
    ending = "." + name.lower()
    fitting = {full: thing for full, thing in known.items() if ("." + full.lower()).endswith(ending)}
    things = {full: thing for full, thing in fitting.items() if not inspect.ismodule(thing)}
    if things or fitting:
        return things or fitting
    if name.startswith("pyro_ae."):
        with contextlib.suppress(ImportError, AttributeError):
            return {name: pkgutil.resolve_name(name)}
    short = {full.rpartition(".")[2] for full in known}
    lower = {s.lower(): s for s in sorted(short)}
    close = get_close_matches(name.rpartition(".")[2].lower(), lower, 3)
    raise ValueError(
        f"there is nothing called {name!r} to cite"
        + (f"; did you mean {' or '.join(repr(lower[c]) for c in close)}?" if close else ".")
        + " 'pyro-ae cite' lists everything"
    )
