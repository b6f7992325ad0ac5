"""What a bundle on disk may be, and what is refused."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import helper, numpy_helper

from dendsam_deploy.bundle.bundle import MANIFEST_FILE, PARITY_FILE, Bundle, digest_file, find_bundle
from dendsam_deploy.bundle.manifest import Manifest
from dendsam_deploy.bundle.parity import NotJudged, ParityReport, ParityRow
from dendsam_deploy.bundle.writer import write_parity
from dendsam_deploy.errors import BundleError, InvalidArgumentError, UnsafeFileError

ROW = ParityRow(2, "encoder", "onnxruntime", "cpu", "fp32", "embedding_relative_max", 1e-6, 1e-4, True, "torch")


@pytest.fixture
def toy(tmp_path: Path, make_bundle) -> Path:
    make_bundle(tmp_path / "toy")
    return tmp_path / "toy"


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    document = json.loads((folder / MANIFEST_FILE).read_text())
    change(document)
    (folder / MANIFEST_FILE).write_text(json.dumps(document))


def replace_encoder(folder: Path, model: onnx.ModelProto, *, also_listed: tuple[str, ...] = ()) -> None:
    """Exchange the encoder's graph and make the manifest agree, as a forger would."""
    onnx.save(model, folder / "encoder.onnx")
    files = [dataclasses.asdict(digest_file(folder, name)) for name in ("encoder.onnx", *also_listed)]
    edit_manifest(folder, lambda document: document["graphs"][0].update(files=files))


def test_what_was_written_is_what_is_opened(tmp_path: Path, make_bundle):
    manifest = make_bundle(tmp_path / "toy")
    bundle = Bundle.open(tmp_path / "toy")
    assert bundle.manifest == manifest
    assert bundle.parity is None
    assert bundle.graph_path("encoder", "fp32") == tmp_path / "toy" / "encoder.onnx"
    assert bundle.extra_path("MODEL_CARD.md") == tmp_path / "toy" / "MODEL_CARD.md"
    assert bundle.extra_path("reference.npz") is None
    with pytest.raises(BundleError, match="no encoder graph at int8, only at fp32"):
        bundle.graph_path("encoder", "int8")
    with pytest.raises(BundleError, match="no detector graph at fp32, only at none"):
        bundle.graph_path("detector", "fp32")


@pytest.mark.parametrize("name", ["encoder.onnx", "MODEL_CARD.md"])
def test_one_flipped_bit_is_found(toy: Path, name: str):
    content = bytearray((toy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (toy / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name}: altered"):
        Bundle.open(toy)


def test_cut_and_missing_files_are_found(toy: Path):
    content = (toy / "decoder.onnx").read_bytes()
    (toy / "decoder.onnx").write_bytes(content[:-1])
    with pytest.raises(BundleError, match=f"{len(content) - 1} bytes, the manifest says {len(content)}"):
        Bundle.open(toy)
    (toy / "decoder.onnx").unlink()
    with pytest.raises(BundleError, match=r"decoder\.onnx: missing"):
        Bundle.open(toy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(colour="red"), "unknown key 'colour'"),
        (lambda d: d["graphs"][0]["files"][0].update(url="x"), "unknown key 'url'"),
        (lambda d: d.pop("licence"), "lacks the key 'licence'"),
        (lambda d: d.update(schema_version=99), "schema version 99"),
        (lambda d: d["graphs"].append(d["graphs"][0]), "listed twice"),
        (lambda d: d["graphs"].pop(), "no decoder graph"),
        (lambda d: d["graphs"][0].update(files=[]), "lists no file"),
        (lambda d: d["graphs"][0]["inputs"][0].update(dtype="float32"), r"inputs tiles float32.*expected tiles uint8"),
        (lambda d: d["graphs"][1]["outputs"].pop(), "expected logits"),
        (lambda d: d["preprocessing"].update(tile_size_px=72), "multiple of 16"),
        (lambda d: d["decoding"].update(region_sizes=[4, 2]), "ascending"),
        (lambda d: d["decoding"].update(region_sizes=[2]), "end with 4"),
    ],
)
def test_a_manifest_that_breaks_the_contract_is_refused(toy: Path, change, message: str):
    edit_manifest(toy, change)
    with pytest.raises(BundleError, match=message):
        Bundle.open(toy)


