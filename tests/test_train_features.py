"""What the training loop has beyond upstream's: bfloat16, clipping, warm-ups, epochs, label dropout, a best average."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch as th
import torch.nn as nn

from guided_diffusion_vae import checkpoint, dist_util, logger, run_state, stop_signals, train_util, validation
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.data.stream import BatchStream, mix, slot_randn
from guided_diffusion_vae.flow_matching import FlowMatching
from guided_diffusion_vae.script_util import create_gaussian_diffusion
from guided_diffusion_vae.stop_signals import StopSignals
from guided_diffusion_vae.train_util import TrainConfig, TrainLoop
from guided_diffusion_vae.unet import UNetModel


class Net(nn.Module):
    """A linear map of x_t with a bias for each of three labels and for none; notes what it was given."""

    def __init__(self, class_dropout_prob=0.0):
        super().__init__()
        th.manual_seed(0)
        self.class_dropout_prob = class_dropout_prob
        self.map, self.labels = nn.Linear(4, 4), nn.Embedding(4, 4)
        self.drops, self.dtypes = [], []

    def forward(self, x, t, y=None, drop=None):
        self.drops.append(drop)
        out = self.map(x)
        self.dtypes.append(out.dtype)
        if y is not None:
            out = out + self.labels(y if drop is None else th.where(drop, 3, y))
        return out


class Stream:
    """Batches that derive from the step; `fails_at` is the step at which the run is killed."""

    num_samples = 10

    def __init__(self, batch_size=4, labels=True, shape=(4,), fails_at=None):
        self.batch_size, self.labels, self.shape, self.fails_at, self.step = batch_size, labels, shape, fails_at, 0

    def seek(self, step):
        self.step = step

    def __next__(self):
        if self.step == self.fails_at:
            raise KeyboardInterrupt
        self.step += 1
        batch = slot_randn((self.batch_size, *self.shape), seed=7, step=self.step, use=0)
        first = dist_util.rank() * self.batch_size
        return batch, {"y": th.arange(first, first + self.batch_size) % 3} if self.labels else {}


class Times:
    """Uniform on [0, 1]."""

    def sample(self, n, device, rng=np.random):
        return th.from_numpy(rng.uniform(size=n)).float().to(device), th.ones(n, device=device)


class HeldOut:
    """Rows of a stated set, for validation."""

    def __init__(self, count=9):
        self.z = th.from_numpy(np.random.RandomState(1).randn(count, 4)).float()

    def __len__(self):
        return len(self.z)

    def batch(self, indices):
        return self.z[list(indices)], {"y": th.tensor([i % 3 for i in indices])}


def loop(model=None, data=None, diffusion=None, **settings):
    flow = diffusion is None
    standard = {
        "batch_size": 4,
        "microbatch": -1,
        "lr": 0.1,
        "ema_rate": "0.9",
        "log_interval": 1,
        "save_interval": 4,
        "resume_checkpoint": "",
        "seed": 3,
        "schedule_sampler": Times() if flow else None,
    }
    return TrainLoop(
        model=model or Net(),
        diffusion=diffusion or FlowMatching(),
        data=data or Stream(),
        **{**standard, **settings},
    )


@pytest.fixture(autouse=True)
def folder(tmp_path):
    with logger.scoped_configure(str(tmp_path), format_strs=["log", "csv"]):
        yield tmp_path


def log_of(folder):
    return (folder / "log.txt").read_text()


def killed_and_resumed(step, **settings):
    """Run until `step`, lose what was not saved, and go on."""
    with pytest.raises(KeyboardInterrupt):
        loop(data=Stream(fails_at=step), **settings).run_loop()
    return loop(**{**settings, "resume_checkpoint": "auto"})


# ---- precision and the optimizer -------------------------------------------------------------------------------------


def one_step(amp):
    th.manual_seed(0)
    model = UNetModel(8, 4, 32, 8, 1, (2,), channel_mult=(1, 2), num_heads=2)
    for param in model.parameters():
        param.data.add_(0.02 * th.randn_like(param))
    data = Stream(shape=(4, 8, 8), labels=False)
    trained = loop(model, data, create_gaussian_diffusion(learn_sigma=True), amp=amp, lr=1e-4)
    loss = trained.run_step(*next(data))
    return trained, loss


def test_bf16_changes_the_loss_by_its_rounding_and_keeps_all_else_float32():
    (plain, a), (half, b) = one_step("none"), one_step("bf16")
    assert a != b and abs(a - b) < 0.01 * a  # bfloat16 has 8 bits: 2^-8 = 0.4 percent
    assert {p.dtype for p in half.mp_trainer.master_params} == {th.float32}
    assert {p.grad.dtype for p in half.model.parameters()} == {th.float32}
    assert {value.dtype for _, losses in half.unlogged for value in losses.values()} == {th.float32}
    grads = [th.cat([p.grad.flatten() for p in one.model.parameters()]) for one in (plain, half)]
    assert 0 < (grads[1] - grads[0]).norm() < 0.03 * grads[0].norm()


def test_bf16_is_what_the_network_computes_in():
    for amp, dtype in (("none", th.float32), ("bf16", th.bfloat16)):
        trained = loop(amp=amp)
        trained.run_step(*next(trained.data))
        assert trained.model.dtypes == [dtype]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"amp": "fp16"}, "--amp is 'fp16'; choose none, bf16 or auto; --use_fp16 True is the half precision"),
        ({"amp": "half"}, "--amp is 'half'; choose none, bf16 or auto"),
        ({"grad_clip": -1.0}, "--grad_clip is -1.0; it must be 0 or more"),
        ({"warmup_steps": -1}, "--warmup_steps is -1; it must be 0 or more"),
        ({"max_epochs": -1}, "--max_epochs is -1; it must be 0 or more"),
        ({"val_interval": -1}, "--val_interval is -1; it must be 0 or more"),
        ({"adam_betas": "0.9"}, "--adam_betas is '0.9'; give two numbers below 1, such as 0.9,0.999"),
        ({"adam_betas": "0.9,1.0"}, "--adam_betas is '0.9,1.0'; give two numbers below 1"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(settings, words):
    with pytest.raises(UserError) as error:
        TrainConfig(**settings)
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


def test_two_half_precisions_are_refused():
    with pytest.raises(UserError, match="--amp bf16 and --use_fp16 True"):
        loop(amp="bf16", use_fp16=True)


def test_the_gradient_of_a_step_is_clipped():
    """SGD's move is the rate times the gradient, so its length is the rate times the limit."""
    trained = loop(grad_clip=0.01)
    trained.opt = th.optim.SGD(trained.mp_trainer.master_params, lr=1.0)
    before = th.cat([p.detach().flatten().clone() for p in trained.model.parameters()])
    trained.run_step(*next(trained.data))
    moved = th.cat([p.detach().flatten() for p in trained.model.parameters()]) - before
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-4)


