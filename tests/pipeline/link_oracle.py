"""The overlap-graph linker once more, on pixels and sets, without any of its machinery."""

from __future__ import annotations

import itertools
import math

import numpy as np


def features(first, second):
    """Return IoU, containment, area ratio and centroid shift of two masks, or None where they do not meet."""
    shared = int((first & second).sum())
    if not shared:
        return None
    small, large = sorted((int(first.sum()), int(second.sum())))
    centres = [np.argwhere(mask).mean(axis=0) for mask in (first, second)]
    return (
        shared / int((first | second).sum()),
        shared / small,
        small / large,
        math.dist(*centres) / math.sqrt(small),
    )


def log_odds(pair, coefficients):
    iou, containment, ratio, shift = pair
    a, b, c, d, e = coefficients
    return a + b * iou + c * containment + d * math.log(ratio) + e * shift


def logit(probability):
    return math.log(probability / (1 - probability))


def link(  # noqa: PLR0912 - an oracle is easier to trust in one piece
    volume, max_gap=2, continuation_limit=0.5, branch_limit=0.65, conflict=2
):
    """Return {(z, label): 3-D id}."""
    nodes = [(z, int(v)) for z, labels in enumerate(volume) for v in np.unique(labels) if v]
    mask = {node: volume[node[0]] == node[1] for node in nodes}
    pair_of = {}
    for a, b in itertools.combinations(nodes, 2):
        if 1 <= b[0] - a[0] <= max_gap + 1 and (pair := features(mask[a], mask[b])):
            pair_of[a, b] = pair

    chained = [(a, b) for (a, b), pair in pair_of.items() if b[0] - a[0] == 1 and pair[0] > 0.6]
    group = {node: {node} for node in nodes}

    def unite(a, b):
        union = group[a] | group[b]
        for node in union:
            group[node] = union

    for a, b in chained:
        unite(a, b)
    followed, preceded = {a for a, _ in chained}, {b for _, b in chained}
    confident = {}

    def note(a, b, odds):
        for node in (a, b):
            confident[node] = max(confident.get(node, 0.0), 1 / (1 + math.exp(-odds)))

    continuation, branch = (-3.9, 8.8, 5.2, 1.1, 0.5), (-5.6, 2.0, 7.8, 0.9, 0.2)
    for a, b in chained:
        note(a, b, log_odds(pair_of[a, b], continuation))

    def in_conflict(a, b):
        shared = {n[0] for n in group[a]} & {n[0] for n in group[b]}
        before, after = sum(z <= a[0] for z in shared), sum(z >= b[0] for z in shared)
        return group[a] is not group[b] and min(before, after) >= conflict

    doubtful = []
    for (a, b), pair in pair_of.items():
        if a not in followed and b not in preceded:
            odds = log_odds(pair, continuation) - 2.0 * (b[0] - a[0] - 1)
            if odds >= logit(continuation_limit):
                doubtful.append((-np.float32(odds), b, a))
    open_above, open_below = set(nodes) - followed, set(nodes) - preceded
    for odds, b, a in sorted(doubtful):
        if a in open_above and b in open_below and not in_conflict(a, b):
            unite(a, b)
            note(a, b, -odds)
            open_above.discard(a)
            open_below.discard(b)

    doubtful = []
    for (a, b), pair in pair_of.items():
        if b[0] - a[0] == 1 and (a not in followed or b not in preceded):
            odds = log_odds(pair, branch)
            if odds >= logit(branch_limit):
                doubtful.append((-np.float32(odds), b, a))
    for odds, b, a in sorted(doubtful):
        if (a in open_above or b in open_below) and not in_conflict(a, b):
            unite(a, b)
            note(a, b, -odds)
            open_above.discard(a)
            open_below.discard(b)

    numbers, ids = {}, {}
    for node in nodes:
        ids[node] = numbers.setdefault(id(group[node]), len(numbers) + 1)
    return ids, confident
