"""Discrete latents summed out exactly, by Pyro's parallel enumeration."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from opt_einsum import shared_intermediates
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.packed import pack
from pyro.ops.rings import LogRing
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from .sites import quote


class _Marking(Messenger):
    """Mark every discrete latent that has no value yet for parallel enumeration."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not msg["done"] and getattr(msg["fn"], "has_enumerate_support", False):
            msg["infer"] = {**(msg["infer"] or {}), "enumerate": "parallel"}


@contextmanager
def enumerating(nesting: int) -> Iterator[None]:
    """Run a model with all values of its discrete latents at once, in dims to the left of ``nesting`` plates."""
    with EnumMessenger(-nesting - 1), _Marking():
        yield


class Term(NamedTuple):
    """A log-density from which the enumerated latents are gone."""

    names: tuple[str, ...]
    """The sites that it stands for."""
    log_prob: Tensor
    """Over plates only, in Pyro's dims; without the common scale."""
    scale: float | Tensor


def is_enumerated(site: dict) -> bool:
    """Whether this run holds every value of a site at once."""
    return bool(site["infer"]) and site["infer"].get("_enumerate_dim") is not None


def marginalise(sites: list[dict]) -> tuple[list[dict], list[Term]]:
    """Sum the enumerated latents out of a model's sites.

    Returns:
        The sites that no enumerated latent touches, and terms for the others.

    Raises:
        ValueError: where the sites of one sum have different scales, as a latent outside a subsampled plate and its
            rows have: then a logarithm would hold the scale.
    """
    if not any(map(is_enumerated, sites)):
        return sites, []
    trace = Trace()
    for site in sites:
        trace.add_node(site["name"], **site)
    trace.symbolize_dims()
    summed = {s["infer"]["_enumerate_symbol"] for s in sites if is_enumerated(s)}
    frames = {trace.plate_to_symbol[f.name]: f for s in sites for f in s["cond_indep_stack"] if f.vectorized}
    untouched, factors = [], []
    for site in sites:
        symbols = site["infer"]["_dim_to_symbol"]
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        if site["mask"] is not None and not is_enumerated(site):  # the values of a masked latent still sum to one
            log_prob = torch.where(torch.as_tensor(site["mask"]), log_prob, log_prob.new_zeros(()))
        packed = pack(log_prob, symbols)
        if is_enumerated(site) or summed & set(packed._pyro_dims):
            ordinal = frozenset(trace.plate_to_symbol[f.name] for f in site["cond_indep_stack"] if f.vectorized)
            factors.append((site, ordinal, packed))
        else:
            untouched.append(site)
    scale = factors[0][0]["scale"]
    names = tuple(site["name"] for site, *_ in factors)
    if any(not _same(site["scale"], scale) for site, *_ in factors):
        raise ValueError(
            f"the enumerated latents among {quote(names)} cannot be summed out, as these sites have different scales "
            "(a minibatch of rows under a latent of all rows, or tempered latents): move the latent into the plate of "
            "the rows, fit without batch_size, or sample it in the guide"
        )
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for _, ordinal, packed in factors:
        tree.setdefault(ordinal, []).append(packed)
    sizes = {symbol: frame.size for symbol, frame in frames.items()}
    with shared_intermediates() as cache:
        contracted = contract_tensor_tree(tree, summed, ring=LogRing(cache, dim_to_size=sizes))
    terms = []
    for ordinal, tensors in contracted.items():
        dims = {symbol: frames[symbol].dim for symbol in ordinal}
        shape = [1] * -min(dims.values(), default=0)
        for symbol, dim in dims.items():
            shape[dim] = sizes[symbol]
        terms += [Term(names, _unpack(t, dims, shape), scale) for t in tensors]
    return untouched, terms


def _same(a: float | Tensor, b: float | Tensor) -> bool:
    return bool(torch.as_tensor(a == b).all())


def _unpack(packed: Tensor, dims: dict[str, int], shape: list[int]) -> Tensor:
    """A packed tensor in Pyro's dims, expanded to the whole of its plates."""
    order = sorted(packed._pyro_dims, key=lambda symbol: dims[symbol])  # type: ignore[attr-defined]
    dense = packed.permute([packed._pyro_dims.index(symbol) for symbol in order])  # type: ignore[attr-defined]
    view = [1] * len(shape)
    for symbol, size in zip(order, dense.shape, strict=True):
        view[dims[symbol]] = size
    return dense.reshape(view).expand(shape)
