"""Everything in one command: what is skipped, redone, refused; and that no interruption changes a bit."""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch as th
from helpers import ROOT, script
from PIL import Image

from evaluations import user_classifier
from guided_diffusion_vae import stages
from guided_diffusion_vae.autoencoders.kl import KLAutoencoder, KLConfig
from guided_diffusion_vae.config import UserError, create_argparser, parse_run
from guided_diffusion_vae.pipeline import PipelineConfig
from guided_diffusion_vae.stages import Stage

TINY = "--image_size 32 --class_cond True --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --num_heads 2".split()
TINY += "--attention_resolutions 8 --process flow --ema_rate 0.9 --num_steps 3 --batch_size 4 --log_interval 1".split()
TINY += "--num_samples_per_user 4 --lr_anneal_steps 8 --save_interval 3".split()


def make_images(folder, seed, n):
    """Three users, each with an own range of brightness."""
    rng = np.random.default_rng(seed)
    for user in range(3):
        (folder / f"user_{user:02d}").mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(80 * user, 80 * user + 80, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"user_{user:02d}" / f"{i}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The flags that name the data, in a folder with a space in its name."""
    root = tmp_path_factory.mktemp("some data")
    make_images(root / "train", 0, 12)
    make_images(root / "test", 1, 4)
    return ["--data_dir", root / "train", "--val_dir", root / "test"]


def here(name):
    """A script as a module of this process."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_here(*flags):
    here("run_pipeline").main([str(flag) for flag in flags])


def start(*flags):
    command = [sys.executable, ROOT / "scripts" / "run_pipeline.py", *flags]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, start_new_session=True, **pipe)


def wait_for(process, words):
    """Read the output up to a line with these words; returns it."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return "".join(lines)
    raise AssertionError(f"{words!r} never came:\n{''.join(lines)[-3000:]}")


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """The folder of a run that nothing happened to, and what it printed."""
    out = tmp_path_factory.mktemp("un disturbed")
    done = script("run_pipeline.py", *data, *TINY, "--out_dir", out)
    assert done.stderr.count("error") == 0
    return out, done.stdout


# ---- the stages' mechanics, with programs of one line ---------------------------------------------------------------


def stage(folder, name, program, *, inputs=(), **more):
    """A stage that runs a line of Python in the folder, and makes the file of its name."""
    program = f"import os, signal, sys, time; os.chdir({str(folder)!r}); {program}; open({name!r}, 'w').close()"
    command = [sys.executable, "-c", program]
    return Stage(name=name, command=lambda: command, inputs=lambda: list(inputs), made=lambda: folder / name, **more)


def log(folder):
    return (folder / "log").read_text().split() if (folder / "log").exists() else []


def test_what_is_done_is_skipped_and_what_changed_is_done_again(tmp_path):
    """Another command or other inputs, or a product that is gone, is work; anything else is not."""

    def run(*inputs, word="b"):
        line = "print('{0}', file=open('log', 'a'))".format
        stages.run_stages([stage(tmp_path, "a", line("a")), stage(tmp_path, "b", line(word), inputs=inputs)], tmp_path)
        return log(tmp_path)

    assert run("x") == ["a", "b"]
    assert run("x") == ["a", "b"]
    assert run("y") == ["a", "b", "b"]
    assert run("y", word="c") == ["a", "b", "b", "c"]
    (tmp_path / "a").unlink()
    assert run("y", word="c") == ["a", "b", "b", "c", "a"]


def test_a_stage_that_is_no_longer_whole_is_done_again(tmp_path):
    for whole, times in (True, 1), (True, 1), (False, 2), (True, 2):
        line = "print('a', file=open('log', 'a'))"
        stages.run_stages([stage(tmp_path, "a", line, whole=lambda whole=whole: whole)], tmp_path)
        assert log(tmp_path) == ["a"] * times


def test_a_stage_that_fails_ends_the_pipeline_with_its_code_and_is_begun_again(tmp_path):
    failing = stage(
        tmp_path, "a", "print('a', file=open('log', 'a')); sys.exit(3 if len(open('log').read()) < 3 else 0)"
    )
    for _ in range(2):
        with pytest.raises(SystemExit) as left:
            stages.run_stages([failing, stage(tmp_path, "b", "sys.exit(4)")], tmp_path)
        if left.value.code == 4:
            break
        assert left.value.code == 3
    assert log(tmp_path) == ["a", "a"]


def test_a_stage_does_not_go_on_with_other_data(tmp_path):
    """Checkpoints of the old data stay as they are; without checkpoints there is nothing to mix."""
    train = tmp_path / "train"
    for inputs, checkpoint in (("old", False), ("new", True), ("new", True)):
        stages.run_stages([stage(tmp_path, "a", "pass", inputs=[inputs], goes_on=train)], tmp_path)
        if checkpoint:
            train.mkdir(exist_ok=True)
            (train / "model000004.pt").touch()
    before = (tmp_path / "a.json").read_text()
    with pytest.raises(UserError, match="has changed, but .*train holds a training .*another --out_dir"):
        stages.run_stages([stage(tmp_path, "a", "pass", inputs=["newer"], goes_on=train)], tmp_path)
    assert (tmp_path / "a.json").read_text() == before


def test_leftovers_are_cleared_only_of_a_stage_that_ran_here(tmp_path):
    """What lay in the folder before the first run may be anybody's."""
    (tmp_path / "png").mkdir()
    for name in ("png/mine", "manifest.csv"):
        (tmp_path / name).touch()
    clears = tmp_path / "png", tmp_path / "manifest.csv"
    stages.run_stages([stage(tmp_path, "a", "pass", clears=clears)], tmp_path)
    assert (tmp_path / "png" / "mine").exists()
    stages.run_stages([stage(tmp_path, "a", "pass", inputs=["new"], clears=clears)], tmp_path)
    assert not (tmp_path / "png").exists() and not (tmp_path / "manifest.csv").exists()


HOST = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_pipeline import stage
from guided_diffusion_vae import dist_util, stages
folder = Path({folder!r})
dist_util.run_main(lambda: stages.run_stages([stage(folder, "a", {program!r})], folder))
"""


def host(folder, program):
    """`run_stages` in a process of its own, with a program that prints ready, spelt otherwise, for it is shown."""
    code = HOST.format(tests=str(ROOT / "tests"), folder=str(folder), program=program)
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **pipe)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_request_to_stop_reaches_the_script_once(number, tmp_path):
    """Sent twice at once, as `timeout` does, it is still one: a second would keep the script from saving."""
    counts = "n = []; signal.signal(15, lambda *_: n.append(1)); print('rea' 'dy')"
    waits = "[time.sleep(0.05) for _ in range(400) if not n]; time.sleep(0.5)"  # up to 20 s, then for an echo
    process = host(tmp_path, f"{counts}; {waits}; print(*n, file=open('log', 'a')); sys.exit(75)")
    wait_for(process, "ready")
    process.send_signal(number)
    time.sleep(0.05)
    process.send_signal(number)
    assert "a: stopped; the same command goes on from here" in process.communicate(timeout=300)[0]
    assert process.returncode == 75 and log(tmp_path) == ["1"]


def test_a_script_that_does_not_listen_is_stopped_all_the_same(tmp_path):
    process = host(tmp_path, "print('rea' 'dy'); time.sleep(60)")
    wait_for(process, "ready")
    process.terminate()
    assert process.wait(30) == 75 and not json.loads((tmp_path / "a.json").read_text())["done"]


def test_a_script_that_is_done_when_asked_to_stop_is_not_done_again(tmp_path):
    process = host(tmp_path, "signal.signal(15, signal.SIG_IGN); print('rea' 'dy'); time.sleep(0.5)")
    wait_for(process, "ready")
    process.terminate()
    assert process.wait(30) == 75 and json.loads((tmp_path / "a.json").read_text())["done"]


def test_two_pipelines_do_not_share_a_folder(tmp_path):
    process = host(tmp_path, "print('rea' 'dy'); time.sleep(60)")
    wait_for(process, "ready")
    (child,) = children(process)
    with pytest.raises(UserError, match=f"--out_dir .* is in use by process {process.pid} on .*choose another folder"):
        stages.run_stages([], tmp_path)
    process.kill()
    process.wait()
    stages.run_stages([], tmp_path)
    os.kill(child, signal.SIGKILL)


def test_nothing_is_cleared_where_an_orphan_still_works(tmp_path):
    """The script of a killed pipeline holds its own folder."""
    holds = "from guided_diffusion_vae import folder_lock; folder_lock.hold('samples', '--log_dir')"
    process = host(tmp_path, f"{holds}; print('rea' 'dy'); time.sleep(60)")
    wait_for(process, "ready")
    (child,) = children(process)
    process.kill()
    process.wait()
    (tmp_path / "samples" / "png").mkdir()
    again = stage(tmp_path, "a", "pass", clears=(tmp_path / "samples" / "png",))
    with pytest.raises(UserError, match=f"is in use by process {child} on"):
        stages.run_stages([again], tmp_path)
    os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    stages.run_stages([again], tmp_path)
    assert not (tmp_path / "samples" / "png").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out_dir .*is a file, or lies below one; give a folder"):
        stages.run_stages([], tmp_path / "file")


def test_mpiexec_hands_the_request_on_to_every_process(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import time\nfrom pathlib import Path\nfrom guided_diffusion_vae import dist_util\n"
        "from guided_diffusion_vae.stop_signals import StopSignals\n"
        "def main():\n    dist_util.setup_dist()\n    with StopSignals() as stop:\n"
        f"        note = Path({str(tmp_path)!r}, str(dist_util.rank()))\n        note.touch()\n"
        "        while not stop.signal_name:\n            time.sleep(0.05)\n"
        "        time.sleep(0.5)\n"  # a second signal would end it here
        "    note.write_text(stop.signal_name)\n    raise dist_util.StopRequested('saved')\n"
        "dist_util.run_main(main)\n"
    )
    command = stages.python(str(program), {}, processes=2)
    assert command[1:3] == ["-n", "2"]
    code = f"""
from pathlib import Path
from guided_diffusion_vae import dist_util, stages
stage = stages.Stage(name="a", command=lambda: {command!r}, inputs=list, made=lambda: Path("nowhere"))
dist_util.run_main(lambda: stages.run_stages([stage], Path({str(tmp_path)!r})))
"""
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], **pipe)
    deadline = time.monotonic() + 60
    while not all((tmp_path / rank).exists() for rank in "01") and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 75 and output.count("stopped: saved") == 1, output
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["SIGTERM", "SIGTERM"]


# ---- commands --------------------------------------------------------------------------------------------------------


def words_of(output, name):
    """What a dry run printed for a stage: flag -> value."""
    (line,) = [line for line in output.splitlines() if line.startswith(f"== {name}: ")]
    words = shlex.split(line)
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return dict(zip(words[place + 1 :: 2], words[place + 2 :: 2], strict=True))


def test_a_dry_run_reads_nothing_and_tells_all(tmp_path, capfd):
    """A recipe's keys count as given; what a stage does not know, or must not be told, does not reach it."""
    recipe = ["--config", ROOT / "configs" / "dit_microdoppler.yaml", "--latent_norm", True, "--seed", 7]
    where = ["--data_dir", "no where", "--heldout_dir", "else where", "--out_dir", tmp_path / "o ut"]
    flags = [*recipe, *where, "--processes", 2, "--skip_bad_images", True, "--dry_run", True]
    run_here(*flags)
    told = capfd.readouterr().out
    assert not (tmp_path / "o ut").exists()
    extract, train, sample, judge = (words_of(told, name) for name in ("extract", "train", "sample", "judge"))
    assert extract == {
        **{"--data_dir": "no where", "--out_dir": f"{tmp_path}/o ut/latents", "--image_size": "128"},
        **{"--vae_path": "microdoppler-f4", "--latent_norm": "True", "--seed": "7", "--skip_bad_images": "True"},
    }
    assert train["--data_dir"] == extract["--out_dir"] and train["--log_dir"] == f"{tmp_path}/o ut/train"
    assert train["--batch_size"] == "64" and train["--max_steps"] == "40000" and train["--seed"] == "7"
    assert train["--resume_checkpoint"] == "auto" and not {"--cfg_scale", "--num_steps", "--val_dir"} & set(train)
    assert (sample["--cfg_scale"], sample["--num_steps"], sample["--batch_size"]) == ("2.0", "100", "32")
    assert (sample["--users"], sample["--num_samples_per_user"], sample["--seed"]) == ("all", "8", "7")
    assert judge["--real_dir"] == "no where" and judge["--heldout_dir"] == "else where" and judge["--seed"] == "7"
    assert judge["--skip_bad_images"] == "True"
    assert "# memory a process: " in told and "40000 steps of 128 images on 2 processes" in told


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "--data_dir is empty"),
        (["--data_dir", "x"], "training has no end: give --max_steps"),
        (["--data_dir", "x", "--max_steps", "9", "--out_dir", "x/y"], "--out_dir x/y lies in --data_dir x"),
        (["--data_dir", "x", "--resume_checkpoint", "y.pt"], "--resume_checkpoint y.pt"),
        (["--data_dir", "x", "--max_steps", "9", "--cfg_scale", "2"], "--cfg_scale 2.0 needs users"),
        (["--data_dir", "x", "--max_steps", "9", "--classifier_path", "c.pt"], "--classifier_path c.pt: the pipeline"),
        (["--data_dir", "x", "--max_steps", "9"], "--data_dir x does not exist"),
        (["--data_dir", "tests", "--max_steps", "9", "--heldout_dir", "x"], "--data_dir tests holds no images"),
    ],
)
def test_what_cannot_work_is_said_in_one_line_before_anything_is_done(flags, words, tmp_path):
    with pytest.raises(UserError, match=words) as error:
        run_here("--out_dir", tmp_path / "out", *flags)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def refused(data, tmp_path, *flags):
    """The line that a pipeline refuses with, before it has written anything."""
    with pytest.raises(UserError) as error:
        run_here(*data, *TINY, "--out_dir", tmp_path / "out", *flags)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    return str(error.value)


