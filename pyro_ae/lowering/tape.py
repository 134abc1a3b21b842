"""One run of a function of tensors, recorded: the ATen ops that it did, to be done again without Python or Pyro."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .capture import CaptureError

Values = list["Tensor | None"]

BINDINGS: dict[str, Any] = {
    name: getattr(torch, name)
    for name in (
        "add", "addmm", "bmm", "cat", "clamp", "cos", "div", "erf", "exp", "expm1", "ge", "gt", "index_select", "le",
        "lgamma", "log", "log1p", "logical_and", "logsumexp", "lt", "matmul", "maximum", "minimum", "mm", "mul", "neg",
        "pow", "reciprocal", "relu", "rsqrt", "rsub", "sigmoid", "sin", "sqrt", "squeeze", "stack", "sub", "sum", "t",
        "tanh", "transpose", "unsqueeze", "where",
    )
} | {name: getattr(Tensor, name) for name in ("expand", "normal_", "view")}  # fmt: skip
"""Python's own bindings of ops, which take half the time of a call by ``torch.ops``."""

SMALL = 2**22
"""Elements of the largest constant that a tape keeps in place of computing it anew."""


class Tape:
    """What a function did in one run, as a list of ops, to be replayed on other inputs.

    Tensors that the function saw besides its inputs, such as parameters and buffers, are held as they are: their later
    values count, and what the run wrote to them a replay writes as well. Random numbers are drawn anew, in the order of
    the run, from torch's own generators. All else is as it was in that run: sizes, settings and the ways of every if.

    Attributes:
        graph: nodes of ATen ops, from the inputs and the held tensors.
        held: the tensors that the graph takes after its inputs.
        written: those of them that a replay changes.
    """

    def __init__(self, graph: fx.Graph, held: list[Tensor], written: list[Tensor], root: fx.GraphModule) -> None:
        self.graph, self.held, self.written, self._root = graph, held, written, root
        code = graph.python_code("self")
        scope = dict(code.globals)
        exec(code.src, scope)
        self._forward: Callable[..., Values] = scope["forward"]

    def __call__(self, *inputs: Tensor) -> Values:
        """Do it again."""
        with torch._C._AutoDispatchBelowAutograd():
            return self._forward(None, *inputs, *self.held)

    @property
    def module(self) -> fx.GraphModule:
        """The graph as a module of the inputs and the held tensors, for a compiler."""
        return fx.GraphModule(self._root, self.graph)


def record(fn: Callable[..., Values], *inputs: Tensor, live: Iterable[Tensor]) -> tuple[Values, Tape]:
    """Run a function, with all its effects, and record what it does.

    Arguments:
        fn: a function of tensors to a list of tensors, or None for some; with gradients by ``torch.autograd.grad``.
        inputs: its arguments.
        live: tensors besides them whose values change from run to run, so that no ``if`` may depend on them.

    Returns:
        What the function gave, and the tape.

    Raises:
        CaptureError: where control flow or sizes depend on the values of the inputs or of live tensors.

    Example:
        >>> weight = torch.ones(2)
        >>> values, tape = record(lambda x: [(x * weight).sum()], torch.ones(2), live=[weight])
        >>> weight.fill_(3.0)
        tensor([3., 3.])
        >>> values, tape(torch.ones(2))
        ([tensor(2.)], [tensor(6.)])
    """
    results: list[Values] = []
    live = list(live)

    def run(*tensors: Tensor) -> Values:
        with _Watch([*tensors, *live]), _Unchecked():
            out = fn(*tensors)
        results.append([None if t is None else t.detach() for t in out])
        return out

    try:
        module = make_fx(run)(*inputs)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, AssertionError, CaptureError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CaptureError(what + _where(error)) from error
    return results[0], _tape(module, live)


