"""A posterior in a few lines of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .posterior import Posterior


def describe(posterior: Posterior) -> str:
    """Model, method, data, latents, and how the fit ended."""
    name = type(getattr(posterior.model, "__self__", posterior.model)).__name__
    name = getattr(posterior.model, "__name__", name) if name == "function" else name
    parts = [f"Posterior of {name} by {posterior.method}"]
    if posterior.data is not None:
        parts.append(f"data: {posterior.data!r}")
    latents = [_latent(posterior, n) for n in posterior.program.layout.names("latent")]
    parts.append("latents: " + (", ".join(latents) or "none"))
    if posterior.draws is not None:
        parts.append(_chains_line(posterior))
    elif "loss" in posterior.history:
        last = {n: v[-1] for n, v in posterior.history.items() if n in ("loss", "validation")}
        steps = int(posterior.history["step"][-1])
        if "validation" in posterior.history:
            last["validation"] = min(posterior.history["validation"])
        unit = "nats per row" if posterior.program.rows > 1 else "nats"
        parts.append(f"{steps} steps; " + ", ".join(f"{n} {v:.4g}" for n, v in last.items()) + f" {unit}")
    if posterior.interrupted:
        parts.append("interrupted by hand")
    return "\n  ".join(parts)


def _latent(posterior: Posterior, name: str) -> str:
    site = posterior.program.layout.model[name]
    if name in posterior.local:
        return f"{name} {list(site.shape[len(site.batch) :])} for each row"
    return f"{name} {list(site.shape)}"


def _chains_line(posterior: Posterior) -> str:
    assert posterior.draws is not None
    chains, draws = next(iter(posterior.draws.values())).shape[:2]
    line = f"{chains} chains of {draws} draws"
    if "diverging" in posterior.stats:
        line += f", {int(posterior.stats['diverging'].sum())} divergences"
    return line
