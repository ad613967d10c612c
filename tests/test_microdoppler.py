"""The simulator against known figures of walking, against physics, and against itself."""

import csv

import numpy as np
import pytest
from helpers import script
from PIL import Image

from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.data import gait, microdoppler, spectrogram
from guided_diffusion_vae.data.gait import Walker, walk
from guided_diffusion_vae.data.microdoppler import Scene, SimulationConfig

DT = 1 / 1000


def track(walker, cycles=4, phase=0.0):
    time_s = np.arange(0, cycles * walker.cycle_s, DT)
    return time_s, walk(walker, time_s, phase + time_s / walker.cycle_s)


def forward_speed(points):
    return np.gradient(points[:, 0], DT)


def test_figures_of_a_comfortable_walk():
    """H 1.75 m, RV 1.6: 1.37 m/s, 1.06 s a cycle, 113 steps a minute, .73 m a step; peak speeds of the joints."""
    walker = Walker(height_m=1.75, relative_speed=1.6)
    assert walker.speed_mps == pytest.approx(1.37, abs=0.01)
    assert walker.cycle_s == pytest.approx(1.06, abs=0.01)
    assert 120 / walker.cycle_s == pytest.approx(113, abs=0.5)
    assert walker.speed_mps * walker.cycle_s / 2 == pytest.approx(0.73, abs=0.01)
    _, joints = track(walker)
    for joint, peak, tolerance in (("ankle", 4.95, 0.15), ("toe", 5.97, 0.3), ("knee", 2.76, 0.3), ("hand", 3.1, 0.3)):
        assert forward_speed(joints[f"right_{joint}"]).max() == pytest.approx(peak, abs=tolerance), joint
    base = forward_speed(joints["base"])
    assert (base.min(), base.max()) == (pytest.approx(1.13, abs=0.06), pytest.approx(1.62, abs=0.06))


@pytest.mark.parametrize("rv", [0.4, 0.9, 1.3, 1.6, 2.2])
def test_every_joint_keeps_up_with_the_walk(rv):
    walker = Walker(relative_speed=rv)
    time_s, joints = track(walker, cycles=5)
    for name, points in joints.items():
        cycle = round(walker.cycle_s / DT)
        strides = (points[cycle::cycle, 0] - points[:-cycle:cycle, 0])[1:3]
        assert strides == pytest.approx(walker.speed_mps * walker.cycle_s, rel=0.03), name


@pytest.mark.parametrize("rv", [0.9, 1.2, 1.5, 1.9])
def test_no_foot_is_below_the_floor_and_the_planted_one_stands_still(rv):
    """The ankle until it lifts, the toe until it leaves: no false tail at -1 m/s while the foot rolls off."""
    walker = Walker(relative_speed=rv)
    time_s, joints = track(walker)
    q = (time_s / walker.cycle_s) % 1
    for name, lift in (("ankle", walker.support - 0.14), ("toe", walker.support - 0.06)):
        speed = forward_speed(joints[f"right_{name}"])
        assert np.abs(speed[(q > 0.12) & (q < lift)]).max() < 0.02, name
        assert speed[(q > 0.12) & (q < 0.9)].min() > -0.06, name
    assert min(joints[f"{side}_{name}"][:, 2].min() for side in ("left", "right") for name in ("ankle", "toe")) >= 0


@pytest.mark.parametrize("rv", [0.4, 0.9, 1.29, 1.31, 1.6, 2.2])
def test_no_joint_jumps(rv):
    """Toward the radar no speed changes by 0.3 m/s in a millisecond: a jump would be a click across all velocities."""
    _, joints = track(Walker(relative_speed=rv))
    for name, points in joints.items():
        assert np.abs(np.diff(forward_speed(points))).max() < 0.3, name


