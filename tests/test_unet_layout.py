"""What keys and outputs do not show of a U-Net: the order of its initial draws, memory formats, dimensions, kernels."""

import pytest
import torch as th
from torch.nn.attention import SDPBackend, sdpa_kernel

from guided_diffusion_vae.unet import (
    AttentionPool2d,
    Downsample,
    EncoderUNetModel,
    QKVAttention,
    QKVAttentionLegacy,
    SuperResModel,
    UNetModel,
    Upsample,
)

SMALL = {"image_size": 8, "in_channels": 4, "model_channels": 32, "out_channels": 4, "num_res_blocks": 1}
SMALL |= {"attention_resolutions": (1, 2), "channel_mult": (1, 2), "num_head_channels": 16}
POOLS = ["adaptive", "attention", "spatial", "spatial_v2"]


def make(kind=UNetModel, **flags):
    """A network in which nothing is zero."""
    th.manual_seed(0)
    model = kind(**{**SMALL, **flags})
    for param in model.parameters():
        param.data.add_(0.02 * th.randn_like(param))
    return model


# ---- initial draws ---------------------------------------------------------------------------------------------------


def draw_in_the_order_of_keys(model):
    """Initialise every module again, in the order of the state_dict, each with PyTorch's own rule."""
    for module in model.modules():
        if isinstance(module, AttentionPool2d):
            table = module.positional_embedding
            table.data.copy_(th.randn(table.shape) / table.shape[0] ** 0.5)
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


@pytest.mark.parametrize(
    "kind, flags",
    [
        (UNetModel, {}),
        (UNetModel, {"num_classes": 3, "resblock_updown": True, "use_scale_shift_norm": True}),
        (UNetModel, {"conv_resample": False, "num_res_blocks": 2}),
        (SuperResModel, {}),
        *[(EncoderUNetModel, {"pool": pool, "resblock_updown": True}) for pool in POOLS],
    ],
)
def test_the_same_seed_gives_upstreams_initial_weights(kind, flags):
    """Upstream draws in the order of the keys, also what it then sets to zero, and nothing else."""
    th.manual_seed(5)
    model, after = kind(**{**SMALL, **flags}), th.rand(1)
    found = {key: value.clone() for key, value in model.state_dict().items()}
    th.manual_seed(5)
    draw_in_the_order_of_keys(model)
    assert th.equal(after, th.rand(1))
    zeroed = {key for key, value in found.items() if not value.any() and model.state_dict()[key].any()}
    assert all(th.equal(found[key], value) for key, value in model.state_dict().items() if key not in zeroed)
    head = {"unet": "out.2", "adaptive": "out.3"}.get(flags.get("pool", "unet"))
    ends = ("out_layers.3", "proj_out", *([head] if head else []))
    assert zeroed == {key for key in found if key.rpartition(".")[0].endswith(ends)}


# ---- memory formats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, {"resblock_updown": True, "use_scale_shift_norm": True}])
def test_channels_last_changes_the_speed_only(flags):
    found = []
    for memory in (th.contiguous_format, th.channels_last):
        model = make(**flags).to(memory_format=memory)
        x = th.linspace(-1, 1, 2 * 4 * 64).view(2, 4, 8, 8).contiguous(memory_format=memory).requires_grad_()
        out = model(x, th.tensor([3, 500]))
        out.square().mean().backward()
        found.append([out, x.grad, *(param.grad for param in model.parameters())])
    for plain, last in zip(*found, strict=True):
        th.testing.assert_close(last.contiguous(), plain.contiguous(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", POOLS)
def test_an_encoder_runs_in_channels_last(pool):
    model, x = make(EncoderUNetModel, pool=pool).eval(), th.linspace(-1, 1, 2 * 4 * 64).view(2, 4, 8, 8)
    with th.no_grad():
        wanted = model(x, th.tensor([3, 500]))
        model.to(memory_format=th.channels_last)
        found = model(x.contiguous(memory_format=th.channels_last), th.tensor([3, 500]))
    th.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# ---- dimensions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("resample", [True, False])
def test_of_three_dimensions_the_last_two_resize(dims, resample):
    x = th.randn(1, 4, *[4] * dims)
    down, up = Downsample(4, resample, dims)(x), Upsample(4, resample, dims)(x)
    first = [4] if dims == 3 else []
    assert list(down.shape[2:]) == [*first, *[2] * min(dims, 2)] and list(up.shape[2:]) == [*first, *[8] * min(dims, 2)]
    if not resample:
        th.testing.assert_close(Downsample(4, False, dims)(up), x)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_adaptive_pool_is_a_mean_in_every_dimension(dims):
    """Upstream's fails for one dimension."""
    model = make(EncoderUNetModel, pool="adaptive", dims=dims).eval()
    norm, act, _, head, _ = model.out
    h = th.randn(2, 64, *[4] * dims)
    kernel = head.weight.flatten(1)
    wanted = act(norm(h)).flatten(2).mean(-1) @ kernel.T + head.bias
    th.testing.assert_close(model.out(h), wanted)
    assert model(th.randn(2, 4, *[8] * dims), th.tensor([3, 500])).shape == (2, 4)


@pytest.mark.parametrize("dims", [1, 3])
def test_a_unet_of_one_or_three_dimensions_runs(dims):
    x = th.randn(1, 4, *[4] * dims)
    assert make(dims=dims)(x, th.tensor([7])).shape == x.shape


# ---- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not th.cuda.is_available(), reason="fused kernels that need d innermost are CUDA's")
@pytest.mark.parametrize("attention", [QKVAttentionLegacy, QKVAttention])
@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])
def test_a_fused_kernel_takes_the_layout(attention, kernel):
    """With the rows as they come, PyTorch falls back to a T x T matrix without a word."""
    qkv = th.randn(2, 3 * 4 * 16, 64, device="cuda", dtype=th.float16, requires_grad=True)
    with sdpa_kernel(kernel):
        attention(4)(qkv).sum().backward()
    assert qkv.grad.isfinite().all()


def test_attention_pooling_says_which_size_it_wants():
    model = make(EncoderUNetModel, pool="attention")
    with pytest.raises(
        ValueError, match="made for 16 positions and sees 8 x 8: --image_size.*--classifier_pool"
    ) as error:
        model(th.zeros(1, 4, 16, 16), th.tensor([0]))
    assert "\n" not in str(error.value)


def test_no_module_keeps_a_buffer():
    """state_dict is the parameters and nothing else: optimiser files and flat masters count on their order."""
    for kind, flags in ((UNetModel, {"num_classes": 3}), (EncoderUNetModel, {"pool": "spatial_v2"})):
        model = make(kind, **flags)
        assert not list(model.buffers())
        assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]
