"""Pictures of power: every step there has its way back."""

import numpy as np
import pytest

from guided_diffusion_vae.data import spectrogram


@pytest.mark.parametrize("carrier_ghz, hz_per_mps", [(77.0, 513.7), (24.0, 160.1), (5.8, 38.7)])
def test_one_metre_per_second_at_the_usual_carriers(carrier_ghz, hz_per_mps):
    assert spectrogram.doppler_hz(1.0, carrier_ghz) == pytest.approx(hz_per_mps, abs=0.05)
    assert spectrogram.velocity_mps(spectrogram.doppler_hz(-2.5, carrier_ghz), carrier_ghz) == pytest.approx(-2.5)


def test_the_axis_runs_from_fast_approach_down():
    """Four rows over -1..+3 m/s: centres at 2.5, 1.5, .5, -.5."""
    assert spectrogram.row_axis(4, (-1.0, 3.0)).tolist() == [2.5, 1.5, 0.5, -0.5]


@pytest.mark.parametrize("velocity", [-2.0, 0.5, 1.4, 5.0])
def test_a_mover_at_constant_speed_is_a_line_at_two_v_over_lambda(velocity):
    """It stands in the row of its velocity, approach above."""
    prf, window_s, low, high = 2290.0, 0.14, -3.25, 6.5
    pulses = np.arange(3 * prf) / prf
    signal = np.exp(2j * np.pi * spectrogram.doppler_hz(velocity, 24.0) * pulses).astype(np.complex64)
    edges_hz = (spectrogram.doppler_hz(low, 24.0), spectrogram.doppler_hz(high, 24.0))
    power = spectrogram.stft_power(signal, size=64, edges_hz=edges_hz, prf_hz=prf, window_s=window_s)
    assert np.abs(power.argmax(axis=0) + 0.5 - (high - velocity) / (high - low) * 64).max() <= 1.0


def test_noise_keeps_its_power():
    """A window of unit energy: the power of white noise is its variance, at every frequency."""
    noise = np.random.default_rng(0).normal(size=(3 * 2290, 2)) @ [1, 1j]
    noise = noise.astype(np.complex64)
    power = spectrogram.stft_power(noise, size=64, edges_hz=(-500, 500), prf_hz=2290, window_s=0.14)
    assert power.mean() == pytest.approx(2.0, rel=0.1)


def test_decibels_come_back():
    db = np.linspace(-45, 0, 10)
    assert spectrogram.db_from_unit(spectrogram.unit_from_db(db)) == pytest.approx(db)
    assert spectrogram.unit_from_db(np.array([-80.0, 20.0])).tolist() == [-1, 1]
    with pytest.raises(ValueError, match="below the ceiling"):
        spectrogram.unit_from_db(db, 0, -40)


def test_decibels_are_relative_to_the_percentile_not_to_one_bright_pixel():
    power = np.full((100, 100), 2.0)
    power[0, 0] = 2e6
    db = spectrogram.db_re_peak(power)
    assert db[1, 1] == pytest.approx(0.0) and db[0, 0] == pytest.approx(60.0)
    assert np.isfinite(spectrogram.db_re_peak(np.diag(np.ones(50)))).all()  # no power at all is a number too


@pytest.mark.parametrize("name", spectrogram.ANCHORS)
def test_colours_come_back(name):
    unit = np.linspace(-1, 1, 256)
    values, distance = spectrogram.unit_from_colours(spectrogram.colours_from_unit(unit, name), name)
    assert np.abs(values - unit).max() < 0.02 and distance.max() == 0
    off_the_map = np.array([255, 0, 255], np.uint8)  # magenta is in none
    assert spectrogram.unit_from_colours(off_the_map, name)[1] > 50


def test_an_unknown_colour_map_names_the_flag_and_the_choice():
    with pytest.raises(ValueError, match="--colormap hot is not known; choose grey, jet, viridis, parula"):
        spectrogram.colour_table("hot")
