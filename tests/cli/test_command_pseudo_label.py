"""``pseudo-label`` as it is typed: its files, its words, its exit codes."""

from __future__ import annotations

import csv

import pytest
import tifffile

pytest.importorskip("torch", reason="bundles are exported from torch")

EVERYTHING = ["--least-score", 0, "--least-iou", 0, "--least-stability", 0, "--least-agreement", 0]


def test_everything_that_is_found_can_be_kept(run, discs, exported, tmp_path) -> None:
    out = tmp_path / "pseudo"
    words = ["pseudo-label", discs / "raw.tif", "-b", exported.bundle, "-o", out, "--score", "0.05", "--threads", 1]
    outcome = run(*words, *EVERYTHING, "--repeats", 1, "--slices", "0:2", "--json", "-", "-q")
    assert outcome.code == 0, outcome.err
    document = outcome.document
    assert document["kept"] == document["masks"] > 0
    assert document["slices"] == [0, 2]
    assert tifffile.imread(document["labels"]).shape == (4, 64, 80)
    with (out / "masks.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == document["masks"]
    assert {path.name for path in out.iterdir()} == {
        "labels.tif", "masks", "masks.csv", "pseudo.json", "review.csv", "review-rois.zip", "review.html"
    }  # fmt: skip
    assert "<h2>Kept, worst first</h2>" in (out / "review.html").read_text()

    # Random weights are right about nothing: the wish is refused in words, by exit code, and without labels.
    wish = ["--truth", discs / "labels.tif", "--wanted-precision", "0.99", "--right-iou", "0.95"]
    outcome = run(*words, "--repeats", 1, "--slices", "0:2", *wish, "-q")
    assert outcome.code == 1
    assert "no labels were written" in outcome.message
    assert not (out / "pseudo.json").exists()
    assert not (out / "labels.tif").exists()
    assert "was not reached" in (out / "review.html").read_text()

    outcome = run(*words, "--slices", "0:2", "--repeats", 2)
    assert outcome.code == 2
    assert "jitter.repeats: 1 -> 2" in outcome.err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "Missing option '-o'"),
        (["-o", "out", "--wanted-precision", "0.9"], "give their labels as truth"),
        (["-o", "out", "--truth", "labels.tif", "--wanted-precision", "7"], "wanted precision is 7"),
        (["-o", "out", "--least-stability", "2"], "--least-stability"),
        (["-o", "out", "--truth", "labels.tif", "--truth-slices", "3:9"], "not among the slices 0:4"),
    ],
)
def test_wrong_words_are_usage_errors(run, discs, exported, tmp_path, monkeypatch, *, words, complaint) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.tif").write_bytes((discs / "labels.tif").read_bytes())
    outcome = run("pseudo-label", discs / "raw.tif", "-b", exported.bundle, "-q", *words)
    assert outcome.code == 2
    assert complaint in outcome.message
    assert not (tmp_path / "out").exists()
