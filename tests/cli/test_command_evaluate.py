"""``evaluate``: the numbers of the library, as a table and as JSON, and its exit code."""

from __future__ import annotations

import json

import pytest
import tifffile

OBJECT_KEYS = {"oce", "e_gs", "e_sg", "pq", "sq", "dq", "s_inst", "msa", "sa50", "sa75", "dice"}
PARTITION_KEYS = {"vi_split", "vi_merge", "arand_error", "arand_precision", "arand_recall"}


@pytest.fixture
def half(discs, tmp_path):
    """The labels of `discs` without the third object."""
    stack = tifffile.imread(discs / "labels.tif")
    stack[stack == 3] = 0
    tifffile.imwrite(tmp_path / "half.tif", stack, photometric="minisblack")
    return tmp_path / "half.tif"


def test_json_has_the_keys_of_the_contract(run, discs, half) -> None:
    document = run("evaluate", half, discs / "labels.tif", "--json", "-").document
    assert document["volume"].keys() >= OBJECT_KEYS | PARTITION_KEYS
    assert document["slices"].keys() >= OBJECT_KEYS
    assert [row["z"] for row in document["per_slice"]] == [0, 1, 2, 3]
    assert all(row.keys() >= OBJECT_KEYS for row in document["per_slice"])
    assert document["volume"]["dq"] == pytest.approx(2 / 2.5)  # two of three found


def test_table_shows_the_same_numbers(run, discs, half) -> None:
    outcome = run("evaluate", half, discs / "labels.tif", "--resamples", 0)
    rows = {line.split()[0]: line.split()[1:] for line in outcome.out.splitlines()}
    assert outcome.err == ""
    assert rows["dq"] == ["0.8000", "0.8000"]
    assert rows["sq"] == ["1.0000", "1.0000"]
    assert rows["2"] == ["segments,", "3", "objects", "in", "the", "truth,", "4", "slices", "scored"]


def test_table_shows_intervals_and_sizes(run, discs, half) -> None:
    words = ["evaluate", half, discs / "labels.tif", "--size-limit", 200]
    document = run(*words, "--json", "-").document
    rows = {line.split()[0]: line.split()[1:] for line in run(*words).out.splitlines()}
    expected = [
        f"{value:.4f}"
        for side in ("volume", "slices")
        for value in (document[side]["e_gs"], *document["intervals"][side]["e_gs"])
    ]
    assert rows["e_gs"] == expected
    assert rows["from"][:4] == ["200", "12", "8", "0"]
    assert run(*words, "--seed", 5, "--json", "-").document["options"]["seed"] == 5


def test_what_is_left_out_of_a_sparse_truth_is_said(run, discs, half) -> None:
    outcome = run("evaluate", discs / "labels.tif", half, "--sparse-truth")
    assert "sparse truth: 1 segments that touch no object of it are left out" in outcome.out


def test_skeletons_give_the_expected_run_length(run, discs, half, tmp_path) -> None:
    (tmp_path / "a.swc").write_text("1 3 0.3075 0.2475 0.01 1 -1\n2 3 0.3075 0.2625 0.05 1 1\n")  # in the first disc
    words = ["evaluate", half, discs / "labels.tif", "--skeletons", tmp_path / "a.swc"]
    volume = run(*words, "--json", "-").document["volume"]
    assert volume["erl_share"] == 1
    assert volume["erl_um"] == pytest.approx((0.015**2 + 0.04**2) ** 0.5)
    assert run(*words, "--min", "erl_share=0.9", "--json", "-").code == 0
    outcome = run("evaluate", half, discs / "labels.tif", "--min", "erl_share=0.9")
    assert outcome.code == 2
    assert "there is no score 'erl_share'" in outcome.message
    assert run("evaluate", half, discs / "labels.tif", "--skeletons", discs / "raw.tif").code == 4


def test_tables_and_worst_objects(run, discs, half, tmp_path) -> None:
    words = ["evaluate", half, discs / "labels.tif", "--csv", tmp_path / "tables"]
    assert run(*words, "--report", tmp_path / "s.html", "--volume", discs / "raw.tif").code == 0
    assert "The worst objects" in (tmp_path / "s.html").read_text(encoding="utf-8")
    assert (tmp_path / "tables" / "per_object.csv").read_text().startswith("z,truth_id,voxels,segment_id,iou,shown_z\n")
    outcome = run(*words, "--volume", discs / "raw.tif")
    assert outcome.code == 2
    assert "name that with --report" in outcome.message


def test_bounds_decide_the_exit_code(run, discs, half, tmp_path) -> None:
    words = ["evaluate", half, discs / "labels.tif", "--json", tmp_path / "scores.json"]
    assert run(*words, "--min", "dq=0.8", "--min", "slices.pq=0.79", "--max", "e_sg=0").code == 0
    outcome = run(*words, "--min", "volume.dq=0.81", "--max", "slices.e_gs=0.1")
    assert outcome.code == 1
    assert outcome.message.startswith("volume.dq is 0.8000, expected at least 0.81; slices.e_gs is ")
    assert "dq" in outcome.out, "the scores are given all the same"
    assert json.loads((tmp_path / "scores.json").read_text())["volume"]["dq"] == pytest.approx(0.8)


def test_options_reach_the_library(run, discs, half) -> None:
    def scores(*words: object):
        return run("evaluate", half, discs / "labels.tif", "--json", "-", *words).document

    assert scores("--ignore-label", 3)["volume"]["dq"] == 1
    assert [row["z"] for row in scores("--slices", "1:3")["per_slice"]] == [1, 2]
    assert scores("--as-2d")["volume"]["truth_objects"] == 12
    assert run("evaluate", discs / "labels.tif", half, "--sparse-truth", "--json", "-").document["volume"]["dq"] == 1


def test_the_page_of_scores(run, discs, half, tmp_path) -> None:
    assert run("evaluate", half, discs / "labels.tif", "--report", tmp_path / "scores.html").code == 0
    assert "half.tif" in (tmp_path / "scores.html").read_text(encoding="utf-8")


def test_slices_outside_the_volume_are_wrong_usage(run, discs, half) -> None:
    outcome = run("evaluate", half, discs / "labels.tif", "--slices", "2:9")
    assert outcome.code == 2
    assert "shows slices 0 to 3" in outcome.message
