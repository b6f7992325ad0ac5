"""What a compiled engine is compiled for, and how work of any size is cut and padded to fit it. Plain arithmetic.

A compiled engine accepts only the shapes of its profiles, and every new shape costs it milliseconds of preparation. So
large batches are cut, boxes are padded to a few round numbers, and shapes that return are recorded and replayed.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, TypeVar, cast

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.runtimes.runner import gpu_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import GraphSpec, TensorSpec
    from dendsam_deploy.runtimes.runner import Tensor

Shape = tuple[int, ...]
Work = TypeVar("Work")

MOST_TILES = 8
"""Most tiles of one execution. An engine reserves memory for its largest batch, whether it ever comes or not."""

MOST_BOXES = 64
"""Most boxes of one execution: at 1024 px their image tokens take 0.27 GB for each float32 tensor in flight."""

BOX_COUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, MOST_BOXES)
"""Numbers of boxes that the decoder is executed with; others are padded up to the next, by less than one half."""

_PROMPTED_TILE = "tile_index"  # what tells a decoder from other graphs

_USUAL_BOXES = 32
_USUAL_REGION = 16

# TensorRT names kernels of fused attention after "multi-head attention": _gemm_mha_v2, fmha_v2, fused_mha_v2.
_FUSED = re.compile(r"(?<![a-z])f?mha(?![a-z])", re.IGNORECASE)
_OTHER_PROFILE = re.compile(r"\[profile [1-9]\d*\]", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Bounds:
    """The least, the most usual and the largest lengths of axes, or values of an input."""

    least: Shape
    usual: Shape
    most: Shape

    def admit(self, numbers: Shape) -> bool:
        """Tell whether numbers lie within."""
        return len(numbers) == len(self.least) and all(
            low <= number <= high for low, number, high in zip(self.least, numbers, self.most, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Profile:
    """Shapes that an engine is optimised for together.

    Parameters
    ----------
    shapes : mapping
        Input -> bounds of its axes; every input of the graph.
    values : mapping
        Input -> bounds of its elements, for inputs whose values decide the shapes of others.
    """

    shapes: Mapping[str, Bounds]
    values: Mapping[str, Bounds]

    def admits(self, shapes: Mapping[str, Shape], values: Mapping[str, Shape]) -> bool:
        """Tell whether inputs of these shapes, and of these values where they matter, can be executed."""
        return all(bounds.admit(shapes[name]) for name, bounds in self.shapes.items()) and all(
            bounds.admit(values[name]) for name, bounds in self.values.items()
        )

    def to_document(self) -> dict[str, dict[str, list[list[int]]]]:
        """Return the bounds as JSON values."""
        return {
            kind: {name: [list(b.least), list(b.usual), list(b.most)] for name, b in sorted(table.items())}
            for kind, table in (("shapes", self.shapes), ("values", self.values))
        }


def make_profiles(spec: GraphSpec) -> tuple[Profile, ...]:
    """Return what an engine of a graph is to be compiled for.

    Encoder and detector get a profile of exactly one tile, the fastest for it, and one of several. The decoder gets one
    for any number of boxes and any region, up to the whole mask grid.
    """
    if spec.role == "decoder":
        cells = next(tensor for tensor in spec.inputs if tensor.name == "embeddings").shape[-1]
        if not isinstance(cells, int):
            raise InvalidArgumentError(f"the decoder's embeddings have a grid of {cells!r} cells, expected a number")
        axes = {"tiles": (1, 1, MOST_TILES), "boxes": (1, _USUAL_BOXES, MOST_BOXES)}
        return (_profile(spec, axes, {"region": Bounds((1,), (min(_USUAL_REGION, cells),), (cells,))}),)
    if not any(isinstance(n, str) for tensor in spec.inputs for n in tensor.shape):
        return (_profile(spec, {}, {}),)
    return tuple(_profile(spec, {"tiles": lengths}, {}) for lengths in ((1, 1, 1), (2, MOST_TILES, MOST_TILES)))


def choose_profile(
    profiles: tuple[Profile, ...], shapes: Mapping[str, Shape], values: Mapping[str, Shape], where: str
) -> int:
    """Return the number of the first profile that admits inputs.

    Raises
    ------
    InvalidArgumentError
        Where none does; names `where`, what was given, and the bounds.
    """
    for number, profile in enumerate(profiles):
        if profile.admits(shapes, values):
            return number
    given = ", ".join(f"{name} {list(values.get(name, shape))}" for name, shape in shapes.items())
    allowed = " or ".join(json.dumps(profile.to_document()) for profile in profiles)
    raise InvalidArgumentError(f"{where}: the engine takes no inputs of {given}, only [least, usual, most] {allowed}")


def gpu_index(device: str) -> int:
    """Return the number of the GPU that ``auto``, ``cuda`` or ``cuda:N`` names.

    Raises
    ------
    MissingCapabilityError
        For the CPU.
    InvalidArgumentError
        For any other spelling.
    """
    gpu = 0 if device == "auto" else gpu_of(device)
    if gpu is None:
        raise MissingCapabilityError("device cpu: the engine tensorrt runs on NVIDIA GPUs; choose --device cuda")
    return gpu


@dataclass(frozen=True, slots=True)
class Call:
    """One execution of the graph, a part of what was asked for.

    Parameters
    ----------
    inputs : mapping
        The part's inputs.
    rows : ndarray, shape (N,), intp
        Where its results belong on the outputs' first axis.
    """

    inputs: Mapping[str, Tensor]
    rows: NDArray[np.intp]


def split_calls(
    inputs: Mapping[str, Tensor], spec: GraphSpec, most_tiles: int = MOST_TILES, most_prompts: int = MOST_BOXES
) -> Iterator[Call]:
    """Cut a batch of any size into executions of limited size, by default such as `make_profiles` admits.

    Neither tiles nor prompts know of each other, so that the results are those of one large execution. Without rows
    there is nothing to execute.
    """
    if _PROMPTED_TILE in inputs:
        yield from _split_prompts(inputs, spec, most_tiles, most_prompts)
        return
    count = batch_size(inputs, spec)
    for start in range(0, count, most_tiles):
        rows = slice(start, min(start + most_tiles, count))
        yield Call({tensor.name: inputs[tensor.name][rows] for tensor in spec.inputs}, np.arange(rows.start, rows.stop))


def batch_size(inputs: Mapping[str, Tensor], spec: GraphSpec) -> int:
    """Return the length of the axis that the outputs count: prompts for the decoders, tiles elsewhere."""
    return inputs[_PROMPTED_TILE if _PROMPTED_TILE in inputs else spec.inputs[0].name].shape[0]


def on_host(tensor: Tensor) -> NDArray[np.generic]:
    """Return a tensor as an array."""
    return tensor if isinstance(tensor, np.ndarray) else tensor.numpy()


def padded_count(count: int) -> int:
    """Return the number of boxes that `count` boxes, 1 to `MOST_BOXES`, are executed as."""
    return next(padded for padded in BOX_COUNTS if padded >= count)


def execution_shapes(call: Call, spec: GraphSpec) -> dict[str, Shape]:
    """Return the shapes that a call's inputs are executed with: those of the boxes are padded."""
    shapes = {tensor.name: tuple(call.inputs[tensor.name].shape) for tensor in spec.inputs}
    if spec.role != "decoder":
        return shapes
    boxes = padded_count(len(call.rows))
    return {
        tensor.name: (boxes, *shapes[tensor.name][1:]) if tensor.shape[0] == "boxes" else shapes[tensor.name]
        for tensor in spec.inputs
    }


