"""A network's flags read off its weights, for both families, and the weights found in others' checkpoints."""

import re

import pytest
import torch as th

from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.dit import SIZES, LightningDiT, create_dit
from guided_diffusion_vae.model_flags import dit_flags_of, flags_of, load_weights, network_weights
from guided_diffusion_vae.script_util import create_model

OPTIONS = ("use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm", "wo_shift", "learn_sigma")
OFF = dict.fromkeys(OPTIONS, False)
LIGHTNING = OFF | dict(use_swiglu=True, use_rope=True, use_rmsnorm=True)
S1 = {"network": "dit", "model_type": "LightningDiT-S/1", "class_cond": True, "class_dropout_prob": 0.1} | LIGHTNING
UNET = {
    **dict(network="unet", num_channels=32, num_res_blocks=1, channel_mult="1,2", class_cond=True, learn_sigma=False),
    **dict(resblock_updown=False, use_scale_shift_norm=True, attention_resolutions="8", class_dropout_prob=0.0),
}


def dit(model_type="LightningDiT-S/1", size=8, channels=4, classes=5, class_dropout_prob=0.1, **options):
    """A network without memory, with LightningDiT's options unless told."""
    with th.device("meta"):
        return create_dit(
            model_type,
            input_size=size,
            in_channels=channels,
            num_classes=classes,
            class_dropout_prob=class_dropout_prob,
            **LIGHTNING | options,
        )


def unet(size=16, channels=4, classes=5, **flags):
    """A U-Net without memory."""
    known = {name: value for name, value in (UNET | flags).items() if name not in ("network", "class_dropout_prob")}
    with th.device("meta"):
        return create_model(size, in_channels=channels, num_classes=classes, **known)


def shapes(model):
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def refusal(made, model, given):
    with pytest.raises(UserError) as error:
        load_weights(model, made.state_dict(), path="m.pt", given=given)
    message = str(error.value)
    assert message.startswith("m.pt is a network of another shape (") and "\n" not in message
    return message.partition("differ): ")[2]


# ---- reading a transformer


@pytest.mark.parametrize("name", SIZES)
def test_every_named_size_is_recognised(name):
    found = dit_flags_of(dit(name).state_dict())
    assert found["model_type"] == name
    assert {key: found[key] for key in SIZES[name]} == SIZES[name]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("base", [OFF, LIGHTNING], ids=["dit", "lightning"])
def test_every_option_is_seen_alone(name, base):
    wanted = base | {name: not base[name]}
    found = dit_flags_of(dit(**wanted).state_dict())
    assert {key: found[key] for key in OPTIONS} == wanted


@pytest.mark.parametrize("patch, size, channels", [(1, 8, 4), (2, 16, 32)])
@pytest.mark.parametrize("drop, rows", [(0.0, 31), (0.1, 32)])
def test_latents_and_labels_are_seen(patch, size, channels, drop, rows):
    made = dit(f"LightningDiT-B/{patch}", size, channels, 31, class_dropout_prob=drop)
    found = dit_flags_of(made.state_dict())
    assert (found["in_channels"], found["input_size"], found["label_rows"]) == (channels, size, rows)
    assert found["class_cond"]


@pytest.mark.parametrize(
    "options", [{"use_rope": True}, {"use_qknorm": True}, {"use_qknorm": True, "use_rmsnorm": True}]
)
def test_heads_are_seen_in_rotations_and_norms(options):
    with th.device("meta"):
        model = LightningDiT(8, 1, 4, hidden_size=192, depth=6, num_heads=6, num_classes=5, **options)
        blind = LightningDiT(8, 1, 4, hidden_size=192, depth=6, num_heads=6, num_classes=5)
    assert dit_flags_of(model.state_dict())["num_heads"] == 6
    assert dit_flags_of(blind.state_dict())["num_heads"] == 3  # the table's


@pytest.mark.parametrize("depth, width, patch, name", [(24, 1024, 1, "L/2"), (28, 1152, 4, "XL/1"), (5, 160, 1, "S/1")])
def test_the_nearest_name(depth, width, patch, name):
    with th.device("meta"):
        model = LightningDiT(8, patch, 4, hidden_size=width, depth=depth, num_heads=4, num_classes=5)
    found = dit_flags_of(model.state_dict())
    assert found["model_type"] == f"LightningDiT-{name}"
    assert (found["depth"], found["hidden_size"], found["patch_size"]) == (depth, width, patch)


def test_the_families_are_not_confused():
    assert dit_flags_of(unet().state_dict()) == {} and flags_of(dit().state_dict()) == {}
    assert dit_flags_of({}) == {} and dit_flags_of({"weight": th.zeros(3)}) == {}


# ---- the flags that would fit


@pytest.mark.parametrize(
    "changed",
    [
        *({name: not LIGHTNING[name]} for name in OPTIONS),
        {"model_type": "LightningDiT-B/2"},
        {"model_type": "LightningDiT-B/1", "use_qknorm": True, "wo_shift": True, "use_rope": False},
    ],
    ids=lambda changed: ",".join(changed),
)
def test_a_transformer_of_another_shape_names_exactly_the_flags_that_differ(changed):
    advice = refusal(dit(**changed), dit(), S1)
    found = dict(re.findall(r"--(\w+) ([^\s,]+)", advice))
    assert found == {name: str(value) for name, value in changed.items()}


