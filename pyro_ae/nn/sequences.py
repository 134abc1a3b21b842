"""Encoders of sequences and the decoders that match them: recurrent networks and transformers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .inputs import check_shape, with_mask


class Recurrent(nn.Module):
    """Sequences to features: the last state of gated recurrent units, or all of their states.

    With ``missing`` a second input says which values are observed, and each step sees it beside its values.

    References:
        Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation
        (Cho et al., 2014) https://arxiv.org/abs/1406.1078

    Arguments:
        inputs: size of one step.
        hidden: size of the state.
        layers: how many, each over the states of the one before.
        states: whether the features are the states after each step, and not the last alone.
        missing: whether the input may have missing values.

    Returns:
        When called with ``[*, T, inputs]``, and perhaps a mask of that shape: ``[*, hidden]``, or ``[*, T, hidden]``.

    Raises:
        ValueError: for another shape; for a mask where ``missing`` is False.

    Example:
        >>> Recurrent(3, 16)(torch.zeros(5, 20, 3)).shape
        torch.Size([5, 16])
    """

    def __init__(
        self, inputs: int, hidden: int, *, layers: int = 1, states: bool = False, missing: bool = False
    ) -> None:
        super().__init__()
        self.inputs, self.states, self.missing, self.event_dims = inputs, states, missing, 2
        first = inputs * (2 if missing else 1)
        self.layers = nn.ModuleList(_GRU(hidden if i else first, hidden) for i in range(layers))

    def forward(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        check_shape(x, ("T", self.inputs), "sequences")
        h = with_mask(x, observed, -1, missing=self.missing, name="Recurrent")
        for layer in self.layers:
            h = layer(h)
        return h if self.states else h[..., -1, :]


class RecurrentDecoder(nn.Module):
    """Codes to sequences: gated recurrent units that begin at the code, and see it at each step.

    References:
        Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation
        (Cho et al., 2014) https://arxiv.org/abs/1406.1078

    Arguments:
        latent: size of a code.
        hidden: size of the state.
        outputs: shape of a sequence, ``(T, outputs of each step)``.
        layers: how many, each over the states of the one before.

    Returns:
        When called with codes ``[*, latent]``: ``[*, *outputs]``.

    Raises:
        ValueError: for another shape.

    Example:
        >>> RecurrentDecoder(2, 16, (20, 3))(torch.zeros(5, 2)).shape
        torch.Size([5, 20, 3])
    """

    def __init__(self, latent: int, hidden: int, outputs: tuple[int, int], *, layers: int = 1) -> None:
        super().__init__()
        self.latent, self.event_dims = latent, 1
        self.steps, size = outputs
        self.start = nn.Linear(latent, hidden)
        self.layers = nn.ModuleList(_GRU(hidden if i else latent, hidden) for i in range(layers))
        self.readout = nn.Linear(hidden, size)

    def forward(self, z: Tensor) -> Tensor:
        check_shape(z, (self.latent,), "codes")
        start = self.start(z).tanh()
        h = z.unsqueeze(-2).expand(*z.shape[:-1], self.steps, self.latent)
        for layer in self.layers:
            h = layer(h, start)
        return self.readout(h)


class _GRU(nn.Module):
    """As ``nn.GRU``, of which ``torch.func.vmap`` knows no rule."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.input, self.state = nn.Linear(inputs, 3 * hidden), nn.Linear(hidden, 3 * hidden)

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        if h is None:
            h = x.new_zeros(*x.shape[:-2], self.state.in_features)
        states = []
        for step in self.input(x).unbind(-2):
            reset, keep, new = step.chunk(3, -1)
            old_reset, old_keep, old_new = self.state(h).chunk(3, -1)
            new = (new + (reset + old_reset).sigmoid() * old_new).tanh()
            h = new + (keep + old_keep).sigmoid() * (h - new)
            states.append(h)
        return torch.stack(states, -2)


