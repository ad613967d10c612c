"""A run whose weights are shared out over two processes against the same run with all of them on each.

Three jobs are done once for all tests: two processes train each network both ways and are killed in a last run; two go
on with that; one goes on with it alone. What they saw is written down, and the tests read it.
"""

import csv
import enum
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch as th
from test_train_features import HeldOut, Stream, Times

from guided_diffusion_vae import checkpoint, dist_util, logger, run_state, sharding
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.dit import LightningDiT
from guided_diffusion_vae.flow_matching import FlowMatching
from guided_diffusion_vae.script_util import create_gaussian_diffusion
from guided_diffusion_vae.train_util import TrainConfig, TrainLoop
from guided_diffusion_vae.unet import UNetModel

pytestmark = pytest.mark.slow

CASES = {"dit": 1e-5, "dit_bf16": 5e-5, "unet": 1e-5}  # how near the weights are; one rounding to bfloat16 is 2^-9
FILES = ("model000010.pt", "ema_0.5_000010.pt", "ema_0.9_000010.pt")
SHAPE = (4, 8, 8)


def network(case, width=32):
    """A small network whose layers all have a gradient."""
    th.manual_seed(0)
    if case == "unet":  # 64 channels: two in each group of a norm, so that no bias is without effect
        model = UNetModel(8, 4, 2 * width, 8, 1, (1,), channel_mult=(1,), num_heads=2, dropout=0.1, num_classes=3)
    else:
        options = dict(use_qknorm=True, use_swiglu=True, use_rope=True, use_rmsnorm=True)
        model = LightningDiT(8, 2, 4, width, 2, 2, num_classes=3, use_checkpoint=case == "dit_bf16", **options)
    for param in model.parameters():
        param.data.add_(0.02 * th.randn_like(param))
    return model


class Killer(Stream):
    """Batches until the step at which the process is killed."""

    def __next__(self):
        if self.step == self.fails_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__next__()


class Rows(HeldOut):
    """Nine of them: one process has five, the other four."""

    def __init__(self):
        super().__init__()
        self.z = th.randn(9, *SHAPE, generator=th.Generator().manual_seed(1))


