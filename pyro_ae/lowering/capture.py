"""A pure function of tensors as an ATen graph: Pyro's handlers run once, and what they computed stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.fx.traceback import preserve_node_meta
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

# Kept whole: their own formulas lose precision or the gradient where these do not.
KEPT = (
    "logsumexp", "log_sigmoid_forward", "softplus", "xlogy", "logaddexp", "special_xlog1py", "_softmax", "_log_softmax",
    "gelu", "silu", "elu", "native_layer_norm", "special_log_ndtr", "special_ndtri", "special_erfcx",
    "linalg_vector_norm", "cumprod", "logcumsumexp", "index_put", "diag_embed", "mv", "addmv", "dot", "vdot",
)  # fmt: skip


class CaptureError(ValueError):
    """A function that is not a graph: what it does depends on values, or draws random numbers."""


@dataclass(frozen=True)
class Graph:
    """A captured function.

    Attributes:
        module: nodes of functional ATen ops over flat inputs.
        inputs: structure of the arguments.
        outputs: structure of the result.
        constants: name to tensor, of what the function saw besides its arguments: parameters, buffers and data.
    """

    module: fx.GraphModule
    inputs: TreeSpec
    outputs: TreeSpec
    constants: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, *args: Any) -> Any:
        """Replay the graph in torch."""
        return tree_unflatten(self.module(*self.flatten(args)), self.outputs)

    def flatten(self, args: tuple) -> list[Any]:
        """The leaves of arguments, in the order of the graph's inputs, whatever the order of a dict's keys."""
        return self.inputs.flatten_up_to(args)

    @property
    def signature(self) -> tuple:
        """What a compiled function depends on: the ops with their arguments, and shapes; not the constants' values."""
        lines = [node.format_node() for node in self.module.graph.nodes]
        shapes = [
            (tuple(v.shape), v.dtype) for n in self.module.graph.nodes if isinstance(v := n.meta.get("val"), Tensor)
        ]
        return (*lines, *shapes, str(self.inputs), *((n, tuple(t.shape), t.dtype) for n, t in self.constants.items()))

    @property
    def ops(self) -> set[str]:
        """Names of the distinct ops."""
        return {str(n.target) for n in self.module.graph.nodes if n.op == "call_function"}


def capture(fn: Callable[..., Any], *example: Any, replayed: bool = False) -> Graph:
    """The ATen graph of a function at the shapes of an example.

    Ops on constants alone are done once and for all where they give whole numbers or truth values, as those decide
    about shapes. Names of sites that were noted with ``torch.fx.traceback.annotate({"site": ...})`` are kept.

    Arguments:
        fn: a function of nested dicts, lists and tuples of tensors, to such; with no effects.
        example: its arguments.
        replayed: whether torch is to run the graph, so that ops are kept whole and all that constants alone decide is
            computed here. Their later values are not seen then.

    Raises:
        CaptureError: where control flow depends on values, or random numbers are drawn.

    Example:
        >>> graph = capture(lambda a: {"b": (a * 2).sum()}, torch.ones(3))
        >>> graph(torch.full((3,), 2.0))
        {'b': tensor(12.)}
    """
    flat, spec = tree_flatten(example)
    outputs: list[TreeSpec] = []

    def flat_fn(*tensors: Tensor) -> list[Tensor]:
        with _Reading(tensors):
            leaves, structure = tree_flatten(fn(*tree_unflatten(tensors, spec)))
        outputs.append(structure)
        return leaves

    rules = {} if replayed else core_aten_decompositions().items()
    table = {op: rule for op, rule in dict(rules).items() if _name(op) not in KEPT}
    detached = [t.detach() if isinstance(t, Tensor) else torch.as_tensor(t) for t in flat]
    try:
        # Some decompositions hold in-place ops, so they come before these are made functional; and at once, functorch
        # would refuse Pyro's own autograd functions.
        with pyro.validation_enabled(False), torch.no_grad(), preserve_node_meta():
            first = make_fx(flat_fn, decomposition_table=table)(*detached)
            second = make_fx(functionalize(lambda *a: fx.Interpreter(first).run(*a)))(*detached)
    except RuntimeError as error:
        if "data-dependent" in str(error) or "_local_scalar_dense" in str(error):
            raise CaptureError(
                "the function's control flow depends on the values of its tensors (an if, a loop or .item()), so it is "
                "no graph: write it with torch.where, or use what runs it as it is, such as nuts(backend='pyro')"
            ) from error
        raise
    for node in list(second.graph.nodes):
        if not node.users and str(node.target) == "aten._linalg_check_errors.default":
            second.graph.erase_node(node)  # it raises an error; in a graph what failed is NaN instead
    second.graph.eliminate_dead_code()
    _refuse_random(second)
    constants = _fold(second, numbers=replayed)
    second.recompile()
    return Graph(second, spec, outputs[0], constants)