def test_the_heel_strikes_differ_by_the_limp():
    """Asymmetry 0.2: the right hip swings half as far again as the left."""
    reach = {}
    for asymmetry in (0.0, 0.2):
        _, joints = track(Walker(hip_asymmetry=asymmetry))
        thigh = {s: joints[f"{s}_knee"][:, 0] - joints[f"{s}_hip"][:, 0] for s in ("right", "left")}
        reach[asymmetry] = np.ptp(thigh["right"]) / np.ptp(thigh["left"])
    assert reach[0.0] == pytest.approx(1.0, abs=0.02) and reach[0.2] == pytest.approx(1.5, abs=0.1)


def test_left_does_half_a_cycle_later_what_right_does():
    walker = Walker(relative_speed=1.5)
    time_s, joints = track(walker, cycles=6)
    half = round(walker.cycle_s / 2 / DT)
    right, left = (forward_speed(joints[f"{side}_ankle"]) for side in ("right", "left"))
    cycle = 2 * half
    assert np.abs(right[cycle : 3 * cycle] - left[cycle + half : 3 * cycle + half]).max() < 0.1


@pytest.mark.parametrize("edge", [0.5, 1.3])
def test_curves_are_continuous_where_the_regimes_meet(edge):
    """The hip excepted: from RV 1.3 on one of its control points parts into two, which moves the spline by 0.65 deg."""
    q = np.linspace(0, 1, 200, endpoint=False)

    def curves(rv):
        legs, arms, trunk = gait.leg_angles(rv, q, 0.6), gait.arm_angles(rv, q), gait.trunk_angles(rv, q)
        return dict(zip(("hip", "knee", "ankle"), legs, strict=True)), [*arms, *trunk, *gait.spine(rv, q, 0.6).T]

    (below, rest_below), (above, rest_above) = curves(edge - 1e-9), curves(edge + 1e-9)
    for name in below:
        assert np.abs(below[name] - above[name]).max() < (0.65 if (name, edge) == ("hip", 1.3) else 1e-5), name
    assert np.abs(np.array(rest_below) - np.array(rest_above)).max() < 1e-5


def test_the_torso_line_stands_at_the_walking_speed():
    for rv in (1.1, 1.6):
        walker = Walker(relative_speed=rv)
        _, places, strengths = microdoppler.draw_person(0, 0)
        body = {"places": tuple(places), "strengths": tuple(strengths)}
        scene = Scene(walker=walker, **body, snr_db=40, clutter_db=-60)
        db = microdoppler.spectrogram_db(scene, np.random.default_rng(0), size=128)
        speed = spectrogram.row_axis(128, microdoppler.VELOCITY_MPS)[db.argmax(axis=0)]
        assert np.median(speed) == pytest.approx(walker.speed_mps, abs=0.12)


def test_the_same_name_is_the_same_picture_and_another_is_not():
    config = SimulationConfig(image_size=32)
    pictures = [microdoppler.render(config, *name)[0] for name in ((3, 0, 1), (3, 0, 1), (3, 0, 2), (4, 0, 1))]
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2]) and not np.array_equal(pictures[0], pictures[3])


def test_persons_differ_more_than_walks_of_one_person():
    """Cadence and speed: the spread between persons is at least twice that within a session."""
    values = np.array(
        [
            [
                (s.walker.speed_mps, 2 / s.walker.cycle_s)
                for s in (microdoppler.draw_scene(0, u, 0, i) for i in range(8))
            ]
            for u in range(31)
        ]
    )
    between, within = values.mean(axis=1).std(axis=0), values.std(axis=1).mean(axis=0)
    assert (between > 2 * within).all()


def test_received_power_falls_with_the_fourth_power_of_the_range():
    """Twice as far is 12 dB less, but for the aspect, which changes a little."""
    _, places, strengths = microdoppler.draw_person(0, 0)
    body = {"walker": Walker(), "places": tuple(places), "strengths": tuple(strengths), "stride_jitter": 0.0}
    power = {}
    for range_m in (20.0, 40.0):
        scene = Scene(**body, range_m=range_m)
        signal = microdoppler.echo(scene, np.random.default_rng(0), carrier_ghz=5.8, duration_s=1.5, prf_hz=600.0)
        power[range_m] = 10 * np.log10(np.mean(np.abs(signal) ** 2))
    assert power[20.0] - power[40.0] == pytest.approx(12, abs=1.5)


