"""The parameters of a model and its guide: those of their modules, and a Pyro param store of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .data import call_with


def module_of(fn: Any) -> nn.Module | None:
    """The module behind a model or guide: itself, the owner of a method, or what a handler wraps."""
    for _ in range(20):  # handlers wrap handlers
        if fn is None or isinstance(fn, nn.Module):
            return fn
        owner = getattr(fn, "__self__", None)
        if isinstance(owner, nn.Module):
            return owner
        fn = getattr(fn, "__wrapped__", None) or getattr(fn, "func", None) or getattr(fn, "fn", None)
    return None


class Parameters:
    """What is learnt, under one roof.

    Modules are found from the model and the guide; ``pyro.param`` and ``pyro.module`` write to a param store
    that is this fit's own and in place only within :meth:`scope`, so two fits never meet in the global one.

    Arguments:
        model: a callable with Pyro sites.
        guide: likewise, or None.
    """

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any] | None = None) -> None:
        self.modules = {
            side: module for side, fn in (("model", model), ("guide", guide)) if (module := module_of(fn)) is not None
        }
        self.registered: dict[str, nn.Module] = {}  # prefix in the param store to what only pyro.module knows
        self._store: Any = {"params": {}, "constraints": {}}
        self._depth = 0

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Put this fit's param store in the place of the global one."""
        store = pyro.get_param_store()
        if self._depth:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            return
        outer = store.get_state()
        store.clear()
        store.set_state(self._store)
        self._depth = 1
        try:
            yield
        finally:
            self._depth = 0
            self._store = store.get_state()
            store.clear()
            store.set_state(outer)

    @contextmanager
    def discover(self) -> Iterator[None]:
        """See a first run of the program: keep the networks that it registers, and own what it makes.

        Networks of a plain function are known by the parameters that ``pyro.module`` stored; their buffers and
        their mode are the program's as well. A tensor that ``pyro.param`` was given is the user's: two fits of one
        function would train the same.
        """
        called: list[nn.Module] = []
        hook = register_module_forward_pre_hook(lambda module, _: called.append(module))
        before = set(self._stored())
        try:
            yield
        finally:
            hook.remove()
        with self.scope():
            store = pyro.get_param_store()
            for name, p in list(store._params.items()):
                if name not in before and not isinstance(p, nn.Parameter):
                    store._param_to_name.pop(p)
                    store._params[name] = own = p.detach().clone().requires_grad_()
                    store._param_to_name[own] = name
            names = {id(p): name for name, p in store._params.items() if "$$$" in name}
        for module in called:
            prefixes = (names[id(p)].removesuffix(n) for n, p in module.named_parameters() if id(p) in names)
            self.registered |= {prefix: module for prefix in [*prefixes][:1]}

    def share(self, other: Parameters) -> None:
        """Use the networks and the param store that another program found and made."""
        self.registered = dict(other.registered)
        self._store = other._store

    @property
    def _all_modules(self) -> dict[str, nn.Module]:
        return {f"{side}.": module for side, module in self.modules.items()} | self.registered

    def submodules(self) -> Iterator[nn.Module]:
        for module in self._all_modules.values():
            yield from module.modules()

    def _stored(self) -> Mapping[str, Tensor]:
        return pyro.get_param_store()._params if self._depth else self._store["params"]

    def named(self) -> dict[str, Tensor]:
        """Name to parameter, unconstrained; a parameter that goes by two names is listed once."""
        named: dict[str, Tensor] = {}
        seen: set[int] = set()
        for side, module in self.modules.items():
            for name, p in module.named_parameters():
                if id(p) not in seen:
                    seen.add(id(p))
                    named[f"{side}.{name}"] = p
        for name, stored in self._stored().items():
            if id(stored) not in seen:
                seen.add(id(stored))
                named[name] = stored
        return named

    def trainable(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.named().items() if p.requires_grad}

    def store_size(self) -> int:
        return len(self._stored())

    def sampled_by(self, guide: Callable[..., Any] | None, batch: Any) -> set[str]:
        """The names in the param store that a guide uses."""
        if guide is None:
            return set()
        args, kwargs = call_with(batch)
        with self.scope(), torch.no_grad(), torch.random.fork_rng(devices=()):
            trace = poutine.trace(guide, param_only=True).get_trace(*args, **kwargs)
        return set(trace.param_nodes)

    def constrained(self) -> dict[str, Tensor]:
        """The values of ``pyro.param`` sites that belong to no module, as the program sees them."""
        own = {id(p) for m in self.modules.values() for p in m.parameters()}
        with self.scope(), torch.no_grad():
            store = pyro.get_param_store()
            return {name: store[name].clone() for name in store if id(store._params[name]) not in own}

    def buffers(self) -> dict[str, Tensor]:
        """Buffers that a module saves, such as running means."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for prefix, module in self._all_modules.items():
            kept = module.state_dict()
            for name, buffer in module.named_buffers():
                if name in kept and id(buffer) not in seen:
                    seen.add(id(buffer))
                    found[prefix + name] = buffer
        return found

    def state(self) -> dict[str, Tensor]:
        """A copy of all parameters and buffers."""
        return {n: t.detach().clone() for n, t in (self.named() | self.buffers()).items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy a :meth:`state` back in place.

        Raises:
            ValueError: where names or shapes differ; it says which.
        """
        ours = self.named() | self.buffers()
        problems = [f"'{n}' is missing from the file" for n in ours if n not in state]
        problems += [f"'{n}' is in the file but not in the model or guide" for n in state if n not in ours]
        problems += [
            f"'{n}' is {tuple(ours[n].shape)} here and {tuple(t.shape)} in the file"
            for n, t in state.items()
            if n in ours and ours[n].shape != t.shape
        ]
        if problems:
            raise ValueError("the parameters do not match: " + "; ".join(problems[:8]))
        with torch.no_grad():
            for name, tensor in ours.items():
                tensor.copy_(state[name])

    def to(self, device: torch.device) -> None:
        for module in self._all_modules.values():
            module.to(device)
        for p in self.named().values():
            p.data = p.data.to(device)

    @contextmanager
    def mode(self, train: bool) -> Iterator[None]:
        """Modules in training or evaluation mode, and afterwards as they were."""
        modules = self._all_modules.values()
        before = [(m, m.training) for module in modules for m in module.modules()]
        for module in modules:
            module.train(train)
        try:
            yield
        finally:
            for m, training in before:
                m.training = training


def unknown_leaves(loss: Tensor, known: Mapping[str, Tensor]) -> list[Tensor]:
    """Leaves of a loss that require a gradient and are not among the known parameters."""
    ids = {id(p) for p in known.values()}
    stack, seen, found = [loss.grad_fn], set(), []
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in ids:
            found.append(leaf)
        stack.extend(n for n, _ in node.next_functions)
    return found
