"""The dark: light scales the mean, electrons and read noise make the variance, nothing else does."""

import itertools

import numpy as np
import pytest

from covray.tasks import low_light
from covray.tasks.low_light import Exposure, darken, expose, read, render

EXPOSURES = [Exposure(0.0, 8000.0, 1.0), Exposure(2.0, 4000.0, 2.0), Exposure(4.5, 1000.0, 4.0)]
COUNT = 200_000


@pytest.mark.parametrize("exposure", EXPOSURES)
@pytest.mark.parametrize("light", [0.0, 0.05, 0.5])
def test_the_sensor_is_unbiased_and_has_poisson_and_read_noise(exposure: Exposure, light: float) -> None:
    seen = expose(np.full(COUNT, light), exposure, np.random.default_rng(0))
    mean = light * 2**-exposure.ev
    step = 1 / (2**low_light.ADC_BITS - 1)
    variance = mean / exposure.full_well_e + (exposure.read_noise_e / exposure.full_well_e) ** 2 + step**2 / 12
    assert abs(seen.mean() - mean) < 5 * np.sqrt(variance / COUNT)
    # The standard error of a variance is about sqrt(2 / n), and a little more for the skew of few electrons.
    assert abs(seen.var() / variance - 1) < 6 * np.sqrt(2 / COUNT)


def test_the_converter_has_its_steps_and_saturates() -> None:
    steps = 2**low_light.ADC_BITS - 1
    seen = expose(np.linspace(0, 1, COUNT), Exposure(0.0, 1000.0, 4.0), np.random.default_rng(0))
    assert np.allclose(seen * steps, np.rint(seen * steps), atol=1e-6)
    assert seen.max() == 1.0


def test_less_exposure_is_darker_at_every_level() -> None:
    ramp = np.repeat(np.arange(0, 256, 5, dtype=np.uint8)[:, None, None], 3, axis=2).repeat(400, axis=1)
    levels = [
        darken(ramp, np.random.default_rng(0), Exposure(ev, 8000.0, 1.0)).mean(axis=(1, 2)) for ev in (0, 1, 2, 3, 4)
    ]
    for brighter, darker in itertools.pairwise(levels):
        assert (brighter[1:] > darker[1:]).all()
        assert (np.diff(darker) > 0).all()


def test_without_darkness_or_noise_the_photograph_returns() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    same = darken(photo, np.random.default_rng(0), Exposure(0.0, 1e9, 0.0))
    assert np.abs(same.astype(int) - photo).max() <= 1


def test_the_generator_decides() -> None:
    photo = np.full((16, 16, 3), 128, np.uint8)
    one, again, other = (darken(photo, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_exposures_are_drawn_from_the_stated_ranges() -> None:
    generator = np.random.default_rng(0)
    drawn = np.array([list(vars(Exposure.sample(generator)).values()) for _ in range(2_000)])
    ranges = np.array([low_light.EV_RANGE, low_light.FULL_WELL_RANGE_E, low_light.READ_NOISE_RANGE_E])
    assert (drawn >= ranges[:, 0]).all()
    assert (drawn <= ranges[:, 1]).all()
    width = ranges[:, 1] - ranges[:, 0]
    assert (np.ptp(drawn, axis=0) > 0.99 * width).all()


def test_reading_inverts_drawing() -> None:
    picture = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    assert np.array_equal(render(read(picture)), picture)
    assert read(picture).dtype == np.float32
