"""LightningDiT against upstream's numbers, DiT against its equations, and what a transformer must keep."""

import math

import numpy as np
import pytest
import torch as th
from helpers import fill_by_name, golden

from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.dit import SIZES, LightningDiT, RotaryEmbedding2D, create_dit, unpatchify

NETWORKS = ["lightning", "plain_dit", "patch2_learn_sigma", "qknorm_wo_shift"]
TINY = dict(input_size=4, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=5)
LIGHTNING = dict(use_swiglu=True, use_rope=True, use_rmsnorm=True)
MILLIONS = {  # of parameters: latents of 32 x 16 x 16, 1000 classes, swiglu + rope + rmsnorm
    **dict.fromkeys(["LightningDiT-B/1", "LightningDiT-B/2"], 130.556),
    "LightningDiT-L/2": 458.153,
    **dict.fromkeys(["LightningDiT-XL/1", "LightningDiT-XL/2"], 675.257),
    **dict.fromkeys(["LightningDiT-1p0B/1", "LightningDiT-1p0B/2"], 1029.401),
    **dict.fromkeys(["LightningDiT-1p6B/1", "LightningDiT-1p6B/2"], 1631.767),
}


def filled(seed=0, **kwargs):
    """A network whose output is not zero."""
    model = LightningDiT(**kwargs)
    fixed = model.pos_embed.clone()
    fill_by_name(model, seed)
    model.pos_embed.data.copy_(fixed)
    return model


def batch(n=4, channels=3, size=4, classes=5):
    draw = th.Generator().manual_seed(0)
    x = th.randn(n, channels, size, size, generator=draw)
    return x, th.rand(n, generator=draw), th.randint(classes, (n,), generator=draw)


def on_paper(**kwargs):
    """The named size without its memory."""
    with th.device("meta"):
        return create_dit(**{"name": "LightningDiT-XL/1", "input_size": 16, "in_channels": 32, **LIGHTNING, **kwargs})


def millions(model):
    return sum(param.numel() for param in model.parameters()) / 1e6


@pytest.fixture(params=NETWORKS)
def upstream(request):
    """(golden numbers, the network with the golden weights)."""
    numbers = golden(f"ldit_{request.param}.npz")
    model = filled(int(numbers["seed_weights"]), **golden("ldit_args.json")[request.param]["args"]).eval()
    return {name: th.from_numpy(numbers[name]) for name in numbers.files}, model


def close(a, b, atol=1e-5):
    return th.allclose(a, b, rtol=0, atol=atol)


# ---- upstream's numbers


@pytest.mark.parametrize("network", NETWORKS)
def test_keys_and_shapes_are_upstreams(network):
    wanted = golden("ldit_args.json")[network]
    model = LightningDiT(**wanted["args"])
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == wanted["state_dict"]


@th.no_grad()
def test_positions_are_upstreams(upstream):
    numbers, model = upstream
    fixed = {name.removeprefix("fixed/"): value for name, value in numbers.items() if name.startswith("fixed/")}
    assert "pos_embed" in fixed and not model.pos_embed.requires_grad
    for name, value in fixed.items():
        assert close(model.state_dict()[name], value, 1e-6), name


@th.no_grad()
def test_outputs_are_upstreams(upstream):
    numbers, model = upstream
    x, t, y = (numbers[name] for name in "xty")
    assert model.null_label == 31
    assert close(model(x, t, y), numbers["out"])
    assert close(model(x, t, th.full_like(y, model.null_label)), numbers["null_out"])


@th.no_grad()
def test_guidance_is_upstreams(upstream):
    numbers, model = upstream
    x, t, y = (numbers[name] for name in "xty")
    doubled = (th.cat([x, th.full_like(x, 7.0)]), th.cat([t, t]), th.cat([y, th.full_like(y, model.null_label)]))
    assert close(model.forward_with_cfg(*doubled, 4.0), numbers["cfg4_intervalNone"])
    assert close(model.forward_with_cfg(*doubled, 4.0, True, 0.5), numbers["cfg4_interval0.5"])  # t[0] = 0.13
    inside = model.forward_with_cfg(*doubled, 4.0, cfg_interval=True, cfg_interval_start=0.1)
    assert close(inside, numbers["cfg4_intervalNone"])


@pytest.mark.parametrize("name", MILLIONS)
def test_named_sizes_have_upstreams_number_of_parameters(name):
    assert round(millions(on_paper(name=name)), 3) == MILLIONS[name]