def test_free_axes_may_bear_any_name(toy: Path):
    edit_manifest(toy, lambda d: d["graphs"][0]["inputs"][0]["shape"].__setitem__(0, "b"))
    Bundle.open(toy)


def test_what_is_no_bundle_is_named(tmp_path: Path):
    with pytest.raises(BundleError, match="not a folder"):
        Bundle.open(tmp_path / "absent")
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        Bundle.open(tmp_path)
    for content in (b"", b"\xff\xfe", b"{", b"[1]", b"[" * 100_000):
        (tmp_path / MANIFEST_FILE).write_bytes(content)
        with pytest.raises(BundleError, match=r"manifest\.json"):
            Bundle.open(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "C:\\secret", "..\\secret", ""])
def test_a_listed_file_outside_the_folder_is_refused(toy: Path, name: str):
    (toy.parent / "secret").write_bytes(b"s")
    edit_manifest(toy, lambda d: d["extra_files"].append({"file": name, "sha256": "00" * 32, "size": 1}))
    with pytest.raises(UnsafeFileError, match="outside its folder"):
        Bundle.open(toy)


def test_a_link_out_of_the_folder_is_refused_and_one_within_is_not(toy: Path):
    original = toy / "encoder.onnx"
    original.rename(toy / "weights.onnx")
    original.symlink_to("weights.onnx")
    Bundle.open(toy)
    (toy / "weights.onnx").rename(toy.parent / "weights.onnx")
    original.unlink()
    original.symlink_to(toy.parent / "weights.onnx")
    with pytest.raises(UnsafeFileError, match="a link to"):
        Bundle.open(toy)


def external_tensor(location: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    return tensor


def model_with(tensor: onnx.TensorProto, *, hidden_in: str = "initializer") -> onnx.ModelProto:
    """A model that holds a tensor where it is expected, in a constant, or in a branch of control flow."""
    out = helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [1])
    if hidden_in == "initializer":
        graph = helper.make_graph([], "g", [], [out], [tensor])
    elif hidden_in == "constant":
        graph = helper.make_graph([helper.make_node("Constant", [], ["w"], value=tensor)], "g", [], [out])
    else:
        branch = helper.make_graph([], "branch", [], [out], [tensor])
        condition = numpy_helper.from_array(onnx.numpy_helper.np.array(True), "c")
        node = helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch)
        graph = helper.make_graph([node], "g", [], [out], [condition])
    return helper.make_model(graph, ir_version=10)


@pytest.mark.parametrize("hidden_in", ["initializer", "constant", "branch"])
def test_external_data_has_to_be_listed_and_inside(toy: Path, hidden_in: str):
    (toy / "w.data").write_bytes(bytes(4))
    model = model_with(external_tensor("w.data"), hidden_in=hidden_in)
    replace_encoder(toy, model, also_listed=("w.data",))
    Bundle.open(toy)
    replace_encoder(toy, model)
    with pytest.raises(BundleError, match=r"needs 'w\.data', which the manifest does not list"):
        Bundle.open(toy)
    for location in ("../secret", "/etc/hostname"):
        replace_encoder(toy, model_with(external_tensor(location), hidden_in=hidden_in))
        with pytest.raises(UnsafeFileError, match="outside its folder"):
            Bundle.open(toy)


def test_a_proof_belongs_to_its_graphs(toy: Path):
    write_parity(Bundle.open(toy), ParityReport((ROW,)))
    bundle = Bundle.open(toy)
    assert bundle.parity == ParityReport((ROW,))
    assert bundle.parity.proves("onnxruntime", "cpu", "fp32")
    assert not bundle.parity.proves("onnxruntime", "cuda:0", "fp32")
    # Other thresholds leave the proof alone; another graph makes the bundle unproven.
    edit_manifest(toy, lambda d: d["thresholds"].update(detection_score=0.5))
    assert Bundle.open(toy).parity is not None
    margin = bundle.manifest.decoding.margin_px
    edit_manifest(toy, lambda d: d["decoding"].update(margin_px=0.0))
    assert Bundle.open(toy).parity is None, "masks were not compared with so little around their boxes"
    edit_manifest(toy, lambda d: d["decoding"].update(margin_px=margin))
    assert Bundle.open(toy).parity is not None
    replace_encoder(toy, model_with(numpy_helper.from_array(onnx.numpy_helper.np.zeros(1, "f4"), "w")))
    assert Bundle.open(toy).parity is None


