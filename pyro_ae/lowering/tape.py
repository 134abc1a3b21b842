"""One run of a function of tensors, recorded: the ATen ops that it did, to be done again without Python or Pyro."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .capture import CaptureError
from .shorten import (
    add_input,
    base_of,
    fold,
    has_effect,
    leave_out,
    merge,
    narrow,
    neutral,
    op_name,
    reuse,
    same,
    written,
)

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


class Tape:
    """What a function did in one run, as a list of ops, to be replayed on other inputs.

    Tensors that the function saw besides its inputs, such as parameters and buffers, are held as they are: their later
    values count, and what the run wrote to them a replay writes as well. Random numbers are drawn anew, in the order of
    the run, from torch's own generators. All else is as it was in that run: sizes, settings and the ways of every if.

    Attributes:
        graph: nodes of ATen ops, from the inputs and the held tensors.
        held: the tensors that the graph takes after its inputs.
        written: those of them that a replay changes.
        random: whether a replay draws random numbers.
    """

    def __init__(self, graph: fx.Graph, held: list[Tensor], written: list[Tensor], root: fx.GraphModule) -> None:
        self.graph, self.held, self.written, self._root = graph, held, written, root
        self.random = any(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) for n in graph.nodes)
        for node in graph.nodes:
            if node.op == "call_function":
                node.target = BINDINGS.get(op_name(node.target), node.target)
        graph.lint()
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
    if op_name(func) in ("index", "_unsafe_index"):
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return True


# -------------------------------------------------------------------------------------------------- from run to tape


def _tape(module: fx.GraphModule, live: Sequence[Tensor]) -> Tape:
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    held = _hold(graph, module)
    literals = {n for n, t in held.items() if _is_literal(n) and not any(t is other for other in live)}
    fixed = written(graph) | {base_of(n) for n in graph.output_node().all_input_nodes}
    leave_out(graph, lambda node: same(node, fixed))
    constants = fold(graph, held, literals, fixed)
    leave_out(graph, lambda node: neutral(node, constants, fixed))
    narrow(graph, fixed)
    merge(graph, fixed)
    graph.eliminate_dead_code(has_effect)
    held |= constants
    for node in list(held):
        if not node.users:
            graph.erase_node(node)
            del held[node]
    order = [n for n in graph.nodes if n in held]
    changed = written(graph)
    reuse(graph, fixed)
    return Tape(graph, [held[n] for n in order], [held[n] for n in order if n in changed], module)


def _hold(graph: fx.Graph, module: fx.GraphModule) -> dict[fx.Node, Tensor]:
    """Make inputs of the tensors that the run saw besides its own; each once, and each as itself."""
    last = [n for n in graph.nodes if n.op == "placeholder"][-1:]
    held: dict[fx.Node, Tensor] = {}
    nodes: dict[int, fx.Node] = {}
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        tensor = getattr(module, str(node.target))
        if id(tensor) not in nodes:
            nodes[id(tensor)] = add_input(graph, str(node.target), last[0] if last else None)
            last = [nodes[id(tensor)]]
            held[last[0]] = last[0].meta["val"] = tensor
        node.replace_all_uses_with(nodes[id(tensor)])
        graph.erase_node(node)
    return held


def _is_literal(node: fx.Node) -> bool:
    """Whether a held tensor was made in the run, from numbers: all that is done with it is to lift it into the run."""
    return all(op_name(user.target).startswith("lift_fresh") for user in node.users)
