"""The rate at which this machine multiplies matrices: what "achieved FLOP/s" of a graph is compared with.

A quoted peak is of no use, because clocks, memory and virtual machines are what they are. The engine that runs the
graphs is made to multiply square matrices, one product feeding the next, at the graph's own precision, on the same
device and threads; the best of several runs counts. The first factor is built from one row inside the graph and only a
row comes out, so that on a GPU no time goes into copying.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.bundle.manifest import GraphSpec, TensorSpec
from dendsam_deploy.errors import DendsamError
from dendsam_deploy.host import cpu_cores
from dendsam_deploy.runtimes.session import ENGINES, SessionOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import Precision
    from dendsam_deploy.bundle.parity import Combination

_OPSET, _IR_VERSION = 17, 9
_FEWEST_RUNS, _LEAST_SECONDS = 4, 0.5
_MANY_CORES = 8
_INT8_STEP = 1 / 32
_FLOAT, _INT8, _FLOAT16, _BFLOAT16 = 1, 3, 10, 16  # onnx.TensorProto.DataType
_ELEMENT = {"fp32": _FLOAT, "fp16": _FLOAT16, "bf16": _BFLOAT16}


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain of square products: `length` times a matrix of `size` by `size`."""

    size: int
    length: int

    @property
    def flop(self) -> int:
        """Operations of its products, two for each multiply-add."""
        return 2 * self.size**3 * self.length


def engine_peak(combination: Combination, threads: int | None, chain: Chain | None = None) -> float | None:
    """Return the operations per second of an engine's matrix products; None where it has none at that precision.

    Parameters
    ----------
    combination : Combination
        Engine, device and precision.
    threads : int or None
        Threads of one operator on the CPU.
    chain : Chain or None
        What is multiplied; None takes matrices that fill the device.
    """
    engine, device, precision = combination
    chain = chain or _chain_for(device)
    row = np.random.default_rng(0).standard_normal((1, chain.size)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "product.onnx")
        path.write_bytes(product_graph(chain, precision))
        spec = GraphSpec(
            role="encoder",
            precision=precision,
            opset=_OPSET,
            files=(),
            inputs=(TensorSpec("x", "float32", row.shape),),
            outputs=(TensorSpec("y", "float32", row.shape),),
        )
        try:
            with ENGINES[engine](path, spec, SessionOptions(engine, device, precision, threads)) as runner:
                return chain.flop / _least_seconds(lambda: runner.run({"x": row}))
        except DendsamError:  # no kernel for this precision
            return None


def numpy_peak(chain: Chain | None = None) -> float:
    """Return the operations per second of numpy's float32 product, on the threads that its library takes by itself."""
    chain = chain or _chain_for("cpu")
    factor = _factor(chain.size)
    product = factor.copy()
    return 2 * chain.size**3 / _least_seconds(lambda: np.matmul(factor, factor, out=product))


def product_graph(chain: Chain, precision: Precision) -> bytes:
    """Return an ONNX file that takes ``x`` (1, size), and gives ``y`` (1, size), the column maxima of the last product.

    Parameters
    ----------
    chain : Chain
        What is multiplied.
    precision : str
        Of the factors; sums are the engine's affair. At int8 both factors of each product are quantised and
        dequantised, as in a statically quantised graph.

    References
    ----------
    Field numbers: ``onnx/onnx.proto3`` in github.com/onnx/onnx.
    """
    weight = _factor(chain.size)
    if precision == "int8":
        nodes, tensors = _quantised_chain(chain.length, weight)
    else:
        element = _ELEMENT[precision]
        nodes = [_cast("x", "row", element), _node("Add", ["row", "w"], "p0")]
        nodes += [_node("MatMul", [f"p{k}", "w"], f"p{k + 1}") for k in range(chain.length)]
        nodes += [_cast(f"p{chain.length}", "last", _FLOAT)]
        tensors = [_tensor("w", element, weight.shape, _bytes_at(weight, precision))]
    nodes.append(_node("ReduceMax", ["last"], "y", _field(1, "axes") + _field(8, 0) + _field(20, 7)))
    graph = b"".join(_field(1, node) for node in nodes) + _field(2, "product")
    graph += b"".join(_field(5, tensor) for tensor in tensors)
    graph += _field(11, _value("x", chain.size)) + _field(12, _value("y", chain.size))
    return _field(1, _IR_VERSION) + _field(7, graph) + _field(8, _field(1, "") + _field(2, _OPSET))


