"""The U-Net family against the official code: every key, shape and number; and what upstream got wrong."""

import ast
import hashlib
import inspect
import re
from functools import cache

import numpy as np
import pytest
import torch as th
from helpers import GOLDEN, fill_by_name, golden

from guided_diffusion_vae import script_util
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.model_flags import attention_factors, flags_of, load_weights
from guided_diffusion_vae.unet import (
    AttentionBlock,
    EncoderUNetModel,
    QKVAttention,
    QKVAttentionLegacy,
    SuperResModel,
    UNetModel,
)

DEFAULTS = script_util.model_and_diffusion_defaults()
MAKERS = {
    "unet": (script_util.create_model, DEFAULTS),
    "sr": (script_util.sr_create_model, script_util.sr_model_and_diffusion_defaults()),
    "classifier": (script_util.create_classifier, script_util.classifier_defaults()),
}
ADM = {"learn_sigma": True, "resblock_updown": True, "attention_resolutions": "32,16,8", "class_cond": True}
WIDE = ADM | {"num_channels": 256, "num_head_channels": 64}
NARROW = ADM | {"num_channels": 192}
ADM_64 = {"num_res_blocks": 3, "num_head_channels": 64, "use_new_attention_order": True, "dropout": 0.1}
SR_512 = {"large_size": 512, "small_size": 128, "num_head_channels": 64, "attention_resolutions": "32,16"}
LISTS = {  # key list -> maker and official flags
    "64x64_diffusion": ("unet", NARROW | ADM_64 | {"image_size": 64}),
    "128x128_diffusion": ("unet", ADM | {"image_size": 128, "num_channels": 256, "num_heads": 4}),
    "256x256_diffusion": ("unet", WIDE | {"image_size": 256}),
    "256x256_diffusion_uncond": ("unet", WIDE | {"image_size": 256, "class_cond": False}),
    "512x512_diffusion": ("unet", WIDE | {"image_size": 512}),
    "64_256_upsampler": ("sr", NARROW | {"large_size": 256, "small_size": 64, "num_heads": 4}),
    "128_512_upsampler": ("sr", NARROW | SR_512),
    "64x64_classifier": ("classifier", {"image_size": 64, "classifier_depth": 4}),
    "128x128_classifier": ("classifier", {"image_size": 128}),
    "256x256_classifier": ("classifier", {"image_size": 256}),
    "512x512_classifier": ("classifier", {"image_size": 512}),
    "image_train_defaults_64": ("unet", {}),
    "image_train_defaults_64_learn_sigma_cc": ("unet", {"learn_sigma": True, "class_cond": True}),
    "image_256_no_resblock_updown": ("unet", {"image_size": 256}),
    "classifier_default_64": ("classifier", {}),
    "classifier_64_adaptive": ("classifier", {"classifier_pool": "adaptive"}),
    "classifier_64_spatial": ("classifier", {"classifier_pool": "spatial"}),
    "classifier_64_spatial_v2": ("classifier", {"classifier_pool": "spatial_v2"}),
}
OFFICIAL = {  # keys, parameters, start of the sha256 of the sorted lines "key shape"
    "64x64_diffusion": (541, 295_904_454, "b879ba9ed4fe94bb"),
    "128x128_diffusion": (493, 421_529_606, "d91b9be2449a697e"),
    "256x256_diffusion": (567, 553_838_086, "408c4d65687d2b6d"),
    "256x256_diffusion_uncond": (566, 552_814_086, "b9c90be1570d1541"),
    "512x512_diffusion": (645, 558_997_638, "f95458c996170da9"),
    "64_256_upsampler": (567, 311_795_910, "99d9c28e89d75934"),
    "128_512_upsampler": (537, 308_835_270, "2424e4b817a8f3a3"),
    "64x64_classifier": (307, 65_438_568, "1f101795c34a2e14"),
    "128x128_classifier": (221, 42_568_040, "d574aa66"),
    "256x256_classifier": (249, 54_096_360, "80623bca"),
    "512x512_classifier": (281, 54_448_360, "14a2ce08"),
}
TINY = {"image_size": 16, "in_channels": 3, "model_channels": 32, "num_res_blocks": 1, "attention_resolutions": (2,)}
TINY |= {"channel_mult": (1, 2)}


