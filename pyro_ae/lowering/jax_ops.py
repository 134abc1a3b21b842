"""ATen ops in JAX: one entry an op, under the name that all its overloads share.

Entries take what the op takes. A dtype among the arguments has been made JAX's before, and results are given the dtype
that they had in torch after, so no entry minds dtypes, devices, layouts or memory formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy import special

Array: TypeAlias = Any
OPS: dict[str, Callable[..., Any]] = {}


def op(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function under the names of ATen ops."""

    def enter(fn: Callable[..., Any]) -> Callable[..., Any]:
        OPS.update(dict.fromkeys(names, fn))
        return fn

    return enter


# ------------------------------------------------------------------------------------------ element by element


def _real(*values: Any) -> list[Array]:
    """In one floating point type: JAX's own do not differentiate beside whole numbers, such as counts."""
    return [jnp.asarray(v, jnp.result_type(*values)) for v in values]


SAME = """
    abs acos acosh asin asinh atan atanh atan2 ceil copysign cos cosh exp exp2 expm1 floor fmod hypot isfinite isinf
    isnan log10 log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor maximum minimum nextafter
    reciprocal remainder sign signbit sin sinc sinh sqrt square tan tanh trunc bitwise_and bitwise_not bitwise_or
    bitwise_xor dot outer flip heaviside
"""
OPS |= {name: getattr(jnp, name) for name in SAME.split()}
OPS |= {
    "digamma": special.digamma,
    "erf": special.erf,
    "erfc": special.erfc,
    "erfinv": special.erfinv,
    "i0": special.i0,
    "lgamma": special.gammaln,
    "neg": jnp.negative,
    "pow": jnp.power,
    "relu": jax.nn.relu,
    "rsqrt": lax.rsqrt,
    "sigmoid": jax.nn.sigmoid,
    "sgn": jnp.sign,
    "silu": jax.nn.silu,
    "special_entr": special.entr,
    "special_erfcx": lambda x: jnp.exp(x * x) * special.erfc(x),
    "special_i0e": special.i0e,
    "special_i1": special.i1,
    "special_i1e": special.i1e,
    "special_log_ndtr": special.log_ndtr,
    "special_ndtri": special.ndtri,
    "special_xlog1py": lambda x, y: special.xlog1py(*_real(x, y)),
    "special_zeta": special.zeta,
    "xlogy": lambda x, y: special.xlogy(*_real(x, y)),
    "igamma": special.gammainc,
    "igammac": special.gammaincc,
    "eq": jnp.equal,
    "ne": jnp.not_equal,
    "lt": jnp.less,
    "le": jnp.less_equal,
    "gt": jnp.greater,
    "ge": jnp.greater_equal,
    "mul": jnp.multiply,
    "round": jnp.round,
    "where": jnp.where,
    "fill": lambda x, value: jnp.full_like(x, value),
    "polygamma": lambda n, x: special.polygamma(n, x),
    "lerp": lambda a, b, weight: a + weight * (b - a),
}
OPS |= dict.fromkeys(("alias", "clone", "contiguous", "detach", "lift_fresh_copy", "_to_copy"), lambda x, **_: x)
OPS |= {"copy": lambda x, source, **_: jnp.broadcast_to(source, x.shape)}


@jax.custom_jvp
def _log(x: Array) -> Array:
    return jnp.log(x)


@_log.defjvp
def _log_jvp(primals: tuple, tangents: tuple) -> tuple:
    # finite at zero, where a weight of zero would otherwise make the whole gradient NaN; as Pyro's enumeration has it
    (x,), (t,) = primals, tangents
    return jnp.log(x), t / jnp.where(x == 0, jnp.finfo(x.dtype).tiny, x)


OPS["log"] = _log


@op("add")
def _add(a: Array, b: Array, alpha: Any = 1) -> Array:
    return a + b if alpha == 1 else a + alpha * b


@op("sub")
def _sub(a: Array, b: Array, alpha: Any = 1) -> Array:
    return a - b if alpha == 1 else a - alpha * b


