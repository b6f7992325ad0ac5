"""ONNX operators in the words of torch: as many as the graphs of bundles hold.

Each function takes a node's inputs in their order and its attributes by name. Inputs that decide shapes, marked in
`OPERATORS`, arrive as lists of numbers.

References
----------
ONNX operator schemas, opset 20: https://onnx.ai/onnx/operators/
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from dendsam_deploy.runtimes.captured_graph import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    Numbers = Sequence[int]
    Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator.

    Parameters
    ----------
    function : callable
        What it does.
    static : tuple of int
        Positions of the inputs that have to be known beforehand, since they decide shapes.
    """

    function: Callable[..., Result]
    static: tuple[int, ...] = ()


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Normalise along one axis."""
    return torch.softmax(x, axis)


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """Multiply matrices."""
    return torch.matmul(x, y)


def add(x: Tensor, y: Tensor) -> Tensor:
    """Add."""
    return torch.add(x, y)


def reshape(x: Tensor, shape: Numbers, *, allowzero: int = 0) -> Tensor:
    """Give another shape; a length of 0 keeps the one that is there, unless `allowzero`."""
    return torch.reshape(x, [x.shape[axis] if n == 0 and not allowzero else n for axis, n in enumerate(shape)])


def transpose(x: Tensor, *, perm: Numbers | None = None) -> Tensor:
    """Order the axes anew."""
    return x.permute(tuple(perm) if perm is not None else tuple(reversed(range(x.ndim))))


def unsqueeze(x: Tensor, axes: Numbers) -> Tensor:
    """Insert axes of length 1."""
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def concat(*parts: Tensor, axis: int) -> Tensor:
    """Join along an axis."""
    return torch.cat(parts, axis)


def expand(x: Tensor, shape: Numbers) -> Tensor:
    """Repeat along axes of length 1."""
    rank = max(x.ndim, len(shape))
    have, want = ([1] * (rank - len(lengths)) + list(lengths) for lengths in (x.shape, shape))
    return x.expand([length if other == 1 else other for length, other in zip(have, want, strict=True)])


def _squeeze(x: Tensor, axes: Numbers | None = None) -> Tensor:
    return torch.squeeze(x) if axes is None else torch.squeeze(x, tuple(axes))


def _flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    return torch.reshape(x, (x.shape[:axis].numel(), x.shape[axis:].numel()))


def _cast(x: Tensor, *, to: int, saturate: int = 1) -> Tensor:
    return x.to(DTYPES[to])


def _divide(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y, rounding_mode=None if x.is_floating_point() else "trunc")


def _clip(x: Tensor, least: Tensor | None = None, most: Tensor | None = None) -> Tensor:
    x = x if least is None else torch.maximum(x, least)
    return x if most is None else torch.minimum(x, most)


def _where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(condition, x, y)


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return functional.gelu(x, approximate=approximate)


def _gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803 - attributes keep the names that ONNX gives them
    transB: int = 0,  # noqa: N803
) -> Tensor:
    product = alpha * torch.matmul(a.T if transA else a, b.T if transB else b)
    return product if c is None else product + beta * c


def _einsum(*tensors: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation, *tensors)


def _layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    return functional.layer_norm(x, x.shape[axis:], scale, bias, epsilon)


def _padded(x: Tensor, pads: Numbers, value: float) -> tuple[Tensor, list[int]]:
    """Return what is to be convolved and how torch pads it; it knows only equal padding on both sides."""
    half = len(pads) // 2
    if tuple(pads[:half]) == tuple(pads[half:]):
        return x, list(pads[:half])
    return _pad(x, [0, 0, *pads[:half], 0, 0, *pads[half:]], value), [0] * half


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    strides: Numbers | None = None,
    pads: Numbers | None = None,
    dilations: Numbers | None = None,
    group: int = 1,
    kernel_shape: Numbers | None = None,
    auto_pad: str = "NOTSET",
) -> Tensor:
    _refuse(auto_pad != "NOTSET", f"auto_pad={auto_pad}")
    rank = weight.ndim - 2
    x, padding = _padded(x, pads or [0] * (2 * rank), 0.0)
    convolve = {1: functional.conv1d, 2: functional.conv2d}[rank]
    return convolve(x, weight, bias, tuple(strides or [1] * rank), padding, tuple(dilations or [1] * rank), group)


def _max_pool(
    x: Tensor,
    *,
    kernel_shape: Numbers,
    strides: Numbers | None = None,
    pads: Numbers | None = None,
    dilations: Numbers | None = None,
    ceil_mode: int = 0,
    storage_order: int = 0,
    auto_pad: str = "NOTSET",
) -> Tensor:
    _refuse(auto_pad != "NOTSET", f"auto_pad={auto_pad}")
    rank = len(kernel_shape)
    x, padding = _padded(x, pads or [0] * (2 * rank), float("-inf"))
    return functional.max_pool2d(
        x, tuple(kernel_shape), tuple(strides or [1] * rank), padding, tuple(dilations or [1] * rank), bool(ceil_mode)
    )


def _pad(
    x: Tensor,
    pads: Numbers,
    value: Tensor | float | None = None,
    axes: Numbers | None = None,
    *,
    mode: str = "constant",
) -> Tensor:
    _refuse(mode != "constant", f"padding mode {mode}")
    chosen = [axis % x.ndim for axis in axes] if axes is not None else list(range(x.ndim))
    widths = [0] * (2 * x.ndim)  # torch counts axes from the last
    for place, axis in enumerate(chosen):
        widths[2 * (x.ndim - 1 - axis)] = pads[place]
        widths[2 * (x.ndim - 1 - axis) + 1] = pads[place + len(chosen)]
    fill = value.item() if isinstance(value, torch.Tensor) else value
    return functional.pad(x, widths, value=fill or 0)


def _slice(
    x: Tensor, starts: Numbers, ends: Numbers, axes: Numbers | None = None, steps: Numbers | None = None
) -> Tensor:
    for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = axes[place] if axes is not None else place
        step = steps[place] if steps is not None else 1
        chosen = range(*slice(start, end if abs(end) < 2**62 else None, step).indices(x.shape[axis]))
        if step > 0:
            index: list[slice] = [slice(None)] * x.ndim
            index[axis] = slice(chosen.start, max(chosen.stop, chosen.start), step)
            x = x[tuple(index)]
        else:
            x = x.index_select(axis, torch.tensor(list(chosen), device=x.device))
    return x


def _split(
    x: Tensor, sizes: Numbers | None = None, *, axis: int = 0, num_outputs: int | None = None
) -> tuple[Tensor, ...]:
    if sizes is not None:
        return torch.split(x, list(sizes), axis)
    return torch.split(x, -(-x.shape[axis] // (num_outputs or 1)), axis)


def _gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    axis %= x.ndim
    flat = torch.remainder(indices.reshape(-1).to(torch.int64), x.shape[axis])
    return x.index_select(axis, flat).reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def _gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return torch.gather(x, axis, torch.remainder(indices.to(torch.int64), x.shape[axis]))


def _gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    _refuse(batch_dims != 0, f"batch_dims={batch_dims}")
    return x[indices.unbind(-1)]


def _range(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _constant_of_shape(shape: Tensor, *, value: Tensor | None = None) -> Tensor:
    fill = torch.zeros(1) if value is None else value
    return torch.full(tuple(shape.tolist()), fill.item(), dtype=fill.dtype)


def _top_k(x: Tensor, k: Numbers, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, ...]:
    # Of equal elements ONNX takes the first ones; torch.topk takes any.
    values, indices = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    return values.narrow(axis, 0, k[0]), indices.narrow(axis, 0, k[0])


def _resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Sequence[float] | None = None,
    sizes: Numbers | None = None,
    *,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    antialias: int = 0,
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
) -> Tensor:
    target = list(sizes) if sizes else [int(n * scale) for n, scale in zip(x.shape, scales or (), strict=True)]
    is_plain = x.ndim == 4 and target[:2] == list(x.shape[:2]) and not antialias and not exclude_outside
    kind = (mode, coordinate_transformation_mode)
    if is_plain and kind in (("linear", "half_pixel"), ("linear", "pytorch_half_pixel")):
        return functional.interpolate(x, target[2:], mode="bilinear", align_corners=False)
    _refuse(not is_plain or (*kind, nearest_mode) != ("nearest", "asymmetric", "floor"), f"Resize by {kind}")
    return functional.interpolate(x, target[2:], mode="nearest")


def _reduction(name: str) -> Callable[..., Tensor]:
    """Return a reduction; its axes are an attribute in older operator sets."""

    def apply(
        x: Tensor, given: Numbers | None = None, *, axes: Numbers = (), keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Tensor:
        chosen = tuple(given if given is not None else axes)
        if not chosen and noop_with_empty_axes:
            return x
        result: Tensor = getattr(torch, name)(x, dim=chosen or tuple(range(x.ndim)), keepdim=bool(keepdims))
        return result

    return apply


def _folded(name: str) -> Callable[..., Tensor]:
    """Return an operator of two tensors as one of any number."""

    def apply(*tensors: Tensor) -> Tensor:
        return reduce(getattr(torch, name), tensors)

    return apply


def _elementwise(name: str) -> Operator:
    """Return an operator that torch knows by the same meaning."""

    def apply(*tensors: Tensor) -> Tensor:
        result: Tensor = getattr(torch, name)(*tensors)
        return result

    return Operator(apply)


def _refuse(is_unknown: bool, what: str) -> None:
    """Raise for a variant that is not translated."""
    if is_unknown:
        raise NotImplementedError(what)


OPERATORS: Mapping[str, Operator] = {
    "Abs": _elementwise("abs"),
    "Add": Operator(add),
    "And": _elementwise("logical_and"),
    "Cast": Operator(_cast),
    "Ceil": _elementwise("ceil"),
    "Clip": Operator(_clip),
    "Concat": Operator(concat),
    "ConstantOfShape": Operator(_constant_of_shape),
    "Conv": Operator(_conv),
    "Cos": _elementwise("cos"),
    "Div": Operator(_divide),
    "Einsum": Operator(_einsum),
    "Equal": _elementwise("eq"),
    "Erf": _elementwise("erf"),
    "Exp": _elementwise("exp"),
    "Expand": Operator(expand, static=(1,)),
    "Flatten": Operator(_flatten),
    "Floor": _elementwise("floor"),
    "Gather": Operator(_gather),
    "GatherElements": Operator(_gather_elements),
    "GatherND": Operator(_gather_nd),
    "Gelu": Operator(_gelu),
    "Gemm": Operator(_gemm),
    "Greater": _elementwise("gt"),
    "GreaterOrEqual": _elementwise("ge"),
    "Identity": _elementwise("clone"),
    "LayerNormalization": Operator(_layer_norm),
    "Less": _elementwise("lt"),
    "LessOrEqual": _elementwise("le"),
    "Log": _elementwise("log"),
    "MatMul": Operator(matmul),
    "Max": Operator(_folded("maximum")),
    "MaxPool": Operator(_max_pool),
    "Min": Operator(_folded("minimum")),
    "Mul": _elementwise("mul"),
    "Neg": _elementwise("neg"),
    "Not": _elementwise("logical_not"),
    "Or": _elementwise("logical_or"),
    "Pad": Operator(_pad, static=(1, 2, 3)),
    "Pow": _elementwise("pow"),
    "Range": Operator(_range),
    "ReduceMax": Operator(_reduction("amax"), static=(1,)),
    "ReduceMean": Operator(_reduction("mean"), static=(1,)),
    "ReduceMin": Operator(_reduction("amin"), static=(1,)),
    "ReduceSum": Operator(_reduction("sum"), static=(1,)),
    "Relu": _elementwise("relu"),
    "Reshape": Operator(reshape, static=(1,)),
    "Resize": Operator(_resize, static=(2, 3)),
    "Sigmoid": _elementwise("sigmoid"),
    "Sin": _elementwise("sin"),
    "Slice": Operator(_slice, static=(1, 2, 3, 4)),
    "Softmax": Operator(softmax),
    "Split": Operator(_split, static=(1,)),
    "Sqrt": _elementwise("sqrt"),
    "Squeeze": Operator(_squeeze, static=(1,)),
    "Sub": _elementwise("sub"),
    "Tanh": _elementwise("tanh"),
    "TopK": Operator(_top_k, static=(1,)),
    "Transpose": Operator(transpose),
    "Unsqueeze": Operator(unsqueeze, static=(1,)),
    "Where": Operator(_where),
}
"""Operators by their name in ONNX. ``Shape`` and ``Constant`` are not among them: they are answered beforehand."""
