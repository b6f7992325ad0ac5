"""The README's table of benchmarks is what the files of results say."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "benchmarks" / "readme_table.py"
HOST = {"processor": "Abacus 9", "cpu_cores": 2, "gpus": [], "load_average": 0.1}
SETTINGS = {"model_type": "vit_b", "image_size_px": 1024, "weights": "random", "repeats": 5}


def load_script():
    spec = importlib.util.spec_from_file_location("readme_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def compared() -> dict[str, object]:
    return {
        "host": HOST,
        "settings": SETTINGS,
        "rows": [
            {"work": "encode a tile", "by": "torch", "median_ms": 15000.0},
            {"work": "encode a tile", "by": "ours", "median_ms": 5000.0},
        ],
        "ratios": [{"work": "encode a tile", "by": "ours", "over": "torch", "value": 3.0, "low": 2.9, "high": 3.1}],
        "agreement": {"ours": {"mean": 0.99996, "least": 0.999}},
        "missing": {"ours, int8": "no such graph"},
    }


def grown() -> dict[str, object]:
    slices = {"sizes": [4, 64], "exponent": 0.98, "linear_misfit": 0.02}
    slices |= {"memory_mb": [900.0, 909.0], "memory_ratio": 1.01}
    return {"host": HOST, "settings": SETTINGS, "scaling": {"slices": slices}}


def test_the_readme_shows_what_was_measured() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for path, text in script.documents(REPOSITORY).items():
        assert path.read_text(encoding="utf-8") == text


def test_another_number_is_another_readme(tmp_path) -> None:
    (tmp_path / "against_x.json").write_text(json.dumps(compared()))
    readme = script.with_table(f"a\n{script.BEGIN}\n{script.END}\nb\n", script.tables(tmp_path))
    assert script.with_table(readme, script.tables(tmp_path)) == readme
    document = compared()
    document["rows"][1]["median_ms"] = 5100.0
    (tmp_path / "against_x.json").write_text(json.dumps(document))
    assert script.with_table(readme, script.tables(tmp_path)) != readme


def test_the_short_table_has_the_fastest_way_to_each_work(tmp_path) -> None:
    assert script.summary(tmp_path) == "No benchmark has been run yet.\n"
    document = compared()
    document["rows"] = [
        {"work": "encode a tile", "by": by, "median_ms": median_ms}
        for by, median_ms in (
            ("torch", 12000.0),
            ("ours, a fp32", 6000.0),
            ("ours, b fp32", 4000.0),
            ("ours, a int8", 3000.0),
        )
    ]
    document["ratios"] = [
        {
            "work": "encode a tile",
            "by": row["by"],
            "over": over,
            "value": 12000 / row["median_ms"],
            "low": 1.0,
            "high": 9.0,
        }
        for row in document["rows"]
        for over in ("torch", "torch.compile")
        if row["by"] != "torch"
    ]
    (tmp_path / "against_x.json").write_text(json.dumps(document))
    assert script.summary(tmp_path).splitlines()[2:] == [
        "| encode a tile | ours, b fp32 | 4 s | 3.00 (1.00 to 9.00) times torch |",
        "| encode a tile | ours, a int8 | 3 s | 4.00 (1.00 to 9.00) times torch |",
    ]


def test_a_stale_table_is_found(tmp_path) -> None:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"{script.BEGIN}\n{script.END}\n")
    before = script.documents(tmp_path)
    (tmp_path / "benchmarks" / "results" / "against_x.json").write_text(json.dumps(compared()))
    assert script.documents(tmp_path) != before


def test_what_stands_around_the_markers_stays() -> None:
    readme = f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n"
    assert script.with_table(readme, "new\n") == f"before\n{script.BEGIN}\nnew\n{script.END}\nafter\n"


@pytest.mark.parametrize("readme", ["", script.BEGIN, script.END + script.BEGIN, 2 * (script.BEGIN + script.END)])
def test_a_readme_without_its_markers_is_refused(readme) -> None:
    with pytest.raises(ValueError, match="README"):
        script.with_table(readme, "")


def test_comparisons_and_growth(tmp_path) -> None:
    assert script.tables(tmp_path) == "No benchmark has been run yet.\n"
    (tmp_path / "against_x.json").write_text(json.dumps(compared()))
    (tmp_path / "scaling.json").write_text(json.dumps(grown()))
    text = script.tables(tmp_path)
    assert "| encode a tile | torch | 15 s |  |\n" in text
    assert "| encode a tile | ours | 5 s | 3.00 (2.90 to 3.10) |\n" in text
    assert "ours: IoU with the predictor's 1.000 on average, at least 0.999" in text
    assert "not measured: ours, int8: no such graph" in text
    assert "| slices | 4 | 64 | 0.98 | 2.0% | 900 to 909 MB (1.01 times) |\n" in text
    assert "Abacus 9, 2 cores" in text


def test_scores_on_real_tissue(tmp_path) -> None:
    trained = {
        "host": HOST,
        "settings": {"model": "tiny", "image_size_px": 512, "minutes_of_cpu": 6.0, "test_slices": [15, 20]},
        "protocols": {"boxes": {"steps": 310}, "published": {"steps": 78}},
        "test": {
            "start": {"box": 0.6957, "jittered": 0.6835, "point": 0.5665, "objects": 264},
            "boxes": {"box": 0.7973, "jittered": 0.7868, "point": 0.6768, "objects": 264},
            "published": {"box": 0.7718, "jittered": 0.7582, "point": 0.6452, "objects": 264},
        },
        "differences": [
            {"prompt": "box", "of": "boxes", "over": "start", "gain": 0.1, "low": 0.09, "high": 0.11},
            {"prompt": "box", "of": "published", "over": "boxes", "gain": -0.0254, "low": -0.032, "high": -0.021},
        ],
    }
    scores = {"oce": 0.4, "pq": 0.5, "sq": 0.8, "dq": 0.625, "s_inst": 0.45, "msa": 0.3, "dice": 0.9}
    compared_prompts = {
        "slices": [15, 17, 19],
        "rows": [
            {"bundle": "old", "prompts": "truth_box", **scores, "relative_percent": {}},
            {"bundle": "new", "prompts": "truth_box", **scores, "relative_percent": {"pq": {"percent": 19.06}}},
        ],
        "curves": [{"bundle": "new", "verdict": "Good enough."}],
    }
    kept = {"masks": 90, "kept": 30, "mask_precision": 0.9234}
    of_rounds = {
        "slices": {"held_out": "15:20"},
        "verdict": "Round 1 is the best.",
        "rounds": [
            {"number": 0, "held_out_box_iou": 0.7, "held_out_pq": 0.5, "masks": 0, "kept": 0, "mask_precision": None},
            {"number": 1, "held_out_box_iou": 0.71, "held_out_pq": 0.51, **kept},
        ],
    }
    for name, document in (("training", trained), ("compare", compared_prompts), ("rounds", of_rounds)):
        (tmp_path / f"{name}_x.json").write_text(json.dumps(document))
    text = script.tables(tmp_path)
    assert "| start |  | 0.696 | 0.683 | 0.567 |\n" in text
    assert "| protocol published | 78 | 0.772 | 0.758 | 0.645 |\n" in text
    assert "slices 15 to 19" in text
    assert "- exact boxes: published over boxes -0.025 (-0.032 to -0.021 over slices)\n" in text
    assert "boxes over start" not in text
    assert "| old | truth box | 0.400 | 0.500 | 0.800 | 0.625 | 0.450 | 0.300 | 0.900 |\n" in text
    assert "| new | truth box | 0.400 | 0.500 (+19.1 %) |" in text
    assert "- new: Good enough.\n" in text
    assert "| 0 | 0.700 | 0.500 |  |  |  |\n" in text
    assert "| 1 | 0.710 | 0.510 | 90 | 30 | 0.92 |\n" in text
    assert text.endswith("Round 1 is the best.\n")


def test_reports_of_the_command(tmp_path) -> None:
    sys.path.append(str(Path(__file__).parent / "evaluate"))
    from latency_reports import make_report  # noqa: PLC0415 - found by the line above

    (tmp_path / "bundle_x.json").write_text(json.dumps(make_report().to_document()))
    text = script.tables(tmp_path)
    assert "| encoder | 1 | openvino cpu fp32 | 100 ms | 102 ms | 10 | 50% |  |\n" in text
    assert "| slice | 1 | openvino cpu fp32 | 130 ms | 132 ms | 7.69 |  | 1.0 GB |\n" in text
    assert "slice, openvino cpu fp32: 77% of the throughput of the encoder alone" in text
    assert "read" not in text
