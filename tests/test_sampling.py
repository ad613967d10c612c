"""From a checkpoint to files: names, labels, seeds, and the same image whatever shares the work."""

import csv
import hashlib

import numpy as np
import pytest
import torch as th
from helpers import draw_users, script
from PIL import Image

from evaluations.image_sets import read_samples
from guided_diffusion_vae import generation, sample_util
from guided_diffusion_vae.config import UserError

NAMES = ["user_01", "user_07", "user_30"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint after three steps on three users; where it is, and its model."""
    root = tmp_path_factory.mktemp("sampling")
    draw_users(root / "data", NAMES, 2)
    flags = "--num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --num_heads 2 --attention_resolutions 8".split()
    flags += "--image_size 32 --diffusion_steps 50 --noise_schedule cosine --class_cond True --max_steps 3".split()
    flags += ["--ema_rate", 0.9, "--batch_size", 2, "--lr", 1e-2, "--sample_interval", 3]
    script("image_train_vae.py", *flags, "--data_dir", root / "data", "--log_dir", root / "run")
    return root / "run" / "model000003.pt"


def sample(trained, out, *flags, **options):
    return script("image_sample_vae.py", "--model_path", trained, "--log_dir", out, *flags, **options)


def arrays(out):
    (path,) = out.glob("samples_*.npz")
    with np.load(path) as found:
        return found["arr_0"], found["arr_1"]


def test_training_shows_a_grid(trained):
    assert Image.open(trained.parent / "previews" / "step_000003.png").width > 3 * 32


def test_only_the_model_path_is_needed(trained, tmp_path):
    done = sample(trained, tmp_path, "--num_samples", 5, "--batch_size", 2, "--use_ddim", True)
    pixels, labels = arrays(tmp_path)
    assert [path.name for path in tmp_path.glob("*.npz")] == ["samples_5x32x32x3.npz"]
    assert pixels.shape == (5, 32, 32, 3) and pixels.dtype == np.uint8 and labels.dtype == np.int64
    for line in ("creating model and diffusion...", "sampling...", "created 2 samples of 5, ", "sampling complete"):
        assert line in done.stdout
    rows = list(csv.DictReader((tmp_path / "manifest.csv").open()))
    assert [row["user"] for row in rows] == [NAMES[label] for label in labels]
    for i, row in enumerate(rows):
        assert np.array_equal(np.asarray(Image.open(tmp_path / row["file"])), pixels[i])
        assert (row["row"], row["seed"], row["use_ddim"]) == (str(i), "0", "True")
        assert row["model_sha256"] == hashlib.sha256(trained.read_bytes()).hexdigest()
    assert len({row["file"] for row in rows}) == 5
    assert {path.stem for path in (tmp_path / "grids").iterdir()} == {row["user"] for row in rows}
    assert (tmp_path / "grid.png").exists()


def test_an_image_is_the_same_whatever_shares_the_work(trained, tmp_path):
    """Batch sizes 1, 4 and 3 on two processes; equal to a level of 8 bits, for a convolution sums in another order."""
    flags = ["--num_samples", 6, "--per_image_seed", True, "--timestep_respacing", 10]
    sample(trained, tmp_path / "a", *flags, "--batch_size", 1)
    sample(trained, tmp_path / "b", *flags, "--batch_size", 4)
    sample(trained, tmp_path / "c", *flags, "--batch_size", 2, ranks=2)
    (a, a_labels), (b, b_labels), (c, c_labels) = (arrays(tmp_path / name) for name in "abc")
    assert np.array_equal(a_labels, b_labels) and np.array_equal(a_labels, c_labels)
    assert np.abs(a.astype(int) - b).max() <= 1 and np.abs(a.astype(int) - c).max() <= 1
    assert np.abs(a[0].astype(int) - a[1]).max() > 10


def test_users_are_named_as_on_disk_and_take_turns(trained, tmp_path):
    sample(trained, tmp_path, "--num_samples", 4, "--users", "30,7", "--timestep_respacing", 5)
    assert arrays(tmp_path)[1].tolist() == [2, 1, 2, 1]
    assert {path.name for path in (tmp_path / "png").iterdir()} == {"user_30", "user_07"}


def pngs(out):
    return {path.relative_to(out).as_posix() for path in (out / "png").rglob("*.png")}


def test_the_same_command_again_leaves_its_own_samples_only(trained, tmp_path):
    """And what is not the sampler's; the judge, given the folder, sees the same images as given the .npz."""
    few = ["--num_steps", 2, "--num_samples_per_user", 2, "--users", "1,7", "--sampler", "heun"]
    few += ["--per_image_seed", True]
    sample(trained, tmp_path, *few)
    before = {name: (tmp_path / name).read_bytes() for name in pngs(tmp_path)}
    assert set(before) == {f"png/user_{u}/micro_doppler_user{u}_00{i}.png" for u in ("01", "07") for i in (1, 2)}
    own = [tmp_path / name for name in ("notes.png", "png/user_30/mine.txt", "grids/mine.png", "step_000003.png")]
    for path in own:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    sample(trained, tmp_path, *few, ranks=2)
    assert {name: (tmp_path / name).read_bytes() for name in pngs(tmp_path)} == before
    assert {path.name for path in (tmp_path / "grids").iterdir()} == {"user_01.png", "user_07.png", "mine.png"}
    assert all(path.read_text() == "mine" for path in own)
    with np.load(tmp_path / "samples_4x32x32x3.npz") as saved:
        assert np.array_equal(read_samples(tmp_path).pixels, saved["arr_0"][[0, 2, 1, 3]])  # file by file
    rows = list(csv.DictReader((tmp_path / "manifest.csv").open()))
    assert [(row["label"], row["sampler"], row["num_steps"], row["spacing"]) for row in rows] == [
        ("0", "heun", "2", "uniform"),
        ("1", "heun", "2", "uniform"),
    ] * 2

    sample(trained, tmp_path, *few, "--save_png", False)
    assert pngs(tmp_path) == set() and (tmp_path / "grids" / "user_01.png").exists()
    with pytest.raises(UserError, match=r"has none of the PNGs .* give the samples_\*.npz"):
        read_samples(tmp_path)


def test_samples_of_another_command_are_not_replaced(trained, tmp_path):
    """Nor by the same flags with another checkpoint; nothing in the folder changes."""
    flags, out = ["--num_steps", 2, "--users", 7, "--num_samples_per_user", 2], tmp_path / "out"
    sample(trained, out, *flags)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    other = trained.with_name("ema_0.9_000003.pt")
    for model, more in ((trained, ["--users", 1]), (trained, ["--seed", 1]), (other, [])):
        done = sample(model, out, *flags, *more, check=False)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        whose = "--num_samples_per_user 2 --num_steps 2 --users 7 and model model000003.pt"
        assert f"--log_dir {out} holds the samples of the command with {whose}: give another" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize(
    "flags, calls, images",
    [
        (["--num_samples", 40, "--sampler", "heun", "--num_steps", 6], 11, 16),
        (["--num_samples", 3, "--num_steps", 5], 5, 3),
    ],
)
def test_a_dry_run_tells_the_time_and_writes_nothing(trained, tmp_path, flags, calls, images):
    """Heun's method evaluates twice a step, but for the last."""
    done = sample(trained, tmp_path / "out", "--dry_run", True, *flags)
    count = flags[1]
    said = f"time: {count} images in batches of {images}, for each about {calls} evaluations of the network: about "
    assert said in done.stdout and not (tmp_path / "out").exists()


def test_a_flag_of_two_names_may_be_cut_short(trained, tmp_path):
    done = sample(trained, tmp_path, "--user", 7, "--num_samples", 1, "--num_steps", 2)
    assert pngs(tmp_path) == {"png/user_07/micro_doppler_user07_001.png"}, done.stdout


def test_a_rehearsal_counts_all_calls_and_computes_few():
    """Of each shape, for guidance may double some; the time that it spares is of the rest."""
    rehearsal = generation.Rehearsal(lambda x: x + 1)
    for _ in range(10):
        assert th.equal(rehearsal(th.zeros(2, 1)), th.ones(2, 1))
    rehearsal(th.zeros(4, 1))
    assert dict(rehearsal.calls) == {(2, 1): 10, (4, 1): 1}
    rehearsal.times = {(2, 1): [9.0, 1.0, 2.0], (4, 1): [5.0]}
    assert rehearsal.spared_s == 7.0


def test_so_many_of_each_user_under_the_names_of_the_users(trained, tmp_path):
    sample(trained, tmp_path, "--user_ids", 1, 30, "--num_samples_per_user", 3, "--num_steps", 4)
    assert arrays(tmp_path)[1].tolist() == [0, 2] * 3
    names = {str(path.relative_to(tmp_path / "png")) for path in (tmp_path / "png").rglob("*.png")}
    assert names == {f"user_{u}/micro_doppler_user{u}_00{i}.png" for u in ("01", "30") for i in (1, 2, 3)}
    assert Image.open(tmp_path / "grids" / "user_01.png").height < 2 * 48


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--image_size", 64], ["--image_size is 64", "trained with 32"]),
        (["--num_channels", 64], ["--num_channels is 64", "trained with 32"]),
        (["--users", "3"], ["--users names '3'", "user_01 to user_30"]),
        (["--vae_path", "pixel"], ["--vae_path pixel", "trained on latents of"]),
        (["--num_samples", 0], ["--num_samples is 0"]),
        (["--num_samples_per_user", 2], ["--num_samples_per_user 2 needs --users"]),
        (["--cfg_scale", 2], ["no null label", "--class_dropout_prob 0.1"]),
        (["--cfg_interval", "0.9,0.1"], ["--cfg_interval is '0.9,0.1'", "must rise"]),
        (["--sampler", "euler"], ["--sampler euler", "p_sample, ddim, heun"]),
        (["--num_steps", 3, "--timestep_respacing", 3], ["--num_steps 3", "give one"]),
        (["--network", "dit"], ["--network is 'dit'", "trained with 'unet'"]),
        (["--timestep_respacing", "ddim30"], ["30"]),
        (["--timestep_respacing", 5, "--sampler", "unipc"], ["--timestep_respacing 5", "give --num_steps"]),
    ],
)
def test_a_flag_that_contradicts_the_run_is_one_line(trained, tmp_path, flags, words):
    done = sample(trained, tmp_path, *flags, check=False)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and all(word in done.stderr for word in words), done.stderr


