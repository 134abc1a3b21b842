"""Priors tuned to a target: parameters in closed form, the critic's distance, what is left alone, refusals."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_ae import batch_plate, bayesian, fit, sghmc
from pyro_ae.critics import wasserstein_critic
from pyro_ae.divergences import energy_distance, sliced_wasserstein
from pyro_ae.engines import prior_matching
from pyro_ae.engines.prior_matching import match_prior
from pyro_ae.engines.run import NonFiniteError
from pyro_ae.priors import learnable
from pyro_ae.processes import gaussian_process
from pyro_ae.slices import distributional_sliced_wasserstein

X = torch.linspace(-1.0, 1.0, 8).unsqueeze(-1)


def lines(n: int, x: Tensor, *_: Tensor) -> Tensor:
    """Of a Gaussian process with the linear kernel 9 x x'."""
    return 3.0 * torch.randn(n, 1) * x.T


class Line(nn.Module):
    """f = w x, with noise whose scale is a parameter of the likelihood."""

    def __init__(self, per: str = "tensor") -> None:
        super().__init__()
        self.net = bayesian(nn.Linear(1, 1, bias=False), learnable(per=per))
        self.log_noise = nn.Parameter(torch.tensor(-2.0))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        f = pyro.deterministic("f", self.net(x).squeeze(-1))
        with batch_plate(x):
            pyro.sample("y", dist.Normal(f, self.log_noise.exp()), obs=y)

    @property
    def scale(self) -> float:
        return next((0.5 * v).exp().item() for n, v in self.net.priors.named_parameters() if "log_variance" in n)


@pytest.mark.parametrize(
    "distance",
    [energy_distance(), sliced_wasserstein(), wasserstein_critic(hidden=(20,), lr=0.1, steps=15)],
    ids=lambda d: type(d).__name__,
)
def test_a_line_gets_the_variance_of_a_linear_kernel(distance: Callable) -> None:
    model = Line()
    history = match_prior(model, X, distance, lines, site="f", steps=120, seed=0, progress=False)
    assert 2.4 < model.scale < 3.6
    assert history["step"] == list(range(120))
    assert sum(history["distance"][-30:]) / 30 < 0.4 * history["distance"][0]


def test_only_the_prior_changes_and_is_then_held_still() -> None:
    model = Line()
    match_prior(model, X, energy_distance(), lines, site="f", steps=3, seed=0, progress=False)
    assert model.log_noise == -2.0 and model.log_noise.requires_grad
    assert not any(p.requires_grad for p in model.net.priors.parameters())
    model.log_noise.requires_grad_(False)
    before = model.scale
    method = sghmc(chains=2, draws=2, warmup=3, thinning=1)
    fit(model, (X, X.squeeze(-1)), method=method, seed=0, progress=False)
    assert model.scale == before
    with pytest.raises(ValueError, match="matched before"):
        match_prior(model, X, energy_distance(), lines, site="f", steps=3, progress=False)


def test_the_deterministic_part_of_a_network_is_left_alone() -> None:
    network = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
    net = bayesian(network, learnable(), deterministic=["0"])

    def model(x: Tensor) -> None:
        pyro.deterministic("f", net(x).squeeze(-1))
        with batch_plate(x):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    before = [p.clone() for p in net.module.parameters()]
    match_prior(model, X, energy_distance(), lines, site="f", steps=2, seed=0, progress=False)
    assert all(torch.equal(p, q) and p.requires_grad for p, q in zip(net.module.parameters(), before, strict=True))
    assert not any(p.requires_grad for p in net.priors.parameters())


class Row(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> None:
        with batch_plate(x):
            z = pyro.deterministic("f", pyro.sample("z", dist.Normal(self.loc, self.log_scale.exp())))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)


@pytest.mark.parametrize("batch_size", [None, 200])
def test_without_a_target_rows_get_the_mean_and_scale_of_the_data(batch_size: int | None) -> None:
    model = Row()
    x = torch.distributions.Normal(2.0, 1.5).icdf((torch.arange(400) + 0.5) / 400)
    settings = {"samples": 8, "lr": 0.02, "steps": 300, "batch_size": batch_size}
    match_prior(model, x, sliced_wasserstein(), seed=0, progress=False, **settings)
    assert abs(model.loc - 2.0) < 0.15
    scale = (model.log_scale.exp() ** 2 + 0.25).sqrt()
    assert abs(scale - 1.5) < 0.15


