"""Divergences: against closed forms, direct sums and SciPy, and their gradients."""

import math

import pytest
import scipy.stats
import torch
from torch import nn

from pyro_ae.divergences import adversarial, energy_distance, imq, mmd, rbf, sliced_wasserstein

SMOOTH = [mmd(), mmd(imq((1.0,), sigma=2.0), unbiased=False), mmd(rbf()), mmd(rbf((0.5, 2.0)), unbiased=False)]
DISTANCES = [energy_distance(), energy_distance(0.5), energy_distance(1.5)]
# In one dimension there are no random directions, so that a call can be repeated.
WASSERSTEIN = [sliced_wasserstein(p=1), sliced_wasserstein(p=1.5), sliced_wasserstein()]


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def assert_mean(values, truth):
    """The mean of independent values is the truth, within 4 standard errors."""
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - truth) < 4 * error, f"{values.mean():.5f} +- {error:.5f}, not {truth:.5f}"


def repeat(times, draw):
    return torch.stack([draw() for _ in range(times)]).double()


# ------------------------------------------------------------------------------------------------- MMD


def test_kernels_are_sums_over_their_scales():
    a, b = torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 2.0]])  # |a - b|^2 = 9
    assert imq((1.0,), sigma=1.5**0.5)(a, b).item() == pytest.approx(1 / 2)  # C = 2 * 3 * 1.5 = 9
    assert imq((1.0, 5.0))(a, b).item() == pytest.approx(6 / 15 + 30 / 39)
    assert rbf()(a, b).item() == pytest.approx(math.exp(-9 / 3))
    assert rbf((3.0, 1.0))(a, b).item() == pytest.approx(math.exp(-1 / 2) + math.exp(-9 / 2))
    for one, many in [(imq((1.0,)), imq()), (rbf((1.0,)), rbf((1.0, 2.0, 4.0)))]:
        assert one(a, a).item() == 1
        assert many(a, a).item() == len(many.scales)


@pytest.mark.parametrize("unbiased", [True, False])
def test_mmd_is_the_double_sum(unbiased):
    a, b = normal(5, 2), normal(7, 2) + 0.5

    def mean(x, y):
        same = x is y and unbiased
        terms = [
            sum(c * 4 / (c * 4 + float(((u - v) ** 2).sum())) for c in (0.5, 2.0))
            for i, u in enumerate(x)
            for j, v in enumerate(y)
            if not (same and i == j)
        ]
        return sum(terms) / len(terms)

    found = mmd(imq((0.5, 2.0)), unbiased=unbiased)(a, b)
    assert found.item() == pytest.approx(mean(a, a) + mean(b, b) - 2 * mean(a, b), abs=1e-12)


def test_biased_mmd_is_the_squared_distance_of_mean_embeddings():
    """With a kernel that is an inner product of features, the embedding is their mean."""
    a, b, w = normal(6, 3), normal(9, 3), normal(3, 5)
    found = mmd(lambda x, y: (x @ w).tanh() @ (y @ w).tanh().T, unbiased=False)(a, b)
    torch.testing.assert_close(found, ((a @ w).tanh().mean(0) - (b @ w).tanh().mean(0)).square().sum())


@pytest.mark.parametrize("kernel", [imq(), rbf()])
def test_unbiased_mmd_is_zero_on_average_where_the_distributions_are_equal(kernel):
    values = repeat(1500, lambda: mmd(kernel)(normal(6, 3), normal(9, 3)))
    assert_mean(values, 0.0)
    assert values.min() < 0
    biased = repeat(200, lambda: mmd(kernel, unbiased=False)(normal(6, 3), normal(9, 3)))
    assert biased.min() > 0
    assert biased.mean() > 20 * values.mean().abs()


