"""The multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .inputs import check_shape, with_mask


class MLP(nn.Module):
    """A multi-layer perceptron over the last dims of its input, and for missing values.

    With ``missing`` it takes a second input that says which values are observed, and sees it beside the values:
    a guide such as ``Amortized`` fills missing values with zeros and passes that mask.

    Arguments:
        inputs: size of the input, or its shape, such as ``(28, 28)``; it is flattened.
        hidden: sizes of the hidden layers.
        outputs: size of the output, or its shape; None ends with the last hidden layer's activations.
        activation: a module class for between the layers.
        missing: whether the input may have missing values.

    Example:
        >>> MLP((8, 8), [32], 2)(torch.zeros(5, 8, 8)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        inputs: int | Sequence[int],
        hidden: Sequence[int],
        outputs: int | Sequence[int] | None = None,
        *,
        activation: Callable[[], nn.Module] = nn.ReLU,
        missing: bool = False,
    ) -> None:
        super().__init__()
        self.input_shape = torch.Size([inputs] if isinstance(inputs, int) else inputs)
        self.event_dims = len(self.input_shape)
        sizes = [self.input_shape.numel() * (2 if missing else 1), *hidden]
        layers: list[nn.Module] = []
        for before, after in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(before, after), activation()]
        self.output_shape = None if outputs is None else torch.Size([outputs] if isinstance(outputs, int) else outputs)
        if self.output_shape is not None:
            layers.append(nn.Linear(sizes[-1], self.output_shape.numel()))
        self.layers = nn.Sequential(*layers)
        self.missing = missing

    def forward(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        check_shape(x, self.input_shape, "inputs")
        dims = len(self.input_shape)
        if dims > 1:
            x, observed = x.flatten(-dims), None if observed is None else observed.flatten(-dims)
        h = with_mask(x, observed, -1, missing=self.missing, name="MLP")
        y = self.layers(h)
        if self.output_shape is not None and len(self.output_shape) > 1:
            y = y.unflatten(-1, self.output_shape)
        return y
