"""The U-Net's presets, its bottleneck features, and its layers against plain versions of them."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, conv2d, interpolate, silu

from minidistill.networks.unet import PRESETS, Attention, Pointwise, UNet, grow, preset

MILLIONS = {"tiny": (1, 2), "small": (9, 10), "base": (34, 40)}


def perturbed(network, seed=0):
    """Every weight random, so that nothing hides behind a layer that starts at zero."""
    torch.manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5 / math.sqrt(parameter[0].numel()))
    return network


def little(**options):
    """A small network with every kind of layer."""
    return perturbed(UNet(**{"shape": (2, 8, 8), "channels": 16, "multipliers": (1, 2), "blocks": 1, "attention": (4,),
                             **options}))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_sizes_and_configs_rebuild_them(name):
    with torch.device("meta"):
        network = preset(name, n_classes=10)
        config = dict(network.config)
        assert config.pop("kind") == "unet"
        again = UNet(**config)
    low, high = MILLIONS[name]
    assert low < sum(p.numel() for p in network.parameters()) / 1e6 < high
    assert network.shape == (3, 32, 32)
    assert network.n_classes == 10
    assert again.config == network.config
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}


def test_presets_take_other_shapes_and_overrides():
    network = preset("tiny", shape=(1, 8, 8), channels=8, blocks=1)
    assert network.config["channels"] == 8
    assert network.config["multipliers"] == [1, 2, 2]
    assert network(torch.randn(2, 1, 8, 8), torch.zeros(2)).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"name='large' is not known.*Valid names: base, small, tiny"):
        preset("large")


@pytest.mark.parametrize("n_classes", [0, 3])
def test_features_are_the_bottleneck(n_classes):
    """What `forward` computes at the middle, of the stated shape, and nothing of the way up."""
    network = little(n_classes=n_classes)
    x, c_noise = torch.randn(3, 2, 8, 8), torch.tensor([0.3, -0.4, 0.9])
    label = torch.tensor([0, 2, 1]) if n_classes else None
    seen = []
    network.middle[-1].register_forward_hook(lambda module, given, out: seen.append(out))
    network.up[0][0].register_forward_hook(lambda module, given, out: seen.append("up"))
    features = network.features(x, c_noise, label)
    assert features.shape == (3, network.feature_channels, 4, 4)
    assert len(seen) == 1
    out = network(x, c_noise, label)
    assert len(seen) == 3  # the middle once, the way up once
    assert torch.equal(features, seen[1])
    assert out.shape == x.shape
    if n_classes:
        assert not torch.equal(features, network.features(x, c_noise, (label + 1) % 3))
    assert not torch.equal(features, network.features(x, c_noise + 0.1, label))
    features.sum().backward()
    assert all(p.grad is None for p in network.up.parameters())


def plain_norm(layer, x):
    n, c = x.shape[:2]
    grouped = x.reshape(n, layer.num_groups, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    normal = centred / (centred.square().mean(2, keepdim=True) + layer.eps).sqrt()
    return normal.reshape(x.shape) * layer.weight.reshape(c, 1, 1) + layer.bias.reshape(c, 1, 1)


def plain_attention(layer, x):
    n, c, h, w = x.shape
    parts = conv2d(plain_norm(layer.norm, x), layer.qkv.weight, layer.qkv.bias)
    q, k, v = parts.reshape(n, 3, layer.heads, c // layer.heads, h * w).unbind(1)
    weights = (q.transpose(-1, -2) @ k / math.sqrt(c // layer.heads)).softmax(-1)  # (n, heads, to, from)
    mixed = (v @ weights.transpose(-1, -2)).reshape(n, c, h, w)
    return x + conv2d(mixed, layer.out.weight, layer.out.bias)


def plain_block(block, x, embedding):
    res = block[0]
    scale, shift = res.modulate(embedding)[:, :, None, None].chunk(2, dim=1)
    h = conv2d(silu(plain_norm(res.norm1, x)), res.conv1.weight, res.conv1.bias, padding=1)
    h = conv2d(silu(plain_norm(res.norm2, h) * (1 + scale) + shift), res.conv2.weight, res.conv2.bias, padding=1)
    h = h + (x if isinstance(res.skip, nn.Identity) else conv2d(x, res.skip.weight, res.skip.bias))
    return plain_attention(block[1], h) if len(block) > 1 else h


@pytest.mark.parametrize("channels", [64, 128, 192])
def test_attention_is_the_textbook_formula(channels):
    layer = perturbed(Attention(channels)).double()
    assert layer.heads == channels // 64
    x = torch.randn(2, channels, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(layer(x, x), plain_attention(layer, x), rtol=1e-10, atol=1e-10)


def test_pointwise_is_a_1x1_convolution():
    layer, x = Pointwise(6, 4).double(), torch.randn(3, 6, 5, 2, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv2d(x, layer.weight, layer.bias), rtol=1e-12, atol=1e-12)
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {"weight": (4, 6, 1, 1), "bias": (4,)}


def test_forward_is_the_plain_network():
    """The whole of it written out with convolutions and softmax, in float64."""
    network = little(n_classes=3).double()
    x, label = torch.randn(2, 2, 8, 8, dtype=torch.float64), torch.tensor([2, 0])
    c_noise = torch.tensor([0.3, -1.2], dtype=torch.float64)
    embedding = silu(network.embed(network.noise(c_noise)) + network.label(label))
    first = network.first(x)
    level0 = plain_block(network.down[0], first, embedding)
    halved = network.down[1](level0)
    level1 = plain_block(network.down[2], halved, embedding)
    h = plain_attention(network.middle[1], plain_block([network.middle[0]], level1, embedding))
    h = plain_block([network.middle[2]], h, embedding)
    for block, skip in ((network.up[0], level1), (network.up[1], halved)):
        h = plain_block(block, torch.cat([h, skip], 1), embedding)
    h = network.up[2](interpolate(h, scale_factor=2, mode="nearest"))
    for block, skip in ((network.up[3], level0), (network.up[4], first)):
        h = plain_block(block, torch.cat([h, skip], 1), embedding)
    wanted = network.outward(silu(plain_norm(network.last_norm, h)))
    torch.testing.assert_close(network(x, c_noise, label), wanted, rtol=1e-9, atol=1e-9)


def test_state_dict_names_are_those_of_earlier_checkpoints():
    names = {key.rsplit(".", 1)[0] for key in little(n_classes=3).state_dict()}
    assert {"embed.0", "label", "first", "down.0.0.norm1", "down.0.0.modulate", "down.1", "down.2.0.skip",
            "down.2.1.qkv", "middle.1.out", "up.2", "last_norm", "outward"} <= names


@pytest.mark.parametrize("channels", [24, 40, 48, 96])
def test_widths_that_are_no_powers_of_two(channels):
    network = UNet((3, 8, 8), channels=channels, multipliers=(1, 2), blocks=1)
    assert network(torch.randn(1, 3, 8, 8), torch.zeros(1)).shape == (1, 3, 8, 8)


def test_a_small_change_of_the_noise_level_changes_the_output_little():
    """Also at 128 channels: a last bit of c_noise must not decide anything, as frequencies of 2^63 would let it."""
    network = perturbed(UNet((1, 4, 4), channels=128, multipliers=(1,), blocks=1))
    x, c_noise = torch.randn(4, 1, 4, 4), torch.tensor([-1.5, -0.3, 0.2, 1.1])
    with torch.no_grad():
        base = network(x, c_noise)
        assert float((network(x, c_noise + 1e-6) - base).abs().max()) < 1e-3 * float(base.std())


def test_patches_are_pixels_with_more_channels():
    """patch 2 is the same network on images whose 2x2 pixels were sorted into channels first, and back at the end."""
    network, x, c_noise = little(patch=2, shape=(2, 16, 16)), torch.randn(3, 2, 16, 16), torch.tensor([0.3, -0.4, 0.9])
    inner = little(shape=(8, 8, 8))
    inner.load_state_dict(network.state_dict())
    sorted_x = x.reshape(3, 2, 8, 2, 8, 2).permute(0, 1, 3, 5, 2, 4).reshape(3, 8, 8, 8)
    wanted = inner(sorted_x, c_noise).reshape(3, 2, 2, 2, 8, 8).permute(0, 1, 4, 2, 5, 3).reshape(x.shape)
    torch.testing.assert_close(network(x, c_noise), wanted)
    assert network.features(x, c_noise).shape == (3, network.feature_channels, 4, 4)
    assert UNet(**{k: v for k, v in network.config.items() if k != "kind"}).patch == 2
    assert "patch" not in little().config  # files of before stay as they are
    with pytest.raises(ValueError, match=r"divisible by 4"):
        little(patch=2, shape=(2, 10, 10))
    with pytest.raises(ValueError, match="patch"):
        little(patch=0)


@pytest.mark.parametrize("n_classes", [0, 3])
def test_a_grown_network_starts_as_the_small_one_on_averaged_images(n_classes):
    """In float64: on images of twice the side, each pixel of a patch gets what the patch's mean got, half as noisy."""
    small = little(n_classes=n_classes).double()
    grown = grow(small).double()
    x, c_noise = torch.randn(3, 2, 16, 16, dtype=torch.float64), torch.tensor([0.3, -0.4, 0.9], dtype=torch.float64)
    label = torch.tensor([0, 2, 1]) if n_classes else None
    wanted = small(avg_pool2d(x, 2), c_noise - math.log(2) / 4, label)
    torch.testing.assert_close(grown(x, c_noise, label), interpolate(wanted, scale_factor=2.0), rtol=1e-6, atol=1e-6)
    assert grown.shape == (2, 16, 16)
    with pytest.raises(ValueError, match="patch=2: wanted one with patch 1"):
        grow(grown)
