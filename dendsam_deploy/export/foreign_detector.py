"""Turns a detector ONNX file made elsewhere into the bundle's detector graph: raw tiles in, boxes in tile px out."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, checker, compose, helper, inliner, shape_inference, version_converter

from dendsam_deploy.bundle.external_data import external_data_locations
from dendsam_deploy.errors import BundleError, CheckpointError, InvalidArgumentError, StorageError, UnsafeFileError
from dendsam_deploy.export.detector_layouts import DetectorLayout, OutputTensor, recognise_layout
from dendsam_deploy.export.detector_nodes import NetworkImage, boxes_from_outputs, image_from_tiles, nodes_from_text
from dendsam_deploy.export.graphs import IR_VERSION, OPSET, GraphExport, check_graph
from dendsam_deploy.models.detector_graph import MOST_CANDIDATES, candidate_count

_STRIDE_PX = 32
_OLDEST_OPSET = 18  # below, some operators of the wrapping take their arguments differently
_FULL_SCALES = {int(TensorProto.FLOAT): 1.0, int(TensorProto.FLOAT16): 1.0, int(TensorProto.UINT8): 255.0}
_PREFIX = "detector/"
_NUMBERS = "tiles_float"


@dataclass(frozen=True, slots=True)
class ForeignDetectorOptions:
    """How a foreign detector is wrapped.

    Parameters
    ----------
    tile_size_px : int
        Side S of the tiles.
    input_size_px : int or None
        Side at which the network sees a tile, where its file leaves that open. None takes the recorded training size,
        or S rounded up to a multiple of 32.
    max_candidates : int or None
        Most candidates that a tile returns. None takes what `candidate_count` recommends.
    full_scale : float or None
        Value that the network expects for white. None: 1, or 255 where its input is of an integer type.
    """

    tile_size_px: int
    input_size_px: int | None = None
    max_candidates: int | None = None
    full_scale: float | None = None


@dataclass(frozen=True, slots=True)
class ForeignDetector:
    """What was recognised in a foreign file.

    Parameters
    ----------
    layout : DetectorLayout
        How its outputs were read.
    input_hw : (int, int)
        Height and width at which the network sees a tile.
    class_names : tuple of str
        Recorded names, empty where there are none.
    one_by_one : bool
        Whether the network takes single images, so that the graph loops over tiles.
    candidates : int
        Candidates per tile.
    """

    layout: DetectorLayout
    input_hw: tuple[int, int]
    class_names: tuple[str, ...]
    one_by_one: bool
    candidates: int


@dataclass(frozen=True, slots=True)
class _Network:
    """A foreign graph, its one input, and what its file records."""

    model: onnx.ModelProto
    image: onnx.ValueInfoProto
    image_shape: tuple[int | None, ...]
    outputs: tuple[OutputTensor, ...]
    metadata: dict[str, str]


def wrap_detector(onnx_path: Path, out_path: Path, options: ForeignDetectorOptions) -> ForeignDetector:
    """Write a detector ONNX file made elsewhere as the bundle's detector graph.

    Scaling to the network's input, grey to three channels, box arithmetic and the choice of the best candidates are
    put around the network; its own operators stay as they are. A network that takes single images is run in a loop.

    Parameters
    ----------
    onnx_path : Path
        The foreign file, with any external data beside it.
    out_path : Path
        The file to write.
    options : ForeignDetectorOptions
        Size of the tiles and what the file leaves open.

    Raises
    ------
    CheckpointError
        If the file is no detector ONNX, or its outputs cannot be told apart; says what was found.
    UnsafeFileError
        If it names files outside its folder.
    StorageError
        If the file system refuses.
    """
    network = _read_network(onnx_path)
    found = _recognise(network, options, onnx_path)
    model = helper.make_model(
        _contract_graph(network, found, options),
        opset_imports=[helper.make_opsetid("", _opset(network.model))],
        producer_name="dendsam-deploy",
    )
    model.ir_version = max(network.model.ir_version, IR_VERSION)
    try:
        onnx.save(model, out_path)
    except OSError as error:
        raise StorageError(
            f"{out_path}: cannot write the graph ({error.strerror or error}); free space or choose another place"
        ) from error
    try:
        check_graph(out_path, GraphExport("detector", options.tile_size_px))
    except BundleError as error:
        out_path.unlink(missing_ok=True)
        raise CheckpointError(f"{onnx_path}: cannot be wrapped: {error}") from error
    return found


def _recognise(network: _Network, options: ForeignDetectorOptions, path: Path) -> ForeignDetector:
    """Settle the size of the input, the layout of the outputs, the classes and whether batches are possible."""
    batch, channels, height, width = network.image_shape
    if channels not in (1, 3):
        raise CheckpointError(
            f"{path}: its input has {channels} channels, expected images of 1 or 3 channels (b, c, h, w)"
        )
    open_size = (
        options.input_size_px or _recorded_size(network.metadata) or -(-options.tile_size_px // _STRIDE_PX) * _STRIDE_PX
    )
    input_hw = (height or open_size, width or open_size)
    if options.input_size_px is not None and input_hw != (options.input_size_px, options.input_size_px):
        raise InvalidArgumentError(
            f"{path}: its input is fixed to {input_hw[0]} x {input_hw[1]} px, not {options.input_size_px}; "
            "leave the size out"
        )
    names = _class_names(network.metadata)
    layout = recognise_layout(network.outputs, len(names) or None, input_hw, str(path))
    first_axes = {output.shape[0] for output in network.outputs if output.name in layout.outputs}
    one_by_one = batch is not None or not layout.has_batch or first_axes != {None}
    if batch not in (None, 1):
        raise CheckpointError(f"{path}: its batch is fixed to {batch}, expected 1 or free; export it again")
    most = layout.rows or MOST_CANDIDATES
    count = min(options.max_candidates or candidate_count(options.tile_size_px, most), most)
    return ForeignDetector(layout, input_hw, names, one_by_one, count)


def _read_network(path: Path) -> _Network:
    """Read a foreign file with its weights, checked, at a version of the operators that the wrapping knows."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a detector as .onnx")
    _check_external_data(path)
    try:
        checker.check_model(str(path))
        model = onnx.load(path)
        _check_operators(model, path)
        if model.functions:
            model = inliner.inline_local_functions(model)
        if _opset(model) < _OLDEST_OPSET:
            model = version_converter.convert_version(model, OPSET)
        model = shape_inference.infer_shapes(model)
    except (
        checker.ValidationError,
        shape_inference.InferenceError,
        version_converter.ConvertError,
        RuntimeError,
        ValueError,
        OSError,
    ) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(
            f"{path}: not a usable ONNX file ({reason}); export it again with opset 17 or later"
        ) from error
    stored = {tensor.name for tensor in model.graph.initializer}
    images = [value for value in model.graph.input if value.name not in stored]
    shapes = [_shape(value) for value in images]
    if len(images) != 1 or len(shapes[0]) != 4 or images[0].type.tensor_type.elem_type not in _FULL_SCALES:
        described = ", ".join(f"{value.name} {list(shape)}" for value, shape in zip(images, shapes, strict=True))
        raise CheckpointError(
            f"{path}: takes {described or 'nothing'}, expected one image (b, c, h, w) of float or uint8"
        )
    return _Network(
        model=model,
        image=images[0],
        image_shape=shapes[0],
        outputs=tuple(OutputTensor(value.name, _shape(value)) for value in model.graph.output),
        metadata={entry.key: entry.value for entry in model.metadata_props},
    )