@op("rsub")
def _rsub(a: Array, b: Array, alpha: Any = 1) -> Array:
    return b - alpha * a


@op("div", "true_divide", "divide")
def _div(a: Array, b: Array, rounding_mode: str | None = None) -> Array:
    if rounding_mode is None:
        return jnp.true_divide(a, b)
    return jnp.floor_divide(a, b) if rounding_mode == "floor" else jnp.trunc(jnp.true_divide(a, b))


@op("floor_divide")
def _floor_divide(a: Array, b: Array) -> Array:
    return jnp.floor_divide(a, b)


@op("clamp", "clip", "hardtanh")
def _clamp(x: Array, min: Any = None, max: Any = None) -> Array:
    return jnp.clip(x, min, max)


@op("clamp_min")
def _clamp_min(x: Array, least: Any) -> Array:
    return jnp.maximum(x, least)


@op("clamp_max")
def _clamp_max(x: Array, most: Any) -> Array:
    return jnp.minimum(x, most)


@op("addcmul")
def _addcmul(x: Array, a: Array, b: Array, value: Any = 1) -> Array:
    return x + value * a * b


@op("addcdiv")
def _addcdiv(x: Array, a: Array, b: Array, value: Any = 1) -> Array:
    return x + value * a / b


@op("softplus")
def _softplus(x: Array, beta: float = 1, threshold: float = 20) -> Array:
    return jax.nn.softplus(beta * x) / beta


@op("log_sigmoid_forward")
def _log_sigmoid_forward(x: Array) -> tuple[Array, Array]:
    return jax.nn.log_sigmoid(x), jnp.exp(-jnp.abs(x))


@op("gelu")
def _gelu(x: Array, approximate: str = "none") -> Array:
    return jax.nn.gelu(x, approximate=approximate == "tanh")


