"""What samples say, against percentiles and medians worked out in another way."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.evaluate.latency_statistics import ratio_interval, summarise

DURATIONS = st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=60)


def percentile(samples: list[float], share: float) -> float:
    """Interpolate linearly between the sorted samples, of which the first is at 0 and the last at 1."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


@given(DURATIONS)
def test_percentiles_and_spread(samples) -> None:
    summary = summarise(samples)
    assert summary.median_ms == pytest.approx(statistics.median(samples))
    assert summary.p90_ms == pytest.approx(percentile(samples, 0.9))
    assert summary.p99_ms == pytest.approx(percentile(samples, 0.99))
    assert summary.mad_ms == pytest.approx(
        statistics.median(abs(sample - statistics.median(samples)) for sample in samples), abs=1e-9
    )
    assert min(samples) <= summary.median_ms <= summary.p90_ms <= summary.p99_ms <= max(samples)


@pytest.mark.parametrize("samples", [[], [0.0], [1.0, -1.0], [float("nan")], [float("inf")]])
def test_what_is_no_duration(samples) -> None:
    with pytest.raises(InvalidArgumentError, match="no durations"):
        summarise(samples)


@given(DURATIONS, DURATIONS, st.floats(0.1, 10))
@settings(max_examples=30, deadline=None)
def test_an_interval_scales_with_its_samples(numerator, denominator, factor) -> None:
    low, high = ratio_interval(numerator, denominator)
    assert 0 < low <= high
    scaled = ratio_interval([factor * sample for sample in numerator], denominator)
    assert scaled == pytest.approx((factor * low, factor * high))
    assert (low, high) == ratio_interval(numerator, denominator)


def test_the_interval_of_constants_is_their_ratio() -> None:
    assert ratio_interval([6.0] * 4, [2.0] * 5) == (3.0, 3.0)


def test_the_interval_holds_the_true_ratio_nearly_always() -> None:
    rng = np.random.default_rng(3)
    true, held = 1.3, 0
    for _ in range(100):
        numerator = true * rng.lognormal(0, 0.2, 25)
        low, high = ratio_interval(numerator.tolist(), rng.lognormal(0, 0.2, 25).tolist())
        held += low <= true <= high
    assert 90 <= held <= 100