def _quantised_chain(length: int, weight: NDArray[np.float32]) -> tuple[list[bytes], list[bytes]]:
    """Return the nodes and tensors of a chain whose factors are 8-bit integers with a scale."""
    scale = float(np.abs(weight).max()) / 127
    whole = np.round(weight / scale).astype(np.int8)
    nodes = [_node("DequantizeLinear", ["wq", "ws", "zero"], "w"), _node("Add", ["x", "w"], "p0")]
    for k in range(length):
        nodes += [
            _node("QuantizeLinear", [f"p{k}", "xs", "zero"], f"q{k}"),
            _node("DequantizeLinear", [f"q{k}", "xs", "zero"], f"d{k}"),
            _node("MatMul", [f"d{k}", "w"], f"p{k + 1}"),
        ]
    tensors = [
        _tensor("wq", _INT8, weight.shape, whole.tobytes()),
        _tensor("ws", _FLOAT, (), np.float32(scale).tobytes()),
        _tensor("xs", _FLOAT, (), np.float32(_INT8_STEP).tobytes()),
        _tensor("zero", _INT8, (), b"\0"),
    ]
    return [*nodes, _node("Identity", [f"p{length}"], "last")], tensors


def _chain_for(device: str) -> Chain:
    """Return products that are large enough to fill a device, and few enough not to keep it for long."""
    if device != "cpu":
        return Chain(4096, 64)
    return Chain(1024, 8) if cpu_cores() <= _MANY_CORES else Chain(2048, 8)


def _least_seconds(work: Callable[[], object]) -> float:
    """Return the shortest duration of several runs, the first one apart."""
    work()
    seconds: list[float] = []
    while len(seconds) < _FEWEST_RUNS or sum(seconds) < _LEAST_SECONDS:
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _factor(size: int) -> NDArray[np.float32]:
    """Return a random square matrix that neither stretches nor shrinks what it is multiplied with."""
    rng = np.random.default_rng(1)
    factor: NDArray[np.float32] = (rng.standard_normal((size, size)) / np.sqrt(size)).astype(np.float32)
    return factor


def _bytes_at(values: NDArray[np.float32], precision: Precision) -> bytes:
    """Return the bytes of float32 values at another precision; bf16 is their upper half."""
    if precision == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(np.float16 if precision == "fp16" else np.float32).tobytes()


def _node(operator: str, inputs: list[str], output: str, attribute: bytes = b"") -> bytes:
    """Encode a node with at most one attribute."""
    encoded = b"".join(_field(1, name) for name in inputs) + _field(2, output) + _field(4, operator)
    return encoded + (_field(5, attribute) if attribute else b"")


def _cast(name: str, output: str, element: int) -> bytes:
    """Encode a conversion to another element type."""
    return _node("Cast", [name], output, _field(1, "to") + _field(3, element) + _field(20, 2))


def _tensor(name: str, element: int, shape: tuple[int, ...], data: bytes) -> bytes:
    """Encode a constant."""
    return b"".join(_field(1, size) for size in shape) + _field(2, element) + _field(8, name) + _field(9, data)


def _value(name: str, size: int) -> bytes:
    """Encode the name and type of an input or output, float32 (1, size)."""
    shape = b"".join(_field(1, _field(1, length)) for length in (1, size))
    return _field(1, name) + _field(2, _field(1, _field(1, _FLOAT) + _field(2, shape)))


def _field(number: int, value: int | str | bytes) -> bytes:
    """Encode one field of a protocol buffer: a number, or text, bytes or a message with its length before it."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    """Encode a whole number of at least 0, seven bits a byte, the lowest first."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
