"""``export`` and ``verify``: weights become a bundle, and the bundle is compared with them."""

from __future__ import annotations

import dataclasses
import math
import shutil

import onnx
import pytest

from dendsam_deploy.bundle.bundle import MANIFEST_FILE, digest_file
from dendsam_deploy.bundle.manifest import Manifest
from dendsam_deploy.bundle.parity import NotJudged, ParityReport, ParityRow
from dendsam_deploy.cli.verify import parity_table


@pytest.fixture
def copy(bundle, tmp_path):
    """A bundle of one's own to spoil."""
    shutil.copytree(bundle, tmp_path / "copy")
    (tmp_path / "copy" / "parity.json").unlink(missing_ok=True)
    return tmp_path / "copy"


def test_export_verifies_before_it_publishes(run, random_sam, tmp_path) -> None:
    words = ["export", "--sam", random_sam, "-o", tmp_path / "exports" / "a"]
    document = run(*words, "--name", "ca1", "--json", "-").document
    assert document["proven"]
    assert document["name"] == "ca1"
    assert (tmp_path / "exports" / "a" / "parity.json").is_file()
    again = run(*words)
    assert again.code == 2
    assert "a bundle of that name exists; choose another name or pass --overwrite" in again.message


def test_export_without_verification_is_unproven(run, copy) -> None:
    facts = run("info", copy, "--json", "-").document
    assert facts["parity"] == "unproven"
    assert facts["model_pixel_size_nm"] == 12


def test_verify_lists_every_comparison(run, copy) -> None:
    outcome = run("verify", copy, "--device", "cpu")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    columns = ["fp32", "graph", "metric", "limit", "openvino", "cpu", "onnxruntime", "cpu"]
    assert lines[0].split() == columns
    numbers = lines[1 : lines.index("")]
    assert {line.split()[0] for line in numbers} == {"1", "2", "4", "5"}, "without a detector there are no boxes"
    assert sum("logits_max_over_std" in line for line in numbers) == 3, "the worst of each decoder, and of the chain"
    assert [line.partition(":")[0] for line in lines[-2:]] == ["openvino on cpu at fp32", "onnxruntime on cpu at fp32"]
    assert all(line.endswith("limits kept") for line in lines[-2:])
    document = run("verify", copy, "--engine", "onnxruntime", "--json", "-").document
    assert document["passed"]
    assert {row["engine"] for row in document["rows"]} == {"onnxruntime"}
    row_keys = {"level", "graph", "engine", "device", "precision", "metric", "value", "limit", "passed"}
    assert all(row_keys <= row.keys() for row in document["rows"])
    full = run("verify", copy, "--engine", "onnxruntime", "-v").out
    assert sum(" logits_max_over_std:boxes=" in line for line in full.splitlines()) == 4


def test_the_table_shows_the_worst_and_what_failed() -> None:
    def row(metric: str, value: float, engine: str = "onnxruntime", precision: str = "fp32", limit=0.5) -> ParityRow:
        passed = limit is None or value <= limit
        return ParityRow(2, "encoder", engine, "cpu", precision, metric, value, limit, passed, "stored")

    rows = (
        row("embedding_relative_max:batch=1", 0.25),
        row("embedding_relative_max:batch=2", 0.75),
        row("embedding_relative_max:batch=1", 0.125, engine="openvino"),
        row("embedding_relative_max:batch=1", 0.375, precision="bf16", limit=None),
        row("not_finite", math.nan, precision="bf16"),
    )
    refused = NotJudged("openvino", "cpu", "bf16", "no such kernel")
    exact, half, verdicts = parity_table(ParityReport(rows, (refused,))).split("\n\n")
    assert exact.splitlines()[1].split() == [
        "2",
        "encoder",
        "embedding_relative_max",
        "0.5",
        "0.75",
        "!",
        "0.125",
        "FAILED",
    ]
    assert [line.split()[2:] for line in half.splitlines()[1:]] == [
        ["embedding_relative_max", "0.375"],
        ["not_finite", "0.5", "nan", "!", "FAILED"],
    ]
    assert verdicts.splitlines() == [
        "onnxruntime on cpu at fp32: 1 of 2 limits broken",
        "openvino on cpu at fp32: all 1 limits kept",
        "onnxruntime on cpu at bf16: 1 of 1 limits broken",
        "openvino on cpu at bf16: not judged, no such kernel",
    ]
    assert "embedding_relative_max:batch=2" in parity_table(ParityReport(rows), in_full=True)


def test_scores_need_both_a_volume_and_its_truth(run, copy, discs) -> None:
    assert run("verify", copy, "--volume", discs / "raw.tif").code == 2
    words = ["--volume", discs / "raw.tif", "--truth", discs / "labels.tif", "--slices", "1:3"]
    document = run("verify", copy, "--device", "cpu", *words, "--json", "-").document
    losses = {row["engine"] for row in document["rows"] if row["metric"] == "truth_pq_loss"}
    assert losses == {"openvino"}


def test_verify_runs_the_weights_themselves_where_they_are_given(run, copy, random_sam) -> None:
    document = run("verify", copy, "--sam", random_sam, "--engine", "onnxruntime", "--json", "-").document
    assert document["passed"]
    assert {row["reference"] for row in document["rows"] if row["graph"] == "encoder"} == {"torch"}


def test_verify_fails_on_other_weights(run, copy) -> None:
    graph = copy / "encoder.onnx"
    model = onnx.load(graph)
    biggest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    biggest.raw_data = bytes(len(biggest.raw_data))
    onnx.save(model, graph)
    _accept(copy)
    outcome = run("verify", copy)
    assert outcome.code == 1
    assert "FAILED" in outcome.out
    assert "break their limit" in outcome.message
    assert run("info", copy, "--json", "-").document["parity"] == "failed"


def test_an_altered_graph_is_not_opened_at_all(run, copy) -> None:
    graph = copy / "decoder.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    outcome = run("verify", copy)
    assert outcome.code == 4
    assert str(graph) in outcome.message


def _accept(folder) -> None:
    """Write the digests of the files as they are now into the manifest, as an attacker or a bad disk could not."""
    path = folder / MANIFEST_FILE
    manifest = Manifest.from_json(path.read_text(), str(path))
    graphs = tuple(
        dataclasses.replace(graph, files=tuple(digest_file(folder, file.file) for file in graph.files))
        for graph in manifest.graphs
    )
    path.write_text(dataclasses.replace(manifest, graphs=graphs).to_json())