def test_betas_reach_the_optimizer_and_the_flag_wins_over_the_checkpoint(folder):
    assert loop(max_steps=1).opt.param_groups[0]["betas"] == (0.9, 0.999)
    first = loop(max_steps=1, adam_betas="0.9,0.95")
    assert first.opt.param_groups[0]["betas"] == (0.9, 0.95)
    first.run_loop()
    same = loop(adam_betas="0.9,0.95", resume_checkpoint="auto")
    assert same.opt.param_groups[0]["betas"] == (0.9, 0.95) and "saved" not in log_of(folder)
    other = loop(adam_betas="0.5,0.9", resume_checkpoint="auto")
    assert other.opt.param_groups[0]["betas"] == (0.5, 0.9)
    assert "--adam_betas: saved (0.9, 0.95) -> given (0.5, 0.9)" in log_of(folder)


def rates_of(trained):
    """The learning rate at each update."""
    rates = []
    trained.opt.register_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
    trained.run_loop()
    return rates


WARM = [0.1 * 1 / 4, 0.1 * 2 / 4, 0.1 * 3 / 4, 0.1, 0.1, 0.1, 0.1, 0.1]
ANNEALED = [1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8]  # upstream sets 1 - n / 8 after update n


@pytest.mark.parametrize("anneal", [0, 8])
def test_warm_up_rates(anneal):
    wanted = [w * a for w, a in zip(WARM, ANNEALED, strict=True)] if anneal else WARM
    assert rates_of(loop(warmup_steps=4, lr_anneal_steps=anneal, max_steps=8)) == pytest.approx(wanted, rel=1e-12)


