"""Weights kept packed for oneDNN: the same numbers, also after a change, and gradients where they are wanted."""

import copy

import pytest
import torch as th
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from guided_diffusion_vae import channels_last, packing, unet

pytestmark = pytest.mark.skipif(not th.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
INNERMOST = th.channels_last
CONVOLUTIONS = {
    "3x3": ({"kernel_size": 3, "padding": 1}, lambda conv, x: conv(x)),
    "strided": ({"kernel_size": 3, "padding": 1, "stride": 2}, lambda conv, x: conv(x)),
    "without bias": ({"kernel_size": 3, "padding": 1, "bias": False}, lambda conv, x: conv(x)),
    "1x1": ({"kernel_size": 1}, lambda conv, x: channels_last.pointwise(x, conv)),
    "after upsampling": ({"kernel_size": 3, "padding": 1}, lambda conv, x: channels_last.upsample_conv(x, conv)),
}


def image(*shape):
    return th.randn(*shape, generator=th.Generator().manual_seed(0)).to(memory_format=INNERMOST)


def of(flags):
    th.manual_seed(0)
    return channels_last.Conv2d(16, 8, **flags).to(memory_format=INNERMOST)


@th.no_grad()
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_numbers_of_the_usual_convolution(name):
    flags, call = CONVOLUTIONS[name]
    conv, x = of(flags), image(3, 16, 8, 10)
    usual = call(conv, x)
    packing.keep_packed(conv)
    for _ in range(2):
        found = call(conv, x)
        assert found.is_contiguous(memory_format=INNERMOST) and (found - usual).abs().max() < 1e-6
    for size in (x[:1], image(2, 16, 12, 8), x):  # the last batch of a job; pictures of another size
        assert (call(conv, size) - call(of(flags), size)).abs().max() < 1e-6
        kept = [part for part in tree_leaves(vars(conv.packed)) if th.is_tensor(part)]
        assert len(kept) == 2 * len(list(conv.parameters()))  # the parameters and them packed: no memory for each size


@th.no_grad()
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_weights_that_change_are_packed_again(name):
    flags, call = CONVOLUTIONS[name]
    conv, x = of(flags), image(3, 16, 8, 10)
    packing.keep_packed(conv)
    before = call(conv, x)
    for factor in (2, 0.5):
        conv.weight.mul_(factor)
        other = of(flags)
        other.load_state_dict(conv.state_dict())
        assert (call(conv, x) - call(other, x)).abs().max() < 1e-6
    assert (call(conv, x) - before).abs().max() < 1e-6
    conv.load_state_dict({name: 0 * value for name, value in conv.state_dict().items()})
    assert not call(conv, x).any()
    if conv.bias is not None:
        conv.bias.add_(1)
        assert (call(conv, x) == 1).all()


def test_gradients_and_other_layouts_are_made_the_usual_way():
    conv, x = of({"kernel_size": 3, "padding": 1}), image(2, 16, 8, 8).requires_grad_()
    packing.keep_packed(conv)
    th.autograd.grad(conv(x).sum(), [x, *conv.parameters()])
    with th.no_grad():
        conv(x.contiguous())
        with th.autocast("cpu", dtype=th.bfloat16):
            assert conv(x).dtype == th.bfloat16
        assert conv.packed.state is None
        conv(x)
    assert conv.packed.state


@th.no_grad()
def test_a_copy_packs_for_itself():
    conv, x = of({"kernel_size": 3, "padding": 1}), image(2, 16, 8, 8)
    packing.keep_packed(conv)
    found, other = conv(x), copy.deepcopy(conv)
    assert conv.packed.state and other.packed.state is None
    other.weight.zero_()
    assert th.equal(conv(x), found) and not th.equal(other(x), found)


@th.no_grad()
def test_a_whole_network():
    small = {"image_size": 16, "in_channels": 4, "model_channels": 32, "out_channels": 4, "num_res_blocks": 1}
    th.manual_seed(0)
    model = unet.UNetModel(**small, attention_resolutions=(2,), channel_mult=(1, 2), resblock_updown=False).eval()
    for param in model.parameters():
        nn.init.normal_(param, std=0.05)
    model.to(memory_format=INNERMOST)
    kept = copy.deepcopy(model)
    packing.keep_packed(kept)
    x, t = image(3, 4, 16, 16), th.tensor([1, 20, 300])
    usual = model(x, t)
    for _ in range(2):
        assert F.mse_loss(kept(x, t), usual) < 1e-10 * usual.square().mean()
    assert sum(bool(module.packed.state) for module in kept.modules() if hasattr(module, "packed")) > 15
