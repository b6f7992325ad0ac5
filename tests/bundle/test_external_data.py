"""The walk through a protocol buffer, against the onnx package and against rubbish."""

import contextlib
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

from dendsam_deploy.bundle.external_data import external_data_locations
from dendsam_deploy.errors import BundleError


def model_of(locations: list[str]) -> onnx.ModelProto:
    tensors = []
    for index, location in enumerate(locations):
        tensor = onnx.TensorProto(name=f"w{index}", data_type=onnx.TensorProto.FLOAT, dims=[300])
        tensor.external_data.add(key="location", value=location)
        tensor.external_data.add(key="length", value="1200")
        tensors.append(tensor)
    inline = helper.make_tensor("inline", onnx.TensorProto.FLOAT, [1000], bytes(4000), raw=True)
    sparse = onnx.SparseTensorProto(values=tensors[-1]) if tensors else None
    node = helper.make_node("If", ["c"], ["y"], then_branch=helper.make_graph([], "t", [], [], tensors[:1]))
    graph = helper.make_graph([node], "g", [], [], [inline, *tensors[1:-1]])
    graph.sparse_initializer.extend([sparse] if sparse else [])
    return helper.make_model(graph)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(locations=st.lists(st.text(min_size=1, max_size=200), max_size=6))
def test_every_location_is_found_wherever_the_tensor_is(tmp_path: Path, locations: list[str]):
    path = tmp_path / "model.onnx"
    path.write_bytes(model_of(locations).SerializeToString())
    assert external_data_locations(path) == frozenset(locations)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300))
def test_rubbish_is_refused_or_harmless(tmp_path: Path, content: bytes):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with contextlib.suppress(BundleError):
        external_data_locations(path)


@pytest.mark.parametrize("cut", [1, 7, 100])
def test_a_cut_file_is_named(tmp_path: Path, cut: int):
    path = tmp_path / "model.onnx"
    path.write_bytes(model_of(["a", "b", "c"]).SerializeToString()[:-cut])
    with pytest.raises(BundleError, match=r"model\.onnx: not an ONNX file"):
        external_data_locations(path)


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def test_depth_hides_nothing_and_breaks_nothing(tmp_path: Path):
    entry = field(1, b"location") + field(2, b"../secret")
    content = field(5, field(13, entry))  # an initializer of a graph
    for _ in range(3000):
        content = field(1, field(5, field(6, content)))  # a graph in an attribute of a node of a graph, and so on
    path = tmp_path / "model.onnx"
    path.write_bytes(field(7, content))
    assert external_data_locations(path) == {"../secret"}


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