def test_annealing_alone_is_upstreams():
    assert rates_of(loop(lr_anneal_steps=8)) == [0.1] + [0.1 * (1 - n / 8) for n in range(7)]


@pytest.mark.parametrize("settings", [{"warmup_steps": 6}, {"warmup_steps": 6, "lr_anneal_steps": 9}])
def test_a_resumed_warm_up_has_the_same_rates_bit_for_bit(folder, settings):
    """Saved after steps 0 and 2, killed before step 4: the resumed run repeats updates 3 to 8."""
    settings |= {"max_steps": 9, "save_interval": 2, "ema_warmup": True}
    (folder / "straight").mkdir()
    with logger.scoped_configure(str(folder / "straight"), format_strs=[]):
        straight = loop(**settings)
        wanted = rates_of(straight)
    resumed = killed_and_resumed(4, **settings)
    assert resumed.resume_step == 3 and rates_of(resumed) == wanted[3:]
    assert "--lr: saved" not in log_of(folder)
    for name in ("model000008.pt", "ema_0.9_000008.pt"):
        a, b = checkpoint.load(folder / "straight" / name), checkpoint.load(folder / name)
        assert all(th.equal(a[key], b[key]) for key in a), name


def test_moving_averages_warm_up_as_by_hand():
    trained = loop(ema_rate="0.3,0.9999", ema_warmup=True)
    by_hand = [trained.model.map.bias.detach().clone() for _ in range(2)]
    for n in range(6):
        trained.run_step(*next(trained.data))
        trained.step += 1
        now = trained.model.map.bias.detach()
        rates = [min(rate, (1 + n) / (10 + n)) for rate in (0.3, 0.9999)]  # 0.1, 2/11, 3/12, 4/13 > 0.3, ...
        by_hand = [rate * old + (1 - rate) * now for rate, old in zip(rates, by_hand, strict=True)]
    names = [name for name, _ in trained.model.named_parameters()]
    for params, wanted in zip(trained.ema_params, by_hand, strict=True):
        assert th.allclose(params[names.index("map.bias")], wanted, rtol=1e-6, atol=1e-7)
    assert not th.allclose(*by_hand, rtol=1e-3)


@pytest.mark.parametrize(
    "settings, steps",
    [
        ({"max_epochs": 2}, 5),  # 2 * 10 / 4
        ({"max_epochs": 1}, 3),  # 10 / 4, rounded up
        ({"max_epochs": 2, "max_steps": 4}, 4),
        ({"max_epochs": 2, "lr_anneal_steps": 3}, 3),
        ({"max_epochs": 2, "max_steps": 9, "lr_anneal_steps": 8}, 5),
        ({"max_epochs": 0, "max_steps": 9}, 9),
    ],
)
def test_the_smallest_limit_ends_the_run(folder, settings, steps):
    trained = loop(**settings)
    trained.run_loop()
    assert trained.step == steps == trained.last_step
    assert trained.data.step == steps


def test_the_end_of_the_times_is_in_the_last_quarter():
    train_util.log_loss_dict(FlowMatching(), th.tensor([0.0, 0.25, 0.99, 1.0]), {"loss": th.tensor([1.0, 2, 3, 5])})
    row = logger.getkvs()
    assert {name: row[name] for name in row} == {"loss": 2.75, "loss_q0": 1, "loss_q1": 2, "loss_q3": 4}


