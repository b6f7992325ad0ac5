"""Attention with relative position in one kernel: written out in a graph, it moves gigabytes of scores through memory.

Both exact forms of the encoder's graphs (see `models.plain_encoder`) are recognised in a program and replaced by one of
two functions that never hold the scores:

``in_kernel``
    FlexAttention adds ``q R_h`` and ``q R_w``, one vector each for a query, to the scores where they are computed. It
    has to be compiled.
``widened``
    The same sum as one product of wider heads, for the kernels of ``scaled_dot_product_attention``.

References
----------
Dong et al. 2024, "Flex Attention: A programming model for generating optimized attention kernels", arXiv:2412.05496.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeGuard

import torch
from torch import fx
from torch.nn import functional
from torch.nn.attention.flex_attention import flex_attention

from dendsam_deploy.runtimes.captured_operators import (
    add,
    concat,
    expand,
    matmul,
    reshape,
    softmax,
    transpose,
    unsqueeze,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

AttentionKernel = Literal["in_kernel", "widened"]

_ALIGNMENT = 8
"""Kernels for half precision take heads of a multiple of this width."""


class _Match(NamedTuple):
    """The parts of one attention: queries, keys and values ``(n, h, q, d)``, positions ``(n, h, q, side)``."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    rows: fx.Node
    columns: fx.Node


def fuse_attention(program: fx.GraphModule, kernel: AttentionKernel) -> int:
    """Replace every attention with relative position in a program, in place.

    Parameters
    ----------
    program : fx.GraphModule
        From `captured_program.program_of`.
    kernel : str
        ``in_kernel`` or ``widened``.

    Returns
    -------
    int
        How many there were.
    """
    attend: Callable[..., Tensor] = {"in_kernel": attend_in_kernel, "widened": attend_widened}[kernel]
    count = 0
    for node in list(program.graph.nodes):
        found = _match(node)
        if found is not None:
            with program.graph.inserting_before(node):
                fused = program.graph.call_function(attend, tuple(found))
            fused.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(fused)
            count += 1
    program.graph.eliminate_dead_code()
    program.recompile()
    return count


def attend_in_kernel(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Attend ``(n, h, q, d)``; the score of key ``k`` grows by ``rows[..., k // side] + columns[..., k % side]``."""
    side = columns.shape[-1]

    def with_position(score: Tensor, batch: Tensor, head: Tensor, asking: Tensor, asked: Tensor) -> Tensor:
        by_row = rows[batch, head, asking, asked // side]
        return score + by_row + columns[batch, head, asking, asked % side]

    attended = flex_attention(query, key, value, score_mod=with_position, scale=1.0)
    assert isinstance(attended, torch.Tensor), "it returns more only where the sums are asked for"
    return attended


def attend_widened(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return what `attend_in_kernel` does, as ``[q, rows, columns] . [k, onehot(row), onehot(column)]``."""
    side = columns.shape[-1]
    place = torch.arange(key.shape[2], device=key.device)
    places = torch.cat([functional.one_hot(place // side, side), functional.one_hot(place % side, side)], dim=1)
    places = places.to(key.dtype).expand(*key.shape[:2], -1, -1)
    padding = (0, -(query.shape[-1] + 2 * side) % _ALIGNMENT)
    wide_query = functional.pad(torch.cat([query, rows, columns], dim=-1), padding)
    wide_key = functional.pad(torch.cat([key, places], dim=-1), padding)
    return functional.scaled_dot_product_attention(wide_query, wide_key, value, scale=1.0)


def _match(node: fx.Node) -> _Match | None:
    """Recognise the last product of an attention with relative position, in either form."""
    weights = node.args[0] if _is(node, matmul) else None
    if not _is(weights, softmax) or len(weights.users) > 1:
        return None
    value, scores = node.args[1], weights.args[0]
    assert isinstance(value, fx.Node)
    if _is(scores, matmul):
        return _match_widened(scores, value)
    if _is(scores, reshape):
        return _match_added(scores.args[0], value)
    return None


def _match_widened(scores: fx.Node, value: fx.Node) -> _Match | None:
    """Recognise ``[q, rows, columns] . [k, places]``."""
    wide_query, wide_key = scores.args[0], _transposed(scores.args[1])
    if not (_is(wide_query, concat) and _is(wide_key, concat) and len(wide_query.args) == 3):
        return None
    key, places = wide_key.args
    if not _is(places, expand):
        return None
    query, rows, columns = wide_query.args
    return _Match(query, key, value, rows, columns)  # type: ignore[arg-type]  # operands of a concatenation are nodes


def _match_added(total: object, value: fx.Node) -> _Match | None:
    """Recognise ``q k + rows + columns``, in which scores have the axes (n, h, query y, query x, key y, key x)."""
    if not _is(total, add):
        return None
    found: dict[str, fx.Node] = {}
    for part in (operand for side in total.args for operand in (side.args if _is(side, add) else (side,))):
        if _is(part, unsqueeze):
            found["columns" if part.meta["val"].shape[-2] == 1 else "rows"] = part
        elif _is(part, reshape) and _is(part.args[0], matmul):
            found["scores"] = part.args[0]
    if found.keys() != {"rows", "columns", "scores"}:
        return None
    query, key = found["scores"].args[0], _transposed(found["scores"].args[1])
    if key is None or not isinstance(query, fx.Node):
        return None
    return _Match(query, key, value, *(_by_query(found[name], query) for name in ("rows", "columns")))


def _by_query(position: fx.Node, query: fx.Node) -> fx.Node:
    """Return positions ``(n, h, y, x, side, 1)`` or ``(n, h, y, x, 1, side)`` as ``(n, h, q, side)``."""
    batch, heads, tokens, _ = query.meta["val"].shape
    with position.graph.inserting_after(position):
        flat = position.graph.call_function(reshape, (position, [batch, heads, tokens, -1]))
    flat.meta["val"] = position.meta["val"].reshape(batch, heads, tokens, -1)
    return flat


def _transposed(node: object) -> fx.Node | None:
    """Return what a node transposes, if it swaps the last two of four axes."""
    if not _is(node, transpose) or tuple(node.kwargs.get("perm") or ()) != (0, 1, 3, 2):  # type: ignore[arg-type]  # a tuple of numbers
        return None
    found = node.args[0]
    return found if isinstance(found, fx.Node) else None


def _is(node: object, function: Callable[..., Tensor]) -> TypeGuard[fx.Node]:
    """Tell whether something is a call of a function."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is function
