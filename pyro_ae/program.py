"""A model and its guide, ready to run: their parameters, their layout and the scale of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoNormal, init_to_feasible
from pyro.infer.autoguide.utils import deep_setattr
from torch import Tensor

from .data import Call, call_with
from .parameters import Parameters
from .particles import why_serial
from .plates import Scaled
from .sites import Layout, inspect_sites, quote
from .types import Guide, Model


class _MeanField(AutoNormal):
    """Pyro's mean-field guide; where the model proposes a start, as ``bayesian`` does for weights, narrow around it.

    Elsewhere it starts as Pyro's does, at zero with a scale of 0.1. Weights would hardly leave their prior from there:
    a layer of zeros passes no gradient on, and such a scale is more noise than a wide layer's output is signal.

    Arguments:
        model: a callable with Pyro sites.
        width: the scale to start with, over the size of what the model proposes; at least 0.001.
    """

    def __init__(self, model: Model, width: float = 0.05) -> None:
        super().__init__(model, init_loc_fn=_proposed)
        self.width = width

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            if (site["infer"] or {}).get("start"):
                loc, scale = self._get_loc_and_scale(name)
                size = loc.detach().square().mean().sqrt()
                deep_setattr(self.scales, name, torch.full_like(scale, float((self.width * size).clamp(1e-3, 0.1))))


def _proposed(site: Any) -> Tensor:
    """What the model proposes to start from; else what Pyro's guides start at."""
    propose = (site["infer"] or {}).get("start")
    return propose() if propose else init_to_feasible(site)


