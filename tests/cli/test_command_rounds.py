"""``rounds`` as it is typed: what is refused before any training."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="rounds train")


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        ([], 2, "Missing option '-o'"),
        (["-o", "out", "--rounds", "0"], 2, "--rounds"),
        (["-o", "out", "--wanted-precision", "0.9"], 2, "name some with --calibration-slices"),
        (["-o", "out", "--held-out-slices", "2:9"], 2, "do not lie in a volume of 4 slices"),
        (["-o", "out"], 2, "no slice is left for the role unlabelled"),
        (["-o", "out", "--labelled-slices", "0:2", "--held-out-slices", "2:4"], 2, "lie within 2 of the held-out"),
        (["-o", "taken", "--labelled-slices", "0:1", "--held-out-slices", "3:4", "--gap", "0"], 2, "holds no rounds"),
        (["-o", "out", "--labelled-slices", "0:1", "--held-out-slices", "3:4", "--gap", "0", "--start", "none.pt"], 4,
         "none.pt: cannot be read"),
    ],
)  # fmt: skip
def test_wrong_words_are_refused_before_any_training(
    run, discs, tmp_path, monkeypatch, *, words, code, complaint
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").touch()
    outcome = run("rounds", discs / "raw.tif", discs / "labels.tif", "-q", *words)
    assert outcome.code == code
    assert complaint in outcome.message
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "thesis.txt"]