def test_an_autoencoder_of_unknown_scale_is_refused_before_training(data, tmp_path):
    """Each channel by its statistics needs no scale: then it is another flag that is refused."""
    model = KLAutoencoder(KLConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=3, embed_dim=3))
    th.save({"state_dict": model.state_dict()}, tmp_path / "a.ckpt")
    flags = ["--vae_path", tmp_path / "a.ckpt", "--sampler", "ddim"]
    assert "does not say how its latents are scaled: give --scale_factor" in refused(data, tmp_path, *flags)
    for known in ("--scale_factor", 0.5), ("--latent_norm", True):
        assert "--sampler ddim is not of this model's process" in refused(data, tmp_path, *flags, *known)


def test_a_sampler_that_cannot_be_is_refused_before_training(data, tmp_path, monkeypatch):
    gaussian = ["--process", "gaussian", "--diffusion_steps", 100]
    line = refused(data, tmp_path, *gaussian, "--num_steps", 101)
    assert "section of 100 steps into 101: lower --num_steps 101" in line and "--timestep_respacing" not in line
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    assert "dopri5 needs torchdiffeq: pip install" in refused(data, tmp_path, "--sampler", "dopri5")


def test_what_the_judge_will_refuse_is_refused_before_training(data, tmp_path):
    """In the pipeline's words; the judge's own questions, with numbers just beyond its limits."""
    few, strangers, mixed, one = (tmp_path / name for name in ("few", "strangers", "mixed", "one"))
    make_images(few, 2, 3)
    make_images(mixed, 3, 4)
    (mixed / "user_02").rename(mixed / "user_77")
    make_images(strangers, 4, 4)
    make_images(one, 5, 12)
    for user in range(3):
        (strangers / f"user_{user:02d}").rename(strangers / f"other_{user:02d}")
    for path in [*one.glob("*/*.png")]:
        path.rename(one / f"walker_{path.parent.name}_{path.name}")
    judged = [*data[:2], "--heldout_dir"]
    cases = [
        (["--data_dir", few, *data[2:]], "--data_dir has 3 images of user_00; the judge needs at least 4"),
        ([*judged, strangers], "--heldout_dir shows none of the users of --data_dir"),
        ([*judged, mixed], "--heldout_dir has the user user_77, who is not in --data_dir"),
        ([*judged, data[1]], "--heldout_dir holds training images only"),
        ([*data, "--num_samples_per_user", 1], "--num_samples_per_user 1 has 3 images; the comparison needs"),
        (["--data_dir", one, *data[2:], "--class_cond", False], "--data_dir has one user only"),
        (["--data_dir", *data[1:2], "--val_dir", mixed], "--val_dir .*mixed holds the class user_77"),
    ]
    for flags, words in cases:
        line = refused([], tmp_path, *flags)
        assert re.match(words, line), line
        flag = "--heldout_dir" if "--heldout_dir" in flags else "--val_dir"
        assert f"without {flag} there is no report" in line or "user_77" in line