class _Reading(TorchDispatchMode):
    """Let an ``if`` read what does not depend on the function's arguments, such as whether data have missing values.

    The tracer by itself lets no value of a tensor be read, though those of constants are what they are.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.dependent = WeakTensorKeyDictionary()
        self._mark(inputs)

    def _mark(self, tensors: Iterable[Any]) -> None:
        for t in tensors:
            if isinstance(t, Tensor):
                self.dependent[t] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        depends = any(isinstance(t, Tensor) and t in self.dependent for t in given)
        if not depends and torch.Tag.data_dependent_output in func.tags:
            with disable_proxy_modes_tracing():
                return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if depends:
            written = given if func._schema.is_mutable else []
            self._mark((*tree_leaves(out), *written))
        return out


def _name(op: Any) -> str:
    return str(op).split(".")[1] if str(op).startswith("aten.") else str(op)


def site_of(node: fx.Node) -> str | None:
    """The sample site that a node was noted for."""
    return (node.meta.get("custom") or {}).get("site")


def _refuse_random(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            where = f" at site '{site_of(node)}'" if site_of(node) else ""
            raise CaptureError(
                f"the function draws random numbers{where} ({node.target}), which a graph would repeat for ever: draw "
                "them outside, or in evaluation mode where it is dropout"
            )


def _fold(module: fx.GraphModule, numbers: bool) -> dict[str, Tensor]:
    """Do the ops on constants that give indices and masks, or all of them; and give the constants that are left."""
    known: dict[fx.Node, Any] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            known[node] = getattr(module, str(node.target))
        elif node.op == "call_function" and all(n in known for n in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
            value = known[node]
            if isinstance(value, Tensor) and (numbers or not value.is_floating_point()):
                constant = _constant(module, node, f"_folded_{node.name}", value)
                known[constant] = value
                node.replace_all_uses_with(constant)
                module.graph.erase_node(node)
        elif numbers and _copies(node):
            node.replace_all_uses_with(node.args[0])
        elif numbers and _name(node.target) in FILLED:
            val = node.meta["val"]
            value = torch.full(val.shape, FILLED[_name(node.target)], dtype=val.dtype, device=val.device)
            constant = _constant(module, node, f"_filled_{node.name}", value)
            known[constant] = value
            node.replace_all_uses_with(constant)
            module.graph.erase_node(node)
    for node in list(module.graph.nodes):
        if _name(node.target) in ("index", "index_put", "_unsafe_index", "_unsafe_index_put"):
            node.update_arg(1, [i for entry in node.args[1] for i in _positions(module, node, entry)])
    module.graph.eliminate_dead_code()
    used = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    return {name: getattr(module, name).detach() for name in sorted(used)}


FILLED = {"ones_like": 1, "zeros_like": 0, "new_zeros": 0, "new_ones": 1}
"""Ops of which only the shape of the input matters, and what they give."""


def _copies(node: fx.Node) -> bool:
    """Whether an op gives what it is given: the derivative of a square has a power of one, and detaches do nothing."""
    op = _name(node.target)
    return op in ("detach", "alias") or (op == "pow" and node.args[1] in (1, 1.0))


def _constant(module: fx.GraphModule, before: fx.Node, name: str, value: Tensor) -> fx.Node:
    module.register_buffer(name, value, persistent=False)
    with module.graph.inserting_before(before):
        constant = module.graph.get_attr(name)
    constant.meta = {k: v for k, v in before.meta.items() if k == "custom"}
    return constant


def _positions(module: fx.GraphModule, node: fx.Node, index: fx.Node | None) -> list[fx.Node | None]:
    """An index; and for a mask, which picks as many elements as it has truths, the places of these."""
    if index is None or index.op != "get_attr" or getattr(module, str(index.target)).dtype != torch.bool:
        return [index]
    places = getattr(module, str(index.target)).nonzero(as_tuple=True)
    return [_constant(module, node, f"{node.name}_{index.target}_{d}", p) for d, p in enumerate(places)]
