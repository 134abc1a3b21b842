"""The few plain networks the zoo shares. All take any leading dims, and encoders take missing values.

Each has ``event_dims``, the dims of one input without those that lead, or None where inputs differ.
"""

from .images import Convolutional, ConvolutionalDecoder, Residual, ResidualDecoder
from .perceptron import MLP
from .pixels import MaskedConvolution, PixelCNN
from .sequences import Recurrent, RecurrentDecoder, Transformer, TransformerDecoder

__all__ = [
    "MLP",
    "Convolutional",
    "ConvolutionalDecoder",
    "MaskedConvolution",
    "PixelCNN",
    "Recurrent",
    "RecurrentDecoder",
    "Residual",
    "ResidualDecoder",
    "Transformer",
    "TransformerDecoder",
]
