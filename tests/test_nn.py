"""The shared networks: any leading dims, rows apart from one another, missing values unseen; and torch's results."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from pyro_ae import bayesian, fit, importance, iwae, svi
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.models.vae import VAE
from pyro_ae.nn import (
    MLP,
    Convolutional,
    ConvolutionalDecoder,
    MaskedConvolution,
    PixelCNN,
    Recurrent,
    RecurrentDecoder,
    Residual,
    ResidualDecoder,
    Transformer,
    TransformerDecoder,
)

LATENT = 3

# name -> (encoder, shape of its features, decoder, shape of a row); each pair matches
Pair = tuple[Callable[..., nn.Module], tuple[int, ...], Callable[[], nn.Module], tuple[int, ...]]
PAIRS: dict[str, Pair] = {
    "perceptron": (partial(MLP, (4, 3), [16]), (16,), lambda: MLP(LATENT, [16], (4, 3)), (4, 3)),
    "sequences, recurrent": (
        *(partial(Recurrent, 2, 6), (6,)),
        *(lambda: RecurrentDecoder(LATENT, 6, (5, 2)), (5, 2)),
    ),
    "sequences, recurrent, two layers": (
        *(partial(Recurrent, 2, 6, layers=2), (6,)),
        *(lambda: RecurrentDecoder(LATENT, 6, (5, 2), layers=2), (5, 2)),
    ),
    "sequences, transformer": (
        *(partial(Transformer, 2, 8, 6), (8,)),
        *(lambda: TransformerDecoder(LATENT, 8, (5, 2)), (5, 2)),
    ),
    "sequences, transformer, sinusoids": (
        *(partial(Transformer, 2, 10, heads=5), (10,)),
        *(lambda: TransformerDecoder(LATENT, 10, (5, 2), heads=5), (5, 2)),
    ),
    "sequences, states, recurrent": (
        *(partial(Recurrent, 2, 6, states=True), (5, 6)),
        *(lambda: RecurrentDecoder(LATENT, 6, (5, 2)), (5, 2)),
    ),
    "sequences, states, transformer": (
        *(partial(Transformer, 2, 8, states=True), (5, 8)),
        *(lambda: TransformerDecoder(LATENT, 8, (5, 2)), (5, 2)),
    ),
}
for _shape in ((28, 28), (7, 8), (1, 1), (2, 5, 3)):
    PAIRS[f"images {_shape}, convolutional"] = (
        *(partial(Convolutional, _shape, (4, 6), 10), (10,)),
        *(partial(ConvolutionalDecoder, LATENT, (6, 4), _shape), _shape),
    )
    PAIRS[f"images {_shape}, residual"] = (
        *(partial(Residual, _shape, (4, 6), 10), (10,)),
        *(partial(ResidualDecoder, LATENT, (6, 4), _shape), _shape),
    )

every = pytest.mark.parametrize("name", PAIRS)
pooled = pytest.mark.parametrize("name", [name for name in PAIRS if "states" not in name])


def networks(name: str) -> list[tuple[nn.Module, tuple[int, ...], tuple[int, ...]]]:
    """Each network of a pair, with the shapes of what goes into it and what comes out."""
    encoder, features, decoder, row = PAIRS[name]
    return [(encoder(), row, features), (encoder(missing=True), row, features), (decoder(), (LATENT,), row)]


def holes(x: Tensor) -> Tensor:
    """Which values are observed: about two thirds of them."""
    return torch.rand_like(x) < 0.67


@every
def test_leading_dims_are_rows(name: str) -> None:
    for net, inputs, outputs in networks(name):
        x = torch.randn(4, 3, *inputs)
        y = net(x)
        assert y.shape == (4, 3, *outputs)
        one_by_one = torch.stack([torch.stack([net(row) for row in rows]) for rows in x])
        torch.testing.assert_close(y, one_by_one, atol=1e-5, rtol=1e-5)
        assert net(x[:, :0]).shape == (4, 0, *outputs), "no rows"


@every
def test_each_row_depends_on_itself_alone(name: str) -> None:
    for net, inputs, _ in networks(name):
        x = torch.randn(4, *inputs, requires_grad=True)
        (gradient,) = torch.autograd.grad((net(x)[1] * torch.randn_like(net(x)[1])).sum(), x)
        assert gradient[1].abs().sum() > 0
        assert gradient[[0, 2, 3]].abs().sum() == 0


@every
def test_every_parameter_gets_a_finite_gradient(name: str) -> None:
    for net, inputs, _ in networks(name):
        net(torch.randn(4, *inputs)).square().sum().backward()
        wrong = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not wrong, f"{type(net).__name__}: {wrong}"


@every
def test_nets_run_stacked(name: str) -> None:
    """As chains of SG-MCMC do: forward too, and without a fallback of torch's that is said to be slow."""
    for net, inputs, outputs in networks(name):
        x = torch.randn(2, *inputs)
        stacked = {n: torch.stack([p.detach() * s for s in (1.0, 0.9, 1.1)]) for n, p in net.named_parameters()}
        y = vmap(lambda p, net=net, x=x: functional_call(net, p, (x,)))(stacked)
        assert y.shape == (3, 2, *outputs)
        torch.testing.assert_close(y[0], net(x), atol=1e-5, rtol=1e-5)


