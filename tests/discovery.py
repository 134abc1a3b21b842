"""Finds what to parametrise tests with, by package name: by path, models/vae.py has no parent package."""

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

ZOO = ("pyro_ae.guides", "pyro_ae.models")
EVERYTHING = ("pyro_ae", *ZOO, "pyro_ae.papers")


def names(*packages: str) -> list[str]:
    """Names of the packages and of every module in them, sorted; only packages are imported for it."""
    found = set(packages)
    for package in packages:
        for info in pkgutil.iter_modules(importlib.import_module(package).__path__, package + "."):
            found |= set(names(info.name)) if info.ispkg else {info.name}
    return sorted(name for name in found if not name.endswith(".__main__"))  # that one runs when imported


def modules(*packages: str) -> Iterator[tuple[str, ModuleType]]:
    """Name and module of every file in the packages (models and guides by default), sorted; no __init__."""
    for name in names(*(packages or ZOO)):
        module = importlib.import_module(name)
        if not hasattr(module, "__path__"):
            yield name, module
