"""The command: the official lines in their order, the golden numbers in them, and a sentence for every bad input."""

import json
import math
import os
import re
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch as th
from helpers import ROOT, draw_users, golden
from PIL import Image

from evaluations import evaluator, inception, official
from evaluations.batches import ArrayBatch, NpzBatch, open_batch
from evaluations.features import FeatureSpace
from guided_diffusion_vae.config import UserError, create_argparser, parse_run
from guided_diffusion_vae.sample_util import Batch as Samples
from guided_diffusion_vae.sample_util import save_samples

FIVE = ["Inception Score", "FID", "sFID", "Precision", "Recall"]
PROGRESS = [
    "warming up...",
    "computing reference batch activations...",
    "computing/reading reference batch statistics...",
    "computing sample batch activations...",
    "computing/reading sample batch statistics...",
    "Computing evaluations...",
]


def pixels(n, size=8, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (n, size, size, 3)).astype(np.uint8)


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


# ---- the golden numbers through the whole command --------------------------------------------------------------------


def golden_space(shift=0.0):
    """A space that knows the golden features of a batch by its flag, moved by the same vector."""
    data = golden("evaluator_features.npz")

    def extract(batch):
        side = "ref" if batch.flag == "REF" else "sample"
        return {"pool": data[f"{side}_pool"] + np.float32(shift), "spatial": data[f"{side}_spatial"]}

    return FeatureSpace("inception", "golden", extract, "golden", data["softmax_weights"])


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Evaluate as many images as there are golden features, with a space put in; gives lines and the captured text."""

    def run(space, *flags, stats=None):
        monkeypatch.setattr(evaluator, "choose_space", lambda *_: space)
        ref = npz(tmp_path / "ref.npz", arr_0=pixels(400), **(stats or {}))
        sample = npz(tmp_path / "sample.npz", arr_0=pixels(350, seed=1))
        evaluator.main([str(ref), str(sample), *map(str, flags)])
        captured = capsys.readouterr()
        return captured.out.splitlines(), captured

    return run


def numbers_of(lines):
    return {name: float(value) for name, value in (line.split(": ") for line in lines)}


def test_the_golden_numbers_are_printed(run, tmp_path):
    lines, _ = run(golden_space(), "--json", tmp_path / "a" / "n.json", "--html", tmp_path / "b" / "n.html")
    assert lines[:6] == PROGRESS
    assert [line.split(":")[0] for line in lines[6:11]] == FIVE
    found, wanted = numbers_of(lines[6:11]), golden("evaluator_features.json")
    assert found["Inception Score"] == pytest.approx(wanted["Inception Score"], rel=1e-6)
    assert found["FID"] == pytest.approx(wanted["FID"], rel=1e-6)
    assert found["sFID"] == pytest.approx(wanted["sFID"], rel=1e-6)
    assert found["Precision"] == pytest.approx(wanted["Precision"], abs=1e-3)
    assert found["Recall"] == pytest.approx(wanted["Recall"], abs=1e-3)

    kept = json.loads((tmp_path / "a" / "n.json").read_text())
    assert kept["numbers"] == found  # every digit is printed
    assert f"<td>{wanted['FID']:.6g}</td>" in (tmp_path / "b" / "n.html").read_text()


def test_the_five_lines_can_still_be_told_from_what_follows(run):
    """A parser that takes lines beginning with an official name finds each once."""
    lines, _ = run(golden_space())
    assert len(lines) > 11
    for name in FIVE:
        assert len([line for line in lines if line.startswith(f"{name}:")]) == 1
    assert [line.split(":")[0] for line in lines[11:]] == [
        *("KID", "Precision (fp32, centred)", "Recall (fp32, centred)", "Density", "Coverage"),
        *("FID floor", "FID at that number", "FID / floor"),
    ]


def test_without_extras_only_the_official_lines_are_printed(run):
    lines, _ = run(golden_space(), "--extras", "False")
    assert len(lines) == 11


def test_stored_statistics_are_used(run):
    """A reference mean moved by v makes FID larger by 2 v.(m_ref - m_sample) + |v|^2; sFID stays."""
    data, v = golden("evaluator_features.npz"), 0.5
    stats = {}
    for name, end in (("pool", ""), ("spatial", "_s")):
        mu, sigma = official.official_moments(data[f"ref_{name}"])
        stats |= {f"mu{end}": mu + (v if name == "pool" else 0), f"sigma{end}": sigma}
    found, wanted = numbers_of(run(golden_space(), stats=stats)[0][6:11]), golden("evaluator_features.json")
    gap = data["ref_pool"].mean(axis=0, dtype=np.float64) - data["sample_pool"].mean(axis=0, dtype=np.float64)
    assert found["FID"] == pytest.approx(wanted["FID"] + 2 * v * gap.sum() + 64 * v**2, rel=1e-5)
    assert found["sFID"] == pytest.approx(wanted["sFID"], rel=1e-5)


def test_statistics_of_other_features_are_refused(run):
    stats = {"mu": np.zeros(5), "sigma": np.eye(5), "mu_s": np.zeros(30), "sigma_s": np.eye(30)}
    with pytest.raises(UserError, match="statistics of 5 features, Inception has 64"):
        run(golden_space(), stats=stats)


def test_half_precision_is_warned_of_where_it_misleads(run):
    """Far from 0 the official float16 distances are noise; about the mean nothing has changed."""
    _, captured = run(golden_space())
    assert "float16" not in captured.err
    lines, captured = run(golden_space(shift=30.0))
    assert "in the official float16" in captured.err
    numbers, wanted = numbers_of(lines[6:11]), golden("evaluator_features.json")
    exact = float(next(line for line in lines if line.startswith("Precision (fp32")).split(": ")[1])
    assert exact == pytest.approx(wanted["Precision"], abs=5e-3)
    assert max(abs(numbers[name] - wanted[name]) for name in ("Precision", "Recall")) > 0.01


def test_numbers_of_unchecked_weights_are_called_otherwise(run):
    """The same arithmetic; but nobody takes the numbers for FID, nor the stored statistics for those of the weights."""
    checked, _ = run(golden_space())
    stats = {"mu": np.zeros(5), "sigma": np.eye(5), "mu_s": np.zeros(30), "sigma_s": np.eye(30)}
    lines, captured = run(golden_space()._replace(name="inception-unchecked"), stats=stats)
    end = "_inception-unchecked"
    assert [line.split(":")[0] for line in lines[6:11]] == [
        f"{n}{end}" for n in ("IS", "FD", "sFD", "Precision", "Recall")
    ]
    assert [line.split(": ")[1] for line in lines[6:11]] == [line.split(": ")[1] for line in checked[6:11]]
    assert [line.split(": ")[1] for line in lines[11:]] == [line.split(": ")[1] for line in checked[11:]]
    assert not any(re.match("FID|sFID|Inception|Precision:|Recall:|KID:", line) for line in lines)
    assert "which inception-unchecked features have no use for" in captured.err


def test_stored_statistics_need_no_images_for_their_rank(run):
    """Of 500 dimensions: the reference's covariance is stored, so that the sample alone is too few; or none is."""
    wide = np.random.RandomState(0).randn(64, 500).astype(np.float32)
    space = golden_space()
    widened = lambda batch: {k: v @ wide if k == "pool" else v for k, v in space.extract(batch).items()}  # noqa: E731
    weight = np.zeros((500, golden("evaluator_features.npz")["softmax_weights"].shape[1]), np.float32)
    spatial = golden("evaluator_features.npz")["ref_spatial"].shape[1]
    stats = {"mu": np.zeros(500), "sigma": np.eye(500), "mu_s": np.zeros(spatial), "sigma_s": np.eye(spatial)}
    _, captured = run(space._replace(extract=widened, class_weight=weight), stats=stats)
    assert "FID of 350 images in 500 dimensions" in captured.err and "400" not in captured.err
    numbers, both = {}, {"stats": None}
    x = cloud(40, 0)
    _, _, notes = evaluator.beyond(
        FeatureSpace("vae", "", dict), numbers, {"pool": x} | both, {"pool": x} | both, seed=0
    )
    assert not notes
    _, _, notes = evaluator.beyond(FeatureSpace("vae", "", dict), numbers, {"pool": x}, {"pool": x}, seed=0)
    assert "FD_vae of 40 and 40 images in 64 dimensions" in notes[0]


