"""How people walk: the kinematic model of Boulic, Thalmann and Thalmann (1990), in the form of Chen (2011).

One parameter rules the gait: RV, the speed in hip heights per second, valid in (0, 3]. Translations and joint angles
are functions of the phase q in [0, 1) of the right leg's cycle; a left limb does at q what the right does at q + 1/2.

    cycle length = 1.346 sqrt(RV) hip heights,      cycle time = cycle length / RV

Mended against Chen's published code: the elbow is continuous at RV = 1.3, the forward motion is in metres, no foot
dips through the floor, and a foot on the ground stands still: its heel until it lifts, its toe until it leaves.
"""

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

SEGMENTS = {  # lengths as fractions of body height
    "head": 0.130,
    "half_shoulder": 0.1295,
    "torso": 0.288,
    "half_hip": 0.0955,
    "upper_leg": 0.245,
    "lower_leg": 0.246,
    "foot": 0.143,
    "upper_arm": 0.188,
    "lower_arm": 0.152,
}
HIP_HEIGHT = 0.491  # fraction of body height


@dataclass(frozen=True, kw_only=True)
class Walker:
    """Who walks, and how: what one person keeps from image to image, and what one walk adds."""

    height_m: float = 1.75
    relative_speed: float = 1.5  # RV: hip heights per second
    cadence_factor: float = 1.0  # steps per second, relative to the model's; the speed stays
    arm_swing: float = 1.0  # 0: hands in pockets
    hip_asymmetry: float = 0.0  # the right hip swings 1 + a times, the left 1 - a times; 0.2 is a limp
    knee_factor: float = 1.0
    sway: float = 1.0  # of the trunk

    @property
    def hip_height_m(self) -> float:
        return HIP_HEIGHT * self.height_m

    @property
    def speed_mps(self) -> float:
        """Mean walking speed, m/s."""
        return self.relative_speed * self.hip_height_m

    @property
    def cycle_s(self) -> float:
        """Time of two steps, s."""
        return 1.346 / np.sqrt(self.relative_speed) / self.cadence_factor

    @property
    def support(self) -> float:
        """Fraction of the cycle in which a foot is on the ground."""
        return 0.752 - 0.143 / self.cycle_s


def walk(walker: Walker, time_s: np.ndarray, phase: np.ndarray) -> dict[str, np.ndarray]:
    """Joint positions of a walk along +x.

    Args:
        time_s: (T,) equally spaced, s; phase: (T,) phase of the right leg's cycle, in cycles, increasing.
    Returns:
        joint name -> (T, 3) in m: x forward, y left, z up, floor at z = 0. Joints: base, neck, head, and right_ and
        left_ shoulder, elbow, hand, hip, knee, ankle, toe.
    """
    rv, q = walker.relative_speed, phase % 1.0
    height = walker.height_m
    length = {name: fraction * height for name, fraction in SEGMENTS.items()}
    base = spine(rv, q, walker.support) * np.array([1, walker.sway, 1]) * walker.hip_height_m
    base += np.stack([walker.speed_mps * (time_s - time_s[0]), 0 * q, 0 * q + walker.hip_height_m], axis=-1)
    lean, tilt, pelvis, thorax = (np.radians(angle) for angle in trunk_angles(rv, q))
    hips = rotation(psi=-tilt * walker.sway, phi=pelvis)
    chest = rotation(theta=lean, phi=thorax)

    def above(x, y, z):
        return base + turn(chest, np.stack(np.broadcast_arrays(x, y, z), axis=-1) + 0 * base)

    joints = {"base": base, "neck": above(0, 0, length["torso"]), "head": above(0, 0, length["torso"] + length["head"])}
    for side, sign, shift in (("right", -1, 0.0), ("left", 1, 0.5)):
        limb = (q + shift) % 1.0
        hip_factor = 1 - sign * walker.hip_asymmetry
        hip, knee, ankle = (np.radians(angle) for angle in leg_angles(rv, limb, walker.support))
        points = leg(hip * hip_factor, knee * walker.knee_factor, ankle, length, sign)
        leg_joints = {name: base + turn(hips, point) for name, point in points.items()}
        plant_foot(leg_joints, phase + shift, walker, time_s)
        shoulder, elbow = (np.radians(angle) * walker.arm_swing for angle in arm_angles(rv, limb))
        arm_joints = {name: above(*point) for name, point in arm(shoulder, elbow, length, sign).items()}
        joints |= {f"{side}_{name}": point for name, point in {**leg_joints, **arm_joints}.items()}
    return joints


