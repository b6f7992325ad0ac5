"""Compiled engines of TensorRT: made once, of this graph for this GPU, never from elsewhere. ``-m tensorrt -rs``."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import onnx
import pytest
from tensorrt_inputs import assert_close, box_inputs, graph_of, tile_inputs

from dendsam_deploy.bundle.bundle import Bundle, digest_file
from dendsam_deploy.bundle.manifest import FileDigest, Role
from dendsam_deploy.cli.main import main
from dendsam_deploy.errors import BundleError, UnsafeFileError
from dendsam_deploy.evaluate.parity import VerifyOptions, verify_bundle
from dendsam_deploy.runtimes.gpu_engine_cache import ENGINE_FILE
from dendsam_deploy.runtimes.gpu_engine_plan import MOST_TILES
from dendsam_deploy.runtimes.portable import OnnxRunner, RunnerOptions
from dendsam_deploy.runtimes.session import SessionOptions, open_session

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dendsam_deploy.progress import Progress

pytestmark = pytest.mark.tensorrt

ROLES: tuple[Role, ...] = ("detector", "encoder", "decoder")


@pytest.mark.parametrize("role", ROLES)
def test_an_engine_is_compiled_once(bundle: Bundle, engines, role: Role) -> None:
    path, graph = graph_of(bundle, role)
    told: list[Progress] = []
    options = engines.EngineOptions(progress=told.append)
    with engines.EngineRunner(path, graph, options) as first:
        digest = first.stored.sha256
    told.clear()
    with engines.EngineRunner(path, graph, options) as second:
        assert not second.stored.is_new
        assert second.stored.sha256 == digest
    assert told == []


def test_compiling_is_reported_and_says_how_many_attentions_were_fused(copied: Bundle, engines) -> None:
    shutil.rmtree(copied.path / "engines", ignore_errors=True)
    path, graph = graph_of(copied, "encoder")
    told: list[Progress] = []
    with engines.EngineRunner(path, graph, engines.EngineOptions(progress=told.append)) as runner:
        built = runner.stored.built
        assert runner.stored.is_new
    operators = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    assert built.attention_layers == operators.count("Softmax") + operators.count("Attention") > 0
    assert 0 <= built.fused_attention_layers <= built.attention_layers
    assert {progress.stage for progress in told} == {"compile"}
    assert len(told) > 2
    assert all(0 <= progress.done <= progress.total for progress in told)
    assert f"{built.fused_attention_layers} of {built.attention_layers} attention" in told[-1].note


def test_whoever_loses_interest_stops_a_build(copied: Bundle, engines) -> None:
    shutil.rmtree(copied.path / "engines", ignore_errors=True)

    def interrupted(progress: Progress) -> None:
        raise KeyboardInterrupt

    path, graph = graph_of(copied, "decoder")
    with pytest.raises(KeyboardInterrupt):
        engines.EngineRunner(path, graph, engines.EngineOptions(progress=interrupted)).__enter__()
    assert not list((copied.path / "engines").glob("*/record.json"))


@pytest.mark.parametrize("change", ["graph", "profiles"])
def test_a_stale_engine_is_not_used(copied: Bundle, engines, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    path, graph = graph_of(copied, "decoder")
    with engines.EngineRunner(path, graph) as runner:
        old = runner.stored.sha256
    if change == "graph":
        model = onnx.load(path)
        model.doc_string = "another file, though the same function"
        onnx.save(model, path)
        graph = replace(graph, files=(digest_file(path.parent, path.name), *graph.files[1:]))
    else:
        monkeypatch.setattr("dendsam_deploy.runtimes.gpu_engine_plan.MOST_TILES", MOST_TILES - 1)
    with engines.EngineRunner(path, graph) as runner:
        assert runner.stored.is_new
        new = runner.stored.sha256
    plans = {file.parent.name for file in (copied.path / "engines").glob(f"decoder-fp32-*/{ENGINE_FILE}")}
    assert len(plans) >= 2
    assert old
    assert new


def spoil(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]


@pytest.mark.parametrize("damage", [spoil, lambda content: content[:-1], lambda content: b""])
def test_a_tampered_engine_is_refused(
    copied: Bundle, engines, damage: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    path, graph = graph_of(copied, "decoder")
    with engines.EngineRunner(path, graph):
        pass
    for engine in (copied.path / "engines").glob(f"*/{ENGINE_FILE}"):
        engine.write_bytes(damage(engine.read_bytes()))
    with pytest.raises(UnsafeFileError, match="altered"):
        engines.EngineRunner(path, graph).__enter__()
    assert main(["verify", str(copied.path), "--engine", "tensorrt", "--precision", "fp32"]) == 77
    assert "altered" in capsys.readouterr().err


def test_an_engine_of_somebody_else_runs_only_when_it_is_trusted(
    copied: Bundle, engines, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, graph = graph_of(copied, "decoder")
    with engines.EngineRunner(path, graph) as runner:
        digest = runner.stored.sha256
    for variable in ("XDG_STATE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(tmp_path / "somebody else"))
    with pytest.raises(UnsafeFileError, match=f"--trust-engine {digest}"):
        engines.EngineRunner(path, graph).__enter__()
    with engines.EngineRunner(path, graph, engines.EngineOptions(trusted=(digest,))) as trusted:
        assert trusted.stored.sha256 == digest
        assert len(trusted.run(box_inputs(copied, 1, 3, 8))["iou"]) == 3


def test_weights_beside_the_graph_are_found(bundle: Bundle, engines, tmp_path: Path) -> None:
    """As they are where a graph has more than 2 GiB of them."""
    path, graph = graph_of(bundle, "encoder")
    onnx.save(
        onnx.load(path),
        tmp_path / "encoder.onnx",
        save_as_external_data=True,
        location="encoder.onnx.data",
        size_threshold=1024,
    )
    files = tuple(digest_file(tmp_path, name) for name in ("encoder.onnx", "encoder.onnx.data"))
    inputs = tile_inputs(bundle, 1)
    with (
        engines.EngineRunner(tmp_path / "encoder.onnx", replace(graph, files=files)) as outside,
        OnnxRunner(path, graph, RunnerOptions()) as inside,
    ):
        assert_close(outside.run(inputs), inside.run(inputs), 2e-3)


def test_what_the_parser_refuses_is_named_in_one_line(bundle: Bundle, engines, tmp_path: Path) -> None:
    path, graph = graph_of(bundle, "encoder")
    model = onnx.load(path)
    node = next(node for node in model.graph.node if node.op_type == "Softmax")
    node.op_type, node.name = "Hardswoosh", "the_culprit"
    onnx.save(model, tmp_path / "encoder.onnx")
    altered = replace(graph, files=(FileDigest("encoder.onnx", "0" * 64, 0),))
    with pytest.raises(BundleError, match=r"encoder\.onnx.*parser.*the_culprit") as caught:
        engines.EngineRunner(tmp_path / "encoder.onnx", altered).__enter__()
    assert "\n" not in str(caught.value)


def test_a_proof_is_about_the_engines_that_were_judged(copied: Bundle, requires_tensorrt: str) -> None:
    """Compiled again, the same graph is another engine, and may be wrong where the first one was not."""
    wishes = SessionOptions("tensorrt", requires_tensorrt, "fp32")
    assert verify_bundle(copied.path, VerifyOptions(session=wishes)).passed
    judged = Bundle.open(copied.path)
    assert judged.parity is not None
    assert {graph.role for graph in judged.parity.compiled} == set(ROLES)
    with open_session(judged, wishes) as session:
        assert session.is_proven
    others = tuple(replace(graph, sha256="00" * 32) for graph in judged.parity.compiled)
    with open_session(replace(judged, parity=replace(judged.parity, compiled=others)), wishes) as session:
        assert not session.is_proven
        assert "encoder" in session.description
