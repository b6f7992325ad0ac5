"""A bundle of trivial graphs, complete in every other respect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import onnx
import pytest
from onnx import helper

from dendsam_deploy.bundle.contract import graph_inputs, graph_outputs
from dendsam_deploy.bundle.manifest import (
    SCHEMA_VERSION,
    Decoding,
    FileDigest,
    GraphSpec,
    Manifest,
    Preprocessing,
    Role,
    Source,
    Thresholds,
)
from dendsam_deploy.bundle.writer import BundleWriter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TILE_SIZE_PX = 64


class MakeBundle(Protocol):
    """Writes a bundle; see `make_bundle`."""

    def __call__(self, out: Path, *, overwrite: bool = False, name: str = "toy") -> Manifest: ...


@pytest.fixture
def make_bundle() -> MakeBundle:
    def make(out: Path, *, overwrite: bool = False, name: str = "toy") -> Manifest:
        with BundleWriter(out, overwrite=overwrite) as writer:
            return fill_bundle(writer, name)

    return make


@pytest.fixture
def fill() -> Callable[[BundleWriter], Manifest]:
    return fill_bundle


def fill_bundle(writer: BundleWriter, name: str = "toy") -> Manifest:
    """Write graphs, an extra file and the manifest."""
    graphs = tuple(toy_graph(writer, role) for role in ("encoder", "decoder"))
    (writer.folder / "MODEL_CARD.md").write_text("# toy\n")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        created_utc="2026-01-01T00:00:00Z",
        licence="CC0-1.0",
        model_type="tiny",
        sources=(Source("sam", "tiny", FileDigest("sam.pt", "00" * 32, 5)),),
        graphs=graphs,
        preprocessing=Preprocessing("minmax_uint8", TILE_SIZE_PX, 16, 15.0, None),
        decoding=Decoding((2, 4), 0.1, 8.0),
        thresholds=Thresholds(0.3, 0.7, 0.0, 20),
        producers={"onnx": onnx.__version__},
        extra_files=writer.digest("MODEL_CARD.md"),
    )
    writer.write_manifest(manifest)
    return manifest


def toy_graph(writer: BundleWriter, role: Role) -> GraphSpec:
    """Write a valid ONNX file; what it computes is of no interest here."""
    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "same", value[:1], value[1:])
    onnx.save(helper.make_model(graph, ir_version=10), writer.folder / f"{role}.onnx")
    return GraphSpec(
        role=role,
        precision="fp32",
        opset=20,
        files=writer.digest(f"{role}.onnx"),
        inputs=graph_inputs(role, TILE_SIZE_PX),
        outputs=graph_outputs(role, TILE_SIZE_PX),
    )
