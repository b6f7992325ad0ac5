"""What a graph does when it runs: every operator with the shapes that it met, as ONNX Runtime's profile tells."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime

from dendsam_deploy.errors import InputFileError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

_FATAL_ONLY = 4


@dataclass(frozen=True, slots=True)
class NodeRun:
    """One execution of one operator.

    Parameters
    ----------
    operator : str
        Such as ``MatMul``.
    input_shapes, output_shapes : tuple of tuple of int
        Shapes of its tensors, weights among them; inputs that were left out are not listed.
    """

    operator: str
    input_shapes: tuple[tuple[int, ...], ...]
    output_shapes: tuple[tuple[int, ...], ...]


def trace_nodes(path: Path, inputs: Mapping[str, NDArray[np.generic]]) -> list[NodeRun]:
    """Run a graph once on the CPU, as it stands in the file and without any optimisation, and list what it executed.

    Nodes in the body of a loop are listed as often as they ran.

    Parameters
    ----------
    path : Path
        Any ONNX file.
    inputs : mapping
        Its inputs by name.

    Raises
    ------
    InputFileError
        If ONNX Runtime cannot load or run the graph.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.enable_profiling = True
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Weights that were rearranged for a kernel are no longer among its inputs.
    options.add_session_config_entry("session.disable_prepacking", "1")
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder, "profile"))
        try:
            session = onnxruntime.InferenceSession(path, sess_options=options, providers=["CPUExecutionProvider"])
            session.run(None, dict(inputs))
        except Exception as error:  # the binding's exceptions derive from Exception alone
            reason = " ".join(str(error).split())
            raise InputFileError(f"{path}: ONNX Runtime cannot trace the graph ({reason})") from error
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return [_node_run(event["args"]) for event in events if event.get("cat") == "Node" and "args" in event]


def _node_run(facts: dict[str, Any]) -> NodeRun:
    """Read an event of the profile; a shape is listed as ``{element type: [sizes]}``."""
    inputs, outputs = (
        tuple(tuple(map(int, shape)) for tensor in facts.get(side, ()) for shape in tensor.values())
        for side in ("input_type_shape", "output_type_shape")
    )
    return NodeRun(facts["op_name"], inputs, outputs)