def build(kind, flags):
    """A network without memory, from flags; those of the process are dropped."""
    make, defaults = MAKERS[kind]
    settings = {name: value for name, value in (defaults | flags).items() if name in inspect.signature(make).parameters}
    with th.device("meta"):
        return make(**settings)


@cache
def listed(name):
    """The network of a key list, made once."""
    return build(*LISTS[name])


def shapes_of(model):
    return [(key, tuple(value.shape)) for key, value in model.state_dict().items()]


def pairs(stored):
    """Keys and shapes of a state_dict in a golden file."""
    return [(key, tuple(shape)) for key, shape in stored.items()]


# ---- keys, shapes, order ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LISTS)
def test_keys_shapes_and_order_are_upstreams(name):
    """state_dict and named_parameters agree with upstream's list, line by line."""
    model = listed(name)
    lines = [f"{key} {shape}" for key, shape in shapes_of(model)]
    assert lines == (GOLDEN / "adm_keys" / f"{name}.txt").read_text().splitlines()
    assert [key for key, _ in model.named_parameters()] == list(model.state_dict())


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_checkpoints_have_their_size_and_hash(name):
    model = listed(name)
    count, params, digest = OFFICIAL[name]
    lines = sorted(f"{key} {shape}" for key, shape in shapes_of(model))
    assert (len(lines), sum(p.numel() for p in model.parameters())) == (count, params)
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest().startswith(digest)


def test_all_lists_are_tested():
    assert {path.stem for path in (GOLDEN / "adm_keys").iterdir()} == set(LISTS)


@pytest.mark.parametrize("name", golden("adm_official_state_dicts.json"))
def test_official_flags_give_the_official_state_dict(name):
    entry = golden("adm_official_state_dicts.json")[name]
    kind = "classifier" if "classifier_width" in entry["args"] else "unet"
    assert shapes_of(build(kind, entry["args"])) == pairs(entry["state_dict"])