def test_options_change_the_size_as_upstream():
    assert len(on_paper().state_dict()) == 351
    assert len(on_paper(use_qknorm=True).state_dict()) == 407
    assert round(millions(on_paper(num_classes=31)), 2) == 674.14
    assert round(millions(on_paper(num_classes=31, wo_shift=True)), 2) == 599.76


def test_all_names_but_ours_are_upstreams():
    assert set(SIZES) - set(MILLIONS) == {"LightningDiT-S/1", "LightningDiT-S/2"}


# ---- DiT's equations, written a second time


def dit_by_its_equations(weights, x, t, y, *, heads, patch):
    """DiT in float64 numpy, token by token and head by head."""
    w = {name: value.double().numpy() for name, value in weights.items()}
    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))

    def linear(name, v):
        return v @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(v):
        return v / (1 + np.exp(-v))

    def norm(v):
        return (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-6)

    def attention(name, v):
        q, k, u = np.split(linear(f"{name}.qkv", v), 3, axis=-1)
        out = np.empty_like(v)
        for part in np.split(np.arange(v.shape[-1]), heads):
            scores = np.exp(q[:, part] @ k[:, part].T / math.sqrt(len(part)))
            out[:, part] = scores / scores.sum(-1, keepdims=True) @ u[:, part]
        return linear(f"{name}.proj", out)

    def mlp(name, v):
        h = linear(f"{name}.fc1", v)
        return linear(f"{name}.fc2", h / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))))

    def one(image, time, label):
        channels, size, _ = image.shape
        corners = [(i, j) for i in range(0, size, patch) for j in range(0, size, patch)]
        kernel = w["x_embedder.proj.weight"]
        cut = [image[:, i : i + patch, j : j + patch] for i, j in corners]
        h = np.stack([(kernel * piece).sum((1, 2, 3)) for piece in cut]) + w["x_embedder.proj.bias"] + w["pos_embed"][0]
        angles = time * np.exp(-math.log(10000) * np.arange(128) / 128)
        waves = np.concatenate([np.cos(angles), np.sin(angles)])
        c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", waves)))
        c = silu(c + w["y_embedder.embedding_table.weight"][label])
        for i in range(depth):
            b1, g1, a1, b2, g2, a2 = np.split(linear(f"blocks.{i}.adaLN_modulation.1", c), 6)
            h = h + a1 * attention(f"blocks.{i}.attn", norm(h) * (1 + g1) + b1)
            h = h + a2 * mlp(f"blocks.{i}.mlp", norm(h) * (1 + g2) + b2)
        shift, scale = np.split(linear("final_layer.adaLN_modulation.1", c), 2)
        tokens = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
        out = np.empty_like(image)
        for token, (i, j) in zip(tokens, corners, strict=True):
            out[:, i : i + patch, j : j + patch] = token.reshape(patch, patch, channels).transpose(2, 0, 1)
        return out

    samples = zip(x.double().numpy(), t.tolist(), y.tolist(), strict=True)
    return th.from_numpy(np.stack([one(*sample) for sample in samples]))


@th.no_grad()
def test_with_all_options_off_it_is_dit():
    model, (x, t, y) = filled(**TINY).eval(), batch()
    wanted = dit_by_its_equations(model.state_dict(), x, t, y, heads=2, patch=2)
    assert wanted.std() > 0.1
    assert close(model(x, t, y).double(), wanted)
    assert close(model.double()(x.double(), t, y), wanted, 1e-6)  # sinusoids stay float32


# ---- what it must keep


@th.no_grad()
def test_unpatchify_undoes_a_patch_embedding_that_only_copies():
    """The kernel of channel (row, column, c) of a token picks that one pixel of the patch."""
    patch, channels, grid = 2, 3, 4
    embed = LightningDiT(**TINY | dict(input_size=8, hidden_size=patch**2 * channels, num_heads=1)).x_embedder
    pick = th.eye(patch**2 * channels).view(-1, patch, patch, channels)
    embed.proj.weight.copy_(pick.permute(0, 3, 1, 2))
    x = th.randn(2, channels, grid * patch, grid * patch)
    assert th.equal(unpatchify(embed(x), patch, grid), x)