def test_points_may_be_drawn_at_each_step_and_the_seed_counts() -> None:
    seen = []

    def points() -> Tensor:
        seen.append(torch.rand(5, 1))
        return seen[-1]

    def matched(seed: int) -> float:
        model = Line()
        match_prior(model, points, energy_distance(), lines, site="f", steps=4, seed=seed, progress=False)
        return model.scale

    first = matched(1)
    assert len(seen) == 5 and not torch.equal(seen[1], seen[2])
    assert matched(1) == first != matched(2)


@pytest.mark.parametrize(("shift", "scale"), [(0.5, 1.0), (2.0, 1.0), (0.0, 3.0)])
def test_the_critics_distance_of_normals_is_wassersteins_but_for_the_penaltys_slope(shift: float, scale: float) -> None:
    torch.manual_seed(0)
    fitted = wasserstein_critic(hidden=(50,), lr=0.1).fitted(torch.randn(500, 1), shift + scale * torch.randn(500, 1))
    found = fitted(torch.randn(20_000, 1), shift + scale * torch.randn(20_000, 1))
    exact = shift or (scale - 1.0) * math.sqrt(2.0 / math.pi)
    assert abs(found / (exact * (1.0 + exact / 20.0)) - 1.0) < 0.12


def test_the_critic_learns_from_one_pair_and_judges_another() -> None:
    """In many dimensions few samples of one distribution seem far apart, to a critic that has learned from them."""
    torch.manual_seed(0)
    a, b, c, d = torch.randn(4, 20, 50)
    critic = wasserstein_critic(hidden=(50,), lr=0.1)
    assert critic(a, b) > 3.0
    assert abs(critic.fitted(a, b)(c, d)) < 1.0

    def noise(n: int, x: Tensor) -> Tensor:
        return torch.randn(n, len(x))

    history = match_prior(
        Row(), torch.zeros(50), critic, noise, site="f", steps=5, samples=20, lr=1e-6, seed=0, progress=False
    )
    assert max(history["distance"]) < 1.5


@pytest.mark.parametrize("spread", [0.0, 0.7])
def test_functions_have_the_kernels_moments(spread: float) -> None:
    torch.manual_seed(0)
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]])
    process = gaussian_process(variance=2.0, lengthscale=1.5, spread=spread)
    f = process(20_000, x)
    expected = process.kernel(x, 20_000 if spread else 1).mean(0).float()
    torch.testing.assert_close(f.T @ f / len(f), expected, atol=0.15, rtol=0)
    if not spread:
        torch.testing.assert_close(expected[0, 1], torch.tensor(2.0 * math.exp(-0.5 / 1.5**2)), atol=1e-4, rtol=0)
        default = gaussian_process().kernel(x)[0, 0, 1]  # the lengthscale is 2
        assert abs(default - math.exp(-0.125)) < 1e-4
    else:
        assert abs(expected[0, 0] - 2.0 * math.exp(0.5 * spread**2)) < 0.1


# ------------------------------------------------------------------------------- warm-up, checkpoints


def directions(steps: int = 2) -> distributional_sliced_wasserstein:
    return distributional_sliced_wasserstein(10, steps, lr=1e-2, diversity=0.0)


def test_a_warm_up_teaches_the_distance_alone() -> None:
    settings = {"steps": 5, "lr": 0.1, "seed": 0, "progress": False}
    model, distance = Line(), directions()
    seen: list[tuple[float, Tensor]] = []

    def target(n: int, x: Tensor) -> Tensor:
        network = distance.network
        seen.append((model.scale, torch.zeros(()) if network is None else network.weight.detach().clone()))
        return lines(n, x)

    history = match_prior(model, X, distance, target, site="f", warmup=3, **settings)
    assert history["step"] == list(range(5)) and history["warmup"] == [1, 1, 1, 0, 0]
    assert all(math.isfinite(d) and d > 0 for d in history["distance"])
    scales, weights = [s for s, _ in seen[::2]], [w for _, w in seen[1::2]]
    assert scales[:4] == [1.0] * 4 and scales[4] != 1.0
    assert all(not torch.equal(a, b) for a, b in zip(weights, weights[1:], strict=False))


