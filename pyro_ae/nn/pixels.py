"""Networks that go through an image pixel by pixel, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from .images import image_shape
from .inputs import check_shape


class MaskedConvolution(nn.Conv2d):
    """A convolution that sees the pixels above and to the left, and the pixel itself unless it is the first layer.

    References:
        Pixel Recurrent Neural Networks (van den Oord, Kalchbrenner and Kavukcuoglu, 2016)
        https://arxiv.org/abs/1601.06759

    Arguments:
        inputs: channels.
        outputs: channels.
        size: of the kernel, odd.
        first: whether the pixel itself is hidden, as it must be where its own value comes in.

    Raises:
        ValueError: for an even size.

    Example:
        >>> MaskedConvolution(1, 1, 3, first=True).mask
        tensor([[1., 1., 1.],
                [1., 0., 0.],
                [0., 0., 0.]])
    """

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, size: int, *, first: bool = False) -> None:
        if size < 1 or size % 2 == 0:
            raise ValueError(f"the size of a masked kernel must be odd, so that it has a centre, got {size}")
        super().__init__(inputs, outputs, size, padding=size // 2)
        seen = torch.arange(size * size) < size * size // 2 + (not first)
        self.register_buffer("mask", seen.float().reshape(size, size))

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class PixelCNN(nn.Module):
    """Images to the parameters of each pixel's distribution, given the pixels before it and a context.

    Masked convolutions, all but the first around an identity. What is near a pixel is all that they see of the image:
    kernels of the sizes 2 r + 1 reach as far up and to the left as the sum of their r. Channels of the same pixel do
    not see one another.

    References:
        Pixel Recurrent Neural Networks (van den Oord, Kalchbrenner and Kavukcuoglu, 2016)
        https://arxiv.org/abs/1601.06759

    Arguments:
        inputs: shape of an image, ``(channels, height, width)`` or ``(height, width)``.
        channels: of each layer.
        kernels: size of each layer's kernel, odd; a size of 1 adds depth and no reach.
        outputs: parameters of each pixel; the image's channels by default.
        tied: whether layers of the same size, but for the first, have the same weights.
        activation: a module class for before each layer.

    Returns:
        When called with images ``[*, *inputs]``, and perhaps a context ``[*, channels, height, width]`` that is added
        to the first layer: ``[*, outputs, height, width]``, or ``[*, *inputs]`` where no number of outputs was given.
        Leading dims broadcast.

    Raises:
        ValueError: for another shape, or an even size.

    Example:
        >>> net = PixelCNN((8, 8), 16, (3, 3, 1))
        >>> net(torch.zeros(5, 8, 8), torch.zeros(2, 5, 16, 8, 8)).shape
        torch.Size([2, 5, 8, 8])
    """

    def __init__(
        self,
        inputs: Sequence[int],
        channels: int,
        kernels: Sequence[int] = (7, 3, 3, 3),
        *,
        outputs: int | None = None,
        tied: bool = False,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.input_shape, self.channels = image_shape(inputs), channels
        self.event_dims = None  # an image's and a context's differ, and there may be either number of inputs
        size, maps = self.input_shape[-2:], math.prod(self.input_shape[:-2])
        self.output_shape = self.input_shape if outputs is None else torch.Size([outputs, *size])
        self.context_shape = torch.Size([channels, *size])
        first, *rest = kernels
        different = list(dict.fromkeys(rest)) if tied else rest
        self.order = [different.index(k) for k in rest] if tied else list(range(len(rest)))
        self.first = MaskedConvolution(maps, channels, first, first=True)
        self.rest = nn.ModuleList(MaskedConvolution(channels, channels, k) for k in different)
        self.last = nn.Conv2d(channels, outputs or maps, 1)
        self.activation = activation()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_shape(x, self.input_shape, "images")
        leading = x.shape[: x.dim() - len(self.input_shape)]
        h = self.first(x.reshape(-1, self.first.in_channels, *self.input_shape[-2:]))
        if context is not None:
            check_shape(context, self.context_shape, "a context")
            summed = h.reshape(*leading, *self.context_shape) + context
            leading, h = summed.shape[:-3], summed.reshape(-1, *self.context_shape)
        for i in self.order:
            h = h + self.rest[i](self.activation(h))
        return self.last(self.activation(h)).reshape(*leading, *self.output_shape)
