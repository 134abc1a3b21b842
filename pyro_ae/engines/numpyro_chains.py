"""Chains by NumPyro's kernels on the lowered energy: all of them in one compiled call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..energy import Energy
from ..lowering.capture import Graph, capture
from ..lowering.density import precision
from .run import Event, Run

if TYPE_CHECKING:
    from .nuts import Chains, hmc, nuts

PARTS = 40
"""How often the progress bar moves, and an interrupt is heeded."""


class Compiled(NamedTuple):
    """What is compiled once for a graph and a configuration, and serves every fit of the same shapes."""

    start: Callable[..., Any]
    """Constants, keys, points and inverse mass matrix to the kernel's state."""
    advance: Callable[..., Any]
    """Constants, state and number of steps to the state after them, and what came by."""
    size: int
    """The most steps that ``advance`` takes."""


_cache: OrderedDict[tuple, Compiled] = OrderedDict()


def sample(
    config: nuts | hmc,
    energy: Energy,
    starts: list[dict[str, Tensor]],
    run: Run,
    *,
    inverse_mass: Tensor | None = None,
) -> Chains:
    """Unconstrained draws of all chains, and sampler statistics.

    Arguments:
        starts: an initial point for each chain.
        inverse_mass: of the flat latents, sorted by name: variances ``[d]`` or a covariance ``[d, d]``.
    """
    import jax
    import jax.numpy as jnp

    from ..lowering.to_jax import array, arrays, tensor

    graph = capture(energy, starts[0])
    kept: list[dict[str, Any]] = []
    done, drawn, interrupted = 0, 0, False
    with precision(config.float64), run.bar(config.warmup + config.draws, "draw", type(config).__name__) as bar:
        compiled = _compiled(config, graph)
        constants = arrays(graph.constants)
        # torch's generator is what ``seed=`` sets, so the chains follow from it
        keys = jax.random.split(jax.random.PRNGKey(int(torch.randint(2**31 - 1, ()))), config.chains)
        points = {n: jnp.stack([array(s[n]) for s in starts]) for n in energy.transforms}
        bar.set_postfix_str("compiling")
        try:
            state = compiled.start(constants, keys, points, None if inverse_mass is None else array(inverse_mass))
            while drawn < config.draws:
                left = config.warmup - done if done < config.warmup else config.draws - drawn
                number = min(compiled.size, left)
                state, found = compiled.advance(constants, state, number)
                part = jax.tree.map(lambda a, n=number: tensor(a)[:, :n], found)
                if done >= config.warmup:
                    kept.append(part)
                    drawn += number
                done += number
                divergences = sum(int(k["diverging"].sum()) for k in kept)
                where = "draws" if kept else "warm-up"
                step_size = part["step_size"][:, -1].mean().item()
                bar.set_postfix_str(f"{config.chains} chains, {where}, step size {step_size:.2g}", refresh=False)
                bar.update(number)
                event = Event(done, 0, {"drawn": drawn, "divergences": divergences}, {})
                if any([callback(event) is True for callback in run.callbacks]):
                    break
        except KeyboardInterrupt:
            interrupted = True
    if not kept:
        raise KeyboardInterrupt("stopped during the warm-up, before any draw")
    joined: dict[str, Any] = {
        n: jax.tree.map(lambda *parts: torch.cat(parts, 1), *(k[n] for k in kept)) for n in kept[0]
    }
    draws = joined.pop("z")
    return draws, joined, interrupted


def _compiled(config: nuts | hmc, graph: Graph) -> Compiled:
    """From the cache where the same model was sampled before, with other data or seeds perhaps."""
    settings = tuple(getattr(config, n) for n in config.__dataclass_fields__ if n not in ("init", "backend"))
    key = (type(config).__name__, settings, graph.signature)
    if key not in _cache:
        _cache[key] = _compile(config, graph)
        while len(_cache) > 16:
            _cache.popitem(last=False)
    _cache.move_to_end(key)
    return _cache[key]


def _compile(config: nuts | hmc, graph: Graph) -> Compiled:
    import jax
    import jax.numpy as jnp
    from numpyro.infer import HMC, NUTS

    from ..lowering.to_jax import lower

    potential = lower(graph)
    size = max(1, -(-(config.warmup + config.draws) // PARTS))

    def kernel(constants: Any, inverse_mass: Any = None) -> Any:
        options: dict[str, Any] = {
            "potential_fn": lambda v: potential(v, constants=constants),
            "target_accept_prob": config.target_accept,
            "dense_mass": config.dense_mass,
            "inverse_mass_matrix": inverse_mass,
        }
        if hasattr(config, "max_tree_depth"):
            return NUTS(max_tree_depth=config.max_tree_depth, **options)
        return HMC(trajectory_length=config.trajectory_length, **options)

    def start(constants: Any, keys: Any, points: Any, inverse_mass: Any) -> Any:
        return kernel(constants, inverse_mass).init(keys, config.warmup, points, (), {})

    def look(state: Any) -> dict[str, Any]:
        found = {
            "z": state.z,
            "diverging": state.diverging,
            "energy": state.energy,
            "acceptance_rate": state.accept_prob,
            "step_size": state.adapt_state.step_size,
            "n_steps": state.num_steps,
            "lp": -state.potential_energy,
        }
        if hasattr(config, "max_tree_depth"):
            found["tree_depth"] = jnp.ceil(jnp.log2(state.num_steps + 1.0)).astype(int)
        return found

    def advance(constants: Any, state: Any, number: Any) -> tuple[Any, dict[str, Any]]:
        """The number is no constant, so that one compilation serves every part of the run."""
        ours = kernel(constants)
        # a kernel of NumPyro knows how to step once it was initialised
        jax.eval_shape(lambda k, z: ours.init(k, config.warmup, z, (), {}), state.rng_key, state.z)
        space = jax.tree.map(
            lambda a: jnp.zeros((a.shape[0], size, *a.shape[1:]), a.dtype), jax.eval_shape(look, state)
        )

        def body(i: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            now, out = carry
            now = ours.sample(now, (), {})
            return now, jax.tree.map(lambda o, a: o.at[:, i].set(a), out, look(now))

        return jax.lax.fori_loop(0, number, body, (state, space))

    return Compiled(jax.jit(start), jax.jit(advance), size)