@pytest.mark.parametrize("lengthscale", [None, 0.8])
def test_mmd_of_two_gaussians(lengthscale):
    """E k(a, b) = (l^2 / (l^2 + v))^(d/2) exp(-|delta|^2 / 2 (l^2 + v)) for a - b ~ N(delta, v I)."""
    d, std, shift = 3, 0.6, 0.7
    l2 = d / 2 if lengthscale is None else lengthscale**2

    def mean(v, squared):
        return (l2 / (l2 + v)) ** (d / 2) * math.exp(-squared / (2 * (l2 + v)))

    truth = mean(2 * std**2, 0) + mean(2, 0) - 2 * mean(std**2 + 1, d * shift**2)
    divergence = mmd(rbf(None if lengthscale is None else (lengthscale,)))
    assert_mean(repeat(400, lambda: divergence(std * normal(50, d) + shift, normal(40, d))), truth)


def test_kernels_are_accurate_for_near_points_far_from_the_origin():
    a = 1000 + normal(20, 4).float()
    b = a + 1e-2 * normal(20, 4).float()
    for kernel in (imq((1e-5,)), rbf((0.01,))):
        truth = kernel(a.double(), b.double()).float()
        assert 0.05 < truth.diagonal().mean() < 0.95
        torch.testing.assert_close(kernel(a, b), truth, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------- energy distance


@pytest.mark.parametrize("p", [0.5, 1.0, 1.7])
def test_energy_distance_is_the_direct_sum(p):
    a, b = normal(5, 3), normal(7, 3) + 0.5

    def total(x, y):
        return sum(float((u - v).norm()) ** p for u in x for v in y)

    truth = 2 * total(a, b) / 35 - total(a, a) / 20 - total(b, b) / 42
    assert energy_distance(p)(a, b).item() == pytest.approx(truth, abs=1e-12)


def test_energy_distance_against_scipy():
    """SciPy's is the root of the biased estimate, whose means within a sample run over all n^2 pairs, not n (n - 1).

    With s the unbiased mean within, the biased one is (1 - 1/n) s: the biased estimate is ours plus s_a/n + s_b/m.
    """
    a, b = normal(8, 1), normal(11, 1) + 1
    s_a, s_b = (torch.pdist(x).mean().item() for x in (a, b))
    truth = scipy.stats.energy_distance(a[:, 0].numpy(), b[:, 0].numpy()) ** 2
    assert energy_distance()(a, b).item() + s_a / 8 + s_b / 11 == pytest.approx(truth, abs=1e-12)


def test_energy_distance_of_two_gaussians():
    """In one dimension a - b ~ N(delta, v) has E |a - b| = 2 s phi(delta/s) + delta (2 Phi(delta/s) - 1), s^2 = v."""

    def mean(delta, v):
        z = delta / v**0.5
        return 2 * v**0.5 * scipy.stats.norm.pdf(z) + delta * (2 * scipy.stats.norm.cdf(z) - 1)

    def draw(shift, std):
        return energy_distance()(std * normal(30, 1) + shift, normal(20, 1))

    assert_mean(repeat(500, lambda: draw(0.8, 0.5)), 2 * mean(0.8, 1.25) - mean(0, 0.5) - mean(0, 2))
    assert_mean(repeat(500, lambda: draw(0.0, 1.0)), 0.0)


# --------------------------------------------------------------------------------- sliced Wasserstein


@pytest.mark.parametrize("sizes", [(9, 9), (9, 6), (7, 11), (1, 5), (3, 1)])
def test_one_dimension_against_scipy(sizes):
    a, b = (normal(size, 1) + size for size in sizes)
    truth = scipy.stats.wasserstein_distance(a[:, 0].numpy(), b[:, 0].numpy())
    assert sliced_wasserstein(p=1)(a, b).item() == pytest.approx(truth, abs=1e-12)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_one_dimension_is_the_distance_of_sorted_samples(p):
    a, b = normal(12, 1), 2 * normal(12, 1)
    truth = sum(abs(u - v) ** p for u, v in zip(sorted(a[:, 0].tolist()), sorted(b[:, 0].tolist()), strict=True)) / 12
    assert sliced_wasserstein(p=p)(a, b).item() == pytest.approx(truth, abs=1e-12)


@pytest.mark.parametrize("sizes", [(4, 6), (6, 3), (5, 7)])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_unequal_sizes_are_exact(sizes, p):
    """Repeated rows leave a sample's distribution as it is and make the sizes equal."""
    n, m = sizes
    a, b = normal(n, 3), normal(m, 3) + 1
    common = math.lcm(n, m)
    divergence = sliced_wasserstein(20, p)
    torch.manual_seed(1)
    found = divergence(a, b)
    torch.manual_seed(1)
    truth = divergence(a.repeat(common // n, 1), b.repeat(common // m, 1))
    torch.testing.assert_close(found, truth, atol=1e-12, rtol=0)


@pytest.mark.parametrize("d", [2, 5])
def test_shift_of_a_sample(d):
    """A shift m moves each projection by theta . m, and E (theta . m)^2 = |m|^2 / d whatever the sample."""
    a, m = normal(10, d), normal(d)
    truth = m.square().sum() / d
    assert_mean(repeat(300, lambda: sliced_wasserstein(10)(a + m, a)), truth)
    one = sliced_wasserstein(1)
    assert one(a + m, a) != one(a + m, a)  # each call has directions of its own


def test_two_gaussians():
    """SW_2^2 of N(m, I) and N(0, I) is |m|^2 / d; of finite samples it is more by what it is for m = 0."""
    n, d = 400, 4
    m = torch.tensor([1.0, -1.0, 0.5, 0.0])
    divergence = sliced_wasserstein()
    both = repeat(
        200, lambda: torch.stack([divergence(normal(n, d) + x, normal(n + 50, d)) for x in (m, torch.zeros(d))])
    )
    truth = m.square().sum().item() / d
    assert_mean(both[:, 0] - both[:, 1], truth)
    assert both[:, 1].mean() < 0.05 * truth


# -------------------------------------------------------------------------------------- all but critics


@pytest.mark.parametrize("divergence", [*SMOOTH, *DISTANCES, *WASSERSTEIN], ids=repr)
@pytest.mark.parametrize("sizes", [(4, 4), (4, 6)])
def test_gradients(divergence, sizes):
    d = 1 if divergence in WASSERSTEIN else 2
    samples = [normal(size, d).requires_grad_() for size in sizes]
    assert divergence(*samples).shape == ()
    assert torch.autograd.gradcheck(divergence, samples)


@pytest.mark.parametrize("divergence", [*SMOOTH, *DISTANCES, *WASSERSTEIN], ids=repr)
def test_samples_stay_on_their_device(divergence):
    a, b = normal(4, 2), normal(6, 2)
    with torch.device("meta"):  # where what is made without a device would be
        assert divergence(a, b).isfinite()


@pytest.mark.parametrize("divergence", SMOOTH, ids=repr)
def test_gradients_where_points_coincide(divergence):
    a = normal(4, 2)
    a[1] = a[0]
    b = torch.cat([a[:2], normal(2, 2)])
    assert torch.autograd.gradcheck(divergence, [a.requires_grad_(), b.requires_grad_()])


@pytest.mark.parametrize("divergence", [*SMOOTH, *DISTANCES, *WASSERSTEIN], ids=repr)
def test_gradients_are_finite_where_all_points_coincide(divergence):
    a, b = torch.ones(4, 2, requires_grad=True), torch.ones(6, 2, requires_grad=True)
    loss = divergence(a, b)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert not a.grad.any()  # which NaN would be too
    assert not b.grad.any()


@pytest.mark.parametrize("divergence", [*SMOOTH, *DISTANCES, *WASSERSTEIN], ids=repr)
def test_rows_have_no_order_and_samples_no_rank(divergence):
    d = 1 if divergence in WASSERSTEIN else 3
    a, b = normal(6, d), 2 * normal(8, d) + 1
    truth = divergence(a, b)
    assert truth != 0
    torch.testing.assert_close(divergence(a[torch.randperm(6)], b[torch.randperm(8)]), truth)
    torch.testing.assert_close(divergence(b, a), truth)


@pytest.mark.parametrize(
    "divergence", [mmd(), mmd(rbf()), energy_distance(), sliced_wasserstein(200, p=1), sliced_wasserstein()], ids=repr
)
def test_descent_fits_a_distribution(divergence):
    """The location and scale of a, drawn anew at each step as an encoder's codes are, become those of b."""
    loc, scale = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = torch.optim.Adam([loc, scale], lr=0.03)
    path = []
    for _ in range(300):
        optimizer.zero_grad()
        divergence(loc + scale * torch.randn(50, 2), torch.tensor([1.5, -0.5]) + torch.randn(50, 2) / 2).backward()
        optimizer.step()
        path.append(torch.cat([loc, scale]).detach().clone())
    found = torch.stack(path[150:]).mean(0)
    torch.testing.assert_close(found, torch.tensor([1.5, -0.5, 0.5, 0.5]), atol=0.05, rtol=0)


# --------------------------------------------------------------------------------------------- critics


def normalised_critic():
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


@pytest.mark.parametrize("flat", [False, True])
def test_adversarial_is_the_cross_entropy(flat):
    critic = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)) if flat else nn.Linear(3, 1)
    a, b = normal(5, 3).float(), normal(7, 3).float()
    divergence = adversarial(critic)
    fake, real = (critic(x).flatten().sigmoid() for x in (a, b))
    torch.testing.assert_close(divergence(a, b), -fake.log().mean())
    torch.testing.assert_close(divergence.critic_loss(a, b), -(1 - fake).log().mean() - real.log().mean())


def test_adversarial_is_finite_for_a_sure_critic():
    critic = nn.Linear(1, 1, bias=False)
    nn.init.constant_(critic.weight, 1.0)
    a = torch.full((2, 1), -1000.0, requires_grad=True)
    penalty = adversarial(critic)(a, a)
    penalty.backward()
    assert penalty.item() == 1000
    assert a.grad.tolist() == [[-0.5], [-0.5]]


def test_the_penalty_trains_the_codes_alone_and_leaves_the_critic():
    divergence = adversarial(normalised_critic())
    before = {name: value.clone() for name, value in divergence.state_dict().items()}
    a, b = torch.randn(6, 2, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    divergence(a, b).backward()
    assert a.grad.abs().sum() > 0
    assert b.grad is None
    assert all(parameter.grad is None and parameter.requires_grad for parameter in divergence.parameters())
    torch.testing.assert_close(divergence.state_dict(), before, atol=0, rtol=0)


def test_the_critic_loss_trains_the_critic_alone():
    divergence = adversarial(normalised_critic())
    a, b = torch.randn(6, 2, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    divergence.critic_loss(a, b).backward()
    assert a.grad is None
    assert b.grad is None
    assert all(parameter.grad is not None for parameter in divergence.parameters())
    assert divergence.critic[1].num_batches_tracked == 2


def test_gradient_of_the_penalty():
    critic = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    assert torch.autograd.gradcheck(lambda a: adversarial(critic)(a, a), normal(5, 2).requires_grad_())


def test_the_best_critic_is_the_log_density_ratio():
    """For a ~ N(m, I) and b ~ N(0, I) that is -m x + |m|^2 / 2, linear in x."""
    m = torch.tensor([1.0, -0.5], dtype=torch.float64)
    a, b = normal(20_000, 2) + m, normal(20_000, 2)
    critic = nn.Linear(2, 1).double()
    divergence = adversarial(critic)
    optimizer = torch.optim.LBFGS(critic.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = divergence.critic_loss(a, b)
        value.backward()
        return value

    optimizer.step(loss)
    assert critic.weight.grad.abs().max() < 1e-4
    found = torch.cat([critic.weight[0], critic.bias]).detach()
    x = torch.cat([a, b])
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    p = (x @ found).sigmoid()
    error = (x.T * (p * (1 - p)) @ x).inverse().diagonal().sqrt()  # from the Fisher information
    assert error.max() < 0.02
    truth = torch.tensor([-1.0, 0.5, 0.625])
    assert ((found - truth).abs() < 4 * error).all(), f"{found} +- {error}"


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "divergence",
    [mmd(), mmd(rbf(), unbiased=False), energy_distance(), sliced_wasserstein(), adversarial(nn.Linear(2, 1)), imq()],
    ids=lambda divergence: type(divergence).__name__,
)
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(5), torch.zeros(4, 1), r"shapes \(5,\) and \(4, 1\): .*\.reshape\(-1, 1\)"),
        (torch.zeros(4, 2), torch.zeros(3, 4, 2), r"shapes \(4, 2\) and \(3, 4, 2\): .*\.flatten\(0, -2\)"),
        (torch.zeros(4, 2), torch.zeros(4, 3), r"shapes \(4, 2\) and \(4, 3\): both need the same number d"),
        (torch.zeros(4, 0), torch.zeros(4, 0), "at least 1"),
        (torch.zeros(4, 2), torch.zeros(0, 2), r"\(0, 2\): each needs at least"),
        (torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64), r"float32 and torch.int64: try \.float\(\)"),
    ],
)
def test_samples_that_do_not_fit(divergence, a, b, message):
    with pytest.raises(ValueError, match=message):
        divergence(a, b)