@every
def test_a_mask_that_hides_nothing_changes_nothing(name: str) -> None:
    encoder, _, _, row = PAIRS[name]
    net, x = encoder(missing=True), torch.randn(4, *row)
    torch.testing.assert_close(net(x, torch.ones_like(x, dtype=torch.bool)), net(x))


@every
def test_what_is_missing_is_not_seen_and_that_it_is_missing_is(name: str) -> None:
    encoder, _, _, row = PAIRS[name]
    net, x = encoder(missing=True), torch.randn(6, *row)
    observed = holes(x)
    observed[0] = False  # a row of which nothing is there
    features = net(torch.where(observed, x, torch.nan), observed)
    assert features.isfinite().all()
    assert torch.equal(features, net(torch.where(observed, x, 1e3), observed))
    assert not torch.allclose(features, net(torch.where(observed, x, 0.0)))
    features.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


@every
def test_a_mask_where_none_is_expected_is_refused(name: str) -> None:
    encoder, _, _, row = PAIRS[name]
    x = torch.randn(4, *row)
    with pytest.raises(ValueError, match=r"missing values: build the network with \w+\(\.\.\., missing=True\)"):
        encoder()(x, holes(x))
    with pytest.raises(ValueError, match="has another shape than the values"):
        encoder(missing=True)(x, holes(x)[:2])


@every
def test_wrong_shapes_are_refused(name: str) -> None:
    for net, inputs, _ in networks(name):
        wanted = r", ".join(
            "T" if "sequences" in name and inputs != (LATENT,) and i == 0 else str(n) for i, n in enumerate(inputs)
        )
        for shape in ((4, *inputs[:-1], inputs[-1] + 1), inputs[1:]):
            with pytest.raises(ValueError, match=rf"expected [a-z ]+ \[\*, {wanted}\], got a tensor of"):
                net(torch.zeros(shape))


