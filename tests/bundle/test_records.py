"""Records read back from JSON: whatever the text, a checked dataclass or one error that names the place."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dendsam_deploy.bundle.latency import latency_from_json
from dendsam_deploy.bundle.manifest import SCHEMA_VERSION, Manifest
from dendsam_deploy.bundle.parity import parity_from_json
from dendsam_deploy.bundle.records import RecordError, object_from_json, record_from_json
from dendsam_deploy.errors import DendsamError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Part:
    name: str
    length: int | str = 0


@dataclass(frozen=True)
class Whole:
    ratio: float
    parts: tuple[Part, ...]
    kind: Literal["a", "b"] | None
    best: Part | None
    table: dict[str, float]
    facts: dict[str, Any]
    limit: float | None = None
    flag: bool = False


WHOLE = Whole(1.5, (Part("x", 3), Part("y", "free")), "a", Part("z"), {"q": 2.0}, {"n": [1, {}]})
DOCUMENT: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(WHOLE)))
HUGE = int("9" * 400)


def read(document: object, is_strict: bool = True) -> Whole:
    return record_from_json(Whole, document, "whole", is_strict=is_strict)


def test_what_was_written_is_what_is_read() -> None:
    assert read(DOCUMENT) == WHOLE
    found = read(DOCUMENT | {"ratio": 2, "limit": 3})
    assert (found.ratio, type(found.ratio), type(found.limit)) == (2.0, float, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": "1"}, "whole.ratio is '1', expected float"),
        ({"ratio": True}, "whole.ratio is True, expected float"),
        ({"ratio": float("nan")}, "whole.ratio is nan"),
        ({"ratio": HUGE}, r"whole.ratio is 9{80}\.\.\., expected float"),
        ({"kind": "c"}, "whole.kind is 'c'"),
        ({"kind": ["a"]}, r"whole.kind is \['a'\]"),
        ({"parts": {}}, "whole.parts is {}"),
        ({"parts": [{"name": 1, "length": 0}]}, r"whole.parts\[0\].name is 1, expected str"),
        ({"parts": [{"name": "x", "length": True}]}, r"whole.parts\[0\].length is True, expected int \| str"),
        ({"best": []}, "whole.best is list, expected an object"),
        ({"table": {"q": None}}, "whole.table.q is None, expected float"),
        ({"flag": 1}, "whole.flag is 1, expected bool"),
        ({"more": 1}, "unknown key 'more'"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        read(DOCUMENT | change)


def test_what_may_be_missing() -> None:
    short = {name: value for name, value in DOCUMENT.items() if name not in ("limit", "flag")}
    with pytest.raises(RecordError, match="lacks the key 'flag'"):
        read(short)
    assert read(short | {"later": 1}, is_strict=False) == WHOLE
    with pytest.raises(RecordError, match="lacks the key 'best'"):
        read({}, is_strict=False)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", "[" * 100_000, "9" * 5000, '{"a": ' + "9" * 5000 + "}"])
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(RecordError):
        object_from_json(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(HUGE) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(set(DOCUMENT) - {"parts", "best", "table"})), JSON)
def test_any_value_is_taken_as_it_is_or_refused(name: str, value: object) -> None:
    try:
        found = getattr(read(DOCUMENT | {name: value}), name)
    except RecordError:
        return
    assert json.dumps(found) == json.dumps(value) or found == value


ROW = {"level": 2, "graph": "encoder", "engine": "onnxruntime", "device": "cpu", "precision": "fp32", "metric": "m"}
ROW |= {"value": 1.0, "limit": 0.5, "passed": True, "reference": "stored"}
DAMAGE: list[dict[str, Any]] = [
    {"engine": []},
    {"device": {}},
    {"level": "2"},
    {"value": HUGE},
    {"limit": "1"},
    {"passed": 1},
    {"machine": None},
    {"precision": "fp8"},
    {"precision": []},
    {"reference": "hearsay"},
    {"metric": None},
]


@pytest.mark.parametrize("change", DAMAGE)
def test_a_damaged_proof_is_refused_before_anybody_relies_on_it(
    change: dict[str, Any], make_bundle, tmp_path: Path
) -> None:
    text = json.dumps({"graphs": {}, "decoding": None, "rows": [ROW | change]})
    manifest = make_bundle(tmp_path / "toy")
    with pytest.raises(DendsamError, match=r"parity.json: not a parity report \(report.rows\[0\].*delete it"):
        parity_from_json(text, manifest, "parity.json")


@pytest.mark.parametrize("number", [HUGE, "9" * 5000])
def test_absurd_numbers_are_refused_everywhere(number: object) -> None:
    """Python raises OverflowError or ValueError of its own for them."""
    written = f'{{"schema_version": {SCHEMA_VERSION}, "name": {number}, "preprocessing": {{"zoom": {number}}}}}'
    with pytest.raises(DendsamError):
        Manifest.from_json(written, "manifest.json")
    with pytest.raises(DendsamError):
        latency_from_json(f'{{"schema_version": 1, "bundle": "x", "rows": [{{"median_ms": {number}}}]}}', "b.json")
