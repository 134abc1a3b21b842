"""Feature spaces to compare rows in, made of the rows at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn import MLP


@dataclass(frozen=True)
class Features:
    """A feature space: a function of rows, and what it is.

    Attributes:
        function: rows ``[*, *row]`` to ``[*, d]``.
        about: a phrase that says what it is.
    """

    function: Callable[[Tensor], Tensor]
    about: str

    def __call__(self, rows: Tensor) -> Tensor:
        return self.function(rows)


def principal_features(rows: Tensor, share: float = 0.95, most: int = 50) -> Features:
    """The whitened principal components of some rows, as a feature space.

    Each component has variance 1 over these rows. Components that hold little of the variance are left out, as noise
    would count there as much as what is seen. It knows nothing of what rows mean: of images it sees brightness and
    rough shape.

    Arguments:
        rows: ``[N, *row]``, at least two that differ.
        share: of the variance that the components hold together.
        most: how many components at most.

    Raises:
        ValueError: for rows that are all the same, or too few.

    Example:
        >>> principal_features(torch.randn(100, 4) * torch.tensor([1.0, 1.0, 1.0, 1e-3])).about
        '3 principal components (whitened) of 4 numbers a row'
    """
    flat = rows.detach().cpu().double().reshape(len(rows), -1)
    center = flat.mean(0)
    _, scale, directions = torch.linalg.svd(flat - center, full_matrices=False)
    if len(flat) < 2 or not scale.square().sum() > 0:
        raise ValueError(f"principal components need two rows or more that differ, got {len(flat)} rows")
    held = scale.square().cumsum(0) / scale.square().sum()
    count = min(most, int((held < share).sum()) + 1)
    loadings = directions[:count].T * ((len(flat) - 1) ** 0.5 / scale[:count])

    def function(rows: Tensor) -> Tensor:
        return ((rows.cpu().double().reshape(len(rows), -1) - center) @ loadings).to(torch.get_default_dtype())

    return Features(function, f"{count} principal components (whitened) of {flat.shape[1]} numbers a row")


def classifier_features(rows: Tensor, labels: Tensor, steps: int = 400, dims: int = 32) -> Features:
    """The last hidden layer of a small network that is trained to tell labels apart, as a feature space.

    It sees what the labels are told by. Rows that it is trained on lie farther apart than others of their kind, so
    score rows that it has not seen.

    Arguments:
        rows: ``[N, *row]`` to train on.
        labels: of the rows, ``[N]``, of at least two kinds.
        steps: of Adam, with batches of 128.
        dims: of the last hidden layer.

    Raises:
        ValueError: for labels that do not match the rows, or of a single kind.

    Example:
        >>> x = torch.randn(64, 2, 3)
        >>> classifier_features(x, x[:, 0, 0] > 0, steps=5)(x).shape
        torch.Size([64, 32])
    """
    labels = torch.as_tensor(labels).detach().cpu()
    kinds, targets = labels.unique(return_inverse=True)
    if labels.shape != rows.shape[:1]:
        raise ValueError(f"labels must be one for each of the {len(rows)} rows, got shape {tuple(labels.shape)}")
    if len(kinds) < 2:
        raise ValueError(f"labels must be of two kinds or more, got {kinds.tolist()}: leave labels out")
    flat = rows.detach().cpu().to(torch.get_default_dtype()).reshape(len(rows), -1)
    center, scale = flat.mean(0), flat.std(correction=0).clamp_min(1e-12)
    net, last = MLP(flat.shape[1], (128,), dims, activation=nn.ELU), nn.Linear(dims, len(kinds))
    weights = [*net.parameters(), *last.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=3e-3, weight_decay=1e-2)

    def function(rows: Tensor) -> Tensor:
        given = rows.cpu().to(center.dtype).reshape(len(rows), -1)
        return nn.functional.elu(net((given - center) / scale))

    with torch.enable_grad():
        for _ in range(steps):
            at = torch.randint(len(flat), (min(128, len(flat)),))
            optimizer.zero_grad()
            nn.functional.cross_entropy(last(function(flat[at])), targets[at]).backward()
            optimizer.step()
    net.requires_grad_(False)
    return Features(function, f"the {dims} units of a small network trained to tell {len(kinds)} labels apart")