def test_who_walks_away_is_below_zero():
    _, places, strengths = microdoppler.draw_person(0, 0)
    body = {"places": tuple(places), "strengths": tuple(strengths), "snr_db": 40, "clutter_db": -60}
    scene = Scene(walker=Walker(relative_speed=1.6), **body, heading_deg=180.0)
    db = microdoppler.spectrogram_db(scene, np.random.default_rng(0))
    speed = spectrogram.row_axis(64, microdoppler.VELOCITY_MPS)[db.argmax(axis=0)]
    assert np.median(speed) == pytest.approx(-scene.walker.speed_mps, abs=0.2)


def test_the_script_writes_sessions_apart_and_says_the_truth(tmp_path):
    """Whatever the number of processes, the same files; an interrupted run makes only what is missing."""
    settings = {"num_users": 2, "train_images": 2, "val_images": 1, "test_images": 1, "image_size": 32}
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    script("simulate_microdoppler.py", "--out_dir", tmp_path / "2", "--workers", 2, *flags)
    config = SimulationConfig(out_dir=str(tmp_path / "1"), workers=1, **settings)
    microdoppler.simulate_dataset(config)
    file = tmp_path / "1" / "train" / "user_01" / "user_01_s01_0001.png"
    before = file.read_bytes()
    file.unlink()
    microdoppler.simulate_dataset(config)
    assert file.read_bytes() == before
    rows = list(csv.DictReader((tmp_path / "1" / "manifest.csv").open()))
    assert len(rows) == 8
    sessions = {split: {row["session"] for row in rows if row["split"] == split} for split in ("train", "val", "test")}
    assert not sessions["train"] & sessions["val"] and not (sessions["train"] | sessions["val"]) & sessions["test"]
    for row in rows:
        assert 0.5 < float(row["speed_mps"]) < 2.5 and 1.2 < float(row["cadence_hz"]) < 2.6
        a, b = (np.asarray(Image.open(tmp_path / run / row["file"])) for run in ("1", "2"))
        assert a.shape == (32, 32, 3) and np.array_equal(a, b)


@pytest.mark.parametrize(
    "field, value",
    [("carrier_ghz", 60.0), ("num_users", 0), ("colormap", "hot"), ("clip_db", -1.0), ("seed", -1), ("duration_s", 0.5)]
    + [("image_size", 4), ("workers", -1)],
)
def test_bad_settings_name_the_flag(field, value):
    with pytest.raises((UserError, ValueError), match=f"--{field}"):
        SimulationConfig(**{field: value})


def test_a_folder_holds_the_pictures_of_one_setting(tmp_path):
    """Else the pictures of one seed would stand under the manifest of another."""
    out_dir = str(tmp_path / "set")
    microdoppler.claim_folder(SimulationConfig(out_dir=out_dir, workers=1))
    microdoppler.claim_folder(SimulationConfig(out_dir=out_dir, workers=2))  # the same pictures
    with pytest.raises(UserError, match="--seed is 1, but .* made with 0"):
        microdoppler.claim_folder(SimulationConfig(out_dir=out_dir, seed=1))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a folder"):
        microdoppler.claim_folder(SimulationConfig(out_dir=str(tmp_path / "file")))


def test_refining_keeps_what_is_straight_or_bent():
    """Catmull-Rom is exact for a parabola, and starts at the second instant."""
    coarse, fine = np.arange(10.0), 1 + np.arange(35) / 5
    assert microdoppler.refine(2 * coarse**2 - coarse, 5) == pytest.approx(2 * fine**2 - fine)


def test_nothing_to_simulate_is_an_error():
    with pytest.raises(UserError, match="nothing would be simulated"):
        SimulationConfig(train_images=0, val_images=0, test_images=0)
