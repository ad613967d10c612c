"""The validation as a whole: its settings, its parts one after the other, and what it leaves behind."""

import json
import re

import numpy as np
import pytest
from helpers import ROOT, save_sets, script
from PIL import Image

from evaluations import validation
from evaluations.findings import Finding, Section
from evaluations.image_sets import ImageSet
from evaluations.report import GENERATED, SAME, SHUFFLED, SPLIT, Report, Scores
from evaluations.short import in_short
from evaluations.validation import PARTS, ValidationConfig, statistics_section, validate, write_validation
from guided_diffusion_vae.config import UserError, create_argparser, parse_run

USERS = 12
NAMES = [f"user_{i:02d}" for i in range(USERS)]


def noise(seed, each=6, size=8, labels=True):
    """Every user `each` pictures of noise."""
    pixels = np.random.RandomState(seed).randint(0, 256, (USERS * each, size, size, 3)).astype(np.uint8)
    users = np.repeat(np.arange(USERS), each)
    return ImageSet(pixels, users if labels else None, NAMES if labels else None)


def section(*findings, **data):
    return Section(title="t", findings=list(findings), data=data)


def fd(value, worst, real=10.0):
    return Finding(name="FD_user", value=value, real=real, worst=worst, form="{:.1f}", distance=True)


def table(short, title):
    return next((t.rows for t in short.tables if t.title == title), [])


def test_distances_stand_between_real_images_and_shuffled_ones():
    rows = {
        name: Scores(fd_user=number, precision=number / 100, user_accuracy=1.0, near_copies=0.0)
        for name, number in ((GENERATED, 20.0), (SAME, 10.0), (SHUFFLED, 40.0), (SPLIT, 6.0))
    }
    found = statistics_section(Report(rows, {"compared": 5, "heldout_images": 7}, notes=["beware"]))
    by_name = {finding.name: finding for finding in found.findings}
    distance = by_name["FD_user"]
    assert (distance.value, distance.real, distance.worst) == (20, 10, 40)
    assert distance.place == pytest.approx(0.5)  # of ratios: 20 is halfway from 40 to 10
    assert by_name["precision"].place == pytest.approx((0.2 - 0.4) / (0.1 - 0.4))
    assert by_name["KID_user"].value is None and not {"user accuracy", "near copies", "nearest"} & set(by_name)
    assert found.data["FD_user_floor"] == 6 and "beware" in found.notes
    assert distance.about == "5 images against 7 held-out images"
    assert [row[0] for row in table(in_short([found]), "where FD_user stands")] == ["6.00", "10.00", "20.00", "40.00"]


# ---- the settings ----------------------------------------------------------------------------------------------------


def settings(*flags):
    return parse_run(create_argparser(ValidationConfig), list(flags)).section(ValidationConfig)


@pytest.mark.parametrize(
    "flags, chosen",
    [
        ([], list(PARTS)),
        (["--parts", "all"], list(PARTS)),
        (["--parts", "leaks,all"], list(PARTS)),
        (["--parts", "leaks, statistics"], ["statistics", "leaks"]),
        (["--parts", "leaks", "physics", "leaks"], ["physics", "leaks"]),
    ],
)
def test_parts_are_words(flags, chosen):
    assert settings(*flags).chosen == chosen


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--parts", "leaks,fid"], "--parts has 'fid'; choose of classifier, .*, or all"),
        (["--parts", ","], "--parts is empty"),
        (["--seed", "-1"], "--seed is -1; it must be 0 or more"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--sift_method", "box"], "--sift_method is 'box'; choose ranges, hull"),
        (["--embedding_loss", "l2"], "--embedding_loss is 'l2'"),
    ],
)
def test_wrong_flags_are_named(flags, words):
    with pytest.raises(UserError, match=words):
        settings(*flags)


def test_the_help_speaks_of_this_command():
    said = " ".join(create_argparser(ValidationConfig).format_help().split())
    assert "empty: validation/" in said and "report/ beside" not in said
    assert "of every classifier and of the embedding" in said