def train(case, folder, sharded, *, width=32, fails_at=None, **settings):
    """A run of 10 steps of 8 rows, with all that the loop has; returns it and what its previews were."""
    model, size, previews = network(case, width), dist_util.world_size(), []

    def preview(step):  # each process asks as often as it likes
        with th.no_grad():
            for i in range(1 + dist_util.rank()):
                x = th.randn(2, *SHAPE, generator=th.Generator().manual_seed(i))
                out = model(x, th.tensor([0.2, 0.7]), th.tensor([0, 2]))
        previews.append([step, out.double().sum().item()])

    standard = {
        "batch_size": 8 // size,
        "microbatch": 4 // size,  # two in a step, of which the sum is taken, however many processes
        "lr": 2e-4 if case == "unet" else 1e-3,
        "weight_decay": 0.1,
        "ema_rate": "0.5,0.9",
        "ema_warmup": True,
        "grad_clip": 0.5,
        "amp": "bf16" if case == "dit_bf16" else "none",
        "log_interval": 1,
        "save_interval": 5 if case == "dit" else 10,
        "val_interval": 5,
        "max_steps": 10,
        "sample_interval": 4,
        "seed": 3,
        "resume_checkpoint": "",
        "schedule_sampler": None if case == "unet" else Times(),
    }
    Path(folder).mkdir(exist_ok=True)
    with logger.scoped_configure(str(folder), format_strs=["csv", "log"] if dist_util.rank() == 0 else []):
        loop = TrainLoop(
            model=model,
            diffusion=create_gaussian_diffusion(learn_sigma=True) if case == "unet" else FlowMatching(),
            data=Killer(8 // size, shape=SHAPE, fails_at=fails_at),
            heldout=Rows(),
            sample_fn=preview,
            sharding="fsdp2" if sharded else "none",
            **{**standard, **settings},
        )
        loop.run_loop()
    return loop, previews


def held(loop):
    """The numbers that this process holds of each kind; and how many a whole model has."""
    moments = [value for state in loop.opt.state.values() for value in state.values() if value.ndim]
    kinds = {"weights": list(loop.model.parameters()), "averages": loop.ema_params[0], "moments": moments}
    local = {kind: sum(getattr(t, "_local_tensor", t).numel() for t in group) for kind, group in kinds.items()}
    return {"held": local, "whole": {kind: sum(t.numel() for t in group) for kind, group in kinds.items()}}


def refusal(function):
    """The words of a refusal; anything else fails."""
    with pytest.raises(UserError) as error:
        function()
    return str(error.value)


def together(out):
    """The first job."""
    dist_util.setup_dist()
    for case in CASES:
        for sharded in (False, True):
            loop, previews = train(case, out / f"{case}_{sharded}", sharded)
            seen = {"previews": previews, **held(loop)}
            (out / f"{case}_{sharded}_{dist_util.rank()}.json").write_text(json.dumps(seen))
    train("dit", out / "killed", True, fails_at=8)


def again(out):
    """The second job."""
    dist_util.setup_dist()
    train("dit", out / "killed", True, resume_checkpoint="auto")


def alone(out):
    """The third job: one process goes on with what two began; and what it must not do."""
    dist_util.setup_dist()
    path = out / "dit_True" / "model000005.pt"
    train("dit", out / "alone", True, resume_checkpoint=str(path))
    for sharded in (False, True):
        train("dit", out / f"alone_{sharded}", sharded, max_steps=3)
    plain = str(out / "dit_False" / "model000005.pt")
    words = {
        "none after fsdp2": refusal(lambda: train("dit", out / "x", False, resume_checkpoint=str(path))),
        "fsdp2 after none": refusal(lambda: train("dit", out / "x", True, resume_checkpoint=plain)),
        "shape": refusal(lambda: train("dit", out / "x", True, resume_checkpoint=str(path), width=64)),
        "fp16": refusal(lambda: train("dit", out / "x", True, use_fp16=True)),
    }
    average = str(path.with_name("ema_0.9_000005.pt"))
    train("dit", out / "started", True, resume_checkpoint=average, max_steps=1, lr=1e-9)
    (out / "full").mkdir()
    (out / "full" / "shards000005").write_text("a file where the second save wants a folder")
    with pytest.raises(checkpoint.SaveError) as error:
        train("dit", out / "full", True)
    (out / "words.json").write_text(json.dumps({**words, "full": str(error.value)}))


def start(job, out, ranks):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    here = Path(__file__).parent
    call = f"test_sharding.{job}(Path({str(out)!r}))"
    code = f"from pathlib import Path; import test_sharding; test_sharding.dist_util.run_main(lambda: {call})"
    command = ["mpiexec", "-n", str(ranks)] * (ranks > 1) + [sys.executable, "-c", code]
    env = {**os.environ, "PATH": path, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, cwd=here, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("sharding")
    killed = start("together", out, 2)
    assert (out / "killed" / "state000005.pt").exists(), killed.stderr[-3000:]
    assert killed.returncode != 0 and not (out / "killed" / "model000010.pt").exists()
    for job, ranks in (("again", 2), ("alone", 1)):
        done = start(job, out, ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    return out


def seen(out, case, sharded):
    return [json.loads((out / f"{case}_{sharded}_{rank}.json").read_text()) for rank in (0, 1)]


def rows(folder):
    with open(folder / "progress.csv", newline="") as handle:
        return list(csv.DictReader(handle))


def distance(a, b):
    a, b = checkpoint.load(a), checkpoint.load(b)
    assert list(a) == list(b)
    return max((a[key] - b[key]).abs().max().item() for key in a)


@pytest.mark.parametrize("case", CASES)
def test_the_run_is_the_unsharded_one(out, case):
    for name in (*FILES, "ema_0.5_best.pt"):
        assert distance(out / f"{case}_False" / name, out / f"{case}_True" / name) < CASES[case], name
    moved = distance(out / f"{case}_True" / "model000000.pt", out / f"{case}_True" / "model000010.pt")
    assert moved > 5e-4  # or the comparison would say nothing


@pytest.mark.parametrize("case", CASES)
def test_norms_and_losses_are_of_the_whole_model(out, case):
    names = ("loss", "grad_norm", "param_norm", "val_loss")
    for a, b in zip(rows(out / f"{case}_False"), rows(out / f"{case}_True"), strict=True):
        for name in names:
            near = pytest.approx(float(a[name] or 0), rel=2e-3 if case == "dit_bf16" else 1e-5)
            assert a[name] == b[name] == "" or float(b[name]) == near, name
    weights = checkpoint.load(out / f"{case}_True" / "model000010.pt")
    trained = [weights[name] for name, _ in network(case).named_parameters()]
    whole = th.cat([value.flatten() for value in trained]).double().norm().item()
    assert float(b["param_norm"]) == pytest.approx(whole, rel=1e-3)  # logged before the last update
    assert float(b["grad_norm"]) > 0.5  # so that it was clipped


@pytest.mark.parametrize("case", CASES)
def test_the_average_is_what_previews_see_on_every_process(out, case):
    for a, b in zip(seen(out, case, False), seen(out, case, True), strict=True):
        assert [step for step, _ in b["previews"]] == [4, 8]
        assert [value for _, value in b["previews"]] == pytest.approx([v for _, v in a["previews"]], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_each_process_holds_half_of_everything(out, case):
    parts = seen(out, case, True)
    assert {kind for part in parts for kind in part["held"]} == {"weights", "averages", "moments"}
    for kind, whole in parts[0]["whole"].items():
        assert sum(part["held"][kind] for part in parts) == whole
        assert all(0.45 < part["held"][kind] / whole < 0.55 for part in parts), kind
    assert all(part["held"] == part["whole"] for part in seen(out, case, False))


@pytest.mark.parametrize("case", CASES)
def test_the_exported_file_is_a_plain_networks(out, case):
    weights = checkpoint.load(out / f"{case}_True" / "ema_0.9_000010.pt")
    assert {type(value) for value in weights.values()} == {th.Tensor}
    network(case).load_state_dict(weights, strict=True)


def test_killed_and_resumed_is_the_same_bits(out):
    for name in (*FILES, "ema_0.5_best.pt"):
        assert distance(out / "dit_True" / name, out / "killed" / name) == 0, name
    assert [int(row["step"]) for row in rows(out / "killed")] == [*range(10)]  # killed after 7, on from 5


def test_one_process_goes_on_with_what_two_saved(out):
    for name in FILES:
        assert distance(out / "dit_True" / name, out / "alone" / name) < 1e-5, name
    assert rows(out / "alone")[0]["step"] == "6"


def test_one_process_can_be_sharded_too(out):
    for name in ("model000003.pt", "ema_0.9_000003.pt"):
        assert distance(out / "alone_False" / name, out / "alone_True" / name) < 1e-6


def test_an_average_is_a_start(out):
    name = "ema_0.9_000005.pt"
    assert distance(out / "dit_True" / name, out / "started" / "model000000.pt") < 1e-6


@pytest.mark.parametrize(
    "case, start, end",
    [
        ("none after fsdp2", "--sharding none: ", "was saved by --sharding fsdp2; give that"),
        ("fsdp2 after none", "--sharding fsdp2: ", "was saved by --sharding none; give that"),
        (
            "shape",
            "--resume_checkpoint ",
            "another shape: model.pos_embed is (1, 16, 32) there and (1, 16, 64) here",
        ),
        ("fp16", "--use_fp16 True ", "--sharding fsdp2 takes --amp bf16"),
        ("full", "cannot write ", "earlier checkpoints are intact"),
    ],
)
def test_what_cannot_be_is_one_line(out, case, start, end):
    words = json.loads((out / "words.json").read_text())[case]
    assert words.startswith(start) and end in words and "\n" not in words, words


def test_another_word_is_refused():
    with pytest.raises(UserError, match="^--sharding is 'zero'; choose none or fsdp2$"):
        TrainConfig(sharding="zero")


def test_a_save_that_fails_leaves_the_earlier_checkpoint(out):
    newest, notes = run_state.newest_checkpoint(out / "full")
    assert newest == str(out / "full" / "model000000.pt") and not (out / "full" / "model000005.pt").exists()


# ---- the folder ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(out, tmp_path):
    """A copy of a finished run, with checkpoints 0, 5 and 10."""
    return Path(shutil.copytree(out / "dit_True", tmp_path / "run"))


def test_shards_are_part_of_the_checkpoint(run):
    names = set(run_state.read_state(run / "model000010.pt")["files"])
    shards = {f"shards000010/{name}" for name in (".metadata", "__0_0.distcp", "__1_0.distcp")}
    assert names == shards | set(FILES)
    damaged = run / "shards000010" / "__1_0.distcp"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    newest, notes = run_state.newest_checkpoint(run)
    assert newest == str(run / "model000005.pt")
    assert len(notes) == 1 and "passed over checkpoint 10" in notes[0] and "__1_0.distcp is missing or dam" in notes[0]


def test_a_checkpoint_that_was_cut_off_is_passed_over(run):
    for number in (5, 10):
        (run / f"state{number:06d}.pt").unlink()
    newest, notes = run_state.newest_checkpoint(run)
    assert newest == str(run / "model000000.pt") and len(notes) == 2 and "cut off" in notes[0]
    (run / "state000000.pt").unlink()  # the very first save was cut off: the run begins anew
    assert run_state.newest_checkpoint(run)[0] == ""


def test_old_folders_are_deleted_with_their_checkpoints(run):
    (run / "shards000007").mkdir()
    (run / "shards000007" / "__0_0.distcp").write_bytes(b"cut off")
    run_state.prune(run, 1)
    assert {path.name for path in run.glob("shards*")} == {"shards000010"}
    assert not list(run.glob("*000005.pt")) and run_state.newest_checkpoint(run) == (str(run / "model000010.pt"), [])


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("content", [pickle.dumps(Code()), b"", b"\x80\x04garbage"])
def test_a_table_of_contents_is_data(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match="damaged or holds more than data"):
        sharding._reader(tmp_path).read_metadata()
    assert not (tmp_path / "ran").exists()


class AsPython3112(pickle.Pickler):
    """Members of enumerations as Python 3.11.0 to 3.11.3 write them."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def test_tables_of_other_pythons_are_read_and_nothing_else_by_their_getattr():
    from torch.distributed.checkpoint.metadata import TensorProperties

    def read(pickler, value):
        written = io.BytesIO()
        pickler(written).dump(value)
        return sharding._DataOnly(io.BytesIO(written.getvalue())).load()

    about = TensorProperties(dtype=th.float32)
    assert read(pickle.Pickler, about) == about == read(AsPython3112, about)
    assert b"getattr" in (lambda out: AsPython3112(out).dump(about) or out.getvalue())(io.BytesIO())

    class Reach:
        def __reduce__(self):
            return getattr, (TensorProperties, "__init__")

    with pytest.raises(pickle.UnpicklingError, match="getattr of"):
        read(pickle.Pickler, Reach())
