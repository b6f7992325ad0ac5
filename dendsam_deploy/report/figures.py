"""Charts for the pages, as SVG that takes its colours and its font from the page around it. The home of matplotlib."""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

_INK = "#101112"
_FAINT = "#131415"
_SERIES = ("#201011", "#201012", "#201013", "#201014", "#201015", "#201016")
_PAGE_COLOURS = {
    _INK: "currentColor",
    _FAINT: "var(--line)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES, start=1)},
}
"""Stand-ins for colours that only the page knows, since it may be light or dark."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dendsam-deploy",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.7,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}

_MARKED_POINTS = 60
"""Curves of fewer points show each of them, so that a run of one slice shows something at all."""


_Scale = Literal["log", "count", "fraction"]

_MOST_BINS = 40

_CROWDED_RATIO = 3000.0
"""On a logarithmic axis of a wider range only the powers of ten are named."""


@dataclass(frozen=True, slots=True)
class Series:
    """One curve; `values` has one entry for each z and may hold NaN where there is nothing to show."""

    label: str
    values: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Curve:
    """One curve over its own abscissae, both of shape (N,); NaN leaves a gap."""

    label: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]


def chart_along_z(z: NDArray[np.int64], series: Sequence[Series], y_label: str, y_limit: float | None = None) -> str:
    """Draw up to three curves over the slice number.

    Parameters
    ----------
    z : ndarray, shape (Z,), int64
        Slices, ascending.
    series : sequence of Series
        The curves.
    y_label : str
        What they show, with its unit.
    y_limit : float or None
        Upper end of the axis; None fits it to the data.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(height=2.3)
        for colour, curve in zip(_SERIES, series, strict=False):
            marker = "o" if len(z) <= _MARKED_POINTS else ""
            axes.plot(z, curve.values, color=colour, linewidth=1.5, marker=marker, markersize=3.5, label=curve.label)
        axes.set(xlabel="slice z", ylabel=y_label)
        highest = max((float(np.nanmax(curve.values, initial=0.0)) for curve in series), default=0.0)
        axes.set_ylim(0, y_limit or 1.1 * highest or 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(series) > 1:
            axes.legend(ncols=len(series), loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
        return _svg(figure)


def size_histogram(sizes: NDArray[np.float64], x_label: str, limit: float | None = None) -> str:
    """Draw how often sizes occur, in bins of equal ratio.

    Parameters
    ----------
    sizes : ndarray, shape (N,), float64
        Positive numbers.
    x_label : str
        What they are, with their unit.
    limit : float or None
        A size to mark with a vertical line.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    low, high = float(sizes.min()), float(sizes.max())
    if low == high:
        low, high = low / 2, high * 2
    return _histogram(sizes, np.geomspace(low, high, _bin_count(sizes) + 1), x_label, "log", limit)


def count_histogram(counts: NDArray[np.int64], x_label: str, limit: float | None = None) -> str:
    """Draw how often whole numbers occur, in bins of equally many whole numbers.

    Parameters
    ----------
    counts : ndarray, shape (N,), int64
        Numbers from 1.
    x_label : str
        What they count.
    limit : float or None
        A number to mark with a vertical line.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    width = -(-int(counts.max()) // _MOST_BINS)
    return _histogram(counts, np.arange(0.5, counts.max() + width + 0.5, width), x_label, "count", limit)


def fraction_histogram(fractions: NDArray[np.float64], x_label: str) -> str:
    """Draw how often numbers between 0 and 1 occur, in twenty equal bins.

    Parameters
    ----------
    fractions : ndarray, shape (N,), float64
        Numbers from 0 to 1.
    x_label : str
        What they are.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    return _histogram(fractions, np.linspace(0, 1, 21), x_label, "fraction")


def stage_bars(seconds: Mapping[str, float], limiting: str) -> str:
    """Draw one bar for each stage, with the limiting one in another colour.

    Parameters
    ----------
    seconds : mapping
        Duration of each stage, in the order in which they are shown from the top.
    limiting : str
        The stage that decides how long it all takes.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(height=0.6 + 0.26 * len(seconds))
        colours = [_SERIES[1] if stage == limiting else _SERIES[0] for stage in seconds]
        bars = axes.barh(list(seconds), list(seconds.values()), color=colours, height=0.7)
        axes.bar_label(bars, [f"{value:.3g} s" for value in seconds.values()], padding=4)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("seconds, summed over slices")
        axes.grid(visible=False, axis="y")
        return _svg(figure)


def waterfall(stages_ms: Mapping[str, float]) -> str:
    """Draw the stages of a slice as they follow each other, each bar beginning where the one above it ends.

    Parameters
    ----------
    stages_ms : mapping
        Duration of each stage, in their order.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    durations = np.array(list(stages_ms.values()))
    starts = np.cumsum(durations) - durations
    longest = max(stages_ms, key=stages_ms.__getitem__)
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(height=0.6 + 0.26 * len(stages_ms))
        colours = [_SERIES[1] if stage == longest else _SERIES[0] for stage in stages_ms]
        bars = axes.barh(list(stages_ms), durations, left=starts, color=colours, height=0.7)
        axes.bar_label(bars, [_milliseconds(ms) for ms in durations], padding=4)
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.set_xlim(left=0)
        axes.set_xlabel("milliseconds since the slice was asked for")
        axes.grid(visible=False, axis="y")
        return _svg(figure)


def sample_strips(samples_ms: Mapping[str, Sequence[float]], x_label: str) -> str:
    """Draw every sample as a dot, one line of dots for each name, with a bar at the median.

    Parameters
    ----------
    samples_ms : mapping
        Samples by name, in the order in which they are shown from the top.
    x_label : str
        What was measured.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(height=0.7 + 0.34 * len(samples_ms))
        for row, samples in enumerate(samples_ms.values()):
            # Samples in their order from top to bottom, so that a drift shows.
            height = row + (np.linspace(-0.25, 0.25, len(samples)) if len(samples) > 1 else np.zeros(1))
            median = float(np.median(samples))
            axes.plot(samples, height, "o", color=_SERIES[0], markersize=3.5, alpha=0.75, markeredgewidth=0)
            axes.plot([median, median], [row - 0.36, row + 0.36], color=_SERIES[1], linewidth=2)
            # Beside the line, where no sample can be.
            beside = axes.get_yaxis_transform()
            axes.text(1.01, row, _milliseconds(median), transform=beside, ha="left", va="center")
        axes.set_yticks(range(len(samples_ms)), list(samples_ms))
        axes.set_ylim(len(samples_ms) - 0.5, -0.5)
        axes.set_xlim(0, 1.08 * max(max(samples) for samples in samples_ms.values()))
        axes.set_xlabel(f"{x_label}, milliseconds")
        axes.grid(visible=False, axis="y")
        return _svg(figure)


def rate_curves(curves: Mapping[str, Sequence[tuple[int, float]]], x_label: str, y_label: str) -> str:
    """Draw rates over numbers, on a logarithmic axis of the numbers.

    Parameters
    ----------
    curves : mapping
        Pairs of number and rate, by name; at most six curves are drawn.
    x_label, y_label : str
        What the numbers and the rates are.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(height=2.6)
        numbers = sorted({number for points in curves.values() for number, _ in points})
        for colour, (name, points) in zip(_SERIES, curves.items(), strict=False):
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=colour, linewidth=1.5, marker="o", markersize=4, label=name)
        axes.set_xscale("log")
        axes.set_xticks(numbers, [f"{number}" for number in numbers])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(bottom=0)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
        return _svg(figure)


def course_chart(curves: Sequence[Curve], x_label: str, y_label: str, marked_x: float | None, scale: _Scale) -> str:
    """Draw how up to six values change in the course of something.

    Parameters
    ----------
    curves : sequence of Curve
        The values.
    x_label, y_label : str
        What is counted and what is shown.
    marked_x : float or None
        A moment to mark with a vertical line.
    scale : str
        ``log``, ``fraction`` for values from 0 to 1, or ``count`` for others from 0 on.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(height=2.5)
        for colour, curve in zip(_SERIES, curves, strict=False):
            known = np.isfinite(curve.y)
            marker = "o" if known.sum() <= _MARKED_POINTS else ""
            axes.plot(curve.x[known], curve.y[known], color=colour, lw=1.5, marker=marker, ms=3.5, label=curve.label)
        if marked_x is not None:
            axes.axvline(marked_x, color=_INK, linewidth=1, linestyle=(0, (3, 3)))
        axes.set(xlabel=x_label, ylabel=y_label)
        if scale == "log":
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(0, 1.0 if scale == "fraction" else None)
        axes.set_xlim(0, 1.02 * max(1.0, *(float(curve.x.max(initial=0)) for curve in curves)))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(curves) > 1:
            axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
        return _svg(figure)


def _milliseconds(value: float) -> str:
    """Write a duration as short as it can be read."""
    return f"{value / 1000:.3g} s" if value >= 1000 else f"{value:.3g} ms"


def _axes(height: float) -> tuple[Figure, Axes]:
    """Begin a figure of the width of the page's columns; sizes in inches."""
    figure = Figure(figsize=(6.0, height), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    return figure, axes


def _histogram(
    values: NDArray[np.generic], edges: NDArray[np.float64], x_label: str, scale: _Scale, limit: float | None = None
) -> str:
    """Draw a histogram with given bins, and a line at a limit."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(height=2.3)
        axes.hist(values, bins=edges.tolist(), color=_SERIES[0], rwidth=0.9)
        if scale == "log":
            axes.set_xscale("log")
            steps = (1, 2, 5) if edges[-1] < edges[0] * _CROWDED_RATIO else (1,)
            axes.xaxis.set_major_locator(LogLocator(subs=steps))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
        elif scale == "count":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if limit is not None:
            axes.axvline(limit, color=_SERIES[1], linewidth=1.5, linestyle=(0, (4, 2)))
        axes.set(xlabel=x_label, ylabel="number")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=False, axis="x")
        return _svg(figure)


def _bin_count(values: NDArray[np.float64]) -> int:
    """Return the square root of the number of values, within what a chart of this size can show."""
    return int(np.clip(np.sqrt(len(values)), 8, _MOST_BINS))


def _svg(figure: Figure) -> str:
    """Return a figure as an SVG element that scales with the page and inherits its colours and font."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # ids are alike in all figures, but have to be unique on a page
    head, body = text.split(">", 1)
    text = re.sub(r' (width|height)="[^"]*"', "", head) + ">" + body
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", text)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(r'(id="|#)([mp][0-9a-f]{10})\b', rf"\g<1>{digest}-\g<2>", text)
    for stand_in, page_colour in _PAGE_COLOURS.items():
        text = text.replace(stand_in, page_colour)
    return text
