"""Functions drawn from processes, as targets for what a model's prior should be like."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class gaussian_process:
    r"""Functions drawn from a Gaussian process of zero mean with a squared-exponential kernel.

    .. math:: k(x, x') = \sigma^2 \exp\Big( -\frac{1}{2} \sum_i \frac{(x_i - x'_i)^2}{l_i^2} \Big), \quad
        \log \sigma^2 \sim N(\log s, \tau^2), \quad \log l_i \sim N(\log l, \tau^2)

    References:
        Gaussian Processes for Machine Learning (Rasmussen and Williams, 2006) https://gaussianprocess.org/gpml

    Arguments:
        variance: s.
        lengthscale: l; by default the root of twice the number of inputs.
        spread: :math:`\tau`; above 0 each function has a variance and lengthscales of its own.
        jitter: part of the variance that is added to the kernel's diagonal.

    Raises:
        ValueError: for values out of range.

    Example:
        >>> gaussian_process()(3, torch.linspace(-1.0, 1.0, 5).unsqueeze(-1)).shape
        torch.Size([3, 5])
    """

    variance: float = 1.0
    lengthscale: float | None = None
    spread: float = 0.0
    jitter: float = 1e-6

    def __post_init__(self) -> None:
        positive = self.variance > 0 and (self.lengthscale is None or self.lengthscale > 0) and self.jitter > 0
        if not positive or self.spread < 0:
            raise ValueError(f"variance, lengthscale and jitter must be positive, and spread not negative: {self!r}")

    def __call__(self, n: int, x: Tensor, *_: Any) -> Tensor:
        """Functions at points: ``[n, points]``.

        Arguments:
            n: how many.
            x: points ``[points, inputs]``; further arguments of the model are not looked at.
        """
        kernel = self.kernel(x, draws=n if self.spread else 1)
        noise = torch.randn(n, len(x), 1, dtype=torch.float64, device=x.device)
        return (torch.linalg.cholesky(kernel) @ noise).squeeze(-1).to(x)

    def kernel(self, x: Tensor, draws: int = 1) -> Tensor:
        """Covariances of the function's values ``[draws, points, points]``, in double precision.

        Arguments:
            x: points ``[points, inputs]``.
            draws: of the variance and the lengthscales; the same each time without a spread.
        """
        points, inputs = x.shape
        noise = torch.randn(draws, 1, inputs + 1, dtype=torch.float64, device=x.device)
        factors = (self.spread * noise).exp()
        lengthscale = math.sqrt(2.0 * inputs) if self.lengthscale is None else self.lengthscale
        scaled = x.double() / (lengthscale * factors[..., 1:])
        correlation = torch.exp(
            -0.5 * torch.cdist(scaled, scaled, compute_mode="donot_use_mm_for_euclid_dist").square()
        )
        correlation = correlation + self.jitter * torch.eye(points, dtype=torch.float64, device=x.device)
        return self.variance * factors[..., :1] * correlation