def test_defaults_are_upstreams_in_order():
    wanted = golden("adm_flags.json")
    for name, ours in (
        ("model_and_diffusion", script_util.model_and_diffusion_defaults()),
        ("classifier_and_diffusion", script_util.classifier_and_diffusion_defaults()),
        ("sr", script_util.sr_model_and_diffusion_defaults()),
    ):
        assert list(ours.items()) == list(wanted[name].items())


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in golden("adm_unet_args.json") if name != "encoder_attention"])
def test_outputs_are_upstreams(name):
    entry, data = golden("adm_unet_args.json")[name], golden(f"adm_unet_{name}.npz")
    model = UNetModel(**entry["args"]).eval()
    assert shapes_of(model) == pairs(entry["state_dict"])
    fill_by_name(model, int(data["seed_weights"]))
    y = th.from_numpy(data["y"]) if "y" in data else None
    with th.no_grad():
        out = model(th.from_numpy(data["x"]), th.from_numpy(data["t"]), y)
    np.testing.assert_allclose(out.numpy(), data["out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head, right", [(8, False), (16, True), (32, False)])
def test_the_encoders_output_is_upstreams(head, right):
    """All its arguments show in its weights except the width of a head, and only 16 gives upstream's numbers."""
    data, stored = golden("adm_encoder_unet_attention.npz"), golden("adm_unet_args.json")["encoder_attention"]
    shapes = dict(pairs(stored["state_dict"]))
    model = EncoderUNetModel(**encoder_arguments(shapes), num_head_channels=head, pool="attention").eval()
    assert shapes_of(model) == list(shapes.items())
    fill_by_name(model, int(data["seed_weights"]))
    with th.no_grad():
        out = model(th.from_numpy(data["x"]), th.from_numpy(data["t"]))
    assert np.allclose(out.numpy(), data["out"], rtol=1e-5, atol=1e-5) == right


def encoder_arguments(shapes):
    """The constructor's arguments, read off the weights of an encoder whose levels widen and resize by blocks."""
    convs = [key for key in shapes if re.fullmatch(r"input_blocks\.\d+\.0\.out_layers\.3\.weight", key)]
    widths = [shapes[key][0] for key in convs]  # of blocks 1, 2, ...: R of a level, one that resizes, R of the next
    levels = sorted(set(widths))
    blocks = (len(widths) + 1) // len(levels) - 1
    side = round((shapes["out.2.positional_embedding"][1] - 1) ** 0.5)
    base, emb = shapes["time_embed.0.weight"][1], shapes["input_blocks.1.0.emb_layers.1.weight"]
    attends = {int(key.split(".")[1]) for key in shapes if re.match(r"input_blocks\.\d+\.1\.qkv", key)}
    return {
        "image_size": side * 2 ** (len(levels) - 1),
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "model_channels": base,
        "out_channels": shapes["out.2.c_proj.weight"][0],
        "num_res_blocks": blocks,
        "attention_resolutions": tuple({2 ** ((n - 1) // (blocks + 1)) for n in attends}),
        "channel_mult": tuple(width // base for width in levels),
        "resblock_updown": not any(key.endswith(".op.weight") for key in shapes),
        "use_scale_shift_norm": emb[0] == 2 * widths[0],
    }


@pytest.mark.parametrize("name", golden("adm_golden.json")["models"])
def test_tiny_models_are_upstreams(name):
    """The second set of numbers: weights and inputs filled by a formula."""
    entry = golden("adm_golden.json")["models"][name]
    config = entry.get("cfg", {})
    x = wave(0.11, (2, config.get("in_channels", 3), *[config.get("image_size", 16)] * 2))
    options = {"y": th.tensor([1, 7])} if config.get("num_classes") else {}
    if name == "superres":
        model = SuperResModel(**TINY, out_channels=6, num_classes=10, num_heads=2)
        options = {"y": th.tensor([1, 7]), "low_res": wave(0.2, (2, 3, 4, 4))}
    elif name.startswith("enc_"):
        style = {"use_scale_shift_norm": True, "resblock_updown": True, "num_head_channels": 16}
        model = EncoderUNetModel(**TINY, **style, out_channels=10, pool=name.removeprefix("enc_"))
    else:
        model = UNetModel(**config)
    for i, (key, param) in enumerate(model.named_parameters()):
        values = 0.05 * np.sin(0.37 * np.arange(param.numel()) + i)
        values = values + (1 if param.ndim == 1 and key.endswith("weight") else 0)
        param.data.copy_(th.from_numpy(values).float().view(param.shape))
    params = sum(param.numel() for param in model.parameters())
    assert (len(model.state_dict()), params) == (entry["keys"], entry.get("params", params))
    with th.no_grad():
        flat = model.eval()(x, th.tensor([0, 437]), **options).double().flatten()
    wanted = entry["out"]
    assert len(flat) == wanted["n"]
    got = [*flat[:8].tolist(), *flat[-4:].tolist(), flat.sum().item(), flat.abs().sum().item()]
    wanted = [*wanted["first8"], *wanted["last4"], wanted["sum"], wanted["abssum"]]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)  # some outputs are 0 but for what does not cancel


def wave(rate, shape):
    return th.from_numpy(np.cos(rate * np.arange(np.prod(shape)))).float().view(*shape)


# ---- attention, checkpointing, half precision ------------------------------------------------------------------------


def small(**flags):
    """A network that attends at both of its levels; nothing in it is zero, so nothing hides what lies behind it."""
    th.manual_seed(0)
    model = UNetModel(8, 4, 32, 4, 1, (1, 2), channel_mult=(1, 2), num_heads=2, **flags)
    for param in model.parameters():
        param.data.add_(th.randn_like(param) * 0.02)
    return model


def batch():
    th.manual_seed(1)
    return th.randn(2, 4, 8, 8), th.tensor([3, 500])


def head_first_to_part_first(rows, heads):
    """The rows of a qkv layer, from (head, part, channel) to (part, head, channel)."""
    return rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


@pytest.mark.parametrize("width", [8, 16, 64])
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_the_two_layouts_of_attention_are_a_permutation(heads, width, monkeypatch):
    """After it both attend to the same bits, and differ by 0.0; without it, unless there is one head, they differ.

    Heads of 8 may differ in the last bit of the output: the CPU's product of matrices so narrow rounds by strides,
    and the layouts have different ones.
    """
    seen, attend = [], th.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        th.nn.functional, "scaled_dot_product_attention", lambda *qkv: (seen.append(qkv), attend(*qkv))[1]
    )
    th.manual_seed(0)
    qkv = th.randn(2, 3 * heads * width, 10)
    permuted = qkv[:, head_first_to_part_first(th.arange(3 * heads * width), heads)]
    legacy, new = QKVAttentionLegacy(heads)(qkv), QKVAttention(heads)
    assert (legacy - new(permuted)).abs().max() <= (1e-6 if width == 8 else 0.0)
    assert all(th.equal(a, b) for a, b in zip(*seen, strict=True))
    assert th.equal(legacy, new(qkv)) == (heads == 1)


def test_a_network_of_legacy_attention_becomes_one_of_new_attention():
    """Permuting the qkv rows of a checkpoint changes nothing at all; a wrong flag loads, and is wrong."""
    legacy, new = small().eval(), small(use_new_attention_order=True).eval()
    with th.no_grad():
        wanted, wrong = legacy(*batch()), new(*batch())
        state = {k: head_first_to_part_first(v, 2) if ".qkv." in k else v for k, v in legacy.state_dict().items()}
        new.load_state_dict(state)
        assert (new(*batch()) - wanted).abs().max() == 0.0
    assert (wrong - wanted).abs().max() > 1e-4


def test_attention_is_softmax_of_scaled_products():
    th.manual_seed(0)
    q, k, v = th.randn(3, 1, 4, 6)
    weights = th.softmax(q[0].T @ k[0] / 2, dim=-1)
    got = QKVAttention(1)(th.cat([q, k, v], dim=1))
    np.testing.assert_allclose(got[0].numpy(), (weights @ v[0].T).T.numpy(), atol=1e-6)


def trained(seed=2, **flags):
    """Output, gradients of input and parameters, and how often each convolution ran."""
    model, (x, t), calls = small(**flags), batch(), []
    for name, module in model.named_modules():
        if name.endswith(("in_layers.2", "qkv")):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    x.requires_grad_()
    th.manual_seed(seed)
    out = model(x, t)
    out.square().mean().backward()
    return [out, x.grad, *(p.grad for p in model.parameters())], calls


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_changes_neither_output_nor_gradient(dropout):
    """Every block is computed twice, with the same dropout mask: upstream's gradient is off by half."""
    (plain, once), (cheap, twice) = (trained(dropout=dropout, use_checkpoint=flag) for flag in (False, True))
    assert all(th.equal(a, b) for a, b in zip(plain, cheap, strict=True))
    assert sorted(twice) == sorted(once * 2)
    other, _ = trained(seed=3, dropout=dropout)
    assert th.equal(other[0], plain[0]) == (dropout == 0)


def test_a_frozen_network_still_has_a_gradient_for_its_input():
    model, (x, t) = small(use_checkpoint=True).requires_grad_(False), batch()
    model(x.requires_grad_(), t).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["unet", "adaptive", "attention", "spatial", "spatial_v2"])
def test_half_precision_is_for_the_convolutions_of_the_torso(kind):
    """Norms, embeddings, linear layers and the head keep float32, and so does the output."""
    style = {"num_classes": 3} if kind == "unet" else {"pool": kind, "num_head_channels": 16, "resblock_updown": True}
    make = UNetModel if kind == "unet" else EncoderUNetModel
    th.manual_seed(0)
    model = make(8, 4, 32, 4, 1, (1, 2), channel_mult=(1, 2), use_fp16=True, **style).eval()
    before = {name: param.clone() for name, param in model.named_parameters()}
    model.convert_to_fp16()
    half = {name for name, param in model.named_parameters() if param.dtype == th.float16}
    torso = ("input_blocks.", "middle_block.", "output_blocks.")
    convolutions = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        for part in ("weight", "bias")
        if isinstance(module, (th.nn.Conv1d, th.nn.Conv2d)) and name.startswith(torso)
    }
    assert half == convolutions and len(half) > 20
    y = [th.tensor([0, 2])] if kind == "unet" else []
    with th.no_grad():
        assert model(*batch(), *y).dtype == th.float32
    model.convert_to_fp32()
    for name, param in model.named_parameters():
        assert th.equal(param, before[name].half().float() if name in half else before[name])


def test_half_precision_is_close_to_single():
    single, half = small().eval(), small(use_fp16=True).eval()
    half.convert_to_fp16()
    with th.no_grad():
        wanted = single(*batch())
        assert (half(*batch()) - wanted).abs().max() < 0.01 * wanted.abs().max()


# ---- flags from weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("updown", [False, True])
@pytest.mark.parametrize(
    "mult, blocks, attention, factors",
    [
        ("1,2", 1, "", []),
        ("1,2,2", 2, "32,16", [2, 4]),
        ("0.5,1,3", 3, "64,32,16", [1, 2, 4]),
        ("1,1.5,2,3", 1, "8", [8]),
    ],
)
def test_flags_are_read_off_the_weights(updown, mult, blocks, attention, factors):
    given = {
        "image_size": 64,
        "num_channels": 64,
        "num_res_blocks": blocks,
        "channel_mult": mult,
        "resblock_updown": updown,
        "learn_sigma": updown,
        "class_cond": not updown,
        "use_scale_shift_norm": updown,
    }
    state = build("unet", given | {"attention_resolutions": attention}).state_dict()
    found = flags_of(state)
    assert found | {"image_size": 64} == given
    assert attention_factors(state) == factors


@pytest.mark.parametrize(
    "name",
    [
        "classifier_default_64",
        "classifier_64_adaptive",
        "classifier_64_spatial_v2",
        "classifier_64_spatial",
    ],
)
def test_a_classifier_has_no_flags_of_a_unet(name):
    assert flags_of(listed(name).state_dict()) == {}


BASE = {"image_size": 64, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2"}


def refusal(made, given):
    """The message on loading the weights of one network into another."""
    with pytest.raises(UserError) as error:
        load_weights(build("unet", given), build("unet", made).state_dict(), path="m.pt", given=DEFAULTS | given)
    return str(error.value)


def remedy_of(message):
    """The flags that a message says to give, as values."""
    words = dict(re.findall(r"--(\w+) (\S+?)(?=, --|$)", message.partition(": give ")[2]))
    texts = {name for name, default in DEFAULTS.items() if isinstance(default, str)}
    return {name: value.strip('"') if name in texts else ast.literal_eval(value) for name, value in words.items()}


@pytest.mark.parametrize(
    "made",
    [
        {"num_channels": 64},
        {"num_res_blocks": 2},
        {"channel_mult": "1,2,2"},
        {"learn_sigma": True},
        {"class_cond": True},
        {"resblock_updown": True},
        {"use_scale_shift_norm": False},
        {"num_channels": 64, "num_res_blocks": 2, "learn_sigma": True, "resblock_updown": True},
        {"attention_resolutions": "32"},
        {"attention_resolutions": "64,32", "num_channels": 64},
    ],
    ids=lambda made: ",".join(made),
)
def test_a_checkpoint_of_another_shape_names_the_flags_that_fit(made):
    """One line; and a network made with the flags it names has the checkpoint's keys and shapes."""
    message = refusal(BASE | made, BASE)
    assert message.startswith("m.pt is a network of another shape (") and "\n" not in message
    remedy = remedy_of(message)
    assert set(made) <= set(remedy)
    assert shapes_of(build("unet", BASE | remedy)) == shapes_of(build("unet", BASE | made))


def test_levels_that_come_from_the_table_are_named_too():
    """`--channel_mult` left empty means four levels at 64; the checkpoint has two."""
    given = BASE | {"channel_mult": ""}
    assert remedy_of(refusal(BASE | {"num_channels": 64}, given)) == {"num_channels": 64, "channel_mult": "1,2"}


def test_attention_that_only_the_given_flags_have_is_turned_off():
    message = refusal(BASE, BASE | {"attention_resolutions": "32"})
    assert message.endswith(': give --attention_resolutions ""')


def test_another_number_of_classes_is_a_matter_of_the_data():
    """No flag says how many classes there are, so none is named."""
    users = BASE | {"class_cond": True}
    message = refusal(users | {"num_classes": 31}, users)
    assert "(label_emb.weight differ): give data with 31 classes" in message and "--" not in message


def test_a_remedy_is_made_of_flags_that_exist():
    assert set(remedy_of(refusal(BASE | {"class_cond": True}, BASE))) <= set(DEFAULTS)


def test_the_differing_keys_are_named_and_counted():
    message = refusal(BASE | {"learn_sigma": True}, BASE)
    assert message == "m.pt is a network of another shape (out.2.weight, out.2.bias differ): give --learn_sigma True"
    assert re.search(
        r"\(time_embed\.0\.weight, \S+, \S+ and \d+ more differ\)", refusal(BASE | {"num_channels": 64}, BASE)
    )


def test_what_is_no_unet_is_said_to_be_none():
    with pytest.raises(UserError, match="m.pt.*it is not a U-Net of this kind$"):
        load_weights(small(), {"weight": th.zeros(3)}, path="m.pt", given=DEFAULTS)


def test_weights_that_fit_are_loaded():
    source, target = small(), small()
    for param in source.parameters():
        param.data.add_(1)
    load_weights(target, source.state_dict(), path="m.pt", given=DEFAULTS)
    assert all(th.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"num_channels": 40}, "40 channels, not a multiple of 32: change --num_channels or --channel_mult"),
        ({"channel_mult": "1,1.1"}, "140 channels, not a multiple of 32"),
        ({"image_size": 32, "channel_mult": "1,1,1,1,1,1,1"}, "cannot halve that 6 times.*may have 6 entries"),
        (
            {"image_size": 36, "channel_mult": "1,1,1,1"},
            "sees 36 x 36 and cannot halve that 3 times.*may have 3 entries",
        ),
        ({"image_size": 48}, "unsupported image size: 48.*--channel_mult"),
        ({"num_heads": 3}, "--num_heads 3 does not divide the"),
        ({"num_head_channels": 48}, "--num_head_channels 48 does not divide the"),
        ({"num_head_channels": 1024}, "--num_head_channels 1024 does not divide the"),
        ({"channel_mult": "1,x"}, "--channel_mult is '1,x'"),
        ({"channel_mult": "1,0"}, "--channel_mult is '1,0'"),
        ({"attention_resolutions": "16,a"}, "--attention_resolutions is '16,a'"),
    ],
)
def test_a_network_that_cannot_be_is_one_line(flags, words):
    with pytest.raises(ValueError, match=words) as error:
        build("unet", flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("heads", [{"num_heads": 3}, {"num_heads": 0}, {"num_head_channels": 24}])
def test_heads_that_do_not_divide_are_refused(heads):
    (name, value), *_ = heads.items()
    with pytest.raises(ValueError, match=f"--{name} {value} does not divide the 64 channels"):
        AttentionBlock(64, **heads)


@pytest.mark.parametrize("size", [(6, 7), (7, 8), (8, 5)])
@pytest.mark.parametrize("make", [UNetModel, EncoderUNetModel])
def test_a_size_that_cannot_be_halved_is_one_line(make, size):
    model = make(8, 4, 32, 4, 1, (), channel_mult=(1, 2))
    with pytest.raises(ValueError, match=f"sees {size[0]} x {size[1]}.*halved 1 times.*--image_size") as error:
        model(th.zeros(1, 4, *size), th.tensor([0]))
    assert "\n" not in str(error.value)


def test_a_rectangle_that_can_be_halved_is_fine():
    with th.no_grad():
        assert small()(th.zeros(1, 4, 6, 10), th.tensor([0])).shape == (1, 4, 6, 10)


def test_attention_pooling_is_for_one_size():
    """The other pools take any; this one has a weight for each position."""
    model = EncoderUNetModel(8, 4, 32, 4, 1, (), channel_mult=(1, 2), num_head_channels=16, pool="attention")
    with pytest.raises(ValueError, match="made for 16 positions and sees 8 x 8.*--classifier_pool adaptive") as error:
        model(th.zeros(1, 4, 16, 16), th.tensor([0]))
    assert "\n" not in str(error.value)
    other = EncoderUNetModel(8, 4, 32, 4, 1, (), channel_mult=(1, 2))
    with th.no_grad():
        assert other(th.zeros(1, 4, 16, 16), th.tensor([0])).shape == (1, 4)


def test_an_unknown_pool_is_refused():
    for kind in (NotImplementedError, ValueError):  # upstream's kind, and the user's
        with pytest.raises(kind, match="Unexpected max pooling; --classifier_pool is"):
            build("classifier", {"classifier_pool": "max"})


def test_labels_come_if_and_only_if_the_network_has_classes():
    x, t = batch()
    for model, y in ((small(), th.tensor([0, 1])), (small(num_classes=3), None)):
        with pytest.raises(AssertionError, match="must specify y if and only if the model is class-conditional"):
            model(x, t, y)
