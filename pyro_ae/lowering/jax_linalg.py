"""ATen ops in JAX: creation, linear algebra and networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy import linalg

from .jax_ops import OPS, Array, op, vector_norm

# ----------------------------------------------------------------------------------------------------- creation

OPS |= {
    "zeros": lambda size, dtype=None, **_: jnp.zeros(tuple(size), dtype),
    "ones": lambda size, dtype=None, **_: jnp.ones(tuple(size), dtype),
    "full": lambda size, value, dtype=None, **_: jnp.full(tuple(size), value, dtype),
    "scalar_tensor": lambda value, dtype=None, **_: jnp.asarray(value, dtype),
    "zeros_like": lambda x, dtype=None, **_: jnp.zeros_like(x, dtype),
    "ones_like": lambda x, dtype=None, **_: jnp.ones_like(x, dtype),
    "full_like": lambda x, value, dtype=None, **_: jnp.full_like(x, value, dtype),
    "new_zeros": lambda x, size, dtype=None, **_: jnp.zeros(tuple(size), dtype or x.dtype),
    "new_ones": lambda x, size, dtype=None, **_: jnp.ones(tuple(size), dtype or x.dtype),
    "new_full": lambda x, size, value, dtype=None, **_: jnp.full(tuple(size), value, dtype or x.dtype),
    # what is empty is written before it is read
    "empty": lambda size, dtype=None, **_: jnp.zeros(tuple(size), dtype),
    "empty_like": lambda x, dtype=None, **_: jnp.zeros_like(x, dtype),
    "new_empty": lambda x, size, dtype=None, **_: jnp.zeros(tuple(size), dtype or x.dtype),
    "empty_strided": lambda size, stride, dtype=None, **_: jnp.zeros(tuple(size), dtype),
    "new_empty_strided": lambda x, size, stride, dtype=None, **_: jnp.zeros(tuple(size), dtype or x.dtype),
    "arange": lambda start, end=None, step=None, dtype=None, **_: jnp.arange(start, end, step, dtype),
    "linspace": lambda start, end, steps, dtype=None, **_: jnp.linspace(start, end, steps, dtype=dtype),
    "eye": lambda n, m=None, dtype=None, **_: jnp.eye(n, m, dtype=dtype),
    "tril_indices": lambda n, m, offset=0, **_: jnp.stack(jnp.tril_indices(n, offset, m)),
    "triu_indices": lambda n, m, offset=0, **_: jnp.stack(jnp.triu_indices(n, offset, m)),
}

# ----------------------------------------------------------------------------------------------- linear algebra

OPS |= dict.fromkeys(("mm", "bmm", "matmul", "mv"), jnp.matmul)


@op("addmm", "baddbmm", "addmv", "addbmm")
def _addmm(x: Array, a: Array, b: Array, *, beta: Any = 1, alpha: Any = 1) -> Array:
    return beta * x + alpha * (a @ b)


def _adjoint(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


@op("_cdist_forward")
def _cdist(a: Array, b: Array, p: float, mode: Any = None) -> Array:
    return vector_norm(a[..., :, None, :] - b[..., None, :, :], p, -1)


@op("linalg_cholesky_ex")
def _cholesky_ex(x: Array, *, upper: bool = False, check_errors: bool = False) -> tuple[Array, Array]:
    lower = jnp.linalg.cholesky(x)
    return (_adjoint(lower) if upper else lower), jnp.zeros(x.shape[:-2], jnp.int32)


@op("cholesky")
def _cholesky(x: Array, upper: bool = False) -> Array:
    return _cholesky_ex(x, upper=upper)[0]


def _batch(a: Array, b: Array) -> tuple[Array, Array]:
    leading = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return jnp.broadcast_to(a, (*leading, *a.shape[-2:])), jnp.broadcast_to(b, (*leading, *b.shape[-2:]))


@op("linalg_solve_triangular")
def _solve_triangular(a: Array, b: Array, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Array:
    a, b = _batch(a, b)
    return lax.linalg.triangular_solve(a, b, left_side=left, lower=not upper, unit_diagonal=unitriangular)


@op("triangular_solve")
def _triangular_solve(
    b: Array, a: Array, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> tuple[Array, Array]:
    wide, right = _batch(a, b)
    x = lax.linalg.triangular_solve(
        wide, right, left_side=True, lower=not upper, transpose_a=transpose, unit_diagonal=unitriangular
    )
    return x, a


@op("cholesky_solve")
def _cholesky_solve(b: Array, factor: Array, upper: bool = False) -> Array:
    a, b = _batch(_adjoint(factor) if upper else factor, b)
    half = lax.linalg.triangular_solve(a, b, left_side=True, lower=True)
    return lax.linalg.triangular_solve(a, half, left_side=True, lower=True, transpose_a=True)


@op("cholesky_inverse")
def _cholesky_inverse(factor: Array, upper: bool = False) -> Array:
    return _cholesky_solve(jnp.broadcast_to(jnp.eye(factor.shape[-1], dtype=factor.dtype), factor.shape), factor, upper)


@op("linalg_inv_ex")
def _inv_ex(x: Array, *, check_errors: bool = False) -> tuple[Array, Array]:
    return jnp.linalg.inv(x), jnp.zeros(x.shape[:-2], jnp.int32)


@op("_linalg_solve_ex")
def _solve_ex(a: Array, b: Array, *, left: bool = True, check_errors: bool = False) -> tuple:
    vector = b.ndim == 1 or (b.ndim == a.ndim - 1 and b.shape == a.shape[:-1])
    right = b[..., None] if vector else b
    a, right = _batch(a, right)
    x = jnp.linalg.solve(a, right) if left else _adjoint(jnp.linalg.solve(_adjoint(a), _adjoint(right)))
    pivots = jnp.zeros(a.shape[:-1], jnp.int32)
    return (x[..., 0] if vector else x), a, pivots, jnp.zeros(a.shape[:-2], jnp.int32)


@op("_linalg_slogdet")
def _slogdet(x: Array) -> tuple:
    sign, log = jnp.linalg.slogdet(x)
    return sign, log, x, jnp.zeros(x.shape[:-1], jnp.int32)


@op("_linalg_det")
def _det(x: Array) -> tuple:
    return jnp.linalg.det(x), x, jnp.zeros(x.shape[:-1], jnp.int32)


@op("_linalg_eigh")
def _eigh(x: Array, lower: str = "L", compute_v: bool = True) -> tuple[Array, Array]:
    values, vectors = jnp.linalg.eigh(x, lower, symmetrize_input=False)
    return values, vectors


@op("linalg_qr")
def _qr(x: Array, mode: str = "reduced") -> tuple[Array, Array]:
    q, r = jnp.linalg.qr(x, mode)
    return q, r


@op("linalg_matrix_exp")
def _matrix_exp(x: Array) -> Array:
    flat = x.reshape(-1, *x.shape[-2:])
    return jax.vmap(linalg.expm)(flat).reshape(x.shape)


# ----------------------------------------------------------------------------------------------------- networks


@op("unfold")
def _unfold(x: Array, dim: int, size: int, step: int) -> Array:
    starts = jnp.arange(0, x.shape[dim] - size + 1, step)
    windows = jnp.take(x, starts[:, None] + jnp.arange(size), dim)
    return jnp.moveaxis(windows, dim % x.ndim + 1, -1)


@op("native_layer_norm")
def _layer_norm(x: Array, shape: Sequence[int], weight: Array, bias: Array, eps: float) -> tuple:
    axes = tuple(range(-len(shape), 0))
    mean = x.mean(axes, keepdims=True)
    inverse = lax.rsqrt(x.var(axes, keepdims=True) + eps)
    y = (x - mean) * inverse
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias), mean, inverse


@op("_native_batch_norm_legit_no_training")
def _batch_norm(x: Array, weight: Array, bias: Array, mean: Array, var: Array, momentum: float, eps: float) -> tuple:
    def along(v: Array) -> Array:
        return v.reshape(1, -1, *(1,) * (x.ndim - 2))

    y = (x - along(mean)) * lax.rsqrt(along(var) + eps)
    y = y if weight is None else y * along(weight)
    return (y if bias is None else y + along(bias)), mean[:0], var[:0]


@op("native_batch_norm")
def _native_batch_norm(
    x: Array, weight: Array, bias: Array, mean: Array, var: Array, training: bool, momentum: float, eps: float
) -> tuple:
    if training:
        raise ValueError("a normalisation over the batch in training mode has no place in a density: call eval()")
    return _batch_norm(x, weight, bias, mean, var, momentum, eps)


@op("convolution")
def _convolution(
    x: Array,
    weight: Array,
    bias: Array | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Array:
    dims = x.ndim - 2
    stride, padding, dilation, output_padding = (
        list(v) * dims if len(v) == 1 else list(v) for v in (stride, padding, dilation, output_padding)
    )
    if transposed:
        # the gradient of a convolution: the kernel turned round, and the input spread out by the stride
        size = weight.shape[0] // groups
        weight = jnp.flip(weight, tuple(range(2, weight.ndim)))
        weight = weight.reshape(groups, size, *weight.shape[1:]).swapaxes(1, 2)
        weight = weight.reshape(-1, size, *weight.shape[3:])
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        pads = [(r - p, r - p + o) for r, p, o in zip(reach, padding, output_padding, strict=True)]
        strides, spread = [1] * dims, stride
    else:
        pads, strides, spread = [(p, p) for p in padding], stride, [1] * dims
    y = lax.conv_general_dilated(
        x, weight, strides, pads, lhs_dilation=spread, rhs_dilation=dilation, feature_group_count=groups
    )
    return y if bias is None else y + bias.reshape(1, -1, *(1,) * dims)


def _pool(
    x: Array, start: Any, reduce: Any, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Array:
    dims = len(kernel)
    lead = x.ndim - dims
    pads = [(0, 0)] * lead + [(p, p) for p in (list(padding) * dims if len(padding) == 1 else padding)]
    return lax.reduce_window(x, start, reduce, (1,) * lead + tuple(kernel), (1,) * lead + tuple(stride or kernel), pads)


@op("avg_pool2d")
def _avg_pool2d(x: Array, kernel: Any, stride: Any = (), padding: Any = (0,), *_: Any) -> Array:
    return _pool(x, 0.0, lax.add, kernel, stride, padding) / (kernel[0] * kernel[-1])


@op("max_pool2d_with_indices")
def _max_pool2d(x: Array, kernel: Any, stride: Any = (), padding: Any = (0,), *_: Any) -> tuple[Array, None]:
    return _pool(x, -jnp.inf, lax.max, kernel, stride, padding), None
