"""Numbers and durations as a person would write them."""

import math

import pytest

from dendsam_deploy.report.page import count_text, decimals_text, digits_text, duration_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 ms"), (0.0421, "42 ms"), (1.25, "1.2 s"), (59.94, "59.9 s"), (60, "1 min 0 s"), (3599.6, "1 h 0 min")],
)
def test_durations(seconds, text):
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.00123456, "0.00123"), (1.0, "1.00"), (999.6, "1000"), (math.nan, "–")]
)
def test_three_digits(value, text):
    assert digits_text(value) == text


def test_thousands_and_decimals():
    assert count_text(1234567) == "1\u202f234\u202f567"
    assert decimals_text(0.98765) == "0.99"
    assert decimals_text(math.nan) == "–"