def empty_outputs(
    inputs: Mapping[str, Tensor], spec: GraphSpec, known: Mapping[str, Shape]
) -> dict[str, NDArray[np.generic]]:
    """Return the outputs for no tiles, or no boxes, at all.

    Parameters
    ----------
    inputs : mapping
        What was given; the decoder's ``region`` decides the shape of its logits.
    spec : GraphSpec
        The graph.
    known : mapping
        Output -> shape that the engine states, -1 where it does not know; the detector's number of candidates is there.
    """
    side = int(cast("NDArray[np.int64]", on_host(inputs["region"]))[0]) if spec.role == "decoder" else 0
    return {tensor.name: np.zeros(_empty_shape(tensor, side, known), tensor.dtype) for tensor in spec.outputs}


def count_fused_attention(engine_json: str) -> int:
    """Return how many layers of an engine compute a whole attention in one kernel.

    Parameters
    ----------
    engine_json : str
        What the engine's inspector says, with detailed verbosity. Of an engine with several profiles, whose layers are
        listed once for each, those of the first are counted.

    Raises
    ------
    ValueError
        Where the text is not what an inspector writes.
    """
    layers = json.loads(engine_json)["Layers"]
    names = []
    for layer in layers:
        fields = {"Name": layer} if isinstance(layer, str) else layer
        names.append((str(fields.get("Name", "")), str(fields.get("TacticName", ""))))
    return sum(
        any(_FUSED.search(text) for text in texts) for texts in names if not any(map(_OTHER_PROFILE.search, texts))
    )


