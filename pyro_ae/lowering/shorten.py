"""Graphs of ATen ops made shorter, to the same values."""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

SMALL = 2**22
"""Elements of the largest constant that is kept in place of being computed anew."""


def op_name(op: Any) -> str:
    return str(op).split(".")[1] if str(op).startswith("aten.") else str(op)


def add_input(graph: fx.Graph, name: str, after: fx.Node | None) -> fx.Node:
    first = next(iter(graph.nodes))
    with graph.inserting_before(first) if after is None else graph.inserting_after(after):
        return graph.placeholder(name.lstrip("_"))


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None)


def base_of(node: fx.Node) -> fx.Node:
    """The node whose memory a view of it, a part of it or what was written to it in place shows."""
    while node.op == "call_function":
        schema = _schema(node)
        if node.target is getitem:
            source = node.args[0]
        elif op_name(node.target) == "_unsafe_view" or (schema and any(r.alias_info for r in schema.returns)):
            source = node.args[0] if node.args else None
        else:
            return node
        if not isinstance(source, fx.Node):
            return node
        node = source
    return node


def written(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose memory is written to after they are made."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        schema = _schema(node)
        if schema is None:
            continue
        given = {a.name: v for a, v in zip(schema.arguments, node.args, strict=False)} | dict(node.kwargs)
        # a batch norm writes to its running statistics, though its schema does not say so
        targets = [given.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        targets += [given.get(n) for n in ("running_mean", "running_var") if "batch_norm" in op_name(node.target)]
        found |= {base_of(n) for n in tree_leaves(targets) if isinstance(n, fx.Node)}
    return found


def has_effect(node: fx.Node) -> bool:
    if node.op != "call_function":
        return True
    schema = _schema(node)
    # a draw moves the generator even where nothing uses it; an op without a result checks something
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return schema is not None and (schema.is_mutable or random or not schema.returns)


def leave_out(graph: fx.Graph, same_as: Callable[[fx.Node], fx.Node | None]) -> None:
    """Leave out ops that give what they are given."""
    for node in list(graph.nodes):
        if node.op == "call_function" and (source := same_as(node)) is not None:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _alike(node: fx.Node, source: Any) -> bool:
    """Whether two nodes have the same shape, strides and dtype."""
    ours, theirs = node.meta.get("val"), source.meta.get("val") if isinstance(source, fx.Node) else None
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor) or ours.dtype != theirs.dtype:
        return False
    return ours.shape == theirs.shape and ours.stride() == theirs.stride()


def same(node: fx.Node, fixed: set[fx.Node]) -> fx.Node | None:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    name = op_name(node.target)
    if name in ("detach", "alias"):
        return source
    if name == "t" and op_name(source.target) == "t":
        return source.args[0]  # type: ignore[return-value]
    if name in ("view", "_unsafe_view", "expand") and _alike(node, source):
        return source
    # the derivative of a square has a power of one
    power = name == "pow" and node.args[1] in (1, 1.0) and not {node, base_of(source)} & fixed
    if power and (_alike(node, source) or _takes_the_place(source, node)):
        return source
    return None


def _takes_the_place(source: fx.Node, node: fx.Node) -> bool:
    """Whether the users of a node can take its source, and what they give is laid out as before."""
    ours, theirs = node.meta.get("val"), source.meta.get("val")
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor) or ours.dtype != theirs.dtype:
        return False
    strides = list(theirs.stride())
    in_order = ours.is_contiguous() and strides == sorted(strides, reverse=True) and 0 not in strides
    return ours.shape == theirs.shape and in_order and all(op_name(user.target) in POINTWISE for user in node.users)


NEUTRAL = {"add": 0.0, "sub": 0.0, "mul": 1.0, "div": 1.0}


def neutral(node: fx.Node, constants: dict[fx.Node, Tensor], fixed: set[fx.Node]) -> fx.Node | None:
    """The first argument, where the second is nothing to it: a standard normal prior subtracts zeros."""
    name = op_name(node.target)
    if name not in NEUTRAL or len(node.args) != 2 or node.kwargs or not _alike(node, node.args[0]):
        return None
    source, other = node.args
    assert isinstance(source, fx.Node)
    if {node, base_of(source)} & fixed or source.meta["val"].dtype not in (torch.float32, torch.float64):
        return None
    value = constants.get(other) if isinstance(other, fx.Node) else other
    if isinstance(value, Tensor):
        return source if bool((value == NEUTRAL[name]).all()) else None
    return source if isinstance(value, (int, float)) and value == NEUTRAL[name] else None


BY_SIZE = ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")
"""Ops of which only the size and the dtype of the input matter."""


