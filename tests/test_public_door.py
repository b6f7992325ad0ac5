"""``import dendsam_deploy`` offers exactly this list, costs next to nothing, and loads no engine."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import dendsam_deploy

DOOR = {
    # volumes in
    "open_volume", "open_labels", "open_boxes", "make_phantom", "PhantomOptions",
    # weights
    "finetune_sam", "FinetuneSamOptions", "SamTrainingOptions", "FinetunedSam",
    "finetune_detector", "DetectorTrainingOptions", "DetectorSchedule", "DetectorTrainingResult",
    # bundles
    "export_bundle", "ExportOptions", "Bundle", "verify_bundle", "VerifyOptions", "ParityReport",
    "benchmark_bundle", "BenchmarkOptions", "LatencyReport",
    "open_session", "SessionOptions", "Session",
    # results
    "segment_volume", "SegmentOptions", "SegmentResult", "report_from_run",
    "evaluate_labels", "EvaluateOptions", "ScoreReport", "compare_prompts", "CompareOptions", "Comparison",
    "pseudo_label_volume", "PseudoLabelOptions", "PseudoLabels", "run_rounds", "RoundsOptions", "RoundsResult",
    # what happens on the way
    "Progress", "DendsamError", "InvalidArgumentError", "MissingCapabilityError", "InputFileError", "VolumeError",
    "CheckpointError", "BundleError", "ParityError", "StorageError", "IncompleteRunError", "UnsafeFileError",
}  # fmt: skip


def test_the_door_is_exactly_this_list() -> None:
    assert set(dendsam_deploy.__all__) == DOOR
    assert set(dir(dendsam_deploy)) == DOOR


@pytest.mark.parametrize("name", sorted(DOOR))
def test_every_name_is_there_and_documented(name) -> None:
    value = getattr(dendsam_deploy, name)
    assert value.__name__ == name
    assert value.__module__.startswith("dendsam_deploy.")
    assert inspect.getdoc(value)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(dendsam_deploy.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        f"{alias.asname} {node.module}"
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = {f"{name} dendsam_deploy.{home}" for name, home in dendsam_deploy._HOMES.items()}
    assert seen == homes


def test_a_misspelt_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'segment_volumes'"):
        _ = dendsam_deploy.segment_volumes


def test_the_package_is_typed() -> None:
    assert (Path(dendsam_deploy.__file__).parent / "py.typed").is_file()


def test_importing_loads_nothing_else() -> None:
    program = "import sys; import dendsam_deploy; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    bare = "import sys, __future__, importlib, typing; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded, standard = (
        set(subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout.split())
        for text in (program, bare)
    )
    assert loaded - standard == {"dendsam_deploy"}


def test_names_are_kept_after_the_first_use() -> None:
    vars(dendsam_deploy).pop("VolumeError", None)
    assert dendsam_deploy.VolumeError is importlib.import_module("dendsam_deploy.errors").VolumeError
    assert "VolumeError" in vars(dendsam_deploy)