@op("elu")
def _elu(x: Array, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Array:
    return scale * jnp.where(x > 0, x, alpha * jnp.expm1(jnp.where(x > 0, 0, x) * input_scale))


@op("leaky_relu")
def _leaky_relu(x: Array, negative_slope: float = 0.01) -> Array:
    return jnp.where(x > 0, x, negative_slope * x)


@op("masked_fill")
def _masked_fill(x: Array, mask: Array, value: Any) -> Array:
    return jnp.where(mask, value, x)


# ------------------------------------------------------------------------------------------------- reductions


def _axes(dim: Any) -> Any:
    return (
        None if dim is None or (isinstance(dim, Sequence) and not dim) else dim if isinstance(dim, int) else tuple(dim)
    )


def _reduction(fn: Callable[..., Array]) -> Callable[..., Array]:
    def run(x: Array, dim: Any = None, keepdim: bool = False, **_: Any) -> Array:
        return fn(x, axis=_axes(dim), keepdims=keepdim)

    return run


OPS |= {
    "sum": _reduction(jnp.sum),
    "mean": _reduction(jnp.mean),
    "prod": _reduction(jnp.prod),
    "amax": _reduction(jnp.max),
    "amin": _reduction(jnp.min),
    "any": _reduction(jnp.any),
    "all": _reduction(jnp.all),
    "logsumexp": _reduction(special.logsumexp),
    "argmax": _reduction(jnp.argmax),
    "argmin": _reduction(jnp.argmin),
    "cumsum": lambda x, dim, **_: jnp.cumsum(x, dim),
    "cumprod": lambda x, dim, **_: jnp.cumprod(x, dim),
    "logcumsumexp": lambda x, dim: lax.cumlogsumexp(x, dim % max(x.ndim, 1)),
    "_softmax": lambda x, dim, half: jax.nn.softmax(x, dim),
    "_log_softmax": lambda x, dim, half: jax.nn.log_softmax(x, dim),
    "median": lambda x: jnp.median(x),
}


def _extreme(best: Callable[..., Array], where: Callable[..., Array]) -> Callable[..., Any]:
    def run(x: Array, dim: int | None = None, keepdim: bool = False) -> Any:
        if dim is None:
            return best(x)
        return best(x, axis=dim, keepdims=keepdim), where(x, axis=dim, keepdims=keepdim)

    return run


OPS |= {"max": _extreme(jnp.max, jnp.argmax), "min": _extreme(jnp.min, jnp.argmin)}


@op("var")
def _var(x: Array, dim: Any = None, correction: Any = 1, keepdim: bool = False) -> Array:
    return jnp.var(x, axis=_axes(dim), ddof=1 if correction is None else correction, keepdims=keepdim)


@op("linalg_vector_norm")
def vector_norm(x: Array, ord: Any = 2, dim: Any = None, keepdim: bool = False, **_: Any) -> Array:
    axes = _axes(dim)
    if ord == 2:  # finite gradient at zero, as in torch
        squares = jnp.sum(x * x, axis=axes, keepdims=keepdim)
        return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
    powers = jnp.abs(x) ** ord
    finite = {math.inf: jnp.max, -math.inf: jnp.min}
    if ord in finite:
        return finite[ord](jnp.abs(x), axis=axes, keepdims=keepdim)
    return jnp.sum(powers, axis=axes, keepdims=keepdim) ** (1 / ord)


@op("sort")
def _sort(x: Array, dim: int = -1, descending: bool = False, stable: bool = False) -> tuple[Array, Array]:
    order = jnp.argsort(x, dim, stable=True, descending=descending)
    return jnp.take_along_axis(x, order, dim), order


@op("topk")
def _topk(x: Array, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Array, Array]:
    values, order = _sort(x, dim, largest)
    return lax.slice_in_dim(values, 0, k, axis=dim), lax.slice_in_dim(order, 0, k, axis=dim)


# ------------------------------------------------------------------------------------------------------ shapes

OPS |= {
    "permute": jnp.transpose,
    "transpose": jnp.swapaxes,
    "unsqueeze": jnp.expand_dims,
    "cat": lambda xs, dim=0: jnp.concatenate([x for x in xs if x.shape != (0,)], dim),
    "stack": lambda xs, dim=0: jnp.stack(xs, dim),
    "repeat": lambda x, sizes: jnp.tile(x, sizes),
    "roll": lambda x, shifts, dims=(): jnp.roll(x, tuple(shifts), tuple(dims) or None),
    "tril": lambda x, diagonal=0: jnp.tril(x, diagonal),
    "triu": lambda x, diagonal=0: jnp.triu(x, diagonal),
    "t": lambda x: x.T,
    "diagonal": lambda x, offset=0, dim1=0, dim2=1: jnp.diagonal(x, offset, dim1, dim2),
    "unbind": lambda x, dim=0: [jnp.take(x, i, dim) for i in range(x.shape[dim])],
    "select": lambda x, dim, index: lax.index_in_dim(x, index, dim, keepdims=False),
}


@op("view", "_unsafe_view", "reshape")
def _view(x: Array, shape: Sequence[int]) -> Array:
    return jnp.reshape(x, tuple(shape))


@op("expand")
def _expand(x: Array, shape: Sequence[int], implicit: bool = False) -> Array:
    offset = len(shape) - x.ndim
    sizes = [x.shape[i - offset] if size == -1 else size for i, size in enumerate(shape)]
    return jnp.broadcast_to(x, sizes)


@op("squeeze")
def _squeeze(x: Array, dim: Any = None) -> Array:
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    return jnp.squeeze(x, tuple(d for d in dims if x.ndim and x.shape[d] == 1))


def _piece(x: Array, dim: int, start: int | None, end: int | None, step: int) -> tuple:
    where = [slice(None)] * x.ndim
    where[dim] = slice(start, end, step)
    return tuple(where)


@op("slice")
def _slice(x: Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Array:
    return x[_piece(x, dim, start, end, step)]


@op("slice_scatter")
def _slice_scatter(
    x: Array, source: Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Array:
    return x.at[_piece(x, dim, start, end, step)].set(source)


@op("select_scatter")
def _select_scatter(x: Array, source: Array, dim: int, index: int) -> Array:
    where = [slice(None)] * x.ndim
    where[dim] = index  # type: ignore[call-overload]
    return x.at[tuple(where)].set(source)


@op("split", "split_with_sizes")
def _split(x: Array, sizes: Any, dim: int = 0) -> list[Array]:
    size = x.shape[dim]
    parts = (
        list(sizes) if isinstance(sizes, Sequence) else [sizes] * (size // sizes) + [size % sizes] * (size % sizes > 0)
    )
    ends = [sum(parts[: i + 1]) for i in range(len(parts) - 1)]
    return jnp.split(x, ends, dim)


@op("constant_pad_nd")
def _pad(x: Array, pad: Sequence[int], value: Any = 0) -> Array:
    widths = [(0, 0, 0)] * x.ndim
    for i in range(len(pad) // 2):
        widths[-1 - i] = (pad[2 * i], pad[2 * i + 1], 0)
    return lax.pad(x, jnp.asarray(value, x.dtype), widths)


@op("diag_embed")
def _diag_embed(x: Array, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Array:
    size = x.shape[-1] + abs(offset)
    rows = jnp.arange(x.shape[-1])
    out = jnp.zeros((*x.shape[:-1], size, size), x.dtype)
    out = out.at[..., rows + max(-offset, 0), rows + max(offset, 0)].set(x)
    return jnp.moveaxis(out, (-2, -1), (dim1, dim2))


@op("diagonal_scatter")
def _diagonal_scatter(x: Array, source: Array, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Array:
    moved = jnp.moveaxis(x, (dim1, dim2), (-2, -1))
    rows = jnp.arange(source.shape[-1])
    moved = moved.at[..., rows + max(-offset, 0), rows + max(offset, 0)].set(source)
    return jnp.moveaxis(moved, (-2, -1), (dim1, dim2))


# ----------------------------------------------------------------------------------------------------- indexing


def _where(indices: Sequence[Any]) -> tuple:
    return tuple(slice(None) if i is None else i for i in indices)


OPS |= {
    "index": lambda x, indices: x[_where(indices)],
    "index_select": lambda x, dim, index: jnp.take(x, index, dim) if x.ndim else x,
    "take": lambda x, index: jnp.take(x.reshape(-1), index),
    "embedding": lambda weight, index, *_: jnp.take(weight, index, 0),
}


@op("gather")
def _gather(x: Array, dim: int, index: Array, sparse_grad: bool = False) -> Array:
    if not x.ndim:
        return x
    # the index may be smaller than x in the other dims, and is then for its beginning
    begin = tuple(slice(None) if d == dim % x.ndim else slice(n) for d, n in enumerate(index.shape))
    return jnp.take_along_axis(x[begin], index, dim)


@op("index_put", "_unsafe_index_put")
def _index_put(x: Array, indices: Sequence[Any], values: Array, accumulate: bool = False) -> Array:
    if len(indices) == 1 and indices[0] is not None and indices[0].dtype == jnp.bool_:
        mask = indices[0].reshape(*indices[0].shape, *(1,) * (x.ndim - indices[0].ndim))
        return jnp.where(mask, x + values if accumulate else values, x)  # one value for all: no number of places
    where = _where(indices)
    return x.at[where].add(values) if accumulate else x.at[where].set(values)


def _places(x: Array, dim: int, index: Array) -> tuple:
    grid = list(jnp.indices(index.shape, sparse=True))
    grid[dim] = index
    return tuple(grid)


@op("scatter")
def _scatter(x: Array, dim: int, index: Array, source: Any) -> Array:
    source = source[tuple(slice(n) for n in index.shape)] if hasattr(source, "ndim") and source.ndim else source
    return x.at[_places(x, dim, index)].set(source)


@op("scatter_add")
def _scatter_add(x: Array, dim: int, index: Array, source: Array) -> Array:
    return x.at[_places(x, dim, index)].add(source[tuple(slice(n) for n in index.shape)])


@op("index_add")
def _index_add(x: Array, dim: int, index: Array, source: Array, alpha: Any = 1) -> Array:
    where = [slice(None)] * x.ndim
    where[dim] = index
    return x.at[tuple(where)].add(alpha * source)