def fold(
    graph: fx.Graph, held: dict[fx.Node, Tensor], literals: set[fx.Node], fixed: set[fx.Node]
) -> dict[fx.Node, Tensor]:
    """Compute now what no input and no held tensor has a part in, such as the log-scale of a standard normal."""
    known: dict[fx.Node, Any] = {n: held[n] for n in literals}
    for node in list(graph.nodes):
        if node.op != "call_function" or has_effect(node) or "empty" in op_name(node.target) or base_of(node) in fixed:
            continue
        by_size = op_name(node.target) in BY_SIZE
        if not by_size and not all(n in known for n in node.all_input_nodes):
            continue
        val = node.meta.get("val")
        if isinstance(val, Tensor) and val.numel() > SMALL:
            continue
        given = {n: _like(n) if by_size else known[n] for n in node.all_input_nodes}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
        with torch.no_grad():
            known[node] = node.target(*args, **kwargs)
    constants: dict[fx.Node, Tensor] = {}
    for node, value in known.items():
        if node not in held and isinstance(value, Tensor) and any(user not in known for user in node.users):
            last = [n for n in graph.nodes if n.op == "placeholder"][-1:]
            constant = add_input(graph, f"constant_{node.name}", last[0] if last else None)
            constant.meta = dict(node.meta)
            constants[constant] = value
            node.replace_all_uses_with(constant)
    return constants


def _like(node: fx.Node) -> Tensor:
    val = node.meta["val"]
    return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=val.device)


def merge(graph: fx.Graph, fixed: set[fx.Node]) -> None:
    """Compute once what is computed twice."""
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or has_effect(node):
            continue
        if any(base_of(n) in fixed for n in (node, *node.all_input_nodes)) or "empty" in op_name(node.target):
            continue
        key = (node.target, repr(node.args), repr(sorted(node.kwargs.items())))
        if key in first:
            node.replace_all_uses_with(first[key])
            graph.erase_node(node)
        else:
            first[key] = node


UNARY = ("neg", "exp", "log", "pow", "mul", "div", "add", "sub", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid")

POINTWISE = (*UNARY, "where", "addcmul", "addcdiv", "sigmoid_backward", "tanh_backward", "maximum", "minimum")


def narrow(graph: fx.Graph, fixed: set[fx.Node]) -> None:
    """Do once what is done to all copies of an element, and change signs of sums in place of terms."""
    for node in list(graph.nodes):
        source = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(source, fx.Node) or {base_of(node), base_of(source)} & fixed:
            continue
        name, val, inner = op_name(node.target), node.meta.get("val"), source.args[:1]
        if not isinstance(val, Tensor) or not inner or not isinstance(inner[0], fx.Node) or inner[0] in fixed:
            continue
        if name == "sum" and op_name(source.target) == "neg" and len(source.users) == 1:
            order = [(node.target, node.args[1:], node.kwargs, val), (source.target, (), {}, val)]
        elif (
            name in UNARY
            and op_name(source.target) == "expand"
            and len(node.all_input_nodes) == 1
            and all(op_name(user.target) in POINTWISE for user in node.users)
            and isinstance(few := inner[0].meta.get("val"), Tensor)
        ):
            small = torch.empty(few.shape, dtype=val.dtype, device="meta")
            order = [
                (node.target, node.args[1:], node.kwargs, small),
                (source.target, source.args[1:], {}, small.expand(val.shape)),
            ]
        else:
            continue
        last = inner[0]
        with graph.inserting_before(node):
            for target, args, kwargs, shown in order:
                last = graph.call_function(target, (last, *args), kwargs)
                last.meta["val"] = shown
        node.replace_all_uses_with(last)
        graph.erase_node(node)


FRESH = (*POINTWISE, "mm", "addmm", "bmm", "sum")
"""Ops whose result has memory of its own."""

IN_PLACE: dict[str, Any] = {n: getattr(Tensor, f"{n}_") for n in ("add", "sub", "mul", "div", "neg", "exp", "tanh")}


def reuse(graph: fx.Graph, fixed: set[fx.Node]) -> None:
    """Write to the memory of what is not needed any more, as torch's own formulas of gradients do."""
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_function" and node.args else None
        if op_name(node.target) not in IN_PLACE or not isinstance(source, fx.Node) or {node, source} & fixed:
            continue
        owned = op_name(source.target) in FRESH and len(source.users) == 1 and not source.kwargs.get("out")
        if owned and node.all_input_nodes.count(source) == 1 and _alike(node, source):
            val = source.meta["val"]
            if val.is_contiguous() and val.is_floating_point() and node.args.count(source) == 1:
                node.target = IN_PLACE[op_name(node.target)]
