"""The page of an evaluation."""

import numpy as np
import pytest
import tifffile
from pages import Page, assert_self_contained

from dendsam_deploy.evaluate.scores import EvaluateOptions, evaluate_labels
from dendsam_deploy.report.scores_report import render_scores_report, write_scores_report


@pytest.fixture
def volumes(tmp_path):
    """Two objects through three slices; in slice 1 the second one is missed, in slice 2 it is cut."""
    truth = np.zeros((3, 20, 30), np.uint8)
    truth[:, 2:10, 2:12], truth[:, 12:18, 14:28] = 1, 2
    labels = truth.copy()
    labels[1][labels[1] == 2] = 0
    labels[2, 12:18, 20:28] = 7
    for name, volume in (("truth", truth), ("labels <1>", labels)):
        tifffile.imwrite(tmp_path / f"{name}.tif", volume, photometric="minisblack")
    return tmp_path / "labels <1>.tif", tmp_path / "truth.tif"


def test_the_page_shows_the_scores(volumes, tmp_path):
    report = evaluate_labels(*volumes)
    write_scores_report(tmp_path / "scores.html", report)
    page = Page((tmp_path / "scores.html").read_text())
    assert_self_contained(page)
    assert "Scores of labels <1>.tif" in page.text
    assert f"{report.slices.pq:.3f} PQ, mean over slices" in page.text
    assert f"pq {report.volume.objects.pq:.4f} {report.slices.pq:.4f}" in page.text
    assert f"vi_split {report.volume.partition.vi_split:.4f} variation of information" in page.text


def test_the_worst_come_first(volumes):
    text = Page(render_scores_report(evaluate_labels(*volumes))).text
    worst = text[text.index("Slices with the lowest PQ") :]
    order = [row.z for row in sorted(evaluate_labels(*volumes).per_slice, key=lambda row: row.scores.pq)]
    assert order[0] in (1, 2)
    assert f"segments {order[0]} " in worst
    assert "IoU below 0.5 (1 in all)" in worst


def test_what_was_left_out_is_said(volumes):
    options = EvaluateOptions(sparse_truth=True, as_2d=True, ignore_labels=(1, 9), slices=range(1))
    page = Page(render_scores_report(evaluate_labels(*volumes, options)))
    for words in ("The truth is sparse", "Labels hold for one slice only", "labels 1, 9", "1 slice "):
        assert words in page.text
    assert "Along z" not in page.text