def _check_operators(model: onnx.ModelProto, path: Path) -> None:
    """Raise if a model needs operators of one vendor, which other engines do not have."""
    own = {"", "ai.onnx", *(function.domain for function in model.functions)}
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in model.graph.node if node.domain not in own})
    if foreign:
        raise CheckpointError(
            f"{path}: uses operators that are not ONNX's own ({', '.join(foreign[:3])}); export it again without them"
        )


def _check_external_data(path: Path) -> None:
    """Raise if a graph would open files outside its folder."""
    try:
        locations = external_data_locations(path)
    except BundleError as error:
        raise CheckpointError(f"{path}: not an ONNX file, or cut off; export or copy it again") from error
    folder = path.parent.resolve()
    for location in sorted(locations):
        target = folder / location
        inside = not Path(location).is_absolute() and ".." not in Path(location).parts and target.resolve() == target
        if not inside or (target.is_file() and target.stat().st_nlink > 1):
            raise UnsafeFileError(
                f"{path}: takes its weights from {location!r}, outside its folder or through a link; refused"
            )
        if not target.is_file():
            raise CheckpointError(f"{path}: its weights {location!r} are missing; copy them beside it")


def _contract_graph(network: _Network, found: ForeignDetector, options: ForeignDetectorOptions) -> onnx.GraphProto:
    """Build the bundle's detector graph around a network."""
    side, count = options.tile_size_px, found.candidates
    inner = compose.add_prefix(network.model, _PREFIX).graph
    names = ("tile", "tile_boxes", "tile_scores") if found.one_by_one else (_NUMBERS, "boxes", "scores")
    # Converted before anything else is done to them: TensorRT moves no uint8.
    converted = nodes_from_text(f"{_NUMBERS} = Cast <to = {TensorProto.FLOAT}> (tiles)")
    nodes = [
        *image_from_tiles(_network_image(network, found, options), side, names[0]),
        helper.make_node("Identity", ["image"], [_PREFIX + network.image.name]),
        *inner.node,
        *(
            helper.make_node("Identity", [_PREFIX + output], [f"raw_{number}"])
            for number, output in enumerate(found.layout.outputs)
        ),
        *boxes_from_outputs(found.layout, count, (side, side / min(found.input_hw)), names[1:]),
    ]
    return helper.make_graph(
        [*converted, *(_loop_over_tiles(nodes, count) if found.one_by_one else nodes)],
        "detector",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["tiles", side, side])],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["tiles", "candidates", 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["tiles", "candidates"]),
        ],
        initializer=list(inner.initializer),
    )


