"""Rows that a model makes, in place of those that it observes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data import Call, Rows
from ..sites import Recorder, quote
from .conversion import sources_of
from .groups import View
from .rows import evenly

if TYPE_CHECKING:
    from ..posterior import Posterior


def repeated(rows: Rows, count: int) -> Rows:
    """So many of the rows: some, spread evenly, or all of them in turn until there are enough.

    Arguments:
        rows: of the data.
        count: how many.
    """
    size = rows.need_size()
    return rows.take(evenly(size, count) if count <= size else torch.arange(count) % size)


def prior_run(posterior: Posterior, view: View, template: Rows) -> Recorder:
    """A run of the model that draws everything, a row for each of the template's."""
    model, call = posterior.model, template.call()
    signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    if "size" in signature.parameters:  # what it is given to observe it may also use, as to predict the next pixel
        blank = template._call(template.entries | dict.fromkeys(sources_of(view, template).values()))
        call = Call(blank.args, blank.kwargs | {"size": template.size})
    with Recorder(generate=True) as run:
        try:
            model(*call.args, **call.kwargs)
        except NotImplementedError as error:
            raise ValueError(f"rows cannot be simulated: a prior of the model cannot be drawn from ({error})") from None
    missing = [n for n in (*view.latents, *view.observed) if n not in run.sites]
    if missing:
        raise ValueError(f"the model does not sample {quote(missing)} where it has no rows to observe")
    return run


def with_observed(view: View, rows: Rows, values: Mapping[str, Tensor]) -> Rows:
    """The data with what the model observes replaced, but for what is missing."""
    sources = sources_of(view, rows)
    lost = [name for name in view.observed if name not in sources]
    if lost:
        raise ValueError(
            f"the sites {quote(lost)} observe what is no entry of the data, so that simulated values cannot be put in "
            "its place: pass what they observe as an entry of the data, as it is"
        )
    entries = dict(rows.entries)
    for name, source in sources.items():
        old = rows.entries[source]
        new = values[name].to(old.device, old.dtype).reshape(old.shape)
        entries[source] = torch.where(old.isnan(), old, new) if old.is_floating_point() else new
    return Rows(rows.form, entries, rows.labels)


def as_given(rows: Rows) -> Any:
    """Rows in the form that the model is called with: a tensor, a tuple or a dict."""
    call = rows.call()
    return call.kwargs if rows.form == "dict" else call.args[0] if rows.form == "one" else call.args