def leg(hip, knee, ankle, length, sign) -> dict[str, np.ndarray]:
    """Joints of a leg, relative to the spine's base, before the pelvis turns; angles (T,) in radians."""
    start = np.stack([0 * hip, 0 * hip + sign * length["half_hip"], 0 * hip], axis=-1)
    knee_at = start + length["upper_leg"] * hanging(hip)
    ankle_at = knee_at + length["lower_leg"] * hanging(hip - knee)
    pitch = hip - knee + ankle
    toe_at = ankle_at + length["foot"] * np.stack([np.cos(pitch), 0 * pitch, np.sin(pitch)], axis=-1)
    return {"hip": start, "knee": knee_at, "ankle": ankle_at, "toe": toe_at}


def arm(shoulder, elbow, length, sign) -> dict[str, tuple]:
    """Joints of an arm as (x, y, z), relative to the spine's base, before the chest turns."""
    start = np.array([0, sign * length["half_shoulder"], length["torso"]])
    elbow_at = start + length["upper_arm"] * hanging(shoulder)
    hand_at = elbow_at + length["lower_arm"] * hanging(shoulder + elbow)
    return {"shoulder": tuple(start), "elbow": tuple(elbow_at.T), "hand": tuple(hand_at.T)}


def hanging(angle) -> np.ndarray:
    """The direction (T, 3) of a limb that hangs, swung forward by an angle."""
    return np.stack([np.sin(angle), 0 * angle, -np.cos(angle)], axis=-1)


def plant_foot(joints, phase, walker, time_s) -> None:
    """Let the foot on the ground stand still, and no foot pass through the floor; in place.

    What a planted ankle or toe would slide is taken out of its stance and given back, evenly, to its swing. The ankle
    lifts before the toe: between the two the foot rolls over the toe, which would else run backwards at 1 m/s.
    """
    q, dt = phase % 1.0, time_s[1] - time_s[0]
    whole = slice(np.searchsorted(phase, phase[0] + max(1.0, np.floor(phase[-1] - phase[0]))))  # entire cycles
    for name, lift in (("ankle", walker.support - 0.06), ("toe", walker.support + 0.02)):
        stance = np.clip(np.minimum(q - 0.04, lift - q) / 0.06, 0, 1)
        stance = stance**2 * (3 - 2 * stance)
        velocity = np.gradient(joints[name][:, 0], dt)
        slid = (velocity * stance)[whole].mean() / (1 - stance)[whole].mean()
        planted = (velocity + slid) * (1 - stance)
        joints[name][:, 0] += np.concatenate([[0], np.cumsum((planted - velocity)[:-1]) * dt])
        joints[name][:, 2] = np.maximum(joints[name][:, 2], 0.0)


def turn(matrices, vectors) -> np.ndarray:
    """(T, 3, 3) times (T, 3)."""
    return np.einsum("tij,tj->ti", matrices, vectors)


def rotation(
    psi: np.ndarray | float = 0.0, theta: np.ndarray | float = 0.0, phi: np.ndarray | float = 0.0
) -> np.ndarray:
    """Rz(phi) Ry(theta) Rx(psi), (T, 3, 3); a positive theta swings a hanging limb forward."""
    psi, theta, phi = np.broadcast_arrays(psi, theta, phi)
    zero, one = 0 * psi, 0 * psi + 1

    def stack(*rows):
        return np.moveaxis(np.array(rows), -1, 0)

    rx = stack([one, zero, zero], [zero, np.cos(psi), -np.sin(psi)], [zero, np.sin(psi), np.cos(psi)])
    ry = stack([np.cos(theta), zero, -np.sin(theta)], [zero, one, zero], [np.sin(theta), zero, np.cos(theta)])
    rz = stack([np.cos(phi), -np.sin(phi), zero], [np.sin(phi), np.cos(phi), zero], [zero, zero, one])
    return rz @ ry @ rx


# ---- the curves; a: RV < 0.5, b: below 1.3, c: up to 3 ---------------------------------------------------------------


def _u(rv):
    return max(rv - 1.3, 0.0) / 1.7