def test_a_nan_score_is_explained_and_null_in_json(run, tmp_path):
    space = golden_space()
    space = space._replace(class_weight=space.class_weight * 1000)
    lines, captured = run(space, "--json", tmp_path / "n.json")
    assert lines[6] == "Inception Score: nan"
    assert "nan, officially" in captured.err
    assert json.loads((tmp_path / "n.json").read_text())["numbers"]["Inception Score"] is None


def test_few_images_are_warned_of(run):
    data = golden("evaluator_features.npz")
    wide = np.random.RandomState(0).randn(64, 500).astype(np.float32)
    space = golden_space()
    widened = lambda batch: {k: v @ wide if k == "pool" else v for k, v in space.extract(batch).items()}  # noqa: E731
    weight = np.zeros((500, data["softmax_weights"].shape[1]), np.float32)
    _, captured = run(space._replace(extract=widened, class_weight=weight))
    assert "FID of 400 and 350 images in 500 dimensions" in captured.err


# ---- numbers that the five need --------------------------------------------------------------------------------------


def cloud(n, seed, shift=0.0):
    return np.random.RandomState(seed).randn(n, 64).astype(np.float32) + shift


def test_equal_clouds_are_at_the_floor_and_shifted_ones_are_not():
    space = FeatureSpace("vae", "", dict)
    name = "FD_vae of 200 images each"
    section, lines, more = evaluator.at_the_same_number(space, cloud(400, 0), cloud(300, 1), cloud(200, 2, 5.0), seed=0)
    assert section.title == "Against real images, 200 of each"
    assert 0.7 < more[f"{name}, ratio"] < 1.4
    distance = section.findings[0]
    assert distance.name == name and all(f.name.endswith("_vae of 200 images each") for f in section.findings)
    assert (more[name], more[f"{name}, real"]) == (distance.value, distance.real)
    assert lines == {
        name: f"generated {distance.value:.4g}, real {distance.real:.4g} (ratio {distance.value / distance.real:.4g}),"
        f" shuffled {distance.worst:.4g}; the FD_vae above is of all images, 400 and 300, and not comparable with these"
    }
    assert distance.worst == pytest.approx(64 * 25, rel=0.1)  # |shift|^2
    assert distance.verdict == "as real images"
    section, _, more = evaluator.at_the_same_number(
        space, cloud(400, 0), cloud(300, 1, 5.0), cloud(200, 2, 5.0), seed=0
    )
    assert more[f"{name}, ratio"] > 100
    assert all(finding.verdict == "no better than the worst" for finding in section.findings)


