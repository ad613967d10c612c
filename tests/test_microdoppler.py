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
    for joint, peak, tolerance in (("ankle", 4.95, 0.15), ("toe", 5.97, 0.2), ("knee", 2.76, 0.3), ("hand", 3.1, 0.3)):
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


def test_no_foot_is_below_the_floor_and_the_planted_one_stands_still():
    walker = Walker(relative_speed=1.5)
    time_s, joints = track(walker)
    q = (time_s / walker.cycle_s) % 1
    planted = (q > 0.12) & (q < walker.support - 0.14)
    assert np.abs(forward_speed(joints["right_ankle"])[planted]).max() < 0.02
    assert min(joints[f"{side}_{name}"][:, 2].min() for side in ("left", "right") for name in ("ankle", "toe")) >= 0


def test_left_does_half_a_cycle_later_what_right_does():
    walker = Walker(relative_speed=1.5)
    time_s, joints = track(walker, cycles=6)
    half = round(walker.cycle_s / 2 / DT)
    right, left = (forward_speed(joints[f"{side}_ankle"]) for side in ("right", "left"))
    cycle = 2 * half
    assert np.abs(right[cycle : 3 * cycle] - left[cycle + half : 3 * cycle + half]).max() < 0.1


@pytest.mark.parametrize("edge", [0.5, 1.3])
@pytest.mark.parametrize("curves", [gait.leg_angles, lambda rv, q, support: gait.arm_angles(rv, q)])
def test_curves_are_continuous_where_the_regimes_meet(edge, curves):
    q = np.linspace(0, 1, 50, endpoint=False)
    for below, above in zip(curves(edge - 1e-9, q, 0.6), curves(edge, q, 0.6), strict=True):
        assert np.abs(below - above).max() < 1.1


def test_a_mover_at_constant_speed_is_a_line_at_two_v_over_lambda():
    """77 GHz: 513.7 Hz per m/s; the line stands in the row of its velocity."""
    assert microdoppler.doppler_hz(1.0, 77.0) == pytest.approx(513.7, abs=0.1)
    prf = microdoppler.prf_for(24.0)
    time_s = np.arange(3 * prf) / prf
    for velocity in (-2.0, 0.5, 1.4, 5.0):
        signal = np.exp(2j * np.pi * microdoppler.doppler_hz(velocity, 24.0) * time_s).astype(np.complex64)
        power = microdoppler.spectrum(signal, carrier_ghz=24.0, prf_hz=prf, size=64)
        low, high = microdoppler.VELOCITY_MPS
        row = (high - velocity) / (high - low) * 64
        assert abs((power.argmax(axis=0) + 0.5) - row).max() <= 1.0


def test_the_torso_line_stands_at_the_walking_speed():
    for rv in (1.1, 1.6):
        walker = Walker(relative_speed=rv)
        _, places, strengths = microdoppler.draw_person(0, 0)
        body = {"places": tuple(places), "strengths": tuple(strengths)}
        scene = Scene(walker=walker, **body, snr_db=40, clutter_db=-60)
        db = microdoppler.spectrogram_db(scene, np.random.default_rng(0), size=128)
        low, high = microdoppler.VELOCITY_MPS
        speed = high - (db.argmax(axis=0) + 0.5) * (high - low) / 128
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


def test_the_script_writes_sessions_apart_and_says_the_truth(tmp_path):
    """Whatever the number of processes, the same files; an interrupted run makes only what is missing."""
    flags = ["--num_users", 2, "--train_images", 2, "--val_images", 1, "--test_images", 1, "--image_size", 32]
    for workers in (1, 2):
        script("simulate_microdoppler.py", "--out_dir", tmp_path / str(workers), "--workers", workers, *flags)
    rows = list(csv.DictReader((tmp_path / "1" / "manifest.csv").open()))
    assert len(rows) == 8
    sessions = {split: {row["session"] for row in rows if row["split"] == split} for split in ("train", "val", "test")}
    assert not sessions["train"] & sessions["val"] and not (sessions["train"] | sessions["val"]) & sessions["test"]
    for row in rows:
        assert 0.5 < float(row["speed_mps"]) < 2.5 and 1.2 < float(row["cadence_hz"]) < 2.6
        a, b = (np.asarray(Image.open(tmp_path / run / row["file"])) for run in ("1", "2"))
        assert a.shape == (32, 32, 3) and np.array_equal(a, b)


@pytest.mark.parametrize(
    "field, value", [("carrier_ghz", 60.0), ("num_users", 0), ("colormap", "hot"), ("clip_db", -1)]
)
def test_bad_settings_name_the_flag(field, value):
    with pytest.raises((UserError, ValueError), match=f"--{field}"):
        SimulationConfig(**{field: value})


# ---- pictures of power -----------------------------------------------------------------------------------------------


def test_decibels_come_back():
    db = np.linspace(-45, 0, 10)
    assert spectrogram.db_from_unit(spectrogram.unit_from_db(db)) == pytest.approx(db)
    assert spectrogram.unit_from_db(np.array([-80.0, 20.0])).tolist() == [-1, 1]
    with pytest.raises(ValueError, match="below the ceiling"):
        spectrogram.unit_from_db(db, 0, -40)


@pytest.mark.parametrize("name", spectrogram.ANCHORS)
def test_colours_come_back(name):
    unit = np.linspace(-1, 1, 256)
    values, distance = spectrogram.unit_from_colours(spectrogram.colours_from_unit(unit, name), name)
    assert np.abs(values - unit).max() < 0.02 and distance.max() == 0
    off_map = np.array([[255, 255, 255], [0, 90, 0]], np.uint8)
    if name == "jet":
        assert (spectrogram.unit_from_colours(off_map, name)[1] > 50).all()