def spine(rv, q, support) -> np.ndarray:
    """Translation of the spine's base, (T, 3) in hip heights: forward, left, up."""
    vertical = 0.015 * rv
    lateral = -0.032 if rv >= 0.5 else -0.128 * rv**2 + 0.128 * rv
    forward = -0.021 if rv >= 0.5 else -0.084 * rv**2 + 0.084 * rv
    lateral, forward = -abs(lateral), -abs(forward)
    offset = 0.625 - support
    return np.stack(
        [
            forward * np.sin(2 * np.pi * (2 * q + 2 * offset)),
            lateral * np.sin(2 * np.pi * (q - 0.1)),
            -vertical + vertical * np.sin(2 * np.pi * (2 * q - 0.35)),
        ],
        axis=-1,
    )


def trunk_angles(rv, q):
    """Degrees: forward lean, pelvis tilt to the side, pelvis torsion, thorax torsion."""
    lean = 2.0 if rv >= 0.5 else -8 * rv**2 + 8 * rv
    lean = -lean + lean * np.sin(2 * np.pi * (2 * q - 0.1))
    tilt = 1.66 * rv
    quick, slow = 10 / 3, 10 / 7
    tilt_angle = np.select(
        [q < 0.15, q < 0.5, q < 0.65],
        [
            -tilt + tilt * np.cos(2 * np.pi * quick * q),
            -tilt - tilt * np.cos(2 * np.pi * slow * (q - 0.15)),
            tilt - tilt * np.cos(2 * np.pi * quick * (q - 0.5)),
        ],
        tilt + tilt * np.cos(2 * np.pi * slow * (q - 0.65)),
    )
    pelvis = -4 * rv * np.cos(2 * np.pi * q)
    thorax = periodic([0.1, 0.4, 0.6, 0.9], np.array([4 / 3, -1.5, -4 / 3, 1.5]) * rv, q)
    return lean, tilt_angle, pelvis, thorax


def leg_angles(rv, q, support):
    """Degrees of flexion: hip, knee, ankle."""
    u = _u(rv)
    if rv < 0.5:
        hip = [-0.1, 0.5], [50 * rv, -30 * rv]
        knee = [0.17, 0.4, 0.75, 1.0], [3, 3, 140 * rv, 3]
        ankle = [-3, -30 * rv - 3, 22 * rv - 3, -34 * rv - 3, -3]
    elif rv < 1.3:
        hip = [-0.1, 0.5], [25, -15]
        knee = [0.17, 0.4, 0.75, 1.0], [3, 3, 70, 3]
        ankle = [-3, -18, 8, -20, -3]
    else:
        hip = [0.2 * u - 0.1, 0.5, 0.9], [5 * u + 25, -15, 6 * u + 25]
        knee = [0.17 - 0.05 * u, 0.4, 0.75 - 0.05 * u, 1 - 0.03 * u], [22 * u + 3, 3, 70 - 5 * u, 3 * u + 3]
        ankle = [5 * u - 3, 4 * u - 18, 8 - 3 * u, -8 * u - 20, 5 * u - 3]
        if u == 0.0:
            hip = [-0.1, 0.5], [25, -15]  # knots 1 and 3 coincide, a cycle apart
    ankle = [0.0, 0.08, 0.5 - 0.1 * u, support, 0.85], ankle
    return periodic(*hip, q), periodic(*knee, q), periodic(*ankle, q)


def arm_angles(rv, q):
    """Degrees of flexion: shoulder, elbow."""
    swing = 9.88 * rv
    shoulder = 3 - swing / 2 - swing * np.cos(2 * np.pi * q)
    u, w = _u(rv), (rv - 0.5) / 0.8
    if rv < 0.5:
        elbow = [0.05, 0.5, 0.9], [6 * rv + 3, 34 * rv + 3, 10 * rv + 3]
    elif rv < 1.3:
        elbow = [0.05, 0.5 + 0.01 * w, 0.9], [8 * w + 6, 24 * w + 20, 9 * w + 8]
    else:
        elbow = [0.05, 0.51 + 0.04 * u, 0.9 - 0.1 * u], [14 - 6 * u, 44 + 26 * u, 17 - 6 * u]
    return shoulder, periodic(*elbow, q)


def periodic(knots, values, q) -> np.ndarray:
    """A monotone cubic through control points, repeated every cycle.

    Five cycles are laid out: the slope at a knot depends on its neighbours, and only the outermost feel the ends.
    """
    whole = np.concatenate([np.asarray(knots, dtype=float) + cycle for cycle in range(-2, 3)])
    order = np.argsort(whole)
    return PchipInterpolator(whole[order], np.tile(np.asarray(values, dtype=float), 5)[order])(q)