def test_dropout_shares_no_seed_with_any_use_of_a_step(monkeypatch):
    """Nor with another process: the global generator of ranks 0 ... 7 beside mix(seed, step, use)."""
    trained, seen = loop(), []
    monkeypatch.setattr(th, "manual_seed", seen.append)
    monkeypatch.setattr(dist_util, "world_size", lambda: 8)
    for rank in range(8):
        monkeypatch.setattr(dist_util, "rank", lambda rank=rank: rank)
        trained.run_step(*next(trained.data))
    assert len(set(seen)) == 8 and not set(seen) & {mix(3, 0, use) for use in range(9)}


# ---- label dropout ---------------------------------------------------------------------------------------------------


def drops(batch_size, steps=3, p=0.25, **settings):
    trained = loop(Net(p), Stream(batch_size), batch_size=batch_size, **settings)
    for _ in range(steps):
        trained.run_step(*next(trained.data))
        trained.step += 1
    return trained.model.drops


def test_labels_are_dropped_at_the_stated_rate_and_anew_at_each_step():
    masks = drops(2000)
    assert all(mask.dtype == th.bool and mask.shape == (2000,) for mask in masks)
    for mask in masks:
        assert mask.float().mean().item() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 2000))
    both = (masks[0] & masks[1]).float().mean().item()
    assert both == pytest.approx(0.25**2, abs=4 * math.sqrt(0.0625 / 2000))


def test_microbatches_share_the_masks_of_the_batch():
    assert th.equal(th.cat(drops(8, microbatch=3)), th.cat(drops(8)))


def test_nothing_is_passed_where_nothing_is_to_be_dropped():
    assert drops(4, p=0.0) == [None] * 3
    assert drops(4, seed=None) == [None] * 3
    trained = loop(Net(0.25), Stream(labels=False))
    trained.run_step(*next(trained.data))
    assert trained.model.drops == [None]


# ---- two processes ---------------------------------------------------------------------------------------------------


