"""The layout with channels innermost gives the numbers of the other one: forwards, backwards, in whole networks."""

import copy

import pytest
import torch as th
import torch.nn as nn
import torch.nn.functional as F

from guided_diffusion_vae import channels_last, unet
from guided_diffusion_vae.autoencoders.kl import KLAutoencoder, KLConfig
from guided_diffusion_vae.nn import GroupNorm32

INNERMOST = th.channels_last
SMALL = {"image_size": 8, "in_channels": 4, "model_channels": 32, "out_channels": 4, "num_res_blocks": 1}
SMALL |= {"attention_resolutions": (2,), "channel_mult": (1, 2)}


def image(*shape, dtype=th.float64, seed=0):
    x = th.randn(*shape, dtype=dtype, generator=th.Generator().manual_seed(seed))
    return x.to(memory_format=INNERMOST).requires_grad_()


def gradients(y, *inputs):
    return th.autograd.grad(
        (y * th.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum(), inputs, retain_graph=True
    )


def same(ours, theirs, tolerance=1e-12):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max()


def test_only_images_on_a_cpu_with_channels_innermost_take_the_path():
    x = th.zeros(2, 8, 4, 4)
    assert channels_last.innermost(x.to(memory_format=INNERMOST))
    assert not channels_last.innermost(x)
    assert not channels_last.innermost(x[..., 0].transpose(1, 2))
    assert not channels_last.innermost(th.zeros(2, 8, 1, 1).to(memory_format=INNERMOST))  # both layouts at once
    assert not channels_last.innermost(x.to("meta").to(memory_format=INNERMOST))


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_group_norm_and_its_gradients(groups, silu):
    x, w, b = image(3, 8, 5, 6), th.rand(8).double().requires_grad_(), th.randn(8).double().requires_grad_()
    ours = channels_last.group_norm(x, groups, w, b, 1e-5, silu=silu)
    theirs = F.group_norm(x, groups, w, b, 1e-5)
    theirs = F.silu(theirs) if silu else theirs
    same([ours, *gradients(ours, x, w, b)], [theirs, *gradients(theirs, x, w, b)])
    assert channels_last.innermost(ours)


@pytest.mark.parametrize("channels", [64, 256])
def test_group_norm_with_a_weight_for_each_image(channels):
    x, norm = image(3, channels, 4, 5, dtype=th.float32), GroupNorm32(32, channels)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    scale, shift = (th.randn(3, channels, 1, 1).requires_grad_() for _ in range(2))
    usual = F.group_norm(x.contiguous(), 32, norm.weight, norm.bias, norm.eps) * (1 + scale) + shift
    for layout in (INNERMOST, th.contiguous_format):
        found = norm(x.contiguous(memory_format=layout), scale, shift)
        assert channels_last.innermost(found) == (layout == INNERMOST)
        inputs = x, scale, shift, *norm.parameters()
        same([found, *gradients(found, *inputs)], [usual, *gradients(usual, *inputs)], tolerance=1e-5)
    with th.no_grad():
        assert (norm(x, scale, shift) - usual).abs().max() < 1e-4


def test_equal_pixels_are_normed_to_the_bias():
    x = th.full((2, 8, 4, 4), 3.0).to(memory_format=INNERMOST)
    b = th.arange(8.0)
    assert th.allclose(channels_last.group_norm(x, 4, th.ones(8), b, 1e-5), b[:, None, None].expand_as(x), atol=1e-2)


@pytest.mark.parametrize("layout", [INNERMOST, th.contiguous_format])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_after_upsampling_and_its_gradients(bias, layout):
    x, conv = image(2, 6, 5, 3), nn.Conv2d(6, 4, 3, padding=1, bias=bias).double()
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    ours = channels_last.upsample_conv(x, conv)
    theirs = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    same([ours, *gradients(ours, x, *conv.parameters())], [theirs, *gradients(theirs, x, *conv.parameters())])
    assert channels_last.innermost(ours) == (layout == INNERMOST) and ours.is_contiguous(memory_format=layout)


def test_autocast_keeps_norms_in_single_precision_and_its_gradients():
    x, conv, norm = image(3, 64, 8, 8, dtype=th.float32), nn.Conv2d(64, 8, 3, padding=1), GroupNorm32(32, 64)
    conv.to(memory_format=INNERMOST)
    usual = norm(x)
    with th.autocast("cpu", dtype=th.bfloat16):
        assert (norm(x) - usual).abs().max() < 1e-5
        large = channels_last.upsample_conv(norm(x), conv)
    assert large.dtype == th.bfloat16
    by_x, by_weight = gradients(large.float(), x, conv.weight)
    with th.no_grad():
        conv.bias.zero_()
    same([by_x, by_weight], gradients(channels_last.upsample_conv(norm(x), conv), x, conv.weight), tolerance=0.05)


@pytest.mark.parametrize("options", [{}, {"use_scale_shift_norm": True}])
def test_a_u_net_in_half_precision_has_the_gradients_of_the_usual_layout(options):
    th.manual_seed(0)
    model = unet.UNetModel(**SMALL | {"image_size": 16} | options)
    for param in model.parameters():
        nn.init.normal_(param, std=0.05)
    found, x = [], image(2, 4, 16, 16, dtype=th.float32)
    for layout in (INNERMOST, th.contiguous_format):
        model.to(memory_format=layout)
        with th.autocast("cpu", dtype=th.bfloat16):
            y = model(x.contiguous(memory_format=layout), th.tensor([1, 2]))
        by = gradients(y.float(), *model.parameters())
        found.append(th.cat([g.flatten() for g in by]))
    assert (found[0] - found[1]).norm() < 0.05 * found[1].norm()


def test_upsampling_by_few_pixels_or_elsewhere_is_left_as_it_was():
    assert channels_last.upsampling_pays(th.zeros(1, 2, 8, 8))
    assert not channels_last.upsampling_pays(th.zeros(64, 2, 4, 4))
    assert not channels_last.upsampling_pays(th.zeros(1, 2, 8, 8, device="meta"))
    assert not channels_last.upsampling_pays(th.zeros(1, 2, 8, 8, 8))


def test_a_pointwise_convolution():
    x, conv = image(2, 6, 5, 3), nn.Conv2d(6, 4, 1).double()
    same([channels_last.pointwise(x, conv)], [conv(x)])


@pytest.mark.parametrize(
    "options",
    [{}, {"use_scale_shift_norm": True}, {"resblock_updown": True, "use_new_attention_order": True}],
    ids=["plain", "scale and shift", "resizing blocks"],
)
def test_the_u_net(options):
    th.manual_seed(0)
    model = unet.UNetModel(**SMALL, num_heads=2, num_classes=3, **options)
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)
    other = copy.deepcopy(model).to(memory_format=INNERMOST)
    x, t, y = th.randn(3, 4, 8, 8), th.tensor([0, 500, 999]), th.tensor([0, 1, 2])
    theirs, ours = (m(x, t, y) for m in (model, other))
    assert channels_last.innermost(ours)
    same([ours], [theirs], tolerance=1e-5)
    by = [th.cat([g.flatten() for g in gradients(y, *m.parameters())]) for y, m in ((ours, other), (theirs, model))]
    assert (by[0] - by[1]).norm() <= 1e-5 * by[1].norm()