@pytest.mark.parametrize("count, words", [(200, "pixels are shuffled."), (150, "shuffled, only 150 of them: as few")])
def test_how_many_are_the_worst_is_said(count, words):
    space = FeatureSpace("vae", "", dict)
    section, _, _ = evaluator.at_the_same_number(space, cloud(400, 0), cloud(300, 1), cloud(count, 2), seed=0)
    assert words in section.notes[-1]


def test_the_score_of_users_stands_beside_that_of_real_images():
    """Named surely and alike: as many as users; of one user alone: 1. What the judge learned from does not count."""
    sure, one = np.eye(4)[np.arange(12) % 4], np.tile(np.eye(4)[0], (12, 1))
    learned = np.arange(24) < 12
    space = FeatureSpace("user", "", dict, learned=learned)
    ref = {"pool": cloud(24, 0), "probabilities": np.concatenate([one, sure])}
    score, distance = evaluator.as_findings(
        space, {"IS_user": 1.0, "FD_user": math.inf}, ref, {"pool": cloud(12, 1), "probabilities": one}
    )
    assert (score.value, score.worst) == (1, 1) and score.real == pytest.approx(4) and score.place == 0
    assert distance.value is None and distance.real is None


def test_images_that_the_judge_learned_from_are_not_compared():
    learned = np.array([True, False, True, False])
    space = FeatureSpace("user", "", dict, learned=learned)
    assert evaluator.compared(space, {"pool": np.arange(4)}).tolist() == [1, 3]