def test_a_broken_image_is_refused_before_training_or_left_out_by_the_judge(tmp_path, capfd, monkeypatch):
    """Left out, what is judged is what the folder without it gives."""
    monkeypatch.setattr(user_classifier, "MIN_STEPS", 4)
    for name, seed, n in ("train", 0, 12), ("held", 1, 4), ("png", 2, 4):
        make_images(tmp_path / name, seed, n)
    data = ["--data_dir", tmp_path / "train", "--heldout_dir", tmp_path / "held"]
    for folder in ("train", "held"):
        (tmp_path / folder / "user_01" / "9z.png").write_bytes(b"no image")
        words = "1 of (37|13) images cannot be used: .*9z.png.*or give --skip_bad_images True"
        assert re.search(words, refused(data, tmp_path))
        judge, out = here("evaluate_samples"), tmp_path / f"report {folder}"
        flags = ["--real_dir", data[1], "--heldout_dir", data[3], "--samples", tmp_path / "png", "--out_dir", out]
        flags = [str(flag) for flag in [*flags, "--judge_epochs", 1]]
        with pytest.raises(UserError, match=words):
            judge.main(flags)
        judge.main([*flags, "--skip_bad_images", "True"])
        assert capfd.readouterr().out.count("_dir: left out 1 of") == 1
        (tmp_path / folder / "user_01" / "9z.png").unlink()
        reports = [json.loads((out / "report.json").read_text())]
        judge.main(flags)
        reports.append(json.loads((out / "report.json").read_text()))
        for report in reports:
            del report["about"]["judge_seconds"]
        assert reports[0] == reports[1]