def test_attention_of_many_positions_in_the_usual_layout(monkeypatch):
    block = unet.AttentionBlock(64, num_heads=2)
    nn.init.normal_(block.proj_out.weight, std=0.1)
    x = th.randn(2, 64, 12, 12, requires_grad=True)
    found = []
    for rows_from in (unet.ROWS_FROM, 1000):
        monkeypatch.setattr(unet, "ROWS_FROM", rows_from)
        y = block(x)
        assert y.is_contiguous()
        found.append([y, *gradients(y, x, *block.parameters())])
    same(*found, tolerance=1e-5)
    assert not th.equal(*(y for y, *_ in found))  # they are two ways


def test_the_encoder():
    th.manual_seed(0)
    model = unet.EncoderUNetModel(**SMALL, num_head_channels=32, pool="attention")
    other = copy.deepcopy(model).to(memory_format=INNERMOST)
    x, t = th.randn(3, 4, 8, 8), th.tensor([0, 500, 999])
    same([other(x, t)], [model(x, t)], tolerance=1e-4)


def test_the_autoencoder():
    th.manual_seed(0)
    model = KLAutoencoder(KLConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, norm_groups=4)).eval()
    other = copy.deepcopy(model).to(memory_format=INNERMOST)
    x = th.randn(2, 3, 8, 8)
    z = model.encode(x).mean
    same([other.encode(x).mean, other.decode(z)], [z, model.decode(z)], tolerance=1e-4)
