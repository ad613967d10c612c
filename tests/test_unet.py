"""The U-Net family against the official code: every key, shape and number; and what upstream got wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch as th
from helpers import GOLDEN, fill_by_name, golden

from guided_diffusion_vae import script_util
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.model_flags import flags_of, load_weights
from guided_diffusion_vae.unet import EncoderUNetModel, QKVAttention, QKVAttentionLegacy, SuperResModel, UNetModel

DEFAULTS = script_util.model_and_diffusion_defaults()
ADM = {"learn_sigma": True, "resblock_updown": True, "attention_resolutions": "32,16,8", "class_cond": True}
LISTS = {  # key list -> (maker, flags); official flags of the released checkpoints
    "64x64_diffusion": (
        "unet",
        ADM | {"image_size": 64, "num_channels": 192, "num_res_blocks": 3, "num_head_channels": 64},
    ),
    "128x128_diffusion": ("unet", ADM | {"image_size": 128, "num_channels": 256, "num_heads": 4}),
    "256x256_diffusion": ("unet", ADM | {"image_size": 256, "num_channels": 256, "num_head_channels": 64}),
    "256x256_diffusion_uncond": (
        "unet",
        ADM | {"image_size": 256, "num_channels": 256, "num_head_channels": 64, "class_cond": False},
    ),
    "512x512_diffusion": ("unet", ADM | {"image_size": 512, "num_channels": 256, "num_head_channels": 64}),
    "image_train_defaults_64": ("unet", {}),
    "image_train_defaults_64_learn_sigma_cc": ("unet", {"learn_sigma": True, "class_cond": True}),
    "image_256_no_resblock_updown": (
        "unet",
        {"image_size": 256},
    ),
    "64_256_upsampler": ("sr", ADM | {"large_size": 256, "small_size": 64, "num_channels": 192, "num_heads": 4}),
    "128_512_upsampler": (
        "sr",
        ADM
        | {
            "large_size": 512,
            "small_size": 128,
            "num_channels": 192,
            "num_head_channels": 64,
            "attention_resolutions": "32,16",
        },
    ),
    "64x64_classifier": ("classifier", {"image_size": 64, "classifier_depth": 4}),
    "128x128_classifier": ("classifier", {"image_size": 128}),
    "256x256_classifier": ("classifier", {"image_size": 256}),
    "512x512_classifier": ("classifier", {"image_size": 512}),
    "classifier_default_64": ("classifier", {}),
    "classifier_64_adaptive": ("classifier", {"classifier_pool": "adaptive"}),
    "classifier_64_spatial": ("classifier", {"classifier_pool": "spatial"}),
    "classifier_64_spatial_v2": ("classifier", {"classifier_pool": "spatial_v2"}),
}
COUNTS = {
    "64x64_diffusion": (541, 295_904_454),
    "128x128_diffusion": (493, 421_529_606),
    "256x256_diffusion": (567, 553_838_086),
    "256x256_diffusion_uncond": (566, 552_814_086),
    "512x512_diffusion": (645, 558_997_638),
    "64_256_upsampler": (567, 311_795_910),
    "128_512_upsampler": (537, 308_835_270),
    "64x64_classifier": (307, 65_438_568),
    "128x128_classifier": (221, 42_568_040),
    "256x256_classifier": (249, 54_096_360),
    "512x512_classifier": (281, 54_448_360),
}


def build(kind, flags):
    with th.device("meta"):
        if kind == "classifier":
            return script_util.create_classifier(**{**script_util.classifier_defaults(), **flags})
        if kind == "sr":
            defaults = script_util.sr_model_and_diffusion_defaults()
            return script_util.sr_create_model_and_diffusion(**{**defaults, **flags})[0]
        return script_util.create_model_and_diffusion(**{**DEFAULTS, **flags})[0]


@pytest.mark.parametrize("name", LISTS)
def test_keys_shapes_and_order_are_upstreams(name):
    lines = [
        line for line in (GOLDEN / "adm_keys" / f"{name}.txt").read_text().splitlines() if not line.startswith("#")
    ]
    model = build(*LISTS[name])
    ours = [f"{key} {shape_text(value)}" for key, value in model.state_dict().items()]
    assert [normal(line) for line in ours] == [normal(line) for line in lines if line.strip()]
    assert [key for key, _ in model.named_parameters()] == list(model.state_dict())
    if name in COUNTS:
        count, params = COUNTS[name]
        assert (len(ours), sum(p.numel() for p in model.parameters())) == (count, params)


def shape_text(value):
    return "x".join(map(str, value.shape))


def normal(line):
    """A key and its numbers, however the list writes a shape."""
    key, _, shape = line.strip().partition(" ")
    return key, tuple(int(word) for word in "".join(c if c.isdigit() else " " for c in shape).split())


def test_all_lists_are_tested():
    assert {path.stem for path in Path(GOLDEN / "adm_keys").iterdir()} == set(LISTS)


@pytest.mark.parametrize("name", golden("adm_official_state_dicts.json"))
def test_official_checkpoints_would_load(name):
    entry = golden("adm_official_state_dicts.json")[name]
    args = entry["args"]
    kind = "classifier" if "classifier_width" in args else "sr" if "large_size" in args else "unet"
    ours = {key: list(value.shape) for key, value in build(kind, args).state_dict().items()}
    assert ours == {key: list(shape) for key, shape in entry["state_dict"].items()}


@pytest.mark.parametrize("name", ["default", "legacy_attention_plain_norm", "new_attention_resblock_updown", "classes"])
def test_outputs_are_upstreams(name):
    entry, data = golden("adm_unet_args.json")[name], golden(f"adm_unet_{name}.npz")
    model = UNetModel(**entry["args"]).eval()
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == {
        k: list(v) for k, v in entry["state_dict"].items()
    }
    fill_by_name(model, int(data["seed_weights"]))
    y = th.from_numpy(data["y"]) if "y" in data else None
    with th.no_grad():
        out = model(th.from_numpy(data["x"]), th.from_numpy(data["t"]), y)
    np.testing.assert_allclose(out, data["out"], rtol=1e-5, atol=1e-5)


def test_the_encoders_output_is_upstreams():
    data, shapes = (
        golden("adm_encoder_unet_attention.npz"),
        golden("adm_unet_args.json")["encoder_attention"]["state_dict"],
    )
    wanted = {key: tuple(shape) for key, shape in shapes.items()}
    heads = [(c, u, s) for c in (8, 16, 32, 64) for u in (False, True) for s in (False, True)]
    for channels, updown, scale_shift in heads:
        try:
            model = EncoderUNetModel(
                image_size=16,
                in_channels=4,
                model_channels=wanted["time_embed.0.weight"][1],
                out_channels=31,
                num_res_blocks=flags_of_encoder(wanted),
                attention_resolutions=(2,),
                channel_mult=(1, 2),
                num_head_channels=channels,
                resblock_updown=updown,
                use_scale_shift_norm=scale_shift,
                pool="attention",
            ).eval()
        except ValueError:
            continue
        if {key: tuple(value.shape) for key, value in model.state_dict().items()} != wanted:
            continue
        fill_by_name(model, int(data["seed_weights"]))
        with th.no_grad():
            out = model(th.from_numpy(data["x"]), th.from_numpy(data["t"]))
        if np.allclose(out, data["out"], rtol=1e-5, atol=1e-5):
            return
    pytest.fail("no width of heads gives upstream's output")


def flags_of_encoder(shapes):
    """Residual blocks a level: input blocks before the first that resizes."""
    count = 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("input_blocks."))
    return (count + 1) // 2 - 1


@pytest.mark.parametrize("name", golden("adm_golden.json")["models"])
def test_tiny_models_are_upstreams(name):
    """The second set of numbers: weights and inputs filled by a formula."""
    entry = golden("adm_golden.json")["models"][name]
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.get("cfg", {}).items()}
    x = wave(0.11, (2, config.get("in_channels", 3), *[config.get("image_size", 16)] * 2))
    options = {"y": th.tensor([1, 7])} if config.get("num_classes") else {}
    if name == "superres":
        model = SuperResModel(**TINY, out_channels=6, num_classes=10, num_heads=2)
        options = {"y": th.tensor([1, 7]), "low_res": wave(0.2, (2, 3, 4, 4))}
    elif name.startswith("enc_"):
        norms = {"use_scale_shift_norm": True, "resblock_updown": True, "num_head_channels": 16}
        model = EncoderUNetModel(**TINY, **norms, out_channels=10, pool=name.removeprefix("enc_"))
    else:
        model = UNetModel(**config)
    assert len(model.state_dict()) == entry["keys"]
    for i, (key, param) in enumerate(model.named_parameters()):
        values = 0.05 * np.sin(0.37 * np.arange(param.numel()) + i)
        values = values + (1 if param.ndim == 1 and key.endswith("weight") else 0)
        param.data.copy_(th.from_numpy(values).float().view(param.shape))
    with th.no_grad():
        flat = model.eval()(x, th.tensor([0, 437]), **options).double().flatten()
    wanted = entry["out"]
    assert len(flat) == wanted["n"]
    np.testing.assert_allclose(flat[:8], wanted["first8"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose([flat.sum(), flat.abs().sum()], [wanted["sum"], wanted["abssum"]], rtol=1e-4, atol=1e-3)


TINY = {"image_size": 16, "in_channels": 3, "model_channels": 32, "num_res_blocks": 1, "attention_resolutions": (2,)}
TINY |= {"channel_mult": (1, 2)}


def wave(rate, shape):
    return th.from_numpy(np.cos(rate * np.arange(np.prod(shape)))).float().view(*shape)


# ---- attention, checkpointing, half precision ------------------------------------------------------------------------


def test_the_two_layouts_of_attention_are_a_permutation():
    heads, d, length = 3, 8, 10
    qkv = th.randn(2, 3 * heads * d, length)
    rows = th.arange(3 * heads * d).view(heads, 3, d).transpose(0, 1).flatten()
    assert th.allclose(QKVAttentionLegacy(heads)(qkv), QKVAttention(heads)(qkv[:, rows]), atol=1e-6)


def test_attention_is_softmax_of_scaled_products():
    q, k, v = th.randn(3, 1, 4, 6)
    weights = th.softmax(q[0].T @ k[0] / 2, dim=-1)
    got = QKVAttention(1)(th.cat([q, k, v], dim=1))
    np.testing.assert_allclose(got[0], (weights @ v[0].T).T, atol=1e-6)


def small(**flags):
    th.manual_seed(0)
    model = UNetModel(8, 4, 32, 4, 1, (1, 2), channel_mult=(1, 2), num_heads=2, **flags)
    for param in model.parameters():  # zero-initialised layers would hide everything behind them
        param.data.add_(th.randn_like(param) * 0.02)
    return model


def test_checkpointing_changes_neither_output_nor_gradient():
    """Dropout included: upstream's is off by half the gradient."""
    found = []
    for flag in (False, True):
        model = small(dropout=0.5, use_checkpoint=flag)
        th.manual_seed(1)
        out = model(th.ones(2, 4, 8, 8), th.tensor([3, 5]))
        out.square().mean().backward()
        found.append([out, *(p.grad for p in model.parameters())])
    assert all(th.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_frozen_network_still_has_a_gradient_for_its_input():
    model = small(use_checkpoint=True).requires_grad_(False)
    x = th.ones(1, 4, 8, 8, requires_grad=True)
    model(x, th.tensor([3])).sum().backward()
    assert x.grad.abs().sum() > 0


def test_half_precision_touches_the_convolutions_of_the_torso_only():
    model = small(use_fp16=True)
    model.convert_to_fp16()
    half = {name for name, param in model.named_parameters() if param.dtype == th.float16}
    convolutions = {
        f"{name}.{kind}"
        for name, module in model.named_modules()
        for kind in ("weight", "bias")
        if isinstance(module, (th.nn.Conv1d, th.nn.Conv2d)) and not name.startswith("out.")
    }
    assert half == convolutions
    model.convert_to_fp32()
    assert all(param.dtype == th.float32 for param in model.parameters())


# ---- flags from weights, and errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("updown", [False, True])
@pytest.mark.parametrize("mult, blocks", [("1,2", 1), ("1,2,2", 2), ("0.5,1,3", 3)])
def test_flags_are_read_off_the_weights(updown, mult, blocks):
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
    state = build("unet", given).state_dict()
    found = flags_of(state)
    assert {key: found[key] for key in given if key in found} == {k: v for k, v in given.items() if k in found}
    assert set(given) - set(found) == {"image_size"}


def test_a_checkpoint_of_another_shape_names_the_flags_that_fit():
    made = {"image_size": 64, "num_channels": 64, "channel_mult": "1,2", "learn_sigma": True}
    state = {k: th.zeros(v.shape) for k, v in build("unet", made).state_dict().items()}
    given = {**DEFAULTS, "image_size": 64, "num_channels": 32, "channel_mult": "1,2"}
    model = build("unet", given)
    with pytest.raises(UserError) as error:
        load_weights(model, state, path="m.pt", given=given)
    message = str(error.value)
    assert "m.pt" in message and "give --num_channels 64, --learn_sigma True" in message and "\n" not in message


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"num_channels": 40}, "40 channels.*--num_channels"),
        ({"image_size": 32, "channel_mult": "1,1,1,1,1,1,1"}, "--channel_mult may have 6 entries"),
        ({"image_size": 48}, "unsupported image size: 48.*--channel_mult"),
        ({"num_heads": 3}, "--num_heads 3 does not divide"),
        ({"num_head_channels": 48}, "--num_head_channels 48 does not divide"),
        ({"channel_mult": "1,x"}, "--channel_mult is '1,x'"),
        ({"attention_resolutions": "16,a"}, "--attention_resolutions is '16,a'"),
    ],
)
def test_a_network_that_cannot_be_is_one_line(flags, words):
    with pytest.raises(ValueError, match=words) as error:
        build("unet", flags)
    assert "\n" not in str(error.value)


def test_a_size_that_cannot_be_halved_is_one_line():
    with pytest.raises(ValueError, match="sees 6 x 7.*--image_size"):
        small()(th.zeros(1, 4, 6, 7), th.tensor([0]))


def test_defaults_are_upstreams_in_order():
    wanted = golden("adm_flags.json")
    for name, ours in (
        ("model_and_diffusion", script_util.model_and_diffusion_defaults()),
        ("classifier_and_diffusion", script_util.classifier_and_diffusion_defaults()),
        ("sr", script_util.sr_model_and_diffusion_defaults()),
    ):
        assert list(ours.items()) == list(wanted[name].items())
