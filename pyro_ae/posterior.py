"""The one result of every fit: draws, predictions, evidence, and its way to ArviZ and to disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .data import Call, LoadedRows, Rows, as_rows
from .draws import draw, log_evidence, log_likelihood, replay, row_chunks
from .particles import gather
from .prediction import predict_moments
from .program import Program
from .sites import Layout, Recorder
from .types import Guide, Model

if TYPE_CHECKING:
    from .diagnostics.report import Report
    from .latent_densities import LatentDensity


class Posterior:
    """What a fit found: a guide with its learnt parameters, or the draws of chains. Both are used alike.

    ``fit`` and :meth:`load` make it. Tensors that its methods return are on the CPU and carry no gradient.

    Arguments:
        program: model, guide and parameters, built.
        data: the rows of the fit, or None.
        method: the engine, as text.
        history: name to values over the fit.
        draws: site to ``[chains, draws, *shape]``, for a sampler.
        stats: name to ``[chains, draws]``, for a sampler.
        interrupted: whether the fit was stopped by hand.
        batch_size: rows of a minibatch, for the record.

    Attributes:
        model: the model function.
        guide: the guide, or None where a sampler made the draws.
        draws: site to draws ``[chains, draws, *shape]`` of a sampler, or None.
        stats: name to ``[chains, draws]`` of what the sampler recorded, in ArviZ's names.
        history: name to values over the fit, such as ``loss``, ``validation`` and each site's share.
        method: the engine, as text.
        interrupted: whether the fit was stopped by hand.

    Example:
        >>> from pyro_ae import fit, svi
        >>> from pyro_ae.models import ppca
        >>> model, guide, x = ppca.example()
        >>> posterior = fit(model, x, guide=guide, method=svi(steps=10), progress=False)
        >>> posterior.encode().shape, posterior.reconstruct().shape, posterior.generate(3).shape
        (torch.Size([16, 2]), torch.Size([16, 5]), torch.Size([3, 5]))
    """

    def __init__(
        self,
        program: Program,
        *,
        data: Rows | LoadedRows | None,
        method: str,
        history: Mapping[str, list[float]] | None = None,
        draws: Mapping[str, Tensor] | None = None,
        stats: Mapping[str, Tensor] | None = None,
        interrupted: bool = False,
        batch_size: int | None = None,
    ) -> None:
        self.program = program
        self.data = data
        self.method = method
        self.history = {n: list(v) for n, v in (history or {}).items()}
        self.draws = None if draws is None else dict(draws)
        self.stats = dict(stats or {})
        self.interrupted = interrupted
        self.batch_size = batch_size

    @property
    def model(self) -> Model:
        return self.program.model.fn

    @property
    def guide(self) -> Guide | None:
        return None if self.program.guide is None else self.program.guide.fn

    @property
    def params(self) -> dict[str, Tensor]:
        """Learnt ``pyro.param`` values that belong to no module, as the program sees them."""
        return self.program.parameters.constrained()

    @property
    def local(self) -> list[str]:
        """Names of the latents that each row has for itself."""
        return self.program.layout.local(self.program.plate)

    # -- draws ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, draws: int | None = None, data: Any = None) -> dict[str, Tensor]:
        """Draws of the latent sites.

        Arguments:
            draws: how many; 1000 from a guide and all there are from chains by default. Fewer than there are, are
                taken evenly from all chains.
            data: rows to condition on; those of the fit by default.

        Returns:
            Site to ``[draws, *shape]``.

        Raises:
            ValueError: for more draws than the chains hold; where new rows have latents that no chain drew.

        Example:
            >>> from pyro_ae import fit, svi
            >>> from pyro_ae.models import ppca
            >>> model, guide, x = ppca.example()
            >>> posterior = fit(model, x, guide=guide, method=svi(steps=10), progress=False)
            >>> posterior.sample(5)["z"].shape
            torch.Size([5, 16, 2])
        """
        if draws is not None and draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        if self.draws is not None:
            if data is not None and self.local:
                raise ValueError(
                    f"chains hold draws of {', '.join(map(repr, self.local))} for the rows of the fit only: fit the "
                    "new rows, or use a guide"
                )
            flat = {n: v.flatten(0, 1) for n, v in self.draws.items()}
            held = len(next(iter(flat.values())))
            if draws is None or draws == held:
                return flat
            if draws > held:
                raise ValueError(f"the chains hold {held} draws, fewer than {draws}: fit with nuts(draws=...) of more")
            index = torch.linspace(0, held - 1, draws).round().long()
            return {n: v[index] for n, v in flat.items()}
        return draw(self.program, draws or 1000, self._rows(data).call())

    @torch.no_grad()
    def predict(self, data: Any = None, draws: int = 100, *, sites: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Draws from the posterior predictive distribution of the observed and deterministic sites.

        Arguments:
            data: as for ``fit``; what stands for the observed values is not looked at by the model, though a guide
                sees it. A model that makes room for it may be given None there. The rows of the fit by default.
            draws: how many.
            sites: names; all by default.

        Returns:
            Site to ``[draws, *shape]``.

        Raises:
            ValueError: for an unknown site.
        """
        batch = self._rows(data).call()
        values = self.sample(self._at_most(draws), data)

        def read(layout: Layout, runs: list[Recorder], k: int) -> dict[str, Tensor]:
            # a site that was observed in the fit is not, where the model is given None for it
            free = [n for n in self.program.layout.names("observed") if n in layout.names("latent")]
            known = [*runs[0].generated, *free, *layout.names("deterministic")]
            names = known if sites is None else list(sites)
            unknown = [n for n in names if n not in known]
            if unknown:
                raise ValueError(f"no site {unknown[0]!r} to predict; there are {', '.join(map(repr, known))}")
            return gather(runs, names, layout.model, k, lambda s: s["value"])

        return replay(self.program, values, batch, read, generate=True)

    @torch.no_grad()
    def uncertainty(self, data: Any = None, draws: int | None = None) -> Any:
        """The predicted mean of each observed site, and its uncertainty in two parts, over all draws.

        Draws are streamed, so that many of a large network take no more room than a few.

        Arguments:
            data: as for :meth:`predict`.
            draws: how many; of chains all, of a guide 1000 by default.

        Returns:
            A :class:`~pyro_ae.prediction.Prediction` of ``mean``, ``aleatoric`` and ``epistemic``, or a dict of them
            where the model observes several sites.

        Raises:
            ValueError: for a likelihood without a finite mean and variance.
        """
        return _one(predict_moments(self.program, self.sample(draws, data), self._rows(data).call()))

    @torch.no_grad()
    def log_likelihood(self, data: Any = None, draws: int | None = None) -> dict[str, Tensor]:
        """The log-density of each observed site at draws of the latents.

        Arguments:
            data: rows; those of the fit by default.
            draws: how many.

        Returns:
            Site to ``[draws, *batch]`` in nats, without any minibatch scale.
        """
        return log_likelihood(self.program, self.sample(draws, data), self._rows(data).call())

    @torch.no_grad()
    def log_evidence(self, data: Any = None, particles: int = 1000) -> Tensor:
        r"""A lower bound on log p(x) from importance sampling with the guide, which tightens with more particles.

        .. math:: \log \frac{1}{K} \sum_k \frac{p(x, z_k)}{q(z_k \mid x)}

        Arguments:
            data: rows; those of the fit by default.
            particles: K.

        Returns:
            ``[N]`` in nats, one for each row; or a scalar where a latent ties the rows together.

        Raises:
            ValueError: for a posterior of chains, which has no guide to draw from.
        """
        if particles < 1:
            raise ValueError(f"particles must be at least 1, got {particles}")
        if self.program.guide is None:
            raise ValueError("log_evidence draws from a guide, and chains have none: fit with svi")
        parts = [log_evidence(self.program, batch, particles) for batch in self._chunks(data, particles)]
        return torch.cat(parts) if parts[0].dim() else parts[0]

    def with_guide(self, guide: Guide, *, data: Any = None) -> Posterior:
        """The posterior of the same model, with its parameters as they are, that another guide gives.

        Such a guide is one that draws better than it was trained to, such as ``ImportanceWeighted(posterior.model,
        posterior.guide, 50)`` or ``SemiAmortized``. Nothing is trained.

        Arguments:
            guide: samples the latents, with the model's arguments.
            data: rows, in place of those of the fit.

        Raises:
            ValueError: without data, or where the guide does not fit the model.
        """
        held = self._rows(data)
        batch = held.first(self.batch_size)
        program = self.program.with_guide(guide, batch, minibatched=self.batch_size is not None)
        method = f"{self.method}, then {getattr(guide, '__name__', type(guide).__name__)}"
        return Posterior(program, data=held, method=method, history=self.history, batch_size=self.batch_size)

    # -- local latents -------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, data: Any = None, draws: int = 100, *, code: str | None = None) -> Any:
        """The posterior mean of each row's codes.

        It is the mean of the guide's distribution where the guide has one site, else an average over draws.

        Arguments:
            data: rows; those of the fit by default.
            draws: to average over where there is no closed form; at most those there are.
            code: the site of the codes; by default the latents of the rows, and without any ``"z"`` by
                ``pyro.deterministic``, as a Bayesian autoencoder has it.

        Returns:
            ``[N, *event]`` on the CPU, or a dict of them where rows have several latent sites.

        Raises:
            ValueError: where the model has no codes, or was fitted by a sampler and is given new rows that have latents
                of their own.
        """
        from .coding import codes

        return _one(codes(self, data, draws, code))

    @torch.no_grad()
    def reconstruct(self, data: Any = None, draws: int = 10) -> Any:
        """The mean of the likelihood, averaged over draws of the latents given each row.

        Its uncertainty, as a standard deviation for each value, is ``posterior.uncertainty(data).epistemic.sqrt()``.

        Arguments:
            data: rows; those of the fit by default.
            draws: to average over, of those there are.

        Returns:
            ``[N, *event]`` on the CPU, or a dict of them where the model observes several sites.

        Raises:
            ValueError: as :meth:`encode` does.
        """
        from .coding import reconstruct

        return _one(reconstruct(self, data, draws))

    @torch.no_grad()
    def generate(
        self,
        n: int,
        *,
        mean: bool = False,
        density: LatentDensity | None = None,
        code: str | None = None,
        data: Any = None,
        sites: Iterable[str] | None = None,
    ) -> Any:
        """New rows: latents of a row from the prior or another density, shared latents from the posterior in turn.

        Arguments:
            n: how many rows.
            mean: whether to give the likelihood's mean in place of a draw from it; of codes of a density, averaged over
                the draws of shared latents.
            density: of codes, in place of the prior, such as ``mixture(20, dirichlet_process=True)`` of
                ``pyro_ae.latent_densities``; it is fitted to the codes of the data, for each chain alone.
            code: the site of the codes, which may be one by ``pyro.deterministic``; by default the latents of the rows.
            data: rows whose codes the density is fitted to; those of the fit by default.
            sites: names, also of deterministic sites; the observed ones by default.

        Returns:
            ``[n, *event]`` on the CPU, or a dict of them where the model observes several sites. A model that does
            not take ``size`` is run on rows of the fit, of which it can only see what it does not observe.

        Raises:
            ValueError: for n below 1, an unknown site, a density without codes, and without data that a model needs.
        """
        from .generation import generate

        return _one(generate(self, n, mean=mean, density=density, code=code, data=data, sites=sites))

    # -- ArviZ, report, disk -------------------------------------------------------------------------------

    def to_arviz(self, draws: int | None = None, *, data: Any = None, groups: Iterable[str] | None = None) -> Any:
        """The posterior as ArviZ's ``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x).

        See :func:`pyro_ae.diagnostics.conversion.to_arviz` for the groups and their sizes.

        Arguments:
            draws: from a guide, 1000 by default; chains give all they hold.
            data: rows; those of the fit by default.
            groups: names of the groups to make; all by default.
        """
        from .diagnostics.conversion import to_arviz

        return to_arviz(self, draws, data=data, groups=groups)

    def report(self, data: Any = None) -> Report:
        """Whether this posterior can be trusted, and why.

        See :func:`pyro_ae.diagnostics.report.report`.

        Arguments:
            data: rows; those of the fit by default.
        """
        from .diagnostics.report import report

        return report(self, data)

    def save(self, path: str | Path) -> Path:
        """Write the posterior to a folder: safetensors, netCDF and JSON, nothing pickled, and not the data.

        Arguments:
            path: folder, made where it is not there.

        Raises:
            ValueError: where the folder cannot be written.
        """
        from .storage import save

        return save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, model: Model, guide: Guide | None = None, *, data: Any = None) -> Posterior:
        """Read a posterior that :meth:`save` wrote, into a model and guide of the same make.

        Arguments:
            path: folder.
            model: the model function; the parameters of its modules are overwritten.
            guide: the guide; not needed where ``fit`` made it, or a sampler the draws.
            data: rows for what needs them; they are not on disk.

        Raises:
            ValueError: where the files are not such a posterior, are damaged, or do not match the model; it says where.
        """
        from .storage import load

        return load(Path(path), model, guide, data=data)

    def __repr__(self) -> str:
        from .describe import describe

        return describe(self)

    def _repr_html_(self) -> str:
        from .html import of_posterior

        return of_posterior(self)

    # -- inside --------------------------------------------------------------------------------------------

    def _rows(self, data: Any) -> Rows | LoadedRows:
        rows = self.data if data is None else as_rows(data)
        if rows is None:
            raise ValueError("the posterior was loaded without data: pass data=...")
        return rows.to(self.program.device)

    def _chunks(self, data: Any, particles: int) -> Iterator[Call]:
        return row_chunks(self.program, self._rows(data), particles)

    def _need_local(self, what: str) -> None:
        if not self.local:
            shared = ", ".join(map(repr, self.program.layout.names("latent"))) or "none"
            raise ValueError(
                f"{what} is for models with a latent for each row, inside plate '{self.program.plate}'; this one has "
                f"{shared} outside it. See sample and predict"
            )

    def _at_most(self, draws: int) -> int:
        if self.draws is None:
            return draws
        first = next(iter(self.draws.values()))
        return min(draws, first.shape[0] * first.shape[1])


def _one(values: dict[str, Any]) -> Any:
    return next(iter(values.values())) if len(values) == 1 else values
