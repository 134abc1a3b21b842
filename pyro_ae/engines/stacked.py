"""The energies of many chains and their gradients in one call, over flat vectors of unconstrained latents."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..data import Call, missing_values
from ..energy import Energy
from ..lowering.backends import cuda_graph, inductor
from ..lowering.capture import CaptureError
from ..lowering.tape import Tape, Values, record
from ..precision import layers_in
from ..program import validation
from ..types import Draws

_TENSOR = object()


class StackedEnergy:
    r"""Energies :math:`U(v_c)` of chains ``[chains, d]`` and their gradients, by ``torch.vmap`` over the model.

    A batch is seen by all chains, or has a dim of chains before its rows, one batch for each. Once :meth:`settle` was
    called, each new shape of a batch is recorded and replayed, which spares Pyro's handlers at each step;
    a model that is no graph, or that vmap cannot run, is run as it is, and that is said once.

    Arguments:
        energy: of the model.
        own: whether each chain has a batch of its own.
        missing: whether the data have missing values.
        compile: how it is captured, as for ``fit``.
        precision: of the layers of networks, as for ``fit``.

    Attributes:
        size: d, the number of unconstrained latents.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> energy = Energy(lambda: pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1)), None)
        >>> StackedEnergy(energy)(torch.tensor([[0.0, 1.0], [2.0, 3.0]]), Call())[1]
        tensor([[0., 1.],
                [2., 3.]])
    """

    def __init__(
        self,
        energy: Energy,
        *,
        own: bool = False,
        missing: bool = False,
        compile: bool | str = "auto",
        precision: str = "float32",
    ) -> None:
        self.energy = energy
        self.own = own
        self.missing = missing
        self.compile, self.precision = compile, precision
        values = energy.init("uniform")
        self.shapes = {name: v.shape for name, v in values.items()}
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        self.size = sum(self.sizes)
        self.serial = self.settled = self._capturing = False
        self.eager = compile is False
        self._graphs: dict[tuple, Callable[..., Values]] = {}

    def pack(self, values: Draws) -> Tensor:
        """Unconstrained values ``[*, *shape]`` of each site as flat vectors ``[*, d]``."""
        parts = [values[n].reshape(*values[n].shape[: values[n].dim() - len(s)], -1) for n, s in self.shapes.items()]
        return torch.cat(parts, -1)

    def unpack(self, position: Tensor) -> dict[str, Tensor]:
        """Views of flat vectors ``[*, d]`` as each site's unconstrained values."""
        parts = position.split(self.sizes, -1)
        return {n: p.view(p.shape[:-1] + s) for (n, s), p in zip(self.shapes.items(), parts, strict=True)}

    def settle(self) -> None:
        """From now on nothing but chains and batches changes, so that the computation may be captured."""
        self.settled = True

    def __call__(self, position: Tensor, batch: Call, parameters: Iterable[Tensor] = ()) -> tuple[Tensor, ...]:
        """The energies ``[chains]``, their gradient ``[chains, d]``, and that of their sum in each parameter."""
        parameters = tuple(parameters)
        if not self.settled or self.eager or parameters:
            return self._run(position, batch, parameters)
        leaves, structure = tree_flatten(tuple(batch))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        settings = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        key = (position.shape, *((v.shape, v.dtype) if isinstance(v, Tensor) else repr(v) for v in leaves))
        if key in self._graphs:
            return tuple(self._graphs[key](position, *tensors))  # type: ignore[arg-type]

        def run(position: Tensor, *tensors: Tensor) -> Values:
            given = iter(tensors)
            leaves = [next(given) if setting is _TENSOR else setting for setting in settings]
            return list(self._run(position, Call(*tree_unflatten(leaves, structure)), ()))

        return tuple(self._capture(key, run, position, *tensors))  # type: ignore[arg-type]

    def _capture(self, key: tuple, run: Callable[..., Values], position: Tensor, *tensors: Tensor) -> Values:
        """Run as it is, and keep a tape of it, once a replay is seen to give the same elsewhere as well."""
        if not self.serial:
            run(position, *tensors)
        if self.serial:
            self.eager = True
            return run(position, *tensors)
        self._capturing = True
        try:
            values, tape = record(run, position, *tensors, live=[])
            if tape.random:
                raise CaptureError("it draws random numbers")
            elsewhere = 1.01 * position + 0.01  # not drawn: the random state is the fit's
            replay = self._compiled(tape, [elsewhere, *tensors])
            _check(replay(elsewhere, *tensors), run(elsewhere, *tensors))
            self._graphs[key] = replay
            return values
        except (CaptureError, RuntimeError, NotImplementedError, TypeError) as error:
            self.eager = True
            _say(f"the model's energy is no graph, so each step runs the model itself, which is slower: {_line(error)}")
        finally:
            self._capturing = False
        return run(position, *tensors)

    def _compiled(self, tape: Tape, inputs: list[Tensor]) -> Callable[..., Values]:
        """What runs a tape: a compiler, a CUDA graph, or itself."""
        if self.compile == "inductor":
            return inductor(tape, inputs)
        return cuda_graph(tape, inputs) if inputs[0].is_cuda and self.compile != "replay" else tape

    def _run(self, position: Tensor, batch: Call, parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with validation(False), missing_values(self.missing), torch.enable_grad():
            position = position.detach().requires_grad_()
            energies = self.energies(position, batch)
            gradients = torch.autograd.grad(energies.sum(), (position, *parameters), materialize_grads=True)
        return (energies.detach(), *gradients)

    def energies(self, position: Tensor, batch: Call) -> Tensor:
        """The energies ``[chains]``, by the model itself."""
        with layers_in(self.precision):
            return self._energies(position, batch)

    def _energies(self, position: Tensor, batch: Call) -> Tensor:
        chains = len(position)
        if not self.serial and chains > 1:
            leaves, structure = tree_flatten(tuple(batch))
            dims = [0 if self.own and isinstance(leaf, Tensor) and leaf.dim() else None for leaf in leaves]

            def one(v: Tensor, *leaves: Any) -> Tensor:
                return self.energy(self.unpack(v), Call(*tree_unflatten(list(leaves), structure)))

            try:
                return torch.vmap(one, (0, *dims), randomness="different")(position, *leaves)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                if self._capturing:
                    raise
                self.serial = True
                _say(f"the model cannot run all chains at once, so they take turns, which is slower: {_line(error)}")
        if chains == 1:
            return self.energy(self.unpack(position.view(-1)), self._of(batch, 0)).unsqueeze(0)
        return torch.stack([self.energy(self.unpack(v), self._of(batch, c)) for c, v in enumerate(position)])

    def _of(self, batch: Call, chain: int) -> Call:
        if not self.own:
            return batch
        leaves, structure = tree_flatten(tuple(batch))
        mine = [leaf[chain] if isinstance(leaf, Tensor) and leaf.dim() else leaf for leaf in leaves]
        return Call(*tree_unflatten(mine, structure))


def _check(replayed: Values, ours: Values) -> None:
    for theirs, mine in zip(replayed, ours, strict=True):
        assert theirs is not None and mine is not None
        scale = mine.abs().nan_to_num(0.0, 0.0, 0.0).amax()
        if not torch.allclose(theirs / scale, mine / scale, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise CaptureError("a replay gives other values than the model does")


def _say(what: str) -> None:
    warnings.warn(what, stacklevel=2)


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
