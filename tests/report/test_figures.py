"""Charts: well-formed, in the page's colours, the same every time, and without traces in matplotlib."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest

from dendsam_deploy.report.figures import (
    Curve,
    Series,
    chart_along_z,
    count_histogram,
    course_chart,
    fraction_histogram,
    rate_curves,
    sample_strips,
    size_histogram,
    stage_bars,
    waterfall,
)

Z = np.arange(5)
CHARTS = {
    "curves": lambda: chart_along_z(
        Z, [Series("a", Z.astype(float)), Series("b", np.array([0, np.nan, 1, 2, np.nan]))], "objects"
    ),
    "one slice": lambda: chart_along_z(Z[:1], [Series("a", np.array([3.0]))], "objects"),
    "nothing": lambda: chart_along_z(Z, [Series("a", np.zeros(5))], "objects"),
    "only gaps": lambda: chart_along_z(Z, [Series("a", np.full(5, np.nan))], "mean", y_limit=1.05),
    "many slices": lambda: chart_along_z(np.arange(500), [Series("a", np.arange(500.0))], "objects"),
    "sizes": lambda: size_histogram(np.geomspace(0.001, 10, 300), "area (µm²)"),
    "equal sizes": lambda: size_histogram(np.full(3, 7.0), "area (px)"),
    "counts": lambda: count_histogram(np.array([1, 1, 2, 120]), "slices"),
    "ones": lambda: count_histogram(np.array([1, 1]), "slices"),
    "limits": lambda: size_histogram(np.geomspace(2, 90, 30), "side (px)", limit=8.0),
    "a far limit": lambda: count_histogram(np.array([3, 4, 9]), "objects", limit=292),
    "course": lambda: course_chart(
        [
            Curve("a", Z.astype(float), np.array([0.1, np.nan, 0.2, 0.3, 0.3])),
            Curve("b", Z[:1].astype(float), np.ones(1)),
        ],
        "epoch",
        "score",
        2.0,
        "fraction",
    ),
    "rate course": lambda: course_chart([Curve("a", Z.astype(float), 10.0**-Z)], "step", "rate", None, "log"),
    "fractions": lambda: fraction_histogram(np.array([0.0, 0.5, 1.0]), "IoU"),
    "waterfall": lambda: waterfall({"read": 1.0, "encode": 3000.0, "<paint>": 20.0}),
    "strips": lambda: sample_strips({"a": (1.0, 2.0, 3.0), "b": (5.0,)}, "one call"),
    "rates": lambda: rate_curves({"a": [(1, 3.0), (64, 90.0)], "b": [(8, 40.0)]}, "boxes", "boxes per second"),
    "stages": lambda: stage_bars({"read": 1.0, "encode": 3.0, "<paint>": 0.0}, "encode"),
}


@pytest.mark.parametrize("draw", CHARTS.values(), ids=CHARTS.keys())
def test_a_chart_is_an_svg_in_the_colours_of_the_page(draw):
    text = draw()
    root = ET.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "viewBox" in root.attrib
    assert "width" not in root.attrib
    assert "currentColor" in text
    assert "var(--series-1)" in text
    assert not any(stand_in in text for stand_in in ("#1011", "#1314", "#2010"))


def test_a_chart_is_the_same_every_time():
    assert CHARTS["curves"]() == CHARTS["curves"]()


def test_ids_of_different_charts_differ():
    ids = [set(re.findall(r'id="([^"]*)"', CHARTS[name]())) for name in ("curves", "one slice", "sizes")]
    assert all(ids)
    assert len(set.union(*ids)) == sum(map(len, ids))


def bars_of(text):
    """Return the heights of the bars of a histogram."""
    paths = [e.attrib for e in ET.fromstring(text).iter() if "var(--series-1)" in e.attrib.get("style", "")]
    corners = [np.array(p["d"].replace("M", " ").replace("L", " ").replace("z", " ").split(), float) for p in paths]
    return [float(np.ptp(c.reshape(-1, 2)[:, 1])) for c in corners]


def test_bars_stand_for_whole_numbers():
    heights = np.array(bars_of(count_histogram(np.array([1, 1, 1, 3]), "slices")))
    np.testing.assert_allclose(heights / heights.max(), [1, 0, 1 / 3], atol=1e-4)


def test_every_size_is_in_a_bar():
    heights = np.array(bars_of(size_histogram(np.geomspace(1, 1000, 64), "area")))
    np.testing.assert_allclose(heights, heights[0], rtol=1e-3)
    assert len(heights) == 8


def boxes_of(text, colour):
    """Return (left, right) of everything filled with a colour of the page, in the units of the picture."""
    paths = [e.attrib for e in ET.fromstring(text).iter() if colour in e.attrib.get("style", "") and "d" in e.attrib]
    corners = [np.array(p["d"].replace("M", " ").replace("L", " ").replace("z", " ").split(), float) for p in paths]
    return sorted((c.reshape(-1, 2)[:, 0].min(), c.reshape(-1, 2)[:, 0].max()) for c in corners)


def test_a_waterfall_begins_each_stage_where_the_last_one_ends():
    text = waterfall({"read": 1.0, "encode": 4.0, "paint": 2.0})
    (longest,) = boxes_of(text, "fill: var(--series-2)")
    first, last = boxes_of(text, "fill: var(--series-1)")
    np.testing.assert_allclose((longest[0], last[0]), (first[1], longest[1]), atol=1e-3)
    unit = first[1] - first[0]
    np.testing.assert_allclose(longest[1] - longest[0], 4 * unit, rtol=1e-3)
    np.testing.assert_allclose(last[1] - last[0], 2 * unit, rtol=1e-3)


def test_every_sample_is_a_dot():
    text = sample_strips({"a": (1.0, 2.0, 3.0), "b": (5.0, 6.0)}, "one call")
    assert text.count("<use ") >= 5
    assert "5.5 ms" in text


def test_the_limiting_stage_has_its_own_colour():
    text = stage_bars({"read": 1.0, "encode": 3.0}, "encode")
    assert text.count("var(--series-2)") == 1


def test_settings_of_matplotlib_are_left_as_they_were():
    before = dict(mpl.rcParams)
    stage_bars({"read": 1.0}, "read")
    assert dict(mpl.rcParams) == before


def test_pyplot_is_never_loaded():
    code = (
        "import sys, numpy as np; from dendsam_deploy.report.figures import stage_bars; stage_bars({'a': 1.0}, 'a');"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