def test_a_later_finding_replaces_the_earlier_one_of_the_same_combination(toy: Path):
    on_gpu = dataclasses.replace(ROW, device="cuda:0")
    failed = dataclasses.replace(ROW, value=math.nan, passed=False)
    write_parity(Bundle.open(toy), ParityReport((ROW,)))
    write_parity(Bundle.open(toy), ParityReport((on_gpu,)))
    write_parity(Bundle.open(toy), ParityReport((failed,)))
    parity = Bundle.open(toy).parity
    assert parity is not None
    assert [row.device for row in parity.rows] == ["cuda:0", "cpu"]
    assert not parity.passed
    assert math.isnan(parity.failures[0].value)
    assert not parity.proves("onnxruntime", "cpu", "fp32")
    assert parity.proves("onnxruntime", "cuda:0", "fp32")


def test_nothing_judged_is_nothing_proven():
    assert not ParityReport(()).passed


def test_a_report_answers_for_each_combination():
    bf16 = dataclasses.replace(ROW, precision="bf16", value=math.nan, passed=False)
    elsewhere = dataclasses.replace(bf16, engine="openvino", value=1.0, passed=True)
    report = ParityReport((ROW, bf16, elsewhere))
    assert [str(combination) for combination in report.combinations] == [
        "onnxruntime on cpu at fp32",
        "onnxruntime on cpu at bf16",
        "openvino on cpu at bf16",
    ]
    assert report.proven == (ROW.combination, elsewhere.combination)
    assert report.failures_of(precision="bf16") == report.failures_of("onnxruntime", "cpu", "bf16") == (bf16,)
    assert report.failures_of(engine="openvino") == report.failures_of(precision="fp32") == ()


def test_what_an_engine_can_no_longer_run_is_not_proven_any_more(toy: Path):
    cannot = NotJudged(*ROW.combination, reason="no kernel")
    write_parity(Bundle.open(toy), ParityReport((ROW,)))
    write_parity(Bundle.open(toy), ParityReport((), (cannot,)))
    parity = Bundle.open(toy).parity
    assert parity == ParityReport((), (cannot,))
    write_parity(Bundle.open(toy), ParityReport((ROW,)))
    assert Bundle.open(toy).parity == ParityReport((ROW,))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"rows": [{"level": 1}], "graphs": {}}',
        '{"rows": 3, "graphs": {}}',
        '{"rows": [], "graphs": {}, "not_judged": [1]}',
    ],
)
def test_a_damaged_report_is_named(toy: Path, text: str):
    (toy / PARITY_FILE).write_text(text)
    with pytest.raises(BundleError, match=r"parity\.json: not a parity report"):
        Bundle.open(toy)


def test_a_row_that_claims_to_pass_without_a_number_is_refused(toy: Path):
    write_parity(Bundle.open(toy), ParityReport((ROW,)))
    document = json.loads((toy / PARITY_FILE).read_text())
    document["rows"][0]["value"] = None
    (toy / PARITY_FILE).write_text(json.dumps(document))
    with pytest.raises(BundleError, match="cannot have passed"):
        Bundle.open(toy)


def test_the_only_bundle_is_found(tmp_path: Path, make_bundle):
    exports = tmp_path / "exports"
    with pytest.raises(InvalidArgumentError, match="found no bundle"):
        find_bundle(exports, {})
    assert find_bundle(exports, {"DENDSAM_BUNDLE": "/else/where"}) == Path("/else/where")
    make_bundle(exports / "ca1")
    (exports / "notes").mkdir()
    # What a killed export leaves behind is hidden, complete or not.
    (exports / "ca1").rename(exports / ".other.partial-1")
    make_bundle(exports / "ca1")
    assert find_bundle(exports, {"DENDSAM_BUNDLE": "/else/where"}) == exports / "ca1"
    make_bundle(exports / "ca3")
    assert find_bundle(exports, {"DENDSAM_BUNDLE": "/else/where"}) == Path("/else/where")
    with pytest.raises(InvalidArgumentError, match=r"several bundles \(.*ca1, .*ca3\)"):
        find_bundle(exports, {})


def test_a_manifest_survives_the_way_to_json_and_back(toy: Path):
    manifest = Bundle.open(toy).manifest
    assert Manifest.from_json(manifest.to_json(), "here") == manifest