def test_files_that_are_no_network_are_one_line(trained, tmp_path):
    for path, words in (
        (trained.with_name("opt000003.pt"), "holds an optimizer's state"),
        (trained.with_name("state000003.pt"), "holds no weights"),
        (tmp_path, "is a folder without a checkpoint"),
    ):
        done = script("image_sample_vae.py", "--model_path", path, check=False)
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_users_of_a_network_that_knows_none_are_refused(trained, tmp_path):
    (tmp_path / "run.yaml").write_text(
        (trained.parent / "run.yaml").read_text().replace("class_cond: true", "class_cond: false")
    )
    (tmp_path / trained.name).write_bytes(trained.read_bytes())
    done = sample(tmp_path / trained.name, tmp_path, "--users", "7", check=False)
    assert done.returncode == 2 and "--class_cond False; leave --users out" in done.stderr, done.stderr


# ---- pieces ----------------------------------------------------------------------------------------------------------


def test_pixels_are_truncated_as_upstream_does():
    values = th.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 2.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert sample_util.to_pixels(values)[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
    with pytest.raises(UserError, match="NaN"):
        sample_util.to_pixels(values * float("nan"))


def test_file_names_stay_in_their_folder():
    names = ["../../etc", "-rf", "a" * 300, "user_07", "Jörg"]
    assert [sample_util.safe_name(names, i) for i in range(6)] == [
        "class_000",
        "class_001",
        "class_002",
        "user_07",
        "class_004",
        "class_005",
    ]


HEAD = "file,row,user,label\n"


def test_what_a_manifest_lists_elsewhere_stays(tmp_path):
    """A path that leads out of the folder, by dots or by a link; not a PNG; a list that is not the sampler's."""
    folder, outside = tmp_path / "samples", tmp_path / "outside"
    places = ["user_00/a.png", "user_00/unlisted.png", "user_00/a.npz", "../latents.png"]
    paths = [folder / "png" / name for name in places] + [outside / "b.png", outside / "c.png", folder / "train/d.png"]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (folder / "png" / "link").symlink_to(outside)
    files = ["png/user_00/a.png", "png/user_00/a.npz", "png/../latents.png", "png/../../outside/b.png", "png", ""]
    files += ["png/link/c.png", str(outside / "b.png"), "../outside/b.png", "train/d.png", "png/" + "n" * 5000]
    rows = "".join(f"{file},0,../../outside/b,{i}\n" for i, file in enumerate(files))
    for head, kept in (("file,subject,row\n", paths), (HEAD, paths[1:])):
        (folder / "manifest.csv").write_text(head + rows)
        sample_util.remove_old_samples(folder)
        assert [path for path in paths if path.exists()] == kept
    (folder / "manifest.csv").write_bytes(b"file,row,user\n\xff\x00\n" + b'"' + b"y" * 200_000)
    sample_util.remove_old_samples(folder)
    assert [path for path in paths if path.exists()] == paths[1:]


def test_grids_go_with_their_samples_whatever_the_users_are_called(tmp_path):
    names = ["user_00", "Jörg", "../up"]
    batch = sample_util.Batch(np.zeros((3, 8, 8, 3), np.uint8), np.arange(3))
    sample_util.save_grids(tmp_path, batch, names)
    sample_util.save_manifest(tmp_path, [], batch, names, {"seed": 0})
    assert len(list(tmp_path.rglob("*.png"))) == 4
    sample_util.remove_old_samples(tmp_path)
    assert not list(tmp_path.rglob("*.png"))


def test_pngs_of_an_interrupted_run_are_not_judged_with_the_others(tmp_path):
    for name in ("user_00/a.png", "user_01/b.png"):
        (tmp_path / "png" / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "png" / name)
    assert len(read_samples(tmp_path).pixels) == 2  # no manifest: whatever is there
    (tmp_path / "manifest.csv").write_text(HEAD + "png/user_00/a.png,0,user_00,0\n")
    with pytest.raises(UserError, match="has 1 PNGs that are not in its manifest.csv, such as png/user_01/b.png"):
        read_samples(tmp_path)


@pytest.mark.parametrize(
    "names, words, labels",
    [
        (["0", "1"], ("00", "1", "0"), [0, 1, 0]),
        (["user_00", "user_01"], ("0", "00", "000", "01"), [0, 0, 0, 1]),
        (["a_07", "b_07"], ("b_07", "a_07"), [1, 0]),
        (["7", "user_07"], ("7", "user_07"), [0, 1]),  # as on disk, before the number
        (["none", "user_01"], ("all",), [0, 1]),
    ],
)
def test_users_are_found_by_name_and_by_number(names, words, labels):
    assert sample_util.named_users(words, names) == labels


@pytest.mark.parametrize(
    "names, word, message",
    [
        (["a_07", "b_07"], "7", "--users names '7', but a_07 and b_07 end in it: give the full name"),
        (["a_07", "b_07"], "07", "'07', but a_07 and b_07"),
        (["left", "right"], "None", "--users names 'None', but the model knows left to right"),
        (["user_01"], "²", "--users names '²', but the model knows user_01 to user_01"),
    ],
)
def test_users_that_are_not_one_are_refused(names, word, message):
    with pytest.raises(UserError, match=message):
        sample_util.named_users((word,), names)


def test_each_images_noise_is_its_own():
    a, b = (sample_util.PerImageNoise(0, numbers, "cpu") for numbers in ([3, 4], [4]))
    first = a.randn((2, 2))
    assert th.equal(first[1], b.randn((2, 2))[0]) and not th.equal(first[0], first[1])
    assert th.equal(a(th.zeros(2, 5))[1], b(th.zeros(1, 5))[0])