# ---- which features --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
    """No place that is searched for Inception has it."""
    monkeypatch.delenv("INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def test_without_weights_and_labels_the_autoencoder_sees(no_weights, tmp_path, capsys):
    ref, sample = (npz(tmp_path / f"{i}.npz", arr_0=pixels(14, 16, seed=i)) for i in range(2))
    evaluator.main([str(ref), str(sample), "--html", str(tmp_path / "page.html"), "--json", str(tmp_path / "n.json")])
    out, err = capsys.readouterr()
    first = err.splitlines()[0]
    assert "no weights of Inception (--inception_weights or INCEPTION_WEIGHTS): no FID" in first and len(first) < 200
    assert "numbers of vae features" in first and "no weights" not in out
    assert [line.split(":")[0] for line in out.splitlines() if line in out.split("evaluations...\n")[1]] == [
        *("features", "FD_vae", "Precision_vae", "Recall_vae", "KID_vae", "Density_vae", "Coverage_vae"),
        "FD_vae of 7 images each",
    ]
    assert "; no Inception Score and no sFID, which only Inception has\n" in out
    assert "FID:" not in out and "FID" not in (tmp_path / "page.html").read_text()

    kept, found = json.loads((tmp_path / "n.json").read_text()), {}
    names = [(f["name"], f["value"]) for section in kept["sections"] for f in section["findings"]]
    for name, value in [*kept["numbers"].items(), *kept["more"].items(), *names]:
        assert isinstance(value, float) and found.setdefault(name, value) == value, name
    assert "FD_vae of 7 images each, shuffled" in found


def test_without_weights_labels_make_a_user_space(no_weights, tmp_path, capsys, monkeypatch):
    learn = evaluator.learn_user_space
    monkeypatch.setattr(evaluator, "learn_user_space", lambda ref, **options: learn(ref, steps=2, **options))
    ref = draw_users(tmp_path / "real", ["user_00", "user_01"], 12)
    evaluator.main([str(ref), str(npz(tmp_path / "sample.npz", arr_0=pixels(14, 32)))])
    out, err = capsys.readouterr()
    numbers = dict(line.split(": ", 1) for line in out.split("evaluations...\n")[1].splitlines())
    assert list(numbers)[:5] == ["features", "IS_user", "FD_user", "Precision_user", "Recall_user"]
    learned = "learned from 12 images of 2 users; the reference is the other 12, of which it names .*; no sFID, which"
    assert re.search(learned, numbers["features"])
    assert 1 <= float(numbers["IS_user"]) <= 2
    assert "FD_user of 6 images each" in numbers  # of the 12 that the judge has not learned from
    assert "FID:" not in out and "features are weak (6 images a user to learn from, 8 are wanted" in err


@pytest.mark.parametrize("features, words", [("inception", "--inception_weights"), ("clip", "give inception, dinov2")])
def test_features_that_cannot_be_had(no_weights, tmp_path, features, words):
    batch = npz(tmp_path / "a.npz", arr_0=pixels(8))
    with pytest.raises(UserError, match=f"--features.*{words}"):
        evaluator.main([str(batch), str(batch), "--features", features])


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """A file of weights that nobody trained."""
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    with th.random.fork_rng(devices=[]):
        th.manual_seed(0)
        model = inception.InceptionV3()
        for value in model.parameters():
            if value.ndim > 1:
                value.data.normal_(0, (2 / value[0].numel()) ** 0.5)
    th.save(model.state_dict(), path)
    return path


def command(*words, module=False):
    start = ["-m", "evaluations.evaluator"] if module else [str(ROOT / "evaluations" / "evaluator.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *start, *map(str, words)], capture_output=True, text=True, env=environment, cwd=ROOT
    )


@pytest.mark.slow
def test_the_command_runs_with_inception(tmp_path, random_inception):
    ref, sample = (npz(tmp_path / f"{i}.npz", arr_0=pixels(8, 32, seed=i)) for i in range(2))
    flags = ["--inception_weights", random_inception, "--check_weights", "False", "--cache_dir", tmp_path / "cache"]
    done = command(ref, sample, *flags)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:6] == PROGRESS
    end = "_inception-unchecked"
    assert [line.split(":")[0] for line in lines[6:11]] == [
        f"{n}{end}" for n in ("IS", "FD", "sFD", "Precision", "Recall")
    ]
    assert all(math.isfinite(value) for value in numbers_of(lines[6:11]).values())
    assert done.stderr.count("are unchecked") == 1
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(written) == 2

    same = command(ref, ref, *flags, module=True)
    numbers = numbers_of(same.stdout.splitlines()[6:11])
    assert abs(numbers[f"FD{end}"]) < 1e-3 and (numbers[f"Precision{end}"], numbers[f"Recall{end}"]) == (1, 1)
    assert "hold the same images" in same.stderr
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}  # read, not made