class Stopped:
    """Ctrl-C in the middle of a step, which takes two pairs of samples where a distance learns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
        self.left, self.pair = pairs, prior_matching._pair
        monkeypatch.setattr(prior_matching, "_pair", self)

    def __call__(self, *arguments: object) -> object:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.pair(*arguments)


DISTANCES: dict[str, Callable] = {
    "directions": directions,
    "critic": lambda: wasserstein_critic(hidden=(5,), steps=3),
    "energy": energy_distance,
}


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("rows", [False, True], ids=["target", "minibatches"])
def test_goes_on_to_the_same_prior(name: str, rows: bool, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    make: Callable[[], Row | Line] = Row if rows else Line
    data = torch.randn(8) if rows else X
    settings = {"steps": 6, "samples": 4, "lr": 0.1, "seed": 3, "progress": False, "optimizer": torch.optim.Adam}
    settings |= {"warmup": 2} if name == "directions" else {}
    settings |= {"batch_size": 3} if rows else {"target": lines, "site": "f"}

    def matched(model: nn.Module, folder=None) -> tuple[dict[str, Tensor], dict]:
        history = match_prior(model, data, DISTANCES[name](), checkpoint=folder, **settings)
        return dict(model.named_parameters()), history

    expected, history = matched(make())
    for pairs in (5, 1):  # the second in the warm-up, of directions
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match="interrupted after .* of 6 steps"):
            Stopped(patch, pairs)
            held, part = matched(make(), tmp_path / str(pairs))
        assert len(part["step"]) < 6 and part["distance"] == history["distance"][: len(part["step"])]
        found, whole = matched(make(), tmp_path / str(pairs))
        assert whole == history
        assert all(torch.equal(found[n], v) for n, v in expected.items())
        assert all(not p.requires_grad for n, p in found.items() if "noise" not in n)
    again, whole = matched(make(), tmp_path / "5")  # a run that is complete takes no step
    assert whole == history and all(torch.equal(again[n], v) for n, v in expected.items())


def test_an_interrupted_run_goes_on_with_the_same_objects(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"target": lines, "site": "f", "steps": 5, "seed": 0, "lr": 0.1, "progress": False}
    expected = Line()
    history = match_prior(expected, X, directions(), **settings)
    model, distance = Line(), directions()
    with (
        monkeypatch.context() as patch,
        pytest.warns(UserWarning, match="after 2 of 5 .* same settings and"),
    ):
        Stopped(patch, 5)
        match_prior(model, X, distance, checkpoint=tmp_path, **settings)
    assert model.scale not in (1.0, expected.scale) and not any(p.requires_grad for p in model.net.parameters())
    assert match_prior(model, X, distance, checkpoint=tmp_path, **settings) == history
    assert model.scale == expected.scale
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


def test_interrupted_it_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Line()
    with (
        monkeypatch.context() as patch,
        pytest.warns(UserWarning, match="after 3 of 9 steps: the prior is as"),
    ):
        Stopped(patch, 3)
        history = match_prior(model, X, energy_distance(), lines, site="f", steps=9, seed=0, progress=False)
    other = Line()
    assert match_prior(other, X, energy_distance(), lines, site="f", steps=3, seed=0, progress=False) == history
    assert model.scale == other.scale and not any(p.requires_grad for p in model.net.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.2}, "lr is 0.1 there and 0.2 here: give"),
        ({"seed": 1}, "seed is 0 there and 1 here: give"),
        ({"samples": 5, "steps": 3}, "steps is 2 there and 3 here; samples is 128 there and 5 here"),
        ({"distance": directions(3)}, r"distance is 'd.*steps=2.*' there and 'd.*steps=3.*' here: give"),
        ({"target": gaussian_process()}, "target is '<function lines>' there and 'gaussian_process.*' here: give"),
        ({"optimizer": torch.optim.Adam}, "optimizer is .*RMSprop.* there and .*Adam.* here: give"),
        ({"data": X + 1.0}, "data is .*checksum .* there and .*checksum .* here: give"),
        ({"model": Line(per="weight")}, r"'model.net.priors.0.loc.w-weight' is \(1, 1\) here and \(\) in the file"),
    ],
)
def test_refuses_the_checkpoint_of_another_run(change: dict, message: str, tmp_path) -> None:
    settings = {"model": Line(), "data": X, "distance": directions(), "target": lines, "lr": 0.1, "seed": 0}
    settings |= {"site": "f", "steps": 2, "progress": False, "checkpoint": tmp_path}
    match_prior(**settings)
    before = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(ValueError, match=message):
        match_prior(**settings | {"model": Line()} | change)
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_a_checkpoint_is_written_now_and_then(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed, and not interrupted, has what was last written."""
    clock = iter(range(0, 10_000, 16))
    monkeypatch.setattr(prior_matching.time, "monotonic", lambda: next(clock))
    settings = {"target": lines, "site": "f", "steps": 9, "seed": 0, "progress": False, "checkpoint": tmp_path}

    def distance(a: Tensor, b: Tensor) -> Tensor:
        if broken and len(list(tmp_path.iterdir())):
            raise RuntimeError("killed")
        return (a.mean() - b.mean()).square() + a.square().mean()

    broken, model, other = True, Line(), Line()
    with pytest.raises(RuntimeError, match="killed"):
        match_prior(model, X, distance, **settings)
    broken = False
    history = match_prior(model, X, distance, **settings)
    assert history == match_prior(other, X, distance, **settings | {"checkpoint": tmp_path / "other"})
    assert model.scale == other.scale


