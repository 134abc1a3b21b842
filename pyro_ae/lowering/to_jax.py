"""A captured graph as a JAX function."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map, tree_unflatten

from . import jax_linalg  # noqa: F401  enters its ops
from .capture import Graph, site_of
from .jax_ops import OPS

# JAX would take three quarters of a GPU's memory when it first computes, and torch is there as well
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

UNUSED = frozenset(("layout", "device", "pin_memory", "memory_format", "non_blocking"))
"""Arguments that are about where and how a tensor is stored."""


class MissingOpError(ValueError):
    """A graph holds an op that has no entry."""


def array(tensor: Tensor) -> Any:
    """A tensor as an array of JAX; floating point numbers in the precision that JAX is set to."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg()
    return jnp.asarray(plain.double().numpy() if plain.is_floating_point() else plain.numpy(), dtype(plain.dtype))


def arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Each of some named tensors as an array."""
    return {name: array(t) for name, t in tensors.items()}


def tensor(value: Any) -> Tensor:
    """An array of JAX as a tensor of its own."""
    return torch.from_numpy(np.array(value))


def lower(graph: Graph) -> Callable[..., Any]:
    """A graph as a function of the same nested arguments, with arrays for tensors.

    The function takes the graph's constants last, name to array, so that they are arguments of what is compiled.
    Floating point numbers have the precision that JAX is set to, whatever they had in torch.

    Arguments:
        graph: what ``capture`` gives.

    Raises:
        MissingOpError: for an op without an entry in ``jax_ops.OPS``; it names the op and the sample site.

    Example:
        >>> from pyro_ae.lowering.capture import capture
        >>> graph = capture(lambda a: (a * 2).sum(), torch.ones(3))
        >>> float(lower(graph)(jnp.ones(3), constants={}))
        6.0
    """
    own = fx.Graph()  # a copy that does not hold on to the constants
    outputs = own.graph_copy(graph.module.graph, {})
    nodes, spec, structure = list(own.nodes), graph.inputs, graph.outputs
    check(nodes)

    def run(*args: Any, constants: dict[str, Any]) -> Any:
        inputs = iter(spec.flatten_up_to(args))
        values: dict[fx.Node, Any] = {}
        for node in nodes:
            if node.op == "placeholder":
                values[node] = _cast(next(inputs), node.meta.get("val"))
            elif node.op == "get_attr":
                values[node] = constants[str(node.target)]
            else:
                values[node] = _call(node, values)
        leaves: Any = fx.node.map_arg(outputs, values.__getitem__)
        return tree_unflatten(list(leaves), structure)

    return run


def check(nodes: list[fx.Node]) -> None:
    """Refuse what has no entry, all of it at once."""
    missing: dict[str, str] = {}
    for node in nodes:
        if node.op == "call_function" and node.target is not operator.getitem and _key(node) not in OPS:
            site = site_of(node)
            missing.setdefault(str(node.target), f" (at site '{site}')" if site else "")
    if missing:
        raise MissingOpError(
            "these ops of the model have no translation to JAX: "
            + ", ".join(f"{name}{where}" for name, where in missing.items())
            + ". Run it in torch with nuts(backend='pyro'), or enter them in pyro_ae.lowering.jax_ops.OPS"
        )


def _key(node: fx.Node) -> str:
    return str(node.target).split(".")[1] if str(node.target).startswith("aten.") else str(node.target)


def _call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node.target is operator.getitem:
        return values[node.args[0]][node.args[1]]  # type: ignore[index]
    given, named = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    args = [tree_map(_plain, a) for a in given]
    kwargs = {n: _plain(v) for n, v in named.items() if n not in UNUSED and not (n == "dtype" and v is None)}
    result = OPS[_key(node)](*args, **kwargs)
    meta = node.meta.get("val")
    if isinstance(meta, (tuple, list)):
        return [_cast(r, m) for r, m in zip(result, meta, strict=False)]
    return _cast(result, meta)


def _plain(value: Any) -> Any:
    return dtype(value) if isinstance(value, torch.dtype) else value


def _cast(result: Any, meta: Any) -> Any:
    if not isinstance(meta, Tensor) or result is None:
        return result
    wanted = dtype(meta.dtype)
    return result if getattr(result, "dtype", None) == wanted else jnp.asarray(result, wanted)


def dtype(of: torch.dtype) -> Any:
    """JAX's dtype for torch's: all floating point numbers in the precision that JAX is set to."""
    if of.is_floating_point:
        return jax.dtypes.canonicalize_dtype(np.float64)
    if of.is_complex:
        return jax.dtypes.canonicalize_dtype(np.complex128)
    return jnp.bool_ if of == torch.bool else jax.dtypes.canonicalize_dtype(np.int64)