def _loop_over_tiles(nodes: list[onnx.NodeProto], count: int) -> list[onnx.NodeProto]:
    """Put nodes that take ``tile`` (1, S, S) and give ``tile_boxes``, ``tile_scores`` into a loop over all tiles."""
    before = nodes_from_text(
        f"""
        lone_tile = Gather <axis = 0> ({_NUMBERS}, tile_number)
        tile_axis = Constant <value_ints = [0]> ()
        tile = Unsqueeze (lone_tile, tile_axis)
        """
    )
    after = nodes_from_text(
        """
        lone_boxes = Squeeze (tile_boxes, tile_axis)
        lone_scores = Squeeze (tile_scores, tile_axis)
        go_on = Identity (may_go_on)
        """
    )
    body = helper.make_graph(
        [*before, *nodes, *after],
        "one_tile",
        [
            helper.make_tensor_value_info("tile_number", TensorProto.INT64, []),
            helper.make_tensor_value_info("may_go_on", TensorProto.BOOL, []),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("lone_boxes", TensorProto.FLOAT, [count, 4]),
            helper.make_tensor_value_info("lone_scores", TensorProto.FLOAT, [count]),
        ],
    )
    counting = nodes_from_text(
        f"""
        tile_count = Shape <start = 0, end = 1> ({_NUMBERS})
        trips = Squeeze (tile_count)
        """
    )
    return [*counting, helper.make_node("Loop", ["trips", ""], ["boxes", "scores"], body=body)]


def _network_image(network: _Network, found: ForeignDetector, options: ForeignDetectorOptions) -> NetworkImage:
    """Describe what the network takes."""
    kind = network.image.type.tensor_type.elem_type
    white = _FULL_SCALES[int(kind)] if options.full_scale is None else options.full_scale
    return NetworkImage(*found.input_hw, channels=network.image_shape[1] or 1, element_type=kind, white=white)


def _opset(model: onnx.ModelProto) -> int:
    """Return the version of ONNX's own operators that a model uses."""
    return max((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)


def _shape(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    """Return the shape of an input or output; None for axes that are free."""
    dims = value.type.tensor_type.shape.dim
    return tuple(int(dim.dim_value) if dim.HasField("dim_value") else None for dim in dims)


def _class_names(metadata: dict[str, str]) -> tuple[str, ...]:
    """Return the class names that a YOLO file records."""
    names = _literal(metadata.get("names"))
    if isinstance(names, dict):
        return tuple(str(name) for name in names.values())
    return tuple(str(name) for name in names) if isinstance(names, list) else ()


def _recorded_size(metadata: dict[str, str]) -> int | None:
    """Return the size of images that a YOLO file records."""
    size = _literal(metadata.get("imgsz"))
    longest = max(size) if isinstance(size, list) and size else size
    return longest if isinstance(longest, int) and longest > 0 else None


def _literal(text: str | None) -> object:
    """Read a Python literal; None where there is none."""
    try:
        return ast.literal_eval(text) if text else None
    except (ValueError, SyntaxError):
        return None