class _Watch(TorchDispatchMode):
    """Refuse to let Python see values that will be others in the next run; let it see those that stay."""

    def __init__(self, changing: Iterable[Tensor]) -> None:
        super().__init__()
        self.changing: dict[int, Any] = {}  # the storages; held, so that no other takes the place of one
        self._mark(changing)

    def _mark(self, tensors: Iterable[Any]) -> None:
        for t in tensors:
            if isinstance(t, Tensor) and t.layout is torch.strided:
                storage = t.untyped_storage()
                self.changing[storage._cdata] = storage

    def _changes(self, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        return value.layout is not torch.strided or value.untyped_storage()._cdata in self.changing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        random = torch.Tag.nondeterministic_seeded in func.tags
        changes = random or any(map(self._changes, given))
        if torch.Tag.data_dependent_output in func.tags:
            if changes:
                raise CaptureError(
                    f"control flow depends on values that change from step to step (an if, a loop or .item(); {func})"
                )
            with disable_proxy_modes_tracing():
                return func(*args, **kwargs)
        if changes and _sized_by_values(func, args):
            raise CaptureError(f"sizes depend on values that change from step to step ({func})")
        out = func(*args, **kwargs)
        if changes:
            self._mark([*tree_leaves(out), *(given if func._schema.is_mutable else [])])
        return out


class _Unchecked(TorchFunctionMode):
    """Do without the looks at values that torch takes to check them, and to give the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is one_hot and (classes := (*args[1:], kwargs.get("num_classes", -1))[0]) > 0:
            return (args[0].unsqueeze(-1) == torch.arange(classes, device=args[0].device)).long()
        return func(*args, **kwargs)


def _where(error: BaseException) -> str:
    """The line that failed, of the last file that is not torch's or Pyro's."""
    place, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        if name.split(".")[0] not in ("torch", "pyro", "contextlib") and name != __name__:
            place = f" [{name}, line {trace.tb_lineno}, in {trace.tb_frame.f_code.co_name}]"
        trace = trace.tb_next
    return place


def _sized_by_values(func: Any, args: tuple) -> bool:
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if _name(func) in ("index", "_unsafe_index"):
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return True


def _name(op: Any) -> str:
    return str(op).split(".")[1] if str(op).startswith("aten.") else str(op)


# -------------------------------------------------------------------------------------------------- from run to tape


def _tape(module: fx.GraphModule, live: Sequence[Tensor]) -> Tape:
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    held = _hold(graph, module)
    literals = {n for n, t in held.items() if _is_literal(n) and not any(t is other for other in live)}
    fixed = _written(graph) | {_base(n) for n in graph.output_node().all_input_nodes}
    _simplify(graph, lambda node: _same(node, fixed))
    constants = _fold(graph, held, literals, fixed)
    _simplify(graph, lambda node: _neutral(node, constants, fixed))
    _merge(graph, fixed)
    graph.eliminate_dead_code(_has_effect)
    held |= constants
    for node in list(held):
        if not node.users:
            graph.erase_node(node)
            del held[node]
    order = [n for n in graph.nodes if n in held]
    written = _written(graph)
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = BINDINGS.get(_name(node.target), node.target)
    graph.lint()
    return Tape(graph, [held[n] for n in order], [held[n] for n in order if n in written], module)


def _hold(graph: fx.Graph, module: fx.GraphModule) -> dict[fx.Node, Tensor]:
    """Make inputs of the tensors that the run saw besides its own; each once, and each as itself."""
    last = [n for n in graph.nodes if n.op == "placeholder"][-1:]
    held: dict[fx.Node, Tensor] = {}
    nodes: dict[int, fx.Node] = {}
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        tensor = getattr(module, str(node.target))
        if id(tensor) not in nodes:
            nodes[id(tensor)] = _placeholder(graph, str(node.target), last[0] if last else None)
            last = [nodes[id(tensor)]]
            held[last[0]] = last[0].meta["val"] = tensor
        node.replace_all_uses_with(nodes[id(tensor)])
        graph.erase_node(node)
    return held


def _placeholder(graph: fx.Graph, name: str, after: fx.Node | None) -> fx.Node:
    first = next(iter(graph.nodes))
    with graph.inserting_before(first) if after is None else graph.inserting_after(after):
        return graph.placeholder(name.lstrip("_"))


def _is_literal(node: fx.Node) -> bool:
    """Whether a held tensor was made in the run, from numbers: all that is done with it is to lift it into the run."""
    return all(_name(user.target).startswith("lift_fresh") for user in node.users)


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None)


def _base(node: fx.Node) -> fx.Node:
    """The node whose memory a view of it, a part of it or what was written to it in place shows."""
    while node.op == "call_function":
        schema = _schema(node)
        if node.target is getitem:
            source = node.args[0]
        elif _name(node.target) == "_unsafe_view" or (schema and any(r.alias_info for r in schema.returns)):
            source = node.args[0] if node.args else None
        else:
            return node
        if not isinstance(source, fx.Node):
            return node
        node = source
    return node


def _written(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose memory is written to after they are made."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        schema = _schema(node)
        if schema is None:
            continue
        given = {a.name: v for a, v in zip(schema.arguments, node.args, strict=False)} | dict(node.kwargs)
        # a batch norm writes to its running statistics, though its schema does not say so
        targets = [given.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        targets += [given.get(n) for n in ("running_mean", "running_var") if "batch_norm" in _name(node.target)]
        found |= {_base(n) for n in tree_leaves(targets) if isinstance(n, fx.Node)}
    return found


def _has_effect(node: fx.Node) -> bool:
    if node.op != "call_function":
        return True
    schema = _schema(node)
    # a draw moves the generator even where nothing uses it; an op without a result checks something
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return schema is not None and (schema.is_mutable or random or not schema.returns)


def _simplify(graph: fx.Graph, same_as: Callable[[fx.Node], fx.Node | None]) -> None:
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


def _same(node: fx.Node, fixed: set[fx.Node]) -> fx.Node | None:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    name = _name(node.target)
    if name in ("detach", "alias"):
        return source
    if name == "t" and _name(source.target) == "t":
        return source.args[0]  # type: ignore[return-value]
    if name in ("view", "_unsafe_view", "expand") and _alike(node, source):
        return source
    # the derivative of a square has a power of one
    if name == "pow" and node.args[1] in (1, 1.0) and _alike(node, source) and not {node, _base(source)} & fixed:
        return source
    return None


NEUTRAL = {"add": 0.0, "sub": 0.0, "mul": 1.0, "div": 1.0}


def _neutral(node: fx.Node, constants: dict[fx.Node, Tensor], fixed: set[fx.Node]) -> fx.Node | None:
    """The first argument, where the second is nothing to it: a standard normal prior subtracts zeros."""
    name = _name(node.target)
    if name not in NEUTRAL or len(node.args) != 2 or node.kwargs or not _alike(node, node.args[0]):
        return None
    source, other = node.args
    assert isinstance(source, fx.Node)
    if {node, _base(source)} & fixed or source.meta["val"].dtype not in (torch.float32, torch.float64):
        return None
    value = constants.get(other) if isinstance(other, fx.Node) else other
    if isinstance(value, Tensor):
        return source if bool((value == NEUTRAL[name]).all()) else None
    return source if isinstance(value, (int, float)) and value == NEUTRAL[name] else None


BY_SIZE = ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")
"""Ops of which only the size and the dtype of the input matter."""


def _fold(
    graph: fx.Graph, held: dict[fx.Node, Tensor], literals: set[fx.Node], fixed: set[fx.Node]
) -> dict[fx.Node, Tensor]:
    """Compute now what no input and no held tensor has a part in, such as the log-scale of a standard normal."""
    known: dict[fx.Node, Any] = {n: held[n] for n in literals}
    for node in list(graph.nodes):
        if node.op != "call_function" or _has_effect(node) or "empty" in _name(node.target) or _base(node) in fixed:
            continue
        by_size = _name(node.target) in BY_SIZE
        if not by_size and not all(n in known for n in node.all_input_nodes):
            continue
        val = node.meta.get("val")
        if isinstance(val, Tensor) and val.numel() > SMALL:
            continue
        given = {n: _like(n) if by_size else known[n] for n in node.all_input_nodes}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
        with torch.no_grad():
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    constants: dict[fx.Node, Tensor] = {}
    for node, value in known.items():
        if node not in held and isinstance(value, Tensor) and any(user not in known for user in node.users):
            last = [n for n in graph.nodes if n.op == "placeholder"][-1:]
            constant = _placeholder(graph, f"constant_{node.name}", last[0] if last else None)
            constant.meta = dict(node.meta)
            constants[constant] = value
            node.replace_all_uses_with(constant)
    return constants


def _like(node: fx.Node) -> Tensor:
    val = node.meta["val"]
    return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=val.device)


def _merge(graph: fx.Graph, fixed: set[fx.Node]) -> None:
    """Compute once what is computed twice."""
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or _has_effect(node):
            continue
        if any(_base(n) in fixed for n in (node, *node.all_input_nodes)) or "empty" in _name(node.target):
            continue
        key = (node.target, repr(node.args), repr(sorted(node.kwargs.items())))
        if key in first:
            node.replace_all_uses_with(first[key])
            graph.erase_node(node)
        else:
            first[key] = node
