"""Convolutional encoders of images and the decoders that match them, plain and residual."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..plates import batched
from .inputs import check_shape, with_mask

Activation = Callable[[], nn.Module]


class Convolutional(nn.Module):
    """Images to features: convolutions that halve height and width, and a linear layer.

    Each layer has kernels of 3 x 3 and stride 2, and rounds up, so that any height and width will do; 28 becomes 14,
    7 and 4. The features end with the activation. With ``missing`` a second input says which values are observed.

    References:
        Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks
        (Radford, Metz and Chintala, 2016) https://arxiv.org/abs/1511.06434

    Arguments:
        inputs: shape of an image, ``(channels, height, width)`` or ``(height, width)``.
        channels: of each layer.
        features: size of the features.
        activation: a module class for after each layer.
        missing: whether the input may have missing values.

    Returns:
        When called with ``[*, *inputs]``, and perhaps a mask of that shape: features ``[*, features]``.

    Raises:
        ValueError: for another shape; for a mask where ``missing`` is False.

    Example:
        >>> Convolutional((28, 28), (16, 32, 64), 128)(torch.zeros(5, 28, 28)).shape
        torch.Size([5, 128])
    """

    def __init__(
        self,
        inputs: Sequence[int],
        channels: Sequence[int],
        features: int,
        *,
        activation: Activation = nn.ReLU,
        missing: bool = False,
    ) -> None:
        super().__init__()
        self.input_shape = image_shape(inputs)
        self.event_dims = len(self.input_shape)
        self.missing = missing
        *maps, height, width = self.input_shape
        smallest = _halved(height, width, channels)[-1]
        layers = self._layers(math.prod(maps) * (2 if missing else 1), channels, activation)
        readout = nn.Linear(channels[-1] * math.prod(smallest), features)
        self.layers = batched(nn.Sequential(*layers, nn.Flatten(), readout, activation()), 3)

    @staticmethod
    def _layers(inputs: int, channels: Sequence[int], activation: Activation) -> list[nn.Module]:
        sizes = pairwise([inputs, *channels])
        return [layer for a, b in sizes for layer in (nn.Conv2d(a, b, 3, stride=2, padding=1), activation())]

    def forward(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        check_shape(x, self.input_shape, "images")
        if len(self.input_shape) == 2:
            x, observed = x.unsqueeze(-3), None if observed is None else observed.unsqueeze(-3)
        return self.layers(with_mask(x, observed, -3, missing=self.missing, name=type(self).__name__))


class ConvolutionalDecoder(nn.Module):
    """Codes to images: a linear layer, and transposed convolutions that double height and width.

    It goes through the sizes of :class:`Convolutional` the other way round, so it ends at any height and width.

    References:
        Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks
        (Radford, Metz and Chintala, 2016) https://arxiv.org/abs/1511.06434

    Arguments:
        latent: size of a code.
        channels: that enter each layer; the encoder's in reverse.
        outputs: shape of what comes out, ``(channels, height, width)`` or ``(height, width)``. The channels need not be
            an image's: twice as many are a mean and a scale for each of its values.
        activation: a module class for before each layer.

    Returns:
        When called with codes ``[*, latent]``: ``[*, *outputs]``.

    Raises:
        ValueError: for another shape.

    Example:
        >>> ConvolutionalDecoder(10, (64, 32, 16), (2, 28, 28))(torch.zeros(5, 10)).shape
        torch.Size([5, 2, 28, 28])
    """

    def __init__(
        self, latent: int, channels: Sequence[int], outputs: Sequence[int], *, activation: Activation = nn.ReLU
    ) -> None:
        super().__init__()
        self.latent, self.output_shape, self.event_dims = latent, image_shape(outputs), 1
        *maps, height, width = self.output_shape
        sizes = _halved(height, width, channels)[::-1]
        first = (channels[0], *sizes[0])
        layers = self._layers(channels, math.prod(maps), sizes[1:], activation)
        self.layers = batched(nn.Sequential(nn.Linear(latent, math.prod(first)), nn.Unflatten(1, first), *layers), 1)

    @staticmethod
    def _layers(
        channels: Sequence[int], outputs: int, sizes: list[tuple[int, int]], activation: Activation
    ) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for (a, b), size in zip(pairwise([*channels, outputs]), sizes, strict=True):
            even = (1 - size[0] % 2, 1 - size[1] % 2)
            layers += [activation(), nn.ConvTranspose2d(a, b, 3, stride=2, padding=1, output_padding=even)]
        return layers

    def forward(self, z: Tensor) -> Tensor:
        check_shape(z, (self.latent,), "codes")
        return self.layers(z).reshape(*z.shape[:-1], *self.output_shape)


class Residual(Convolutional):
    """Images to features: residual blocks that halve height and width, and a linear layer.

    Arguments, inputs and outputs are those of :class:`Convolutional`. Activations are normalised in groups of 16
    channels of the same image, so that no image changes another's features, as it would by batch normalisation.

    References:
        Identity Mappings in Deep Residual Networks (He, Zhang, Ren and Sun, 2016) https://arxiv.org/abs/1603.05027
        Group Normalization (Wu and He, 2018) https://arxiv.org/abs/1803.08494

    Arguments:
        inputs: shape of an image, ``(channels, height, width)`` or ``(height, width)``.
        channels: of each block.
        features: size of the features.
        activation: a module class.
        missing: whether the input may have missing values.

    Example:
        >>> Residual((3, 32, 32), (16, 32), 128)(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 128])
    """

    @staticmethod
    def _layers(inputs: int, channels: Sequence[int], activation: Activation) -> list[nn.Module]:
        blocks = [_Block(a, b, activation, stride=2) for a, b in pairwise([channels[0], *channels])]
        return [nn.Conv2d(inputs, channels[0], 3, padding=1), *blocks, _norm(channels[-1]), activation()]


class ResidualDecoder(ConvolutionalDecoder):
    """Codes to images: a linear layer, and residual blocks, each after height and width are doubled.

    Arguments, inputs and outputs are those of :class:`ConvolutionalDecoder`; it matches :class:`Residual`.

    References:
        Identity Mappings in Deep Residual Networks (He, Zhang, Ren and Sun, 2016) https://arxiv.org/abs/1603.05027

    Arguments:
        latent: size of a code.
        channels: that enter each block; the encoder's in reverse.
        outputs: shape of what comes out, ``(channels, height, width)`` or ``(height, width)``.
        activation: a module class.

    Example:
        >>> ResidualDecoder(10, (32, 16), (3, 32, 32))(torch.zeros(5, 10)).shape
        torch.Size([5, 3, 32, 32])
    """

    @staticmethod
    def _layers(
        channels: Sequence[int], outputs: int, sizes: list[tuple[int, int]], activation: Activation
    ) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for (a, b), size in zip(pairwise([*channels, channels[-1]]), sizes, strict=True):
            layers += [nn.Upsample(size=size), _Block(a, b, activation)]
        return [*layers, _norm(channels[-1]), activation(), nn.Conv2d(channels[-1], outputs, 3, padding=1)]


class _Block(nn.Module):
    """Two convolutions, each after a normalisation and an activation, beside the identity or a 1 x 1 convolution."""

    def __init__(self, inputs: int, outputs: int, activation: Activation, stride: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(_norm(inputs), activation(), nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)),
            *(_norm(outputs), activation(), nn.Conv2d(outputs, outputs, 3, padding=1)),
        )
        same = stride == 1 and inputs == outputs
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.layers(x)


def _norm(channels: int) -> nn.GroupNorm:
    # of about 16 channels a group: a group of a single value would become a constant
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 16)), channels)


def image_shape(shape: Sequence[int]) -> torch.Size:
    """A shape that is an image's: two or three positive sizes.

    Raises:
        ValueError: for any other.
    """
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"an image is (channels, height, width) or (height, width), got {tuple(shape)}")
    return torch.Size(shape)


def _halved(height: int, width: int, channels: Sequence[int]) -> list[tuple[int, int]]:
    """The height and width that come to each layer, and out of the last."""
    if not channels:
        raise ValueError("channels must have at least one entry, the channels of a layer")
    return [(-(-height // 2**i), -(-width // 2**i)) for i in range(len(channels) + 1)]
