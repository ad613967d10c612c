"""Memory and time of a run before it starts, against published figures, closed forms and real tensors."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch as th

from guided_diffusion_vae import dist_util, sharding
from guided_diffusion_vae import estimate as module
from guided_diffusion_vae.dit import LightningDiT, create_dit
from guided_diffusion_vae.estimate import activation_bytes, estimate, forward_flops, matmul_rate, saved_bytes
from guided_diffusion_vae.fp16_util import MixedPrecisionTrainer
from guided_diffusion_vae.unet import UNetModel

CPU, GPU = th.device("cpu"), th.device("cuda")
LIGHTNING = dict(use_swiglu=True, use_rope=True, use_rmsnorm=True)
LATENT = (4, 16, 16)
TERA = 1e12


@pytest.fixture
def one_teraflop(monkeypatch):
    """A machine whose speed is known."""
    monkeypatch.setattr(module, "matmul_rate", lambda *args: TERA)


def unet(device="meta", **kwargs):
    settings = dict(num_res_blocks=1, attention_resolutions=(1, 2), channel_mult=(1, 2), num_classes=5)
    with th.device(device):
        return UNetModel(16, 4, 32, 4, **{**settings, "num_heads": 2, "use_scale_shift_norm": True, **kwargs})


def dit(device="meta", name="LightningDiT-S/1", channels=4, **kwargs):
    with th.device(device):
        return create_dit(name, input_size=16, in_channels=channels, **LIGHTNING, **kwargs)


def small_dit(device="meta", **kwargs):
    with th.device(device):
        return LightningDiT(16, 1, 4, hidden_size=48, depth=2, num_heads=3, num_classes=5, **LIGHTNING, **kwargs)


def of(model, shape=LATENT, **kwargs):
    settings = dict(batch_size=8, microbatch=-1, num_emas=1, steps=1000, classes=5, device="cpu")
    return estimate(model, shape, **{**settings, **kwargs})


def batch(n, device="cpu", classes=5):
    with th.device(device):
        return th.zeros(n, *LATENT), th.zeros(n), th.zeros(n).long() if classes else None


# ---- published figures


@pytest.mark.parametrize(
    "name, millions, gmacs, gigabytes",
    [("LightningDiT-XL/1", 675.257, 118.4, 13.5), ("LightningDiT-B/1", 130.556, 23.0, 2.6)],
)
def test_the_published_sizes(one_teraflop, name, millions, gmacs, gigabytes):
    """Latents 32 x 16 x 16, 1000 classes, float32 with one average."""
    found = of(dit(name=name, channels=32), (32, 16, 16), classes=1000)
    assert round(found.parameters / 1e6, 3) == millions
    assert found.macs / 1e9 == pytest.approx(gmacs, rel=0.01)
    assert found.state_bytes / 1e9 == pytest.approx(gigabytes, rel=0.01)


# ---- closed forms


def test_a_convolution_and_a_product_are_counted():
    """3 x 3 x 4 x 8 multiply-adds at 16 x 16 places, then 8 x 10 at each."""

    class Net(th.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = th.nn.Conv2d(4, 8, 3, padding=1), th.nn.Linear(8, 10)

        def forward(self, x, t, y):
            return self.linear(self.conv(x).movedim(1, -1))

    with th.device("meta"):
        assert forward_flops(Net(), LATENT, None) == 2 * 256 * (3 * 3 * 4 * 8 + 8 * 10)


def test_attention_is_counted():
    """One more block of a transformer: qkv, proj, SwiGLU and modulation, and 2 L^2 d of attention."""
    d, tokens = 48, 64
    sizes = dict(input_size=8, patch_size=1, in_channels=4, hidden_size=d, num_heads=3, num_classes=5, **LIGHTNING)
    with th.device("meta"):
        one, two = (forward_flops(LightningDiT(depth=n, **sizes), (4, 8, 8), 5) for n in (1, 2))
    hidden = 2 * 4 * d // 3
    assert (two - one) / 2 == tokens * d * (3 * d + d + 3 * hidden) + 6 * d * d + 2 * tokens**2 * d


@pytest.mark.parametrize("num_emas", [0, 1, 3])
def test_state_in_float32(one_teraflop, num_emas):
    """Weight, gradient, two moments and the averages, 4 bytes each; the fixed positions have no gradient."""
    model = unet()
    count = sum(param.numel() for param in model.parameters())
    assert of(model, num_emas=num_emas).state_bytes == 4 * count * (4 + num_emas)
    assert of(model, num_emas=num_emas, processes=2).state_bytes == 4 * count * (5 + num_emas)  # DDP's buckets
    transformer = dit()
    count, fixed = sum(param.numel() for param in transformer.parameters()), transformer.pos_embed.numel()
    assert of(transformer, num_emas=num_emas).state_bytes == 4 * (count * (4 + num_emas) - 3 * fixed)


@pytest.mark.parametrize("make", [unet, dit])
def test_state_in_half_precision_is_the_trainers(one_teraflop, make):
    """Weights, masters, both gradients, both moments and an average, counted on the real objects after a step."""
    model = make("cpu")
    trainer = MixedPrecisionTrainer(model=model, use_fp16=True)
    opt = th.optim.AdamW(trainer.master_params)
    for param in [*model.parameters(), *trainer.master_params]:
        param.grad = th.zeros_like(param) if param.requires_grad else None
    opt.step()
    moments = [value for state in opt.state.values() for value in state.values() if value.ndim]
    gradients = [p.grad for p in [*model.parameters(), *trainer.master_params] if p.grad is not None]
    averages = [param.detach().clone() for param in trainer.master_params]
    real = [*model.parameters(), *trainer.master_params, *gradients, *moments, *averages]
    assert of(make(), half=True).state_bytes == sum(tensor.numel() * tensor.element_size() for tensor in real)


def work(out):
    """What each of two processes does: one step of a network of each kind whose tensors are shared out, and count."""
    dist_util.setup_dist()
    seen = {}
    for make in (unet, small_dit):
        model = make("cpu")
        sharding.create_sharding("fsdp2").place(model)
        params = list(model.parameters())
        opt = th.optim.AdamW(params)
        for param in params:
            param.grad = th.zeros_like(param) if param.requires_grad else None
        opt.step()
        moments = [value for state in opt.state.values() for value in state.values() if value.ndim]
        gradients = [param.grad for param in params if param.grad is not None]
        averages = [param.detach().clone() for param in params] * 2
        shares = [tensor.to_local() for tensor in [*params, *gradients, *moments, *averages]]
        seen[make.__name__] = sum(share.numel() * share.element_size() for share in shares)
    (Path(out) / f"{dist_util.rank()}.json").write_text(json.dumps(seen))


def test_shares_are_those_of_two_processes(one_teraflop, tmp_path):
    """What the first holds is told, and no process holds more; not all first dimensions are even."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = f"from test_estimate import dist_util, work; dist_util.run_main(lambda: work({str(tmp_path)!r}))"
    command = ["mpiexec", "-n", "2", sys.executable, "-c", program]
    env, here = {**os.environ, "PATH": path}, Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=here)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for make in (unet, small_dit):
        found = of(make(), num_emas=2, processes=2, sharded=True)
        assert found.state_bytes == first[make.__name__] >= second[make.__name__]
        assert found.state_bytes < 0.6 * of(make(), num_emas=2).state_bytes
    assert "weights, gradients, Adam and 2 averages, of each 1 / 2 by --sharding fsdp2 + about" in str(found)