# ---- one part after the other ----------------------------------------------------------------------------------------


def picture(value):
    return Image.fromarray(np.full((2, 2, 3), value, np.uint8))


@pytest.fixture
def parts(monkeypatch):
    """Three parts whose findings are known; put an exception in place of a section to let a part fail."""
    made = {
        "statistics": section(fd(30.0, 400.0)),
        "sifting": section(accepted=np.array([True, False] * (USERS * 3)), reasons=["", "torso below"] * (USERS * 3)),
        "memorisation": Section(title="m", pictures={"closest_pairs.png": picture(7)}),
    }

    def part(name):
        def run(train, heldout, samples, config, progress):
            if isinstance(made[name], Exception):
                raise made[name]
            return made[name]

        return run

    monkeypatch.setattr(validation, "PARTS", {name: part(name) for name in made})
    return made


def kept(folder, **options):
    """Validate noise with the parts put in, and write the report after every part."""
    written, seen, samples = [], [], noise(2)

    def keep(sections):
        seen.append((list(sections), sections["in short"].notes))
        written[:] = write_validation(folder, sections, samples, {"parts": ("a", "b")})

    validate(noise(0), noise(1), samples, ValidationConfig(**options), say=lambda text: None, keep=keep)
    return sorted(path.name for path in written), seen