class RecordedShapes(Generic[Work]):
    """Recorded work by shape: what returns is recorded on its second appearance, and the least recently used forgotten.

    Parameters
    ----------
    capacity : int
        Most recordings that are kept.
    """

    def __init__(self, capacity: int = 32) -> None:
        self._capacity = capacity
        self._recorded: OrderedDict[Hashable, Work] = OrderedDict()
        self._seen: set[Hashable] = set()
        self._refused: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._recorded)

    def find(self, key: Hashable) -> Work | None:
        """Return what was recorded for a shape."""
        work = self._recorded.get(key)
        if work is not None:
            self._recorded.move_to_end(key)
        return work

    def is_due(self, key: Hashable) -> bool:
        """Take note that a shape without recording is executed; tell whether it should be recorded this time."""
        if key in self._refused:
            return False
        if key in self._seen:
            return True
        self._seen.add(key)
        return False

    def keep(self, key: Hashable, work: Work) -> None:
        """Store a recording."""
        self._recorded[key] = work
        while len(self._recorded) > self._capacity:
            forgotten, _ = self._recorded.popitem(last=False)
            self._seen.discard(forgotten)

    def refuse(self, key: Hashable) -> None:
        """Never try to record a shape again."""
        self._refused.add(key)

    def clear(self) -> None:
        """Forget all recordings: the memory that they work on has moved."""
        self._recorded.clear()
        self._seen.clear()


def _profile(spec: GraphSpec, axes: Mapping[str, tuple[int, int, int]], values: Mapping[str, Bounds]) -> Profile:
    """Return a profile; `axes` gives least, usual and most lengths of the free axes."""

    def bounds(shape: tuple[int | str, ...]) -> Bounds:
        lengths = [axes[n] if isinstance(n, str) else (n, n, n) for n in shape]
        least, usual, most = (tuple(length[kind] for length in lengths) for kind in range(3))
        return Bounds(least, usual, most)

    shapes = {tensor.name: bounds(tensor.shape) for tensor in spec.inputs}
    return Profile(MappingProxyType(shapes), MappingProxyType(dict(values)))


def _split_prompts(inputs: Mapping[str, Tensor], spec: GraphSpec, most_tiles: int, most_prompts: int) -> Iterator[Call]:
    """Cut a decoder's work: into groups of neighbouring tiles, and these into groups of prompts."""
    tiles = inputs["embeddings"].shape[0]
    tile_index = cast("NDArray[np.int64]", on_host(inputs[_PROMPTED_TILE]))
    if len(tile_index) and not (tile_index.min() >= 0 and tile_index.max() < tiles):
        raise InvalidArgumentError(
            f"tile_index runs from {tile_index.min()} to {tile_index.max()}, expected numbers of the {tiles} embeddings"
        )
    axis = next(tensor.shape[0] for tensor in spec.inputs if tensor.name == _PROMPTED_TILE)
    by_prompt = [tensor.name for tensor in spec.inputs if tensor.shape[0] == axis]
    hosted = {tensor.name: on_host(inputs[tensor.name]) for tensor in spec.inputs if tensor.name != "embeddings"}
    for first in range(0, tiles, most_tiles):
        (members,) = np.nonzero((tile_index >= first) & (tile_index < first + most_tiles))
        for start in range(0, len(members), most_prompts):
            rows = members[start : start + most_prompts]
            part = {name: hosted[name][rows] for name in by_prompt}
            part[_PROMPTED_TILE] = tile_index[rows] - first
            embeddings = inputs["embeddings"][first : min(first + most_tiles, tiles)]
            yield Call({**hosted, **part, "embeddings": embeddings}, rows)


def _empty_shape(tensor: TensorSpec, side: int, known: Mapping[str, Shape]) -> Shape:
    """Return the shape of an output without rows."""
    stated = known.get(tensor.name, (-1,) * len(tensor.shape))
    lengths = [0]
    for n, length in zip(tensor.shape[1:], stated[1:], strict=True):
        if isinstance(n, int):
            lengths.append(n)
        elif match := re.fullmatch(r"(\d+)\*region", n):
            lengths.append(int(match[1]) * side)
        else:
            lengths.append(max(0, length))
    return tuple(lengths)