def test_unchecked_weights_are_warned_of_once(tmp_path, random_inception, monkeypatch, capsys):
    monkeypatch.setattr(evaluator, "inception_space", lambda path, **options: options["check"])
    for flag, words in (("True", []), ("False", ["random.pth are unchecked: no number is called FID"])):
        flags = ["--inception_weights", str(random_inception), "--check_weights", flag]
        run = parse_run(create_argparser(evaluator.EvaluatorConfig), flags)
        assert evaluator.choose_space(run, ArrayBatch(pixels(8))) is (flag == "True")
        said = capsys.readouterr().err.splitlines()
        assert len(said) == len(words) and all(word in line for word, line in zip(words, said, strict=True))


def test_weights_are_checked_unless_told_otherwise(tmp_path, random_inception):
    batch = npz(tmp_path / "a.npz", arr_0=pixels(8))
    with pytest.raises(UserError, match="random.pth"):
        evaluator.main([str(batch), str(batch), "--inception_weights", str(random_inception)])


# ---- what is wrong with a batch is said in a sentence ----------------------------------------------------------------

GOOD = pixels(6)
UNIT = (GOOD / 255).astype(np.float32)
BAD = {
    "no images": ({"mean": GOOD, "b": GOOD}, "no images .arr_0.*; it holds b, mean: .*make_reference.py"),
    "statistics only": (
        {"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(2), "sigma_s": np.eye(2)},
        "has statistics but no images .arr_0.: precision and recall",
    ),
    "mu alone": ({"arr_0": GOOD, "mu": np.zeros(2)}, "has mu but not sigma, mu_s, sigma_s"),
    "floats from -1": ({"arr_0": UNIT * 2 - 1}, r"float32 from -1 to 1; .*\(\(x \+ 1\) \* 127.5\).round\(\)"),
    "floats to 1": ({"arr_0": UNIT}, r"float32 from 0 to 1; .*\(x \* 255\).round\(\)"),
    "standardised floats": ({"arr_0": UNIT * 6 - 3}, "float32 from -3 to 3; .*convert it to uint8"),
    "floats beyond": ({"arr_0": UNIT * 300}, "values from .* to 300; they must be 0 to 255"),
    "not a number": ({"arr_0": np.where(UNIT > 0.5, np.nan, 100 * UNIT)}, "must be 0 to 255"),
    "sixteen bits": ({"arr_0": GOOD.astype(np.uint16) * 257}, "values from .* to 65[0-9]+; they must be 0 to 255"),
    "booleans": ({"arr_0": GOOD > 9}, "bool .*must be numbers from 0 to 255"),
    "channels first": ({"arr_0": GOOD.transpose(0, 3, 1, 2)}, r"channels first; .*x.transpose\(0, 2, 3, 1\)"),
    "grey": ({"arr_0": GOOD[..., 0]}, "grey; give --grey_to_rgb True"),
    "grey with an axis": ({"arr_0": GOOD[..., :1]}, "grey; give --grey_to_rgb True"),
    "alpha": ({"arr_0": np.concatenate([GOOD, GOOD[..., :1]], axis=3)}, r"RGB with alpha; .*x\[..., :3\]"),
    "zeros and ones": ({"arr_0": GOOD // 128}, r"uint8 from 0 to 1; .*cast from floats in \[0, 1\].*\(x \* 255\)"),
    "zeros": ({"arr_0": GOOD.astype(np.int64) * 0}, "int64 from 0 to 0; it must be 0 to 255"),
    "minus one to one": (
        {"arr_0": (GOOD // 86).astype(np.int8) - 1},
        r"int8 from -1 to 1; .*\[-1, 1\].*\+ 1\) \* 127.5",
    ),
    "two channels": ({"arr_0": GOOD[..., :2]}, r"must be \(N, height, width, 3\)"),
    "one image": ({"arr_0": GOOD[0, 0]}, r"must be \(N, height, width, 3\)"),
    "empty": ({"arr_0": GOOD[:0]}, "holds no images"),
    "three": ({"arr_0": GOOD[:3]}, "holds 3 images; precision and recall need at least 4"),
    "flat": ({"arr_0": GOOD[:, :0]}, "an image must have 1 to"),
    "objects": ({"arr_0": np.array([GOOD, None], dtype=object)}, "Python objects, which are never loaded"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_batch_is_one_sentence(tmp_path, case):
    arrays, words = BAD[case]
    with pytest.raises(UserError, match=words) as caught:
        list(open_batch(npz(tmp_path / "bad.npz", **arrays), "SAMPLE").iterate())
    assert str(caught.value).startswith(f"SAMPLE {tmp_path / 'bad.npz'}") and "\n" not in str(caught.value)


def test_a_cast_of_floats_is_noted_where_it_may_be_meant(tmp_path):
    """0, 1, 254 and 255 are what is left of [-1, 1]; black and white are no such thing, nor is one value more."""
    cast = np.array([0, 1, 254, 255], np.uint8)[GOOD // 64]
    for x, noted in ((cast, 1), (np.where(GOOD < 128, np.uint8(0), np.uint8(255)), 0), (np.maximum(cast, 2), 0)):
        batch = open_batch(npz(tmp_path / "a.npz", arr_0=x), "SAMPLE")
        assert len(batch.notes) == noted and all("cast from floats in [-1, 1]" in note for note in batch.notes)
    last = np.concatenate([cast] * 8)
    last[-1, -1, -1, -1] = 77
    assert not open_batch(npz(tmp_path / "a.npz", arr_0=last), "SAMPLE").notes


@pytest.mark.parametrize(
    "sigma", [np.array([[1, 0.5], [0.4, 1]]), np.array([[1.0, 0.0], [0.0, -1e-3]])], ids=["askew", "negative"]
)
@pytest.mark.parametrize("end", ["", "_s"])
def test_what_is_no_covariance_is_refused(tmp_path, sigma, end):
    stats = {"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}
    with pytest.raises(UserError, match=f"REF .*: sigma{end} is no covariance"):
        _ = NpzBatch(npz(tmp_path / "bad.npz", arr_0=GOOD, **stats | {f"sigma{end}": sigma}), "REF").stats
    rounded = stats | {f"sigma{end}": np.array([[1, 0.5], [0.5 + 1e-7, 0]])}
    assert NpzBatch(npz(tmp_path / "good.npz", arr_0=GOOD, **rounded), "REF").stats


@pytest.mark.parametrize("mu", [np.zeros(0), np.zeros((1, 2)), np.full(2, np.nan), np.array(["a", "b"]), np.zeros(3)])
def test_bad_statistics_are_one_sentence(tmp_path, mu):
    stats = {"mu": mu, "sigma": np.eye(2), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}
    with pytest.raises(UserError, match="stores mu .*must be finite, .d,. and .d, d."):
        _ = NpzBatch(npz(tmp_path / "bad.npz", arr_0=GOOD, **stats), "REF").stats


def header(shape, descr="|u1", fortran=False, version=(1, 0)):
    text = f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text) + 1)
    return b"\x93NUMPY" + bytes(version) + length + text + b"\n"


@pytest.mark.parametrize(
    "head",
    [
        header((10**9, 10**4, 10**4, 3)),
        header((10**9, 10**4, 10**4, 3), fortran=True),
        header((2**62, 2**62, 2**62, 3), version=(2, 0)),
        header((-6, 8, 8, 3)),
        header((7, 8, 8, 3)),
        header((6, 8, 8, 3), descr="|O"),
        header((6, 8, 8, 3))[:20],
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 60_000,
        b"not an array",
    ],
    ids=["huge", "huge by columns", "beyond 64 bits", "negative", "one more", "objects", "cut", "nested", "foreign"],
)
def test_a_header_that_lies_is_found_out_before_memory_is_asked_for(tmp_path, head):
    path = tmp_path / "bad.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", head + GOOD.tobytes())
    with pytest.raises(UserError, match="^REF "):
        list(open_batch(path, "REF").iterate())


@pytest.mark.parametrize("data", [None, b"", b"text", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_archive(tmp_path, data):
    path = tmp_path / "bad.npz"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match="^REF .*bad.npz (does not exist|is not a readable|has no images)"):
        open_batch(path, "REF")


def test_a_truncated_or_altered_archive_is_found_out(tmp_path):
    path = npz(tmp_path / "a.npz", arr_0=GOOD)
    data = bytearray(path.read_bytes())
    for cut in range(0, len(data), 97):
        path.write_bytes(data[:cut])
        with pytest.raises(UserError):
            list(open_batch(path, "REF").iterate())
    data[600] ^= 255  # a pixel: the checksum knows
    path.write_bytes(data)
    with pytest.raises(UserError, match="was it copied whole"):
        list(open_batch(path, "REF").iterate())


@pytest.mark.parametrize("labels", [np.zeros(5, int), np.zeros((6, 2), int), np.zeros(6), np.array([None] * 6)])
def test_labels_that_do_not_fit_are_left_out_with_a_warning(tmp_path, labels):
    if labels.dtype == object:
        with pytest.raises(UserError, match="arr_1 holds Python objects"):
            open_batch(npz(tmp_path / "a.npz", arr_0=GOOD, arr_1=labels), "REF")
        return
    batch = open_batch(npz(tmp_path / "a.npz", arr_0=GOOD, arr_1=labels), "REF")
    assert batch.labels is None and "not one integer an image (6); ignored" in batch.notes[0]


def test_other_resolutions_and_the_same_images_are_warned_of():
    small, large = ArrayBatch(pixels(6, 8), flag="REF"), ArrayBatch(pixels(6, 16), flag="SAMPLE")
    space = FeatureSpace("user", "", dict)  # says no size
    line = "REF is 8 x 8 and SAMPLE 16 x 16:"
    assert evaluator.input_warnings(small, large, space) == [f"{line} the distance is also one of resolutions"]
    for size, resized in ((8, "SAMPLE"), (16, "REF"), (64, "REF and SAMPLE")):
        how = f"{resized} brought to {size} x {size} for the user features, which may add to the distance"
        assert evaluator.input_warnings(small, large, space._replace(size=size)) == [f"{line} {how}"]
    assert not evaluator.input_warnings(small, ArrayBatch(pixels(6, seed=1)), space)
    assert not evaluator.input_warnings(small, ArrayBatch(pixels(7)), space)
    (same,) = evaluator.input_warnings(small, ArrayBatch(pixels(6)), space)
    assert "REF and SAMPLE hold the same images" in same


def test_samples_as_reference_are_warned_of(tmp_path):
    """By the file's name, and by what lies in the folder that the sampler wrote; a reference beside it is none."""
    sampled = tmp_path / "samples"
    draw_users(sampled / "png", ["user_00", "user_01"], 3, size=8)
    real = draw_users(tmp_path / "real", ["user_00", "user_01"], 3, size=8)
    save_samples(sampled, Samples(pixels(6), None))
    npz(sampled / "reference.npz", arr_0=pixels(6))
    space = FeatureSpace("user", "", dict)
    for path, swapped in (
        *((sampled, True), (sampled / "png", True), (sampled / "samples_6x8x8x3.npz", True)),
        *((sampled / "reference.npz", False), (real, False)),
    ):
        other = ArrayBatch(pixels(7, seed=3))
        said = evaluator.input_warnings(open_batch(path, "REF"), other, space)
        assert [f"REF {path} looks like the sampler's" in line for line in said] == [True] * swapped, path


def test_the_command_says_it_in_a_line_and_exits_with_2(tmp_path):
    done = command(npz(tmp_path / "a.npz", arr_0=UNIT), tmp_path / "none.npz")
    assert done.returncode == 2
    assert done.stderr.startswith("error: REF ") and done.stderr.count("\n") == 1 and not done.stdout
    with pytest.raises(UserError, match="required: SAMPLE"):
        evaluator.main(["only_one.npz"])


# ---- where results go ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--json", "."], "--json .* is a folder; give the name of a file in it"),
        (["--html", "a.npz/page.html"], "--html .*a.npz is a file, so nothing can be written below it"),
        (["--json", "same", "--html", "./same"], "--html ./same is --json, too; give another name"),
        (["--json", "a.npz"], "--json a.npz is REF, too"),
        (["--html", "b.npz"], "--html b.npz is SAMPLE, too"),
        (["--seed", "-1"], "--seed is -1; it must be 0 or more"),
    ],
)
def test_a_wrong_place_is_found_out_before_anything_is_computed(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluator, "choose_space", None)
    for i, name in enumerate("ab"):
        npz(tmp_path / f"{name}.npz", arr_0=pixels(8, seed=i))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=words):
        evaluator.main(["a.npz", "b.npz", *flags])
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


# ---- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 4, 64])
@pytest.mark.parametrize("how", ["plain", "compressed", "by columns", "big-endian floats", "long", "version 2"])
def test_images_come_as_they_are_stored(tmp_path, how, step):
    path, x = tmp_path / "a.npz", pixels(10)
    if how == "version 2":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", header(x.shape, version=(2, 0)) + x.tobytes())
    else:
        kinds = {"by columns": np.asfortranarray(x), "big-endian floats": x.astype(">f4"), "long": x.astype(np.int64)}
        (np.savez_compressed if how == "compressed" else np.savez)(path, arr_0=kinds.get(how, x))
    blocks = list(open_batch(path, "REF").iterate(step))
    assert [len(block) for block in blocks] == [min(step, 10 - i) for i in range(0, 10, step)]
    assert np.array_equal(np.concatenate(blocks), x)
    assert np.array_equal(open_batch(path, "REF").take([7, 2]), x[[2, 7]])


@pytest.mark.parametrize("axis", [True, False])
def test_grey_is_repeated_if_told_so(tmp_path, axis):
    grey = GOOD[..., :1] if axis else GOOD[..., 0]
    batch = open_batch(npz(tmp_path / "a.npz", arr_0=grey), "REF", grey_to_rgb=True)
    assert batch.shape == GOOD.shape
    assert np.array_equal(next(batch.iterate()), np.repeat(GOOD[..., :1], 3, axis=3))


def test_a_folder_is_read_as_its_files_are(tmp_path):
    draw_users(tmp_path / "real", ["user_03", "user_11"], 3, size=8)
    batch = open_batch(tmp_path / "real", "REF")
    wanted = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "real").rglob("*.png"))]
    assert np.array_equal(np.concatenate(list(batch.iterate(4))), wanted)
    assert batch.labels.tolist() == [0, 0, 0, 1, 1, 1] and batch.class_names == ["user_03", "user_11"]
    before = batch.digest
    Image.fromarray(GOOD[0]).save(tmp_path / "real" / "user_03" / "1.png")
    assert open_batch(tmp_path / "real", "REF").digest != before


def test_images_of_two_sizes_are_refused_unless_one_is_given(tmp_path):
    folder = draw_users(tmp_path / "real", ["a", "b"], 3, size=8)
    big = np.repeat(np.repeat(GOOD[0], 2, axis=0), 2, axis=1)
    Image.fromarray(big).save(folder / "b" / "1.png")
    with pytest.raises(UserError, match="REF: .*1.png is 16 x 16 pixels, .* 8 x 8: .*--image_size"):
        list(open_batch(folder, "REF").iterate())
    assert np.array_equal(open_batch(folder, "REF", image_size=8).take([4])[0], GOOD[0])


def test_a_bad_image_is_named_and_can_be_left_out(tmp_path):
    folder = draw_users(tmp_path / "real", ["a", "b"], 3, size=8)
    (folder / "a" / "2.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="^REF: .*2.png cannot be read"):
        list(open_batch(folder, "REF").iterate())
    said = []
    assert len(open_batch(folder, "REF", skip_bad_images=True, say=said.append)) == 5
    assert "2.png" in said[0]


def test_a_folder_of_training_and_test_images_is_no_set(tmp_path):
    for part in ("val", "train"):
        draw_users(tmp_path / "data" / part, ["a", "b"], 2, size=8)
    for flag in ("REF", "SAMPLE"):
        with pytest.raises(UserError, match=f"^{flag} .*data holds train, val, .*: give one, such as .*data/train$"):
            open_batch(tmp_path / "data", flag)
    assert len(open_batch(tmp_path / "data" / "val", "REF")) == 4


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: None])
def test_a_folder_without_images_is_named(tmp_path, make):
    make(tmp_path / "real")
    with pytest.raises(UserError, match="^SAMPLE .*(holds no images|does not exist)"):
        open_batch(tmp_path / "real", "SAMPLE")