def test_time_is_work_by_rate(one_teraflop):
    model = unet()
    flops = 2 * of(model).macs
    work = flops * 3 * 1000 * 8
    assert of(model).seconds == pytest.approx(work / (TERA * module.EFFICIENCY))
    assert of(model, recompute=True).seconds == pytest.approx(4 / 3 * of(model).seconds)
    assert of(model, processes=4).seconds == of(model).seconds  # each does its own images
    assert of(model, processes=4).images == 32


def test_the_rate_is_that_of_a_product(monkeypatch):
    """A clock that says how long each took: half a second, for the largest of the sizes tried."""
    seen = []
    monkeypatch.setattr(module, "_time", lambda a: seen.append(len(a)) or 0.5)
    assert matmul_rate(CPU) == 2 * 512**3 / 0.5 and set(seen) == {512}


def test_the_rate_of_this_machine_is_repeatable():
    begin = time.perf_counter()
    rates = [matmul_rate(CPU) for _ in range(2)]
    assert time.perf_counter() - begin < 20
    assert 1 / 4 < rates[0] / rates[1] < 4  # other programs may run


# ---- activations against real tensors


NETWORKS = [
    (unet, {}),
    (unet, {"num_classes": None}),
    (unet, {"dropout": 0.1}),
    (unet, {"resblock_updown": True, "use_new_attention_order": True}),
    (unet, {"channel_mult": (1, 2, 2), "attention_resolutions": (4,), "conv_resample": False}),
    (small_dit, {}),
    (small_dit, {"use_qknorm": True, "wo_shift": True}),
]


