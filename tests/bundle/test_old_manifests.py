"""Manifests of every version that was ever written stay readable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dendsam_deploy.bundle.manifest import SCHEMA_VERSION, Manifest

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION + 1))
def test_a_manifest_of_any_version_is_read(version) -> None:
    path = GOLDEN / f"manifest-{version}.json"
    text = path.read_text(encoding="utf-8")
    assert json.loads(text)["schema_version"] == version
    manifest = Manifest.from_json(text, str(path))
    assert manifest.schema_version == SCHEMA_VERSION
    assert manifest.model_type == "tiny"
    encoder = manifest.graph("encoder", "fp32")
    assert encoder is not None
    assert [file.file for file in encoder.files] == ["encoder.onnx"]
    assert Manifest.from_json(manifest.to_json(), "again") == manifest


def test_version_1_says_nothing_about_attention() -> None:
    manifest = Manifest.from_json((GOLDEN / "manifest-1.json").read_text(encoding="utf-8"), "golden")
    assert {graph.attention for graph in manifest.graphs} == {None}