class Program:
    """A model and a guide under one param store, with the row plate scaled to N.

    Arguments:
        model: a callable with Pyro sites.
        guide: samples the model's latents, or None where a sampler does.
        plate: name of the plate of the rows.
        total: N, or None where there are no rows.
        device: where to compute.
    """

    def __init__(
        self,
        model: Model,
        guide: Guide | None,
        *,
        plate: str | None = "data",
        total: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.plate = plate
        self.total = total
        self.device = torch.device(device)
        self.automatic_guide = False
        self.parameters = Parameters(model, guide)
        self.model = Scaled(model, plate, total)
        self.guide = None if guide is None else Scaled(guide, plate, total)

    @property
    def layout(self) -> Layout:
        assert self.model.layout is not None, "build the program first"
        return self.model.layout

    @contextmanager
    def active(self, *, train: bool = False) -> Iterator[None]:
        """Run in the program's own param store, on its device, in training or evaluation mode."""
        with self.parameters.scope(), self.parameters.mode(train):
            if self.device.type == "cpu":
                yield
            else:
                with self.device:
                    yield

    def build(self, batch: Any, *, minibatched: bool = False, automatic: bool = False) -> None:
        """Run once to see the sites, and build what Pyro builds lazily.

        Arguments:
            batch: a call of the model.
            minibatched: whether batches are subsamples, for which the model needs the plate.
            automatic: whether to make a mean-field guide where there is none.

        Raises:
            ValueError: where guide and model do not fit, or the plate is not there.
        """
        self.parameters.to(self.device)
        with self.active(train=True), self.parameters.discover():
            if self.guide is None and automatic:
                self._automatic_guide(batch)
            try:
                layout = inspect_sites(self.model, self.guide, batch)
            except (ValueError, RuntimeError) as error:
                if minibatched:
                    error.add_note(
                        f"This was a minibatch of the {self.total} rows: the model must take the size of plate "
                        f"'{self.plate}' from the batch that it is given."
                    )
                raise
            self.parameters.to(self.device)
        if minibatched and self.plate not in layout.plates:
            known = ", ".join(map(repr, layout.plates)) or "none"
            raise ValueError(
                f"minibatches need the model's rows in a plate '{self.plate}'; the model's plates are: {known}. "
                "Name yours with fit(..., plate=...), or write `with batch_plate(x):` around the rows"
            )
        if minibatched and self.guide is not None and set(layout.local(self.plate)) & set(layout.guide):
            self._check_amortised(batch, layout)
        with self.active():
            # in evaluation mode, where normalisation layers do not mix particles or count these runs
            parts = (
                [(self.model, layout.model)]
                if self.guide is None
                else [(self.guide, layout.guide), (self.model, layout.model)]
            )
            reasons = [why_serial(fn, batch, sites, layout.nesting) for fn, sites in parts]
            layout.checked, layout.serial = True, next((r for r in reasons if r), None)
        self.model.layout = layout
        if self.guide is not None:
            self.guide.layout = layout

    def _check_amortised(self, batch: Any, layout: Layout) -> None:
        """Refuse a guide whose parameters belong to the rows of a batch: the next batch has other rows."""
        args, kwargs = call_with(batch)

        def one_more(value: Any) -> Any:
            return torch.cat([value, value[:1]]) if isinstance(value, Tensor) and value.dim() else value

        longer = Call(tuple(map(one_more, args)), {n: one_more(v) for n, v in kwargs.items()})
        local = [n for n in layout.local(self.plate) if n in layout.guide]
        try:
            with self.active(), torch.random.fork_rng(devices=()):
                found = inspect_sites(self.guide, None, longer).model  # type: ignore[arg-type]
            follows = all(found[n].shape != layout.guide[n].shape for n in local)
        except (ValueError, RuntimeError):
            follows = False
        if not follows:
            raise ValueError(
                f"the guide has parameters for each row of a batch in {quote(local)}, and minibatches would pair them "
                "with other rows: use a guide that is a function of the rows, as Amortized is, or leave out batch_size"
            )

    def _automatic_guide(self, batch: Any) -> None:
        layout = inspect_sites(self.model, None, batch)
        local = layout.local(self.plate)
        if local:
            latents = ", ".join(f"'{n}'" for n in local)
            site = layout.model[local[0]]
            sizes = site.shape[len(site.batch) :].numel()
            raise ValueError(
                f"the model has a latent for each row ({latents}, in plate '{self.plate}'), which needs a guide that "
                "is a function of the rows. Write\n"
                f"    guide = Amortized(MLP(inputs, [200, 200]), MeanField(200, {sizes}), site='{local[0]}')\n"
                "with MLP from pyro_ae.nn, Amortized from pyro_ae.guides.amortized and MeanField from "
                "pyro_ae.guides.mean_field; or, without minibatches, Shared(model, plate=None) of pyro_ae.guides.shared"
            )
        discrete = [n for n in layout.names("latent") if getattr(layout.model[n].support, "is_discrete", False)]
        if discrete:
            raise ValueError(
                f"the latents {', '.join(map(repr, discrete))} are discrete and have no automatic guide: enumerate "
                "them (pyro.infer.config_enumerate with svi(loss=TraceEnum_ELBO())) or write a guide"
            )
        if not layout.names("latent"):
            raise ValueError(
                "the model has no latent site; for maximum likelihood pass a guide that does nothing: "
                "guide=lambda *args, **kwargs: None"
            )
        guide = _MeanField(self.model.fn)
        self.guide = Scaled(guide, self.plate, self.total)
        self.parameters.modules["guide"] = guide  # beside what the model's pyro.param made, which stays
        self.automatic_guide = True

    def with_guide(self, guide: Guide, batch: Any, *, minibatched: bool = False) -> Program:
        """The same model and parameters with another guide, built."""
        new = Program(self.model.fn, guide, plate=self.plate, total=self.total, device=self.device)
        new.parameters.share(self.parameters)
        new.build(batch, minibatched=minibatched)
        return new

    def inspect(self, batch: Any, *, model: bool = True, guide: bool = True) -> Layout:
        """The layout on another batch; of the guide alone where ``model`` is False."""
        ours, theirs = self.model, self.guide if guide else None
        layout = inspect_sites(ours, theirs, batch) if model else inspect_sites(self.guide, None, batch)  # type: ignore
        layout.checked, layout.serial = True, self.layout.serial
        return layout

    @property
    def rows(self) -> int:
        """N where the model has the plate of the rows, else 1: what losses are divided by to be per row."""
        return self.total if self.total and self.plate in self.layout.plates else 1


@contextmanager
def validation(on: bool) -> Iterator[None]:
    """Check distributions' arguments and supports where ``on``, unless the user switched that off."""
    if on:
        yield
    else:
        with pyro.validation_enabled(False):
            yield
