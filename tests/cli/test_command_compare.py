"""``compare``: its table, its files, and its exit codes."""

from __future__ import annotations

import csv
import json
import shutil

import pytest

QUICK = ("--grid", 4, "--grid-iou", 0, "--grid-stability", 0, "--curve-repeats", 1, "--resamples", 20, "--threads", 1)


@pytest.fixture(scope="module")
def second(bundle, tmp_path_factory):
    """The same bundle under another path."""
    path = tmp_path_factory.mktemp("exports") / "again"
    shutil.copytree(bundle, path)
    return path


def test_table_page_csv_and_json(run, discs, bundle, second, tmp_path) -> None:
    files = {name: tmp_path / f"compare.{name}" for name in ("html", "csv", "json")}
    words = ("--report", files["html"], "--csv", files["csv"], "--json", files["json"], "--slices", "1:3")
    bundles = ("-b", bundle, "-b", second)
    outcome = run("compare", discs / "raw.tif", discs / "labels.tif", *bundles, *QUICK, *words)
    assert outcome.code == 0
    document = json.loads(files["json"].read_text())
    prompts = ["truth_box", "truth_point", "truth_points", "point_grid"]
    assert [row["prompts"] for row in document["rows"]] == 2 * prompts
    assert document["slices"] == [1, 2]
    box, again = document["rows"][0], document["rows"][4]
    assert box["slices"] == again["slices"]
    assert again["relative_percent"]["dice"]["percent"] == pytest.approx(0)

    lines = [line for line in outcome.out.splitlines() if line.startswith("ground-truth box ")]
    assert lines[0] == lines[1]
    assert f"{box['oce']:.4f}" in lines[0]
    assert "+0.0 %" in outcome.out
    assert "The bundle has no detector, so the curve only says" in outcome.out
    assert "has no detector, so there is no row detector_box" in outcome.err

    table = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert [row["prompts"] for row in table] == 2 * prompts
    assert float(table[0]["dice"]) == box["dice"]
    assert float(table[0]["dice_low"]) == box["intervals"]["slices"]["dice"][0]
    assert table[0]["dice_relative_percent"] == ""
    page = files["html"].read_text(encoding="utf-8")
    for words in ("Quality against box error", "The grid of points", "ground-truth points", "Slice 2"):
        assert words in page


def test_one_row_is_enough(run, discs, bundle) -> None:
    words = ("--prompts", "truth_box", "--slices", "0:1", "--curve-repeats", 0, "--threads", 1, "--json", "-")
    document = run("compare", discs / "raw.tif", discs / "labels.tif", "-b", bundle, *words).document
    (row,) = document["rows"]
    assert row["prompts"] == "truth_box"
    assert row["volume"]["truth_objects"] == 3
    assert document["curves"] == []


def test_a_grid_that_keeps_nothing_says_why(run, discs, bundle) -> None:
    words = ("--prompts", "point_grid", "--slices", "0:1", "--grid", 2, "--grid-iou", 1, "--curve-repeats", 0)
    outcome = run("compare", discs / "raw.tif", discs / "labels.tif", "-b", bundle, *words, "--threads", 1)
    assert "nothing passed, no predicted IoU is above" in outcome.out
    assert "lower --grid-iou" in outcome.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--prompts", "guess"), (2, "there are no prompts 'guess'; choose truth_box, ")),
        (("--prompts", "detector_box"), (3, "has no detector")),
        (("--slices", "2:9"), (2, "are not within its 4 slices")),
        (("--grid", 0), (2, "--grid")),
        (("--grid-iou", 1.5), (2, "--grid-iou")),
    ],
)
def test_wrong_usage(run, discs, bundle, words, expected) -> None:
    code, message = expected
    outcome = run("compare", discs / "raw.tif", discs / "labels.tif", "-b", bundle, *words)
    assert outcome.code == code
    assert message in outcome.message


def test_files_that_do_not_fit(run, discs, bundle, tmp_path) -> None:
    outcome = run("compare", discs / "raw.tif", bundle / "manifest.json", "-b", bundle)
    assert outcome.code == 4
    assert run("compare", discs / "raw.tif", discs / "labels.tif", "-b", tmp_path).code == 4
    outcome = run("compare", discs / "raw.tif", discs / "labels.tif", "-b", bundle, "--csv", discs / "raw.tif")
    assert outcome.code == 2
    assert "is no .csv file" in outcome.message