def test_a_transformer_given_to_a_unet():
    advice = refusal(dit("LightningDiT-B/1", 16, use_qknorm=True), unet(), UNET | OFF | {"model_type": "x"})
    assert advice == (
        "give --network dit, --model_type LightningDiT-B/1, --use_qknorm True, --use_swiglu True, --use_rope True,"
        " --use_rmsnorm True, --class_dropout_prob 0.1, or data with 6 classes, for so many it was trained on"
    )


def test_a_unet_given_to_a_transformer():
    advice = refusal(unet(num_channels=64), dit(size=16, class_dropout_prob=0.0), UNET | S1)
    assert advice == "give --network unet, --num_channels 64"


def test_the_attention_of_a_unet_is_told_in_the_sizes_of_the_transformers_latents():
    advice = refusal(unet(attention_resolutions="16"), dit(size=16, class_dropout_prob=0.0), UNET | S1)
    assert advice == "give --network unet, --attention_resolutions 16"


def test_other_latents_are_the_autoencoders_matter():
    wanted = "give the --vae_path and --image_size that make latents of 32 x 16 x 16"
    assert refusal(dit(size=16, channels=32), dit(), S1) == wanted
    assert refusal(dit(size=16, channels=32), dit(size=16), S1) == wanted
    assert refusal(unet(channels=16), unet(), UNET) == "give the --vae_path that makes latents of 16 channels"


@pytest.mark.parametrize(
    "made, mine, advice",
    [
        ((31, 0.1), (5, 0.1), "data with 31 classes, for so many it was trained on"),
        ((31, 0.0), (5, 0.0), "data with 31 classes, for so many it was trained on"),
        ((31, 0.1), (31, 0.0), "--class_dropout_prob 0.1, or data with 32 classes, for so many it was trained on"),
        ((31, 0.0), (31, 0.1), "--class_dropout_prob 0, or data with 30 classes, for so many it was trained on"),
    ],
)
def test_rows_of_labels(made, mine, advice):
    made, mine = (dit(classes=n, class_dropout_prob=drop) for n, drop in (made, mine))
    assert refusal(made, mine, S1) == f"give {advice}"


def test_a_size_without_a_name_is_said_to_have_none():
    with th.device("meta"):
        model = LightningDiT(8, 2, 4, hidden_size=384, depth=12, num_heads=6, num_classes=5)  # DiT-S/2
    assert re.fullmatch(
        r"it has depth 12, hidden_size 384, num_heads \d+, patch_size 2, which no --model_type has;"
        r" the nearest is LightningDiT-B/2",
        refusal(model, dit(), S1),
    )


def test_what_is_no_network_is_said_to_be_none():
    with pytest.raises(UserError, match="it is not a LightningDiT of this kind$"):
        load_weights(dit(), {"weight": th.zeros(3)}, path="m.pt", given=S1)


def test_weights_that_fit_are_loaded():
    sizes = dict(input_size=4, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=5)
    source, target = LightningDiT(**sizes), LightningDiT(**sizes)
    for param in source.parameters():
        param.data.add_(1)
    load_weights(target, source.state_dict(), path="m.pt", given=S1)
    assert all(th.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


# ---- others' checkpoints

BARE = {"x.weight": th.zeros(2), "module": th.ones(1), "submodule.x": th.ones(1)}
AVERAGE = {name: value + 5 for name, value in BARE.items()}
WRAPPED = {f"module.module.{name}": value for name, value in BARE.items()}
OPT = {"state": {}, "param_groups": [{"lr": 1e-4}]}


@pytest.mark.parametrize(
    "loaded, weights",
    [
        (BARE, BARE),
        (WRAPPED, BARE),
        ({"model": WRAPPED, "ema": AVERAGE, "opt": OPT, "config": {"model": {"model_type": "x"}}}, AVERAGE),
        ({"model": WRAPPED, "opt": OPT}, BARE),
        ({"model": WRAPPED, "ema": {}}, BARE),
        ({"model": WRAPPED, "ema": None}, BARE),
        ({"state_dict": WRAPPED, "epoch": 3}, BARE),
    ],
    ids=["bare", "wrapped", "training", "no ema", "empty ema", "ema None", "lightning"],
)
def test_weights_are_found(loaded, weights):
    found = network_weights(loaded)
    assert list(found) == list(weights) and all(th.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    "loaded, words",
    [
        (OPT, "x.pt holds an optimizer's state: give a model"),
        ({}, "x.pt holds no weights: give a model"),
        ({"model": {"lr": 1}}, "x.pt holds no weights"),
        ({"a": th.zeros(1), "b": 3}, "x.pt holds no weights"),
        ([th.zeros(1)], "x.pt holds no weights"),
        (th.zeros(1), "x.pt holds no weights"),
    ],
)
def test_what_holds_no_weights_is_refused(loaded, words):
    with pytest.raises(UserError, match=words) as error:
        network_weights(loaded, path="x.pt")
    assert "\n" not in str(error.value)


def test_a_training_checkpoint_ends_in_the_network():
    sizes = dict(input_size=4, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=5)
    source, target = LightningDiT(**sizes), LightningDiT(**sizes)
    ema = {name: value + 1 for name, value in source.state_dict().items()}
    model = {f"module.{name}": value for name, value in source.state_dict().items()}
    loaded = {"model": model, "ema": ema, "opt": OPT, "config": {}}
    load_weights(target, network_weights(loaded), path="m.pt", given=S1)
    assert all(th.equal(value, ema[name]) for name, value in target.state_dict().items())
