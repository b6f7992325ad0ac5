"""Charts of values that are known to an interval, in the style of `figures`; both are the home of matplotlib."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib as mpl

from dendsam_deploy.report.figures import _SERIES, _STYLE, _axes, _svg

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with the ends of its interval, which are the value itself where there is none."""

    value: float
    low: float
    high: float


def estimate_dots(groups: Mapping[str, Mapping[str, Estimate]], x_label: str) -> str:
    """Draw values between 0 and 1 as dots with their intervals, one line for each name, one colour for each group.

    Parameters
    ----------
    groups : mapping
        Estimates by name, by group; names are shown from the top as they first appear, at most six groups are drawn.
    x_label : str
        What the values are.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    names = list(dict.fromkeys(name for estimates in groups.values() for name in estimates))
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(height=0.8 + 0.36 * len(names))
        for number, (colour, (group, estimates)) in enumerate(zip(_SERIES, groups.items(), strict=False)):
            shift = (number - (len(groups) - 1) / 2) * min(0.22, 0.7 / len(groups))
            rows = [names.index(name) + shift for name in estimates]
            found = list(estimates.values())
            axes.hlines(rows, [e.low for e in found], [e.high for e in found], color=colour, linewidth=1.5)
            axes.plot([e.value for e in found], rows, "o", color=colour, markersize=4.5, label=group)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set(xlim=(0, 1), xlabel=x_label)
        if len(groups) > 1:
            axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
        return _svg(figure)


def estimate_curves(
    curves: Mapping[str, Mapping[float, Estimate]],
    x_label: str,
    y_label: str,
    marks: Mapping[str, tuple[float, float]],
) -> str:
    """Draw curves with their intervals as bands, and single marks by name as diamonds.

    Parameters
    ----------
    curves : mapping
        Estimates by x, by curve; at most six are drawn.
    x_label, y_label : str
        What the axes show.
    marks : mapping
        Points (x, y) by the name of the curve whose colour they take.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(height=2.6)
        for colour, (name, points) in zip(_SERIES, curves.items(), strict=False):
            x, found = list(points), list(points.values())
            axes.fill_between(x, [e.low for e in found], [e.high for e in found], color=colour, alpha=0.18, linewidth=0)
            axes.plot(x, [e.value for e in found], color=colour, linewidth=1.5, marker="o", markersize=3.5, label=name)
            if name in marks:
                axes.plot(*marks[name], "D", color=colour, markersize=8)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.set_ylim(bottom=0)
        axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
        return _svg(figure)