class Transformer(nn.Module):
    """Sequences to features: attention between all steps, pooled by one more token, or the tokens of all steps.

    With ``missing`` a second input says which values are observed, and each step sees it beside its values. To a step
    of which nothing is observed no other attends, so that one which pads a sequence changes no other's features.

    References:
        Attention Is All You Need (Vaswani et al., 2017) https://arxiv.org/abs/1706.03762
        On Layer Normalization in the Transformer Architecture (Xiong et al., 2020) https://arxiv.org/abs/2002.04745

    Arguments:
        inputs: size of one step.
        width: size of a token, and of the features.
        steps: most that a sequence may have, with learned positions; None for any number, with sinusoids for positions.
        layers: how many.
        heads: of the attention; a divisor of the width.
        states: whether the features are the tokens of all steps, and not pooled.
        missing: whether the input may have missing values.

    Returns:
        When called with ``[*, T, inputs]``, and perhaps a mask of that shape: ``[*, width]``, or ``[*, T, width]``.

    Raises:
        ValueError: for another shape; for a mask where ``missing`` is False; for heads that do not divide the width.

    Example:
        >>> Transformer(3, 16)(torch.zeros(5, 20, 3)).shape
        torch.Size([5, 16])
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        steps: int | None = None,
        *,
        layers: int = 2,
        heads: int = 4,
        states: bool = False,
        missing: bool = False,
    ) -> None:
        super().__init__()
        self.inputs, self.width, self.states, self.missing, self.event_dims = inputs, width, states, missing, 2
        self.tokens = nn.Linear(inputs * (2 if missing else 1), width)
        self.pool = nn.Parameter(0.02 * torch.randn(1, width))
        self.positions = None if steps is None else nn.Parameter(0.02 * torch.randn(steps, width))
        self.layers = nn.ModuleList(_Attention(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        check_shape(x, ("T", self.inputs), "sequences")
        h = self.tokens(with_mask(x, observed, -1, missing=self.missing, name="Transformer"))
        h = torch.cat([self.pool.expand(*h.shape[:-2], 1, self.width), h + self._at(x)], -2)
        seen = None
        if observed is not None:
            seen = observed.any(-1)
            seen = torch.cat([torch.ones_like(seen[..., :1]), seen], -1)  # the pool is never left without a token
        for layer in self.layers:
            h = layer(h, seen)
        h = self.norm(h)
        return h[..., 1:, :] if self.states else h[..., 0, :]

    def _at(self, x: Tensor) -> Tensor:
        """The positions ``[T, width]``."""
        steps = x.shape[-2]
        if self.positions is None:
            place = torch.arange(steps, device=x.device, dtype=x.dtype).unsqueeze(-1)
            rates = torch.arange(0, self.width, 2, device=x.device, dtype=x.dtype)
            angle = place * torch.exp(-math.log(1e4) / self.width * rates)
            return torch.cat([angle.sin(), angle.cos()], -1)[:, : self.width]
        if steps > len(self.positions):
            raise ValueError(
                f"expected sequences of at most {len(self.positions)} steps, got a tensor of {tuple(x.shape)}: raise "
                "steps, or leave it out for sinusoids"
            )
        return self.positions[:steps]


class TransformerDecoder(nn.Module):
    """Codes to sequences: a token for each step, of its learned position and the code, and attention between them.

    References:
        Attention Is All You Need (Vaswani et al., 2017) https://arxiv.org/abs/1706.03762

    Arguments:
        latent: size of a code.
        width: size of a token.
        outputs: shape of a sequence, ``(T, outputs of each step)``.
        layers: how many.
        heads: of the attention; a divisor of the width.

    Returns:
        When called with codes ``[*, latent]``: ``[*, *outputs]``.

    Raises:
        ValueError: for another shape; for heads that do not divide the width.

    Example:
        >>> TransformerDecoder(2, 16, (20, 3))(torch.zeros(5, 2)).shape
        torch.Size([5, 20, 3])
    """

    def __init__(self, latent: int, width: int, outputs: tuple[int, int], *, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.latent, self.event_dims = latent, 1
        steps, size = outputs
        self.code = nn.Linear(latent, width)
        self.positions = nn.Parameter(0.02 * torch.randn(steps, width))
        self.layers = nn.ModuleList(_Attention(width, heads) for _ in range(layers))
        self.readout = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size))

    def forward(self, z: Tensor) -> Tensor:
        check_shape(z, (self.latent,), "codes")
        h = self.code(z).unsqueeze(-2) + self.positions
        for layer in self.layers:
            h = layer(h)
        return self.readout(h)


class _Attention(nn.Module):
    """A transformer's layer, normalised before each part; by hand, for torch's own has no rule for ``vmap``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads must divide the width, got {heads} heads for a width of {width}")
        self.heads = heads
        self.before = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * width))
        self.after = nn.Linear(width, width)
        self.each = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, h: Tensor, seen: Tensor | None = None) -> Tensor:
        """Tokens ``[*, T, width]``, and which of them may be attended to, ``[*, T]``."""
        query, key, value = self.before(h).unflatten(-1, (3, self.heads, -1)).transpose(-2, -4).unbind(-3)
        scores = query @ key.mT / query.shape[-1] ** 0.5  # [*, heads, T, T]
        if seen is not None:
            scores = scores.masked_fill(~seen[..., None, None, :], -torch.inf)
        h = h + self.after((scores.softmax(-1) @ value).transpose(-2, -3).flatten(-2))
        return h + self.each(h)