def test_other_weights_or_settings_of_a_diffusers_folder_are_another_input(data, tmp_path):
    """Of the same size too; also under `vae`, as pipelines have it, and beside pictures, which count for nothing."""
    script, folder = here("run_pipeline"), tmp_path / "model"
    (folder / "vae").mkdir(parents=True)
    parser = create_argparser(PipelineConfig, *script.SAMPLING, *script.TRAINING)
    run = parse_run(parser, [*map(str, data), "--vae_path", str(folder), "--out_dir", str(tmp_path / "out")])
    seen = [script.extraction(run).inputs()]
    for name in ("config.json", "diffusion_pytorch_model.safetensors", "vae/config.json", "vae/model.bin"):
        for text in ("one", "two"):
            (folder / name).write_text(text)
            time.sleep(0.02)  # of a file system whose times are coarse
            seen.append(script.extraction(run).inputs())
    assert len(set(map(tuple, seen))) == 9 and len({tuple(inputs[:2]) for inputs in seen}) == 1
    (folder / "shown.png").write_text("picture")
    assert script.extraction(run).inputs() == seen[-1]


def test_under_mpiexec_it_refuses_in_one_line(data, tmp_path):
    done = script("run_pipeline.py", *data, *TINY, "--out_dir", tmp_path / "out", ranks=2, check=False)
    assert done.returncode == 2 and "start run_pipeline.py with plain python" in done.stderr
    assert len([line for line in done.stderr.splitlines() if "error" in line]) == 1 and not (tmp_path / "out").exists()


