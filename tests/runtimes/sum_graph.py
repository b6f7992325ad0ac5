"""The smallest graph that an engine can be tried on: it sums the pixels of each tile."""

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from dendsam_deploy.bundle.manifest import FileDigest, GraphSpec, TensorSpec

SPEC = GraphSpec(
    role="encoder",
    precision="fp32",
    opset=17,
    files=(FileDigest("graph.onnx", "", 0),),
    inputs=(TensorSpec("tiles", "uint8", ("b", 2, 3)),),
    outputs=(TensorSpec("sums", "float32", ("b",)),),
)


def write_sum_graph(path: Path) -> Path:
    nodes = [
        helper.make_node("Cast", ["tiles"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["real", "axes"], ["sums"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "sum",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["b", 2, 3])],
        [helper.make_tensor_value_info("sums", TensorProto.FLOAT, ["b"])],
        [helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path