def test_the_report_grows_part_by_part(parts, tmp_path):
    names, seen = kept(tmp_path)
    assert names == ["accepted.csv", "closest_pairs.png", validation.BESIDE, "report.html", "report.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [sections for sections, _ in seen] == [["in short", "beside", *list(parts)[:n]] for n in (1, 2, 3)]
    unfinished = ["sifting, memorisation", "memorisation"]
    assert [notes for _, notes in seen] == [[f"unfinished: {parts} not there yet"] for parts in unfinished] + [[]]
    assert (tmp_path / "accepted.csv").read_text().splitlines()[:3] == [
        "image,accepted,reason",
        "0,1,",
        "1,0,torso below",
    ]
    assert "<td>a, b</td>" in (tmp_path / "report.html").read_text()


def test_a_fault_loses_nothing_of_what_was_there(parts, tmp_path):
    parts["memorisation"] = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        kept(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [part["title"] for part in report["sections"]] == ["In short", "Real beside generated", "t", "t"]
    assert report["sections"][0]["notes"][0] == "unfinished: memorisation not there yet"
    assert (tmp_path / "accepted.csv").exists()


def test_of_a_former_report_nothing_is_left_and_of_others_everything(parts, tmp_path):
    kept(tmp_path)
    (tmp_path / "mine.png").write_bytes(b"not ours")
    names, _ = kept(tmp_path, parts=("statistics",))
    assert names == [validation.BESIDE, "report.html", "report.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.png", *names]


def test_all_that_parts_draw_is_known():
    files = ("classifier_tests", "verification", "measure", "physics", "sifting", "memorization", "leaks")
    source = "".join((ROOT / "evaluations" / f"{name}.py").read_text() for name in files)
    assert set(re.findall(r'"(\w+\.png)"', source)) == {*validation.MADE} - {"accepted.csv", validation.BESIDE}


def test_each_part_is_a_function_of_its_name():
    assert list(PARTS) == validation.ValidationConfig(parts=("all",)).chosen
    words = create_argparser(ValidationConfig).format_help().replace("\n", "").replace(" ", "")
    assert ",".join(PARTS) in words


# ---- what can be known at the start ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, images, words",
    [
        ({"open_set_users": 11}, 6, "--open_set_users is 11 of 12 users"),
        ({"sift_method": "hull"}, 4, "--real_dir has 4 images of user_00; --sift_method hull needs at least 5"),
        ({}, 3, "--real_dir has 3 images of user_00"),
    ],
)
def test_nothing_is_learned_where_a_later_part_must_fail(monkeypatch, options, images, words):
    monkeypatch.setattr(validation, "PARTS", dict.fromkeys(PARTS, None))  # a part that is called is a TypeError
    with pytest.raises(UserError, match=words):
        validate(noise(0, each=images), noise(1), noise(2), ValidationConfig(**options))


@pytest.mark.parametrize("parts", [("physics",), ("leaks", "statistics")])
def test_what_is_not_asked_is_not_checked(monkeypatch, parts):
    monkeypatch.setattr(validation, "PARTS", {name: lambda *args: section() for name in PARTS})
    config = ValidationConfig(parts=parts, open_set_users=11, sift_method="hull")
    found = validate(noise(0, each=4), noise(1), noise(2), config, say=lambda text: None)
    assert set(found) == {"beside", *parts}  # and nothing in short of parts without numbers
    unlabelled = ValidationConfig(parts=("verification",), open_set_users=11)  # nobody is verified then
    assert validate(noise(0), noise(1), noise(2, labels=False), unlabelled, say=lambda text: None)


def test_every_part_is_announced_and_timed(parts):
    said = []
    validate(noise(0), noise(1), noise(2), ValidationConfig(parts=("sifting", "statistics")), say=said.append)
    assert [line for line in said if line.startswith("part")] == [
        "part 1 of 2, statistics: begins",
        "part 1 of 2, statistics: 0 s",
        "part 2 of 2, sifting: begins",
        "part 2 of 2, sifting: 0 s",
    ]
    assert said[0].startswith("part 1") and said[-1].strip().startswith("In short")


def test_unlabelled_samples_are_said_first_and_in_short(parts):
    said = []
    found = validate(noise(0), noise(1), noise(2, labels=False), ValidationConfig(), say=said.append)
    assert "an .npz with labels in arr_1, or a folder" in said[0] and "TRTS, TSTR" in said[0]
    assert said[0] == f"note: {found['in short'].notes[0]}"


def test_the_picture_shows_held_out_images_of_eight_users_beside_generated_ones(parts):
    held, made = noise(1, size=16), noise(2, size=16)
    found = validate(noise(0, size=16), held, made, ValidationConfig(parts=("statistics",)), say=lambda text: None)
    picture = np.asarray(found["beside"].pictures[validation.BESIDE])
    assert picture.shape[0] == 16 + 8 * 20
    second = picture[36:52]  # of 12 users the second that is shown is user_01
    assert np.array_equal(second[:, 68:84], held.pixels[6]) and np.array_equal(second[:, 160:176], made.pixels[6])
    assert [user * 12 // 8 for user in range(8)][-1] == 10
    assert np.array_equal(picture[156:172, 68:84], held.pixels[60])


def test_the_parts_are_called_as_they_are_meant_to_be(tmp_path):
    """The quick ones for real: no argument is left out or renamed."""
    config = ValidationConfig(parts=("physics", "sifting", "memorisation", "leaks"), sift_method="hull")
    found = validate(noise(0, size=32), noise(1, size=32), noise(2, size=32), config, say=lambda text: None)
    assert list(found) == ["in short", "beside", "physics", "sifting", "memorisation", "leaks"]
    assert write_validation(tmp_path, found, noise(2, size=32), {})[0] == tmp_path / "report.html"
    assert any(row[0] == "Are they no copies?" for row in table(found["in short"], "answers"))


@pytest.mark.slow
def test_the_command(tmp_path):
    flags = save_sets(tmp_path, noise(0, each=4), noise(1, each=2), noise(2, each=2))
    done = script("validate.py", *flags, "--parts", "sifting,leaks")
    out = tmp_path / "validation"
    written = {out / "report.html", out / "report.json", out / "accepted.csv", *out.glob("*.png")}
    said = done.stdout.splitlines()[-1]
    assert said.startswith("written: ") and set(said.removeprefix("written: ").split(", ")) == set(map(str, written))
    (tmp_path / "file").write_text("")
    failed = script("validate.py", *flags, "--out_dir", tmp_path / "file", check=False)
    assert failed.returncode == 2 and "--out_dir" in failed.stderr and "is a file" in failed.stderr