def test_one_row_has_no_unbiased_estimate():
    one, many = torch.zeros(1, 2), torch.ones(3, 2)
    for pair in [(one, many), (many, one)]:
        with pytest.raises(ValueError, match=r"at least 2 rows for an unbiased estimate; mmd\(unbiased=False\)"):
            mmd()(*pair)
        with pytest.raises(ValueError, match="at least 2 rows"):
            energy_distance()(*pair)
        assert mmd(unbiased=False)(*pair) > 0
        assert sliced_wasserstein()(*pair) > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: imq(scales=()), r"scales must be .*, got \(\)"),
        (lambda: imq(scales=(1.0, -1.0)), "got .*-1.0"),
        (lambda: imq(sigma=0.0), "sigma must be positive, got 0.0"),
        (lambda: rbf(scales=(0.0,)), "scales must be"),
        (lambda: rbf(scales=2.0), "scales must be a tuple"),
        (lambda: mmd("rbf"), r"such as imq\(\) or rbf\(\), got 'rbf'"),
        (lambda: energy_distance(2), r"within \(0, 2\), got 2"),
        (lambda: energy_distance(0), r"within \(0, 2\), got 0"),
        (lambda: sliced_wasserstein(projections=0), "projections must be .*, got 0"),
        (lambda: sliced_wasserstein(p=0.5), "p must be at least 1, got 0.5"),
        (lambda: adversarial(torch.tanh), "critic must be a module"),
    ],
)
def test_values_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_critic_of_the_wrong_shape():
    divergence = adversarial(nn.Linear(2, 3))
    for use in (divergence, divergence.critic_loss):
        with pytest.raises(ValueError, match=r"gave \(5, 3\) for rows of shape \(5, 2\)"):
            use(torch.zeros(5, 2), torch.zeros(5, 2))


def test_representations():
    assert repr(mmd(imq((1.0,)))) == "mmd(kernel=imq(scales=(1.0,), sigma=1.0), unbiased=True)"
    assert repr(sliced_wasserstein(p=1)) == "sliced_wasserstein(projections=50, p=1)"
    assert repr(adversarial(nn.Tanh())) == "adversarial(\n  (critic): Tanh()\n)"
