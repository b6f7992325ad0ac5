"""Names of weights on the command line, in place of paths."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs the extra train")


@pytest.fixture(autouse=True)
def _nowhere(tmp_path, monkeypatch) -> None:
    """An empty cache, and a mirror that does not answer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DENDSAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DENDSAM_WEIGHTS_URL", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    "words",
    [
        ["export", "--sam", "sam_vitb", "-o", "out"],
        ["export", "--sam", "demo_sam", "--detector", "sam_vitb", "-o", "out"],
        ["finetune", "sam", "raw.tif", "labels.tif", "-o", "out.pt", "--start", "sam_vitb"],
        ["finetune", "sam", "raw.tif", "labels.tif", "-o", "out.pt", "--start", "demo_sam", "--start-base", "sam_vitb"],
        ["finetune", "detector", "raw.tif", "labels.tif", "-o", "out.pt", "--start", "sam_vitb"],
    ],
)
def test_an_unknown_name_is_told_with_those_that_there_are(words, run, tmp_path) -> None:
    outcome = run(*words)
    assert outcome.code == 4
    assert outcome.message.startswith(
        "sam_vitb: no such file, and no known weights of that name; did you mean sam_vit_"
    )
    assert "dendritesam_vit_l" in outcome.message
    assert list(tmp_path.iterdir()) == []


def test_without_a_connection_the_way_out_is_told(run, tmp_path) -> None:
    outcome = run("export", "--sam", "mobile_sam", "-o", "out")
    assert outcome.code == 3
    first, last = outcome.err.splitlines()
    assert first.startswith("fetching mobile_sam, 41 MB from http://127.0.0.1:9/mobile_sam.pt (licence: Apache-2.0)")
    assert "download it on another machine and give the path of it" in last
    assert not (tmp_path / "out").exists()


def test_a_file_of_that_name_is_meant_before_the_name(run, tmp_path) -> None:
    (tmp_path / "mobile_sam").write_text("not weights")
    outcome = run("export", "--sam", "mobile_sam", "-o", "out")
    assert (outcome.code, outcome.message.split(":")[0]) == (4, "mobile_sam")
    assert "not a torch checkpoint" in outcome.message