@pytest.mark.parametrize("make, kwargs", NETWORKS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("images", [1, 4])
def test_activations_are_those_of_real_tensors(one_teraflop, make, kwargs, recompute, images):
    """Bytes told on the meta device from two and three images, and those of real ones on the CPU.

    Equal for a batch; a single image is copied more or less often.
    """
    classes = 0 if kwargs.get("num_classes", 5) is None else 5
    told = of(make(**kwargs), batch_size=images, classes=classes, recompute=recompute).activation_bytes
    real = kept_by(make("cpu", **kwargs), images, classes, recompute)
    assert told == real if images > 1 else told == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("make", [unet, small_dit])
def test_activations_in_half_precision_are_those_of_real_tensors(one_teraflop, make):
    real = make("cpu", **({"use_fp16": True} if make is unet else {}))
    real.convert_to_fp16()
    assert of(make(), batch_size=2, half=True).activation_bytes == kept_by(real, 2, 5, False)


@pytest.mark.parametrize("make, kwargs", NETWORKS[1:3] + NETWORKS[5:])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_in_bfloat16_are_those_of_real_tensors(one_teraflop, make, kwargs, recompute):
    """autocast's copies and what it leaves in float32 are counted, while weights and all that stays are as without."""
    classes = 0 if kwargs.get("num_classes", 5) is None else 5
    options = {"batch_size": 4, "classes": classes, "recompute": recompute}
    told = of(make(**kwargs), bf16=True, **options)
    with th.autocast("cpu", th.bfloat16):
        assert told.activation_bytes == kept_by(make("cpu", **kwargs), 4, classes, recompute)
    assert told.state_bytes == of(make(**kwargs), **options).state_bytes


def test_bfloat16_is_timed_in_bfloat16(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "_time", lambda a: seen.append(a.dtype) or 0.5)
    for kwargs, dtype in (({}, th.float32), ({"bf16": True}, th.bfloat16), ({"half": True}, th.float16)):
        of(unet(), **kwargs)
        assert set(seen) == {dtype}
        seen.clear()


def kept_by(real, images, classes, recompute):
    """What a real forward pass on the CPU saves, and with `recompute` the largest block beside it."""
    real.train()
    _, largest = saved_bytes(real, batch(images, classes=classes), CPU)
    module._recompute(real, recompute)
    return saved_bytes(real, batch(images, classes=classes), CPU)[0] + (largest if recompute else 0)


def test_what_is_saved_is_counted_once():
    """exp keeps its result, a square its argument: one tensor, of 4 bytes a number; a weight is not counted."""

    class Net(th.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = th.nn.Parameter(th.ones(1))

        def forward(self, x, t, y):
            h = (x + self.weight).exp()
            return h.square() + h.sin()

    assert saved_bytes(Net(), batch(3), CPU)[0] == 3 * 4 * 256 * 4


def test_recomputing_keeps_less_and_a_gpu_no_matrix_of_pairs(one_teraflop):
    model = unet(attention_resolutions=(2,))
    cpu, gpu = (activation_bytes(model, LATENT, 5, 1, recompute=False, device=device) for device in (CPU, GPU))
    layers = sum(isinstance(part, module.AttentionBlock) for part in model.input_blocks.modules())
    assert cpu - gpu >= layers * 2 * 64**2 * 4  # 2 heads of 64 x 64 pairs in each
    assert of(model, recompute=True).activation_bytes < of(model).activation_bytes / 2


def test_a_microbatch_is_what_is_kept(one_teraflop):
    whole = of(unet()).activation_bytes
    assert of(unet(), microbatch=4).activation_bytes == pytest.approx(whole / 2, rel=0.02)  # all but what is of weights
    assert of(unet(), microbatch=64).activation_bytes == whole and of(unet(), microbatch=64).microbatch == 8


# ---- the model stays, the lines


@pytest.mark.parametrize("make", [unet, dit])
def test_the_model_is_left_as_it_is(one_teraflop, make):
    model = make().eval()
    before = {name: (param.dtype, param.grad) for name, param in model.named_parameters()}
    of(model, half=True, recompute=True)
    assert {name: (param.dtype, param.grad) for name, param in model.named_parameters()} == before
    assert not model.training and getattr(model, "dtype", th.float32) == th.float32
    assert not any(getattr(part, "use_checkpoint", False) for part in model.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_random_numbers_are_not_drawn(one_teraflop):
    """A dry run or not: the run that follows draws the same."""
    before = th.get_rng_state()
    of(dit(), recompute=True)
    assert th.equal(before, th.get_rng_state())


def test_the_lines(one_teraflop, monkeypatch):
    monkeypatch.setattr(module, "_memory_of", lambda device: 40e9)
    shape = (32, 16, 16)
    found = of(dit(name="LightningDiT-XL/1", channels=32), shape, batch_size=256, microbatch=8, steps=80000)
    network, memory, duration = str(found).splitlines()
    assert network == "network: 675.26 M parameters, 118.6 GMAC an image"
    assert re.fullmatch(
        r"memory a process: 13\.5 GB weights, gradients, Adam and 1 average \+ about \S+ GB activations at 8 images",
        memory,
    )
    days = 80000 * 256 * 3 * 2 * found.macs / (TERA * module.EFFICIENCY) / 86400
    assert duration == (
        f"time: 80000 steps of 256 images on 1 process: about {round(days, -1):.0f} days at 1 TFLOP/s, measured"
        f" on this machine by a matrix product, {module.EFFICIENCY * 100:.0f} % of which a network reaches"
    )


def test_more_than_the_device_has_is_said(one_teraflop, monkeypatch):
    monkeypatch.setattr(module, "_memory_of", lambda device: 10e6)
    assert str(of(unet())).splitlines()[3].startswith("that is more than the 10 MB of this device: give a smaller")
    monkeypatch.setattr(module, "_memory_of", lambda device: None)
    assert len(str(of(unet())).splitlines()) == 3


def test_a_run_without_an_end(one_teraflop):
    found = of(unet(), steps=0, processes=2, num_emas=2)
    assert "time: no last step, and 1000 steps of 16 images on 2 processes: about" in str(found)
    assert "gradients and their copy for the other processes, Adam and 2 averages" in str(found)
    assert found.seconds == of(unet(), steps=1000).seconds


def test_epochs_have_no_known_number_of_steps(one_teraflop):
    assert "time: 3 epochs of data that are not read yet, and 1000 steps of 8" in str(of(unet(), steps=0, epochs=3))
    assert "time: 70 steps (or 1 epoch, if that is less) of 8 images" in str(of(unet(), steps=70, epochs=1))
    assert of(unet(), steps=0, epochs=3).seconds == of(unet(), steps=1000).seconds


@pytest.mark.parametrize(
    "seconds, text",
    [(5, "5 s"), (130, "2.2 min"), (7200, "2 h"), (250e3, "69 h"), (864e3, "10 days"), (4e8, "4600 days")],
)
def test_durations(seconds, text):
    assert module.duration(seconds) == text


@pytest.mark.parametrize(
    "value, text",
    [(1.2e3, "1.2 k"), (675_257_000, "675 M"), (999_700, "1 M"), (13.505e9, "13.5 G"), (7, "7 "), (123_456, "123 k")],
)
def test_numbers(value, text):
    assert module._short(value) == text