def test_rotary_scores_depend_on_the_offset_only():
    grid, rope = 5, RotaryEmbedding2D(16, 5)
    q, k = (rope(th.randn(16).expand(1, 1, grid**2, 16))[0, 0].view(grid, grid, 16) for _ in range(2))
    assert close(q[0, 1] @ k[2, 0], q[2, 4] @ k[4, 3])  # both two down and one left
    assert not close(q[0, 1] @ k[2, 0], q[0, 1] @ k[0, 2], 1e-2)


@pytest.mark.parametrize("options", [{}, LIGHTNING, dict(wo_shift=True, use_qknorm=True)])
def test_a_fresh_network_says_zero_and_starts_as_upstream(options):
    model = LightningDiT(**TINY | options)
    assert not model(*batch()).any()
    for name, param in model.named_parameters():
        if name.endswith(".bias") and "norm" not in name:
            assert not param.any(), name
    for layer, fan in ((model.blocks[1].attn.qkv, 32 + 96), (model.x_embedder.proj, 32 + 3 * 2 * 2)):
        assert 0.95 < layer.weight.abs().max() / math.sqrt(6 / fan) <= 1  # Xavier's bounds
    for layer in (model.y_embedder.embedding_table, model.t_embedder.mlp[0]):
        assert abs(layer.weight.std() - 0.02) < 0.004


def test_recomputed_activations_give_the_same_gradients_under_label_dropout():
    def gradients(use_checkpoint):
        model = filled(**TINY, **LIGHTNING, class_dropout_prob=0.5, use_checkpoint=use_checkpoint).train()
        th.manual_seed(3)
        model(*batch(64)).square().mean().backward()
        return {name: param.grad for name, param in model.named_parameters() if param.requires_grad}

    kept, recomputed = gradients(False), gradients(True)
    assert kept["y_embedder.embedding_table.weight"].abs().sum(1).all()  # all classes and the null label took part
    for name, grad in kept.items():
        assert grad.any() and th.equal(grad, recomputed[name]), name


@th.no_grad()
def test_a_dropped_label_is_the_null_label():
    model, (x, t, y) = filled(**TINY).train(), batch()
    nulls, drop = th.full_like(y, model.null_label), th.tensor([True, False, True, False])
    kept = th.zeros_like(drop)
    assert th.equal(model(x, t, y, drop), model(x, t, th.where(drop, nulls, y), kept))
    assert not close(model(x, t, y, drop)[0], model(x, t, y, kept)[0], 1e-3)


@th.no_grad()
def test_labels_are_dropped_in_training_only_and_as_often_as_asked():
    embed = LightningDiT(**TINY).y_embedder
    embed.embedding_table.weight.copy_(th.arange(6.0)[:, None].expand(-1, 32))
    y = th.zeros(20_000, dtype=th.long)
    th.manual_seed(0)
    assert abs((embed.train()(y)[:, 0] == 5).float().mean() - 0.1) < 0.01
    assert not embed.eval()(y).any()


@th.no_grad()
def test_bfloat16_autocast_stays_near():
    model, (x, t, y) = filled(**TINY, **LIGHTNING, use_qknorm=True).eval(), batch()
    wanted = model(x, t, y)
    with th.autocast("cpu", th.bfloat16):
        assert (model(x, t, y).float() - wanted).abs().max() < 0.03 * wanted.abs().max()


# ---- sentences


@pytest.mark.parametrize(
    "wrong, flag",
    [
        (dict(input_size=5), "--patch_size is 2"),
        (dict(num_heads=3), "--num_heads is 3"),
        (dict(hidden_size=30, num_heads=2), "--hidden_size is 30"),
        (dict(hidden_size=36, num_heads=6, use_rope=True), "--use_rope"),
    ],
)
def test_a_size_that_cannot_be_divided_names_its_flag(wrong, flag):
    with pytest.raises(UserError, match=flag):
        LightningDiT(**TINY | wrong)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"--model_type is 'LightningDiT-XL'; choose one of .*LightningDiT-XL/1"):
        create_dit("LightningDiT-XL")


def test_latents_of_another_size_are_refused():
    x, t, y = batch(size=8)
    with pytest.raises(ValueError, match=r"latents are \(3, 8, 8\), this network was made for \(3, 4, 4\)"):
        LightningDiT(**TINY)(x, t, y)


def test_a_network_without_label_dropout_has_no_null_label():
    model = LightningDiT(**TINY, class_dropout_prob=0)
    assert len(model.y_embedder.embedding_table.weight) == 5
    with pytest.raises(UserError, match="--class_dropout_prob"):
        _ = model.null_label