@pooled
@pytest.mark.parametrize("missing", [False, True])
def test_each_pair_is_a_vae(name: str, missing: bool) -> None:
    encoder, (width,), decoder, row = PAIRS[name]
    model = VAE(decoder(), LATENT, lambda mean: dist.Normal(mean, 1.0).to_event(len(row)))
    guide = Amortized(encoder(missing=missing), MeanField(width, LATENT))
    x = torch.randn(12, *row)
    if missing:
        x = torch.where(holes(x), x, torch.nan)
    before = {n: p.clone() for part in (model, guide) for n, p in part.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "one by one" for what does not broadcast over particles
        method = svi(loss=importance(iwae, 3), steps=2)
        posterior = fit(model, x, guide=guide, method=method, batch_size=6, progress=False, check=False)
    still = [n for part in (model, guide) for n, p in part.named_parameters() if torch.equal(p, before[n])]
    assert not still or row == (1, 1), f"{still} are not trained"  # all features of a single pixel may be off
    assert posterior.log_evidence(x, 20).isfinite().all()
    assert posterior.reconstruct(x).shape == x.shape


# ------------------------------------------------------------------------------------- torch's own results


def test_recurrent_is_torchs_gru() -> None:
    net, truth = Recurrent(3, 7, layers=2, states=True), nn.GRU(3, 7, 2, batch_first=True)
    names = {"input.weight": "weight_ih", "input.bias": "bias_ih", "state.weight": "weight_hh", "state.bias": "bias_hh"}
    net.load_state_dict(
        {f"layers.{i}.{ours}": getattr(truth, f"{theirs}_l{i}") for i in (0, 1) for ours, theirs in names.items()}
    )
    x = torch.randn(4, 6, 3)
    torch.testing.assert_close(net(x), truth(x)[0])
    net.states = False
    torch.testing.assert_close(net(x), truth(x)[1][-1])


@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_torchs(padded: bool) -> None:
    net = Transformer(3, 8, 6, layers=1, heads=2, states=True, missing=True)
    truth = nn.TransformerEncoderLayer(8, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True)
    ours = net.layers[0].state_dict()
    names = {"before.0": "norm1", "before.1": "self_attn.in_proj", "after": "self_attn.out_proj", "each.0": "norm2"}
    names |= {"each.1": "linear1", "each.3": "linear2"}
    join = {"self_attn.in_proj": "_"}
    truth.load_state_dict(
        {f"{b}{join.get(b, '.')}{kind}": ours[f"{a}.{kind}"] for a, b in names.items() for kind in ("weight", "bias")}
    )
    h, seen = torch.randn(4, 6, 8), torch.ones(4, 6, dtype=torch.bool)
    seen[:2, 3:] = not padded
    torch.testing.assert_close(net.layers[0](h, seen), truth(h, src_key_padding_mask=~seen), atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------- sequences


@pytest.mark.parametrize("steps", [None, 9])
@pytest.mark.parametrize("states", [False, True])
def test_steps_that_pad_a_sequence_change_nothing(steps: int | None, states: bool) -> None:
    net = Transformer(2, 8, steps, states=states, missing=True)
    x = torch.randn(4, 9, 2)
    observed = torch.ones_like(x, dtype=torch.bool)
    observed[:, 6:] = False
    features = net(x, observed)
    torch.testing.assert_close(features[:, :6] if states else features, net(x[:, :6]))


@pytest.mark.parametrize("steps", [None, 5])
def test_a_transformer_knows_the_order(steps: int | None) -> None:
    net, x = Transformer(2, 8, steps), torch.randn(4, 5, 2)
    assert not torch.allclose(net(x), net(x.flip(1)), atol=1e-4)


def test_states_are_those_of_the_steps() -> None:
    x = torch.randn(5, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(Transformer(2, 8, layers=0, states=True)(x)[1].square().cumsum(0)[3], x)
    assert gradient.abs().sum(-1).nonzero().tolist() == [[1]]
    (gradient,) = torch.autograd.grad(Recurrent(2, 8, states=True)(x)[1].sum(), x)
    assert gradient.abs().sum(-1).nonzero().tolist() == [[0], [1]]


def test_transformers_refuse_what_they_have_no_room_for() -> None:
    with pytest.raises(ValueError, match="at most 4 steps"):
        Transformer(2, 8, 4)(torch.zeros(3, 5, 2))
    for make in (lambda: Transformer(2, 8, heads=3), lambda: TransformerDecoder(2, 8, (4, 1), heads=3)):
        with pytest.raises(ValueError, match="heads must divide the width"):
            make()


def test_the_state_of_a_recurrent_decoder_moves() -> None:
    y = RecurrentDecoder(2, 8, (5, 1))(torch.randn(4, 2))
    assert (y.diff(dim=1).abs().amax((0, 2)) > 1e-4).all()


# ------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize("make", [Convolutional, Residual])
def test_every_pixel_is_seen(make: Any) -> None:
    x = torch.randn(2, 7, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(make((7, 5), (4, 8, 8), 6, activation=nn.ELU)(x).square().sum(), x)
    assert (gradient != 0).all()


@pytest.mark.parametrize("make", [ConvolutionalDecoder, ResidualDecoder])
def test_every_pixel_is_drawn(make: Any) -> None:
    net = make(2, (8, 8, 4), (2, 7, 5), activation=nn.ELU)
    y, other = net(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert (y != other).all()


def test_features_of_the_smallest_maps_still_tell_images_apart() -> None:
    """A group of one value would be normalised to a constant."""
    net = Residual((4, 4), (8, 8, 8), 16, activation=nn.ELU)
    assert net(torch.randn(50, 4, 4)).std(0).min() > 1e-3


@pytest.mark.parametrize("make", [partial(Convolutional, features=3), partial(PixelCNN, channels=3)])
@pytest.mark.parametrize("shape", [(8,), (0, 8), (1, 1, 8, 8)])
def test_what_is_no_image_is_refused(make: Any, shape: tuple[int, ...]) -> None:
    arguments = {"channels": (4,)} if make.func is Convolutional else {}
    with pytest.raises(ValueError, match=r"an image is \(channels, height, width\) or \(height, width\)"):
        make(inputs=shape, **arguments)


@pytest.mark.parametrize("make", [partial(Convolutional, (8, 8)), partial(ConvolutionalDecoder, 2)])
def test_no_layers_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="channels must have at least one entry"):
        make((), (8, 8)) if make.func is ConvolutionalDecoder else make((), 3)


# ------------------------------------------------------------------------------------------------ pixels


def reach(net: nn.Module, size: int) -> Tensor:
    """Whether the centre's output depends on each pixel, ``[size, size]``."""
    x = torch.randn(size, size, dtype=torch.double, requires_grad=True)
    (gradient,) = torch.autograd.grad(net.double()(x)[..., size // 2, size // 2].sum(), x)
    return gradient != 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kernels", [(3,), (3, 3, 1), (5, 1, 3), (3, 3, 3, 3)])
def test_a_pixel_sees_those_before_it_as_far_as_the_kernels_reach(kernels: tuple[int, ...], tied: bool) -> None:
    seen = reach(PixelCNN((13, 13), 6, kernels, outputs=4, tied=tied, activation=nn.ELU), 13)
    far = sum(k // 2 for k in kernels)
    assert not seen.flatten()[13 * 6 + 6 :].any(), "itself or one after it"
    assert seen[6, 6 - far : 6].all()
    assert not seen[:, : 6 - far].any()
    assert not seen[:, 7 + far :].any()
    assert seen[6 - far : 6, 6 - far : 7].all()
    assert not seen[: 6 - far].any()


def test_later_layers_see_the_pixel_itself() -> None:
    """In a PixelCNN the identity beside them would hide that they do not."""
    seen = [MaskedConvolution(1, 1, 3, first=first).mask.int().tolist() for first in (True, False)]
    assert seen == [[[1, 1, 1], [1, centre, 0], [0, 0, 0]] for centre in (0, 1)]


def test_tied_layers_share_their_weights() -> None:
    count = lambda tied: sum(p.numel() for p in PixelCNN((8, 8), 4, (3, 3, 3, 1, 1), tied=tied).parameters())
    assert count(False) - count(True) == (4 * 4 * 9 + 4) + (4 * 4 + 4)


def test_probabilities_of_all_images_add_up_to_one() -> None:
    """Which they do only where no pixel sees itself or those after it."""
    net, context = PixelCNN((2, 1, 3), 5, (3, 3)), torch.randn(5, 1, 3)
    images = torch.tensor([[int(b) for b in f"{i:06b}"] for i in range(64)]).float().reshape(64, 2, 1, 3)
    log_p = dist.Bernoulli(logits=net(images, context)).to_event(3).log_prob(images)
    assert log_p.exp().sum().item() == pytest.approx(1.0, abs=1e-4)
    assert not torch.allclose(log_p, dist.Bernoulli(logits=net(images)).to_event(3).log_prob(images))


def test_pixels_and_contexts_broadcast_row_by_row() -> None:
    net = PixelCNN((3, 4), 5, (3, 3), outputs=2)
    x, context = torch.randn(6, 3, 4), torch.randn(4, 6, 5, 3, 4)
    y = net(x, context)
    assert y.shape == (4, 6, 2, 3, 4)
    torch.testing.assert_close(y[3, 2], net(x[2], context[3, 2]))
    torch.testing.assert_close(net(x, context[0, 0])[1], net(x[1], context[0, 0]))
    assert net(x).shape == (6, 2, 3, 4)
    stacked = {n: torch.stack([p.detach(), 2 * p.detach()]) for n, p in net.named_parameters()}
    assert vmap(lambda p: functional_call(net, p, (x, context)))(stacked).shape == (2, 4, 6, 2, 3, 4)


def test_pixelcnn_refuses_wrong_shapes() -> None:
    net = PixelCNN((3, 4), 5, (3,))
    with pytest.raises(ValueError, match=r"expected images \[\*, 3, 4\]"):
        net(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"expected a context \[\*, 5, 3, 4\]"):
        net(torch.zeros(3, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="must be odd"):
        MaskedConvolution(1, 1, 4)


@every
def test_weights_of_a_network_may_be_latent(name: str) -> None:
    """It says itself how many dims one input has, and particles together are particles one by one."""
    for net, inputs, outputs in networks(name):
        stochastic = bayesian(net)
        x = torch.randn(4, *inputs)
        with pyro.plate("_particles", 3, dim=-2):
            trace = pyro.poutine.trace(stochastic).get_trace(x)
        together = trace.nodes["_RETURN"]["value"]
        assert together.shape == (3, 4, *outputs)
        latents = {n: trace.nodes[n]["value"] for n in trace.stochastic_nodes if n != "_particles"}
        for k in range(3):
            alone = pyro.poutine.condition(stochastic, {n: v[k, 0] for n, v in latents.items()})(x)
            torch.testing.assert_close(together[k], alone, rtol=1e-4, atol=1e-5)