# ---- the whole road --------------------------------------------------------------------------------------------------


def products(out):
    """The bytes of what a run is for; of the report all but the time that the judge took."""
    report = json.loads((out / "report" / "report.json").read_text())
    del report["about"]["judge_seconds"]
    files = ["train/ema_0.9_000008.pt", "train/ema_0.9_best.pt", "samples/samples_12x32x32x3.npz", "samples/grid.png"]
    return [(out / name).read_bytes() for name in files], report


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_with_the_same_bits(data, undisturbed, tmp_path):
    """Killed outright while it extracts, trains, samples and judges, and once more asked to stop."""
    flags = [*data, *TINY, "--out_dir", tmp_path / "out"]
    moments = ["36 images of 3 classes", "validation loss", "sampling...", "== judge"]
    for words in moments:
        process = start(*flags)
        wait_for(process, words)
        for pid in [process.pid, *children(process)]:
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        if words == "validation loss":
            process = start(*flags)
            wait_for(process, "| step ")
            process.terminate()
            output = process.communicate(timeout=300)[0]
            assert process.returncode == 75 and "stopped: SIGTERM; saved step" in output, output
    done = script("run_pipeline.py", *flags)
    for name in ("extract", "train", "sample"):
        assert f"== {name}: done before" in done.stdout
    assert products(tmp_path / "out") == products(undisturbed[0])