def test_the_bar_shows_the_distance_and_the_warm_up(capsys: pytest.CaptureFixture) -> None:
    history = match_prior(Line(), X, directions(), lines, site="f", steps=2, warmup=1, seed=0, progress=True)
    shown = capsys.readouterr().err
    assert f"distance {history['distance'][1]:.4g}" in shown and "2/2" in shown


# -------------------------------------------------------------------------------------------- refusals


def fixed(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with batch_plate(x):
        pyro.sample("y", dist.Normal(w * x.squeeze(-1), 0.1), obs=x.squeeze(-1))


def counts(x: Tensor) -> None:
    rate = pyro.param("rate", lambda: torch.tensor(1.0), constraint=dist.constraints.positive)
    w = pyro.sample("w", dist.Gamma(rate, 1.0))
    with batch_plate(x):
        pyro.sample("y", dist.Poisson(w), obs=torch.ones(len(x)))


def switch(x: Tensor) -> None:
    logits = pyro.param("logits", lambda: torch.tensor(0.0))
    k = pyro.sample("k", dist.Bernoulli(logits=logits))
    with batch_plate(x):
        pyro.sample("y", dist.Normal(k, 1.0), obs=x.squeeze(-1))


def loose(x: Tensor) -> None:
    scale = pyro.param("scale", lambda: torch.tensor(1.0), constraint=dist.constraints.positive)
    with batch_plate(x):
        pyro.sample("z", dist.Normal(0.0, scale))
        pyro.deterministic("f", pyro.sample("y", dist.Normal(0.0, scale)))


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (loose, {"site": "f"}, "'scale' would be lost"),
        (fixed, {}, r"bayesian\(network, learnable\(\)\)"),
        (counts, {}, "'y' have no gradient .* not reparameterised"),
        (switch, {}, "'k' have no gradient .* not reparameterised"),
        (Line(), {}, "say what is compared .* 'f'"),
        (Line(), {"site": "g"}, "say what is compared .* 'f'"),
        (Line(), {"site": "f", "target": None}, "'f' is not observed"),
        (Line(), {"site": "f", "target": lambda n, x: torch.zeros(n, 3)}, r"shape \(128, 3\), and .* \(128, 8\)"),
        (Line(), {"site": "f", "steps": 0}, "steps must be at least 1"),
        (Line(), {"site": "f", "steps": 5, "warmup": 5}, "from 0 to 4; got 5"),
        (Line(), {"site": "f", "warmup": 1}, r"energy_distance.* has no state\(\)"),
    ],
)
def test_refuses(model: Callable, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match_prior(*(model, X, energy_distance()), **{"target": lines, "progress": False} | settings)


def test_names_the_step_where_the_distance_is_not_finite() -> None:
    steps = iter(range(10))

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return a.mean() / (0.0 if next(steps) == 2 else 1.0)

    with pytest.raises(NonFiniteError, match="not finite at step 2"):
        match_prior(Line(), X, distance, lines, site="f", seed=0, progress=False)


def test_the_critic_refuses() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        wasserstein_critic(lr=0.0)
    with pytest.raises(ValueError, match=r"\[n, d\] and \[m, d\]"):
        wasserstein_critic()(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="must be positive"):
        gaussian_process(variance=-1.0)


class Network(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a.mean() - b.mean()).square()


def test_refuses_a_checkpoint_that_would_lack_something(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"Network\(\) has no state\(\)"):
        match_prior(Line(), X, Network(), lines, site="f", checkpoint=tmp_path, progress=False)
    loader = torch.utils.data.DataLoader(torch.randn(6), batch_size=3)
    with pytest.raises(ValueError, match="a DataLoader cannot be resumed"):
        match_prior(Row(), loader, energy_distance(), checkpoint=tmp_path, progress=False)