def work(out):
    """What each process of a job does: train with label dropout and validation, and write down what it saw."""
    dist_util.setup_dist()
    size, rank = dist_util.world_size(), dist_util.rank()
    with logger.scoped_configure(str(Path(out) / f"run{size}"), format_strs=["csv"] if rank == 0 else []):
        data = Stream(8 // size)
        data.num_samples = 20
        model = Net(0.5)
        trained = loop(model, data, batch_size=8 // size, max_epochs=2, heldout=HeldOut(), grad_clip=0.1, lr=1e-3)
        trained.run_loop()
        seen = {
            "drops": [mask.tolist() for mask in model.drops if mask is not None],
            "best": trained.validation.best,
            "steps": trained.step,
        }
    (Path(out) / f"{size}_{rank}.json").write_text(json.dumps(seen))


def test_two_processes_train_as_one(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = "from test_train_features import dist_util, work; dist_util.run_main(lambda: work({!r}))"
    command = [sys.executable, "-c", program.format(str(tmp_path))]
    for launcher in ([], ["mpiexec", "-n", "2"]):
        done = subprocess.run(
            launcher + command,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PATH": path},
            cwd=Path(__file__).parent,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1_0", "2_0", "2_1"))
    assert one["steps"] == first["steps"] == 5
    assert one["drops"] == [a + b for a, b in zip(first["drops"], second["drops"], strict=True)]
    assert first["best"] == second["best"] and first["best"][1] == one["best"][1] == 4
    assert first["best"][0] == pytest.approx(one["best"][0], rel=1e-6)
    a, b = (checkpoint.load(tmp_path / run / "ema_0.9_best.pt") for run in ("run1", "run2"))
    assert all(th.allclose(a[key], b[key], atol=1e-6) for key in a)


# ---- validation in the loop ------------------------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch):
    """Validation losses from a list instead of from the network."""

    def say(*losses):
        rest = list(losses)
        monkeypatch.setattr(validation, "validation_terms", lambda *_, **__: {"loss": rest.pop(0)})
        return rest

    return say


def same(a, b):
    a, b = checkpoint.load(a), checkpoint.load(b)
    return a.keys() == b.keys() and all(th.equal(a[key], b[key]) for key in a)


VALID = {"heldout": HeldOut(), "max_steps": 10, "ema_rate": "0.9,0.99"}


def test_the_lowest_loss_is_kept_and_named(folder, scripted):
    left = scripted(5.0, 3.0, math.nan, 4.0)  # at 0, 4, 8 as saved, and at the end
    loop(**VALID, keep_last=1).run_loop()
    assert not left
    kept = [path.name for path in folder.glob("*.pt")]
    numbered = ["model000010.pt", "ema_0.9_000010.pt", "ema_0.99_000010.pt", "opt000010.pt", "state000010.pt"]
    assert sorted(kept) == sorted([*numbered, "ema_0.9_best.pt"])
    log = log_of(folder)
    assert log.count("the validation loss is not finite: ema_0.9_best.pt stays as it is") == 1
    assert f"lowest validation loss 3 at step 4: {folder / 'ema_0.9_best.pt'}" in log
    assert checkpoint.load(folder / "state000010.pt")["best"] == (3.0, 4)


def test_the_best_is_the_first_average_as_it_was_saved_then(folder, scripted):
    scripted(5.0, 3.0, 4.0, 3.0)
    loop(**VALID).run_loop()
    assert same(folder / "ema_0.9_best.pt", folder / "ema_0.9_000004.pt")
    assert not same(folder / "ema_0.9_best.pt", folder / "ema_0.9_000000.pt")


def test_a_resumed_run_does_not_overwrite_a_better_best(folder, scripted):
    left = scripted(5.0, 3.0, 3.5, 4.0)
    resumed = killed_and_resumed(7, **VALID)
    assert resumed.resume_step == 5 and resumed.validation.best == (3.0, 4)
    resumed.run_loop()
    assert not left
    assert same(folder / "ema_0.9_best.pt", folder / "ema_0.9_000004.pt")
    assert "lowest validation loss 3 at step 4" in log_of(folder)


def test_a_killed_and_resumed_run_has_the_same_losses_and_the_same_best(folder):
    """With real losses that fall; killed after the best was written, before the state that knows of it."""
    settings = {**VALID, "val_interval": 3, "lr": 1e-2, "max_steps": 11}
    (folder / "straight").mkdir()
    with logger.scoped_configure(str(folder / "straight"), format_strs=["log"]):
        straight = loop(**settings)
        straight.run_loop()
    resumed = killed_and_resumed(7, **settings)
    assert resumed.resume_step == 5
    resumed.run_loop()
    assert resumed.validation.best == straight.validation.best and resumed.validation.best[1] == 11
    assert same(folder / "ema_0.9_best.pt", folder / "straight" / "ema_0.9_best.pt")

    def losses(text):
        return [line for line in text.splitlines() if line.startswith("validation loss")]

    assert [line.split()[-1] for line in losses(log_of(folder / "straight"))] == ["0", "3", "6", "9", "11"]
    assert losses(log_of(folder)) == losses(log_of(folder / "straight"))[:3] + losses(log_of(folder / "straight"))[2:]


def test_validation_leaves_the_run_as_it_was(folder):
    for name, heldout in (("with", HeldOut()), ("without", None)):
        (folder / name).mkdir()
        with logger.scoped_configure(str(folder / name), format_strs=[]):
            loop(heldout=heldout, val_interval=1, max_steps=6).run_loop()
    for kind in ("model", "ema_0.9_"):
        assert same(folder / "with" / f"{kind}000006.pt", folder / "without" / f"{kind}000006.pt")
    assert not (folder / "without" / "ema_0.9_best.pt").exists()


def test_validation_is_of_the_average_not_of_the_weights(folder):
    trained = loop(heldout=HeldOut(), max_steps=5, save_interval=100)
    trained.run_loop()
    model = Net()
    asked = {"batch_size": 9, "seed": 3}
    model.load_state_dict(checkpoint.load(folder / "ema_0.9_000005.pt"))
    average = validation.validation_loss(model, FlowMatching(), HeldOut(), **asked)
    model.load_state_dict(checkpoint.load(folder / "model000005.pt"))
    weights = validation.validation_loss(model, FlowMatching(), HeldOut(), **asked)
    last = [line for line in log_of(folder).splitlines() if line.startswith("validation loss")][-1]
    assert last == f"validation loss {average:.6g} at step 5" and abs(average - weights) > 1e-3


def test_other_tools_pass_the_best_by(folder, scripted):
    """It has no number, so nothing goes on from it and no clean-up removes it."""
    scripted(5.0, 3.0, 4.0, 4.0)
    trained = loop(**VALID)
    trained.run_loop()
    assert trained.newest_average() == folder / "ema_0.9_000010.pt"
    assert run_state.newest_checkpoint(folder) == (str(folder / "model000010.pt"), [])
    run_state.prune(folder, 1)
    assert (folder / "ema_0.9_best.pt").exists() and not (folder / "ema_0.9_000008.pt").exists()
    start = loop(resume_checkpoint=str(folder / "ema_0.9_best.pt"))
    assert start.resume_step == 0 and "its weights start a new one at step 0" in log_of(folder)


def test_a_best_that_lies_elsewhere_is_not_claimed(folder, scripted):
    """A run that goes on in another folder has no best yet."""
    scripted(1.0, 1.5, 1.5, 1.5, 2.0)
    loop(**VALID).run_loop()
    (folder / "elsewhere").mkdir()
    with logger.scoped_configure(str(folder / "elsewhere"), format_strs=["log"]):
        loop(**{**VALID, "max_steps": 11}, resume_checkpoint=str(folder / "model000010.pt")).run_loop()
    assert "lowest validation loss 2 at step 11" in log_of(folder / "elsewhere")


def test_a_best_of_other_data_is_none(folder, scripted):
    """1.0 of the first data is no bar for 2.0 of the second; a run without validation in between changes nothing."""
    left = scripted(1.0, 1.5, 1.5, 1.5, 2.0, 3.0, 3.0)
    loop(**VALID, val_dir="a").run_loop()
    again = {"ema_rate": VALID["ema_rate"], "resume_checkpoint": "auto"}
    assert loop(**again, heldout=HeldOut(), val_dir=folder / ".." / Path.cwd() / "a").validation.best == (1.0, 0)
    loop(**again, max_steps=11).run_loop()
    assert "--val_dir" not in log_of(folder)
    loop(**again, heldout=HeldOut(), val_dir="b", max_steps=12).run_loop()
    assert log_of(folder).count("--val_dir is b, but the run was judged by a: losses of other data are no measure") == 1
    assert "lowest validation loss 2 at step 12" in log_of(folder)
    assert same(folder / "ema_0.9_best.pt", folder / "ema_0.9_000012.pt")
    loop(**again, heldout=HeldOut(), val_dir="b", max_steps=14).run_loop()
    assert not left and log_of(folder).count("--val_dir") == 1
    assert checkpoint.load(folder / "state000014.pt")["best"] == (2.0, 12)


# ---- requests to stop ------------------------------------------------------------------------------------------------


def test_an_echo_of_a_request_is_not_a_second_one(monkeypatch):
    """A launcher signals the group and each process: the loop still saves. Seconds later it is meant."""
    now, left = [0.0], []
    monkeypatch.setattr(stop_signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stop_signals.signal, "raise_signal", left.append)
    with StopSignals() as stop:
        for now[0] in (10.0, 10.1, 11.9):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signal_name == "SIGUSR1" and not left
        now[0] = 13.0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert left == [signal.SIGUSR1]


def test_processes_that_read_data_outlive_the_signal(tmp_path):
    """SIGTERM to the worker alone: the stream goes on."""
    stream = BatchStream([(np.zeros(1), i) for i in range(8)], 2, num_workers=1, shuffle=False)
    next(stream)
    (worker,) = stream._batches._workers
    os.kill(worker.pid, signal.SIGTERM)
    time.sleep(0.2)
    assert [next(stream)[1].tolist() for _ in range(3)] == [[2, 3], [4, 5], [6, 7]] and worker.is_alive()