def test_run_again_it_has_nothing_to_do(undisturbed, data, capfd):
    run_here(*data, *TINY, "--out_dir", undisturbed[0])
    assert capfd.readouterr().out.count("done before") == 4


def test_every_stage_is_asked_for_its_pictures(data, tmp_path, capfd):
    pytest.importorskip("matplotlib")
    run_here(*data, *TINY, "--out_dir", tmp_path / "out", "--plot", True, "--dry_run", True)
    commands = [line for line in capfd.readouterr().out.splitlines() if line.startswith("== ")]
    assert len(commands) == 4 and all("--plot True" in line for line in commands)


@pytest.mark.parametrize("part", ["train", "val"])
def test_lost_latents_are_extracted_again(part, undisturbed, data, capfd):
    """Only those of the part that lost them; the same rows, so that no other stage has anything to do."""
    places = sorted((undisturbed[0] / "latents").glob("*/*.safetensors"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in places}
    (lost,) = (path for path in places if path.parent.name == part)
    lost.unlink()
    assert lost.with_name("latents_stats.pt").is_file() and len(places) == 2
    run_here(*data, *TINY, "--out_dir", undisturbed[0])
    told = capfd.readouterr().out
    assert "== extract: done before" not in told and told.count("done before") == 3
    assert {path: path.read_bytes() for path in places} == {path: what[0] for path, what in before.items()}
    assert [path for path in places if path.stat().st_mtime_ns != before[path][1]] == [lost]


def test_another_network_is_refused_in_one_line(undisturbed, data):
    """Also one whose weights would have the same shapes."""
    changed = ("--num_channels", "64", "32"), ("--process", "gaussian", "'flow'"), ("--seed", 3, "0")
    for flag, value, before in (*changed, ("--vae_path", "pixel", "'microdoppler-f4'")):
        with pytest.raises(
            UserError, match=f"^{flag} is .*holds a training with {before}: .*another --out_dir"
        ) as error:
            run_here(*data, *TINY, "--out_dir", undisturbed[0], flag, value)
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_more_steps_go_on_and_other_images_do_not(undisturbed, data, tmp_path):
    """The last test, for it changes the data: of another image the latents are others."""
    out = undisturbed[0]
    flags = [*data, *TINY, "--out_dir", out]
    (out / "samples" / "samples_99x32x32x3.npz").write_bytes(b"stale")
    done = script("run_pipeline.py", *flags, "--lr_anneal_steps", 11, "--keep_best", False)
    assert "== extract: done before" in done.stdout and "loading model from checkpoint" in done.stdout
    assert (out / "train" / "ema_0.9_000011.pt").is_file()
    words = [words_of(done.stdout, name) for name in ("sample", "judge")]
    assert words[0]["--model_path"].endswith("ema_0.9_000011.pt")
    assert words[1]["--samples"].endswith("samples_12x32x32x3.npz")
    Image.new("RGB", (32, 32), "white").save(data[1] / "user_00" / "0.png")
    with pytest.raises(UserError, match="--data_dir has changed, but .* another --out_dir"):
        run_here(*flags, "--lr_anneal_steps", 11, "--keep_best", False)
