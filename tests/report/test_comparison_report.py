"""The page and the table of a comparison."""

from __future__ import annotations

import csv
import io
from dataclasses import fields, replace

import numpy as np
import pytest
import tifffile
from pages import Page, assert_self_contained
from PIL import Image

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.evaluate.box_error_curve import JITTERS, BoxErrorCurve, CurvePoint, DetectorError
from dendsam_deploy.evaluate.comparison_report import (
    ComparedBundle,
    Comparison,
    ComparisonRow,
    RelativeChange,
    ShownSlice,
)
from dendsam_deploy.evaluate.labelled_slices import CompareOptions
from dendsam_deploy.evaluate.point_grid import GridCounts
from dendsam_deploy.evaluate.score_report import EvaluateOptions
from dendsam_deploy.evaluate.scores import evaluate_labels
from dendsam_deploy.metrics.summary import ObjectScores
from dendsam_deploy.report.comparison_report import (
    change_text,
    draw_outlines,
    render_comparison_report,
    write_comparison_report,
    write_comparison_table,
)
from dendsam_deploy.report.figures_estimates import Estimate, estimate_curves, estimate_dots
from dendsam_deploy.report.worst_objects import SEGMENT_COLOUR, TRUTH_COLOUR


@pytest.fixture
def comparison(tmp_path) -> Comparison:
    """Two bundles with two rows each; the second one is perfect."""
    truth = np.zeros((3, 20, 30), np.uint8)
    truth[:, 2:10, 2:12], truth[:, 12:18, 14:28] = 1, 2
    labels = truth.copy()
    labels[1][labels[1] == 2] = 0
    for name, volume in (("truth", truth), ("labels", labels)):
        tifffile.imwrite(tmp_path / f"{name}.tif", volume, photometric="minisblack")
    options = EvaluateOptions(as_2d=True, resamples=50)
    poor, perfect = (
        evaluate_labels(tmp_path / f"{name}.tif", tmp_path / "truth.tif", options) for name in ("labels", "truth")
    )
    names = [field.name for field in fields(ObjectScores)]
    rows = [
        ComparisonRow(
            bundle,
            prompts,
            report,
            1.25,
            {} if bundle == "sam <b>" else {name: RelativeChange(19.06, 12.0, 25.0) for name in names},
            GridCounts(9, 27, 5, 3, 2, 0.91, 0.8, 0.9) if prompts == "point_grid" else None,
        )
        for bundle, report in (("sam <b>", poor), ("ca1", perfect))
        for prompts in ("truth_box", "point_grid")
    ]
    points = tuple(
        CurvePoint(jitter, ObjectScores(**dict.fromkeys(names, 0.8 - jitter)), {"s_inst": (0.4, 0.9)})
        for jitter in JITTERS
    )
    curve = BoxErrorCurve("ca1", 2, points, DetectorError(9, 1, 0, 0.05, 0.8), 0.75)
    shown = ShownSlice(
        1,
        np.full((20, 30), 90, np.uint8),
        truth[1].astype(np.uint32),
        {(row.bundle, row.prompts): labels[1].astype(np.uint32) for row in rows},
    )
    bundles = tuple(
        ComparedBundle(name, f"exports/{name}", f"{name} on onnxruntime, cpu, fp32") for name in ("sam <b>", "ca1")
    )
    return Comparison(
        "ca1.tif", "truth.tif", (0, 1, 2), CompareOptions().to_document(), 25.0, bundles, tuple(rows), (curve,),
        ("ca1: the bundle has no detector",), shown,
    )  # fmt: skip


def test_the_page_has_a_table_for_each_bundle(comparison, tmp_path) -> None:
    write_comparison_report(tmp_path / "compare.html", comparison)
    page = Page((tmp_path / "compare.html").read_text())
    assert_self_contained(page)
    assert "sam <b> on onnxruntime, cpu, fp32" in page.text
    assert page.text.count("ground-truth box") >= 2
    assert page.text.count("+19.1 %") == 2 * 9
    assert "ca1: the bundle has no detector." in page.text
    assert "Per cents are relative changes against sam <b>" in page.text
    assert "pieces of the truth below 25.0 px are not judged" in page.text
    assert comparison.curves[0].verdict in page.text
    assert "27 0.80 5 0.90 3 2 0.910" in page.text
    assert page.text.count("By size of the objects") == 2
    assert "+12.0 to +25.0" in page.text
    assert page.tags.count("img") == 4


def test_what_is_not_there_is_not_shown(comparison) -> None:
    alone = replace(
        comparison, bundles=comparison.bundles[:1], rows=comparison.rows[:1], curves=(), shown=None, notes=()
    )
    page = Page(render_comparison_report(alone))
    for words in ("Per cents", "box error", "grid of points", "Slice 1"):
        assert words not in page.text


def test_the_table_is_a_row_for_each_bundle_and_source(comparison, tmp_path) -> None:
    write_comparison_table(tmp_path / "table.csv", comparison)
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [(row["bundle"], row["prompts"]) for row in rows] == [(row.bundle, row.prompts) for row in comparison.rows]
    assert float(rows[0]["pq"]) == comparison.rows[0].report.slices.pq
    assert (rows[0]["pq_relative_percent"], rows[2]["pq_relative_percent"]) == ("", "19.06")
    assert float(rows[2]["vi_split"]) == 0
    with pytest.raises(InvalidArgumentError, match="is a folder"):
        write_comparison_table(tmp_path, comparison)


def test_changes_are_written_as_in_the_paper() -> None:
    assert change_text(RelativeChange(19.06)) == "+19.1 %"
    assert change_text(RelativeChange(-3.0)) == "-3.0 %"
    assert change_text(RelativeChange(None)) == change_text(None) == ""


def test_outlines_of_both_sides_lie_on_the_micrograph() -> None:
    truth, labels = np.zeros((2, 40, 50), np.uint32)
    truth[5:20, 5:20], labels[25:35, 30:45] = 1, 1
    picture = np.asarray(Image.open(io.BytesIO(draw_outlines(np.full((40, 50), 80, np.uint8), truth, labels))))
    factor = picture.shape[0] // 40
    assert picture.shape == (40 * factor, 50 * factor, 3)
    assert (picture[5 * factor, 12 * factor] == TRUTH_COLOUR).all()
    assert (picture[25 * factor, 40 * factor] == SEGMENT_COLOUR).all()
    assert (picture[12 * factor, 12 * factor] == 80).all()


def test_charts_show_every_value_and_name() -> None:
    groups = {
        "first": {"box": Estimate(0.5, 0.4, 0.6)},
        "second": {"box": Estimate(0.7, 0.7, 0.7), "grid": Estimate(0, 0, 0)},
    }
    dots = estimate_dots(groups, "pq")
    curves = estimate_curves(
        {"a": {0.0: Estimate(0.8, 0.7, 0.9), 5.0: Estimate(0.6, 0.5, 0.7)}}, "x", "y", {"a": (2.5, 0.7)}
    )
    for chart, words in ((dots, ("first", "second", "box", "grid", "pq")), (curves, ("x", "y", "a"))):
        assert chart.startswith("<svg")
        assert all(f">{word}<" in chart for word in words)
