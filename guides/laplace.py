"""The Laplace guide: the posterior's mode, and after training the normal distribution of the curvature there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, biject_to

from pyro_ae.data import Call
from pyro_ae.density import log_joint
from pyro_ae.types import Model
from pyro_ae.unconstrained import Unconstrained


class Laplace(Unconstrained):
    r"""A point while it is trained by the ELBO, and then a normal distribution over the unconstrained latents.

    .. math::
        \hat u = \arg\max_u \log p(x, u), \qquad q(u) = N\big(\hat u, \, H^{-1}\big), \qquad
        H = -\nabla^2_u \log p(x, u) \, \big|_{\hat u}

    The curvature is that of all data, and exact: so many backward passes as there are numbers in the latents, thus for
    up to some thousands. ``method="laplace"`` is for networks. All latents must be outside the plate of the rows.

    References:
        Accurate Approximations for Posterior Moments and Marginal Densities (Tierney and Kadane, 1986)
        https://doi.org/10.1080/01621459.1986.10478240

    Arguments:
        model: whose latents it samples.
        plate: name of the plate of the rows.
        start: initial value of a site, one of ``pyro.infer.autoguide``'s ``init_to_...`` functions.

    Raises:
        ValueError: at the end of the fit, where the point is no mode.
    """

    def build(self, size: int) -> None:
        self.center = nn.Parameter(torch.zeros(size))
        self.register_buffer("covariance_factor", torch.zeros(size, size))  # zero until it is known

    def get_posterior(self, *args: Any, **kwargs: Any) -> Distribution:
        point = self.training or not self.covariance_factor.any()
        if point:
            return dist.Delta(self.center, event_dim=1)
        return dist.MultivariateNormal(self.center, scale_tril=self.covariance_factor)

    def finish(self, model: Model, batches: Iterable[tuple[Call, float]]) -> None:
        """Compute the curvature; ``svi`` calls this once it is done.

        Arguments:
            model: scaled to the whole data.
            batches: of all rows, and the share of the rows that each has.
        """
        center = self.center.detach()
        hessian = torch.zeros_like(self.covariance_factor)
        for batch, share in batches:
            hessian -= share * torch.autograd.functional.hessian(
                lambda u, batch=batch: self._log_density(model, u, batch), center
            )
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if failed or not torch.isfinite(factor).all():
            least = torch.linalg.eigvalsh(hessian)[0].item() if torch.isfinite(hessian).all() else float("nan")
            raise ValueError(
                f"the posterior has no mode where the Laplace guide ended (smallest curvature {least:.3g}): train it "
                "longer, with a schedule such as 'cosine', or use Shared(model, FullRank). The point is in guide.center"
            )
        with torch.no_grad():
            self.covariance_factor.copy_(torch.linalg.cholesky(torch.cholesky_inverse(factor)))

    def _log_density(self, model: Model, latent: Tensor, batch: Call) -> Tensor:
        """Of the model at unconstrained latents ``[D]``, with the determinants of the maps to their supports."""
        values, log_det = {}, latent.new_zeros(())
        for site, free in self._unpack_latent(latent):
            transform = biject_to(site["fn"].support)
            values[site["name"]] = transform(free)
            log_det = log_det + transform.log_abs_det_jacobian(free, values[site["name"]]).sum()
        return log_joint(model, values, batch).sum() + log_det


def example() -> tuple[Any, Laplace, Tensor]:
    """A model with a real and a positive latent, a guide for it, and 16 rows."""
    from .shared import example as shared

    model, _, x = shared()
    return model, Laplace(model), x
