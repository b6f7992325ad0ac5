"""Reading YOLO checkpoints without running them, and the deployable detector graph."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dendsam_deploy.errors import CheckpointError, InvalidArgumentError, UnsafeFileError
from dendsam_deploy.models.detector import (
    DetectorRecord,
    check_description,
    load_detector,
    save_detector,
)
from dendsam_deploy.models.detector_file import read_detector_file
from dendsam_deploy.models.detector_graph import DetectorGraph, candidate_count
from dendsam_deploy.models.tensor_file import pickled_names

ARCHITECTURES = ("yolov8n", "yolo11n", "yolo26n")
TILE = 128


@pytest.fixture(scope="module")
def yolov8n(shared_data):
    return shared_data / "yolo" / "yolov8n.pt"


def wavy_tiles():
    rows, columns = np.mgrid[0:TILE, 0:TILE]
    waves = [127 + 120 * np.sin(rows / period) * np.cos(columns / (period + 3)) for period in (5, 9, 17)]
    return torch.from_numpy(np.stack(waves).astype(np.uint8))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def scrambled(request):
    """An untrained network of each generation whose signals nevertheless have the variance of a trained one's."""
    detector = load_detector(Path(f"{request.param}.yaml"), seed=3)
    for module in detector.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    detector.network.train()(wavy_tiles()[:, None].float().div(255).expand(-1, 3, -1, -1))
    detector.network.eval()
    for branch in detector.network.model[-1].cv3:
        branch[-1].bias.zero_()
    return detector


@pytest.fixture
def tiles():
    return wavy_tiles()


def letterboxed_truck(shared_data, side):
    image = Image.open(shared_data / "images" / "truck.jpg").convert("L")
    height = round(image.height * side / image.width)
    tile = np.full((side, side), 114, np.uint8)
    top = (side - height) // 2
    tile[top : top + height] = np.array(image.resize((side, height), Image.Resampling.BILINEAR))
    return tile


def reference(detector, images):
    """Boxes and scores of every anchor by ultralytics' own forward pass, best first."""
    head = detector.network.model[-1]
    head.end2end = False
    with torch.no_grad():
        raw = detector.network(images)[0]
    scores, order = raw[:, 4:].amax(1).sort(dim=1, descending=True)
    x, y, w, h = raw[:, :4].gather(2, order[:, None].expand(-1, 4, -1)).unbind(1)
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=2), scores


def test_graph_equals_the_network_with_box_arithmetic_outside(scrambled, tiles):
    boxes, scores = DetectorGraph(scrambled, TILE, input_size_px=TILE)(tiles)
    expected_boxes, expected_scores = reference(scrambled, tiles[:, None].float().div(255).expand(-1, 3, -1, -1))
    count = scores.shape[1]
    torch.testing.assert_close(scores, expected_scores[:, :count], atol=1e-4, rtol=1e-3)
    ranks = settled_ranks(expected_scores, 1e-3)
    torch.testing.assert_close(boxes[:, ranks], expected_boxes[:, ranks].clamp(0, TILE), atol=0.05, rtol=1e-3)


def settled_ranks(scores, margin):
    """Ranks whose scores differ from both neighbours' in every tile, so that rounding cannot exchange them."""
    apart = (scores[:, :-1] - scores[:, 1:] > margin).all(0)
    ranks = (apart[1:] & apart[:-1]).nonzero()[:, 0] + 1
    assert len(ranks) >= 2
    return ranks[ranks < candidate_count(TILE, scores.shape[1])]


def test_official_checkpoint_with_old_module_names_finds_the_truck(shared_data, yolov8n):
    detector = load_detector(yolov8n)
    assert (detector.architecture, detector.image_size_px, len(detector.class_names)) == ("yolov8n", 640, 80)
    for side in (640, 1024):
        tile = torch.from_numpy(letterboxed_truck(shared_data, side))[None]
        boxes, scores = DetectorGraph(detector, side)(tile)
        # Centre and size of the truck as recorded with the data, in a frame of 640.
        expected = torch.tensor([325.9 - 287.4, 307.1 - 103.2, 325.9 + 287.4, 307.1 + 103.2]) * side / 640
        assert scores[0, 0] > 0.85
        assert (boxes[0, 0] - expected).abs().max() < 12 * side / 640


def test_boxes_stay_in_the_tile_and_scores_descend(scrambled, tiles):
    boxes, scores = DetectorGraph(scrambled, TILE, input_size_px=2 * TILE, max_candidates=50)(tiles)
    assert boxes.shape == (3, 50, 4)
    assert (boxes >= 0).all()
    assert (boxes <= TILE).all()
    assert (scores.diff(dim=1) <= 0).all()


def test_graph_leaves_the_detector_as_it_was(scrambled, tiles):
    before = {key: value.clone() for key, value in scrambled.network.state_dict().items()}
    DetectorGraph(scrambled, TILE, input_size_px=TILE)(tiles)
    after = scrambled.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_input_size_must_fit_the_stride():
    with pytest.raises(InvalidArgumentError, match="stride of 32"):
        DetectorGraph(load_detector(Path("yolo11n.yaml")), 100, input_size_px=100)


def test_candidates_follow_the_tile_up_to_what_engines_can_sort():
    assert candidate_count(512, 5376) == 2048
    assert candidate_count(64, 84) == 32
    assert candidate_count(1024, 21504) == 3840


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's and onnxscript's exporter
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("scrambled", ["yolo26n"], indirect=True)
def test_graph_runs_in_onnxruntime_with_any_number_of_tiles(scrambled, tiles, tmp_path):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    graph, path = DetectorGraph(scrambled, TILE, input_size_px=TILE).eval(), tmp_path / "detector.onnx"
    torch.onnx.export(
        graph,
        (tiles[:2],),
        path,
        dynamo=True,
        opset_version=20,
        input_names=["tiles"],
        output_names=["boxes", "scores"],
        dynamic_shapes={"tiles": {0: torch.export.Dim("tiles")}},
        verbose=False,
    )
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 3):
        boxes, scores = session.run(None, {"tiles": tiles[:count].numpy()})
        expected_boxes, expected_scores = graph(tiles[:count])
        np.testing.assert_allclose(scores, expected_scores.numpy(), atol=1e-4)
        ranks = settled_ranks(expected_scores, 1e-3).numpy()
        np.testing.assert_allclose(boxes[:, ranks], expected_boxes.numpy()[:, ranks], atol=0.05)


def test_random_weights_follow_the_seed():
    first, again, other = (load_detector(Path("yolo11n.yaml"), seed).network.state_dict() for seed in (1, 1, 2))
    key = "model.0.conv.weight"
    assert torch.equal(first[key], again[key])
    assert not torch.equal(first[key], other[key])


def test_a_checkpoint_of_ours_comes_back_with_its_record(tmp_path):
    detector = load_detector(Path("yolo11n.yaml"))
    record = DetectorRecord(512, model_pixel_size_nm=3.5, zoom=2.0, summary={"slices": [0, 9]})
    save_detector(tmp_path / "ours.pt", detector.network, record)
    loaded = load_detector(tmp_path / "ours.pt")
    assert (loaded.record, loaded.image_size_px, loaded.architecture) == (record, 512, "yolo11n")
    assert type(loaded.network.model[0]) is type(detector.network.model[0])
    assert [path.name for path in tmp_path.iterdir()] == ["ours.pt"]


class Attack:
    """Pickles into a call of its first member with the others as arguments."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def canary_attacks(canary):
    """Ways to run code from a pickle: outright, by name, through a layer's constructor, through getattr."""
    from ultralytics.nn.tasks import DetectionModel  # noqa: PLC0415 - after detector.py prepared its environment

    command = f"touch {canary}"
    description = {"nc": 1, "activation": f"__import__('os').system('{command}')", "backbone": [], "head": []}
    return {
        "system": Attack(os.system, command),
        "eval": Attack(eval, f"__import__('os').system('{command}')"),
        "constructor": Attack(DetectionModel, description),
        "getattr": Attack(getattr, nn.Identity, "__init__"),
    }


@pytest.mark.parametrize("kind", ["system", "eval", "constructor", "getattr"])
def test_a_hostile_checkpoint_never_runs(kind, tmp_path):
    canary, file = tmp_path / "canary", tmp_path / "hostile.pt"
    torch.save({"model": canary_attacks(canary)[kind]}, file)
    with pytest.raises(UnsafeFileError, match="refused"):
        load_detector(file)
    assert not canary.exists()


def test_what_trainings_leave_in_a_checkpoint(tmp_path):
    """A loss, an optimiser's state, a path, scores as NumPy has them, and the settings as a namespace."""
    from ultralytics.utils import IterableSimpleNamespace  # noqa: PLC0415 - after detector.py prepared its environment

    network = load_detector(Path("yolo11n.yaml"), seed=4).network
    network.args = IterableSimpleNamespace(box=7.5, cls=0.5, dfl=1.5, imgsz=96, epochs=3)
    network.criterion = network.init_criterion()
    content = {
        "epoch": 1,
        "best_fitness": np.float64(0.5),
        "model": None,
        "ema": network,
        "optimizer": torch.optim.AdamW(network.parameters()).state_dict(),
        "train_args": network.args,
        "save_dir": Path("a/b"),
        "train_metrics": {"fitness": np.float32(0.1)},
    }
    torch.save(content, tmp_path / "last.pt")
    assert any(name.startswith("ultralytics.utils.loss.") for name in pickled_names(tmp_path / "last.pt"))
    loaded = load_detector(tmp_path / "last.pt")
    assert loaded.image_size_px == 96
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in loaded.network.state_dict().items())
    assert read_detector_file(tmp_path / "last.pt").epoch == 1


def test_a_hostile_description_in_a_checkpoint_never_runs(tmp_path):
    """ultralytics evaluates the activation that a description names."""
    canary, file = tmp_path / "canary", tmp_path / "hostile.pt"
    network = load_detector(Path("yolo11n.yaml")).network
    network.yaml["activation"] = f"__import__('os').system('touch {canary}')"
    torch.save({"model": network}, file)
    with pytest.raises(UnsafeFileError, match=r"is no layer of torch\.nn; refused"):
        load_detector(file)
    assert not canary.exists()


def test_a_layer_of_a_newer_version_is_named(tmp_path):
    network = load_detector(Path("yolo11n.yaml")).network
    network.yaml["backbone"][0][2] = "Conv3000"
    torch.save({"model": network}, tmp_path / "newer.pt")
    with pytest.raises(CheckpointError, match=r"needs the layer Conv3000, which ultralytics .* lacks; update"):
        load_detector(tmp_path / "newer.pt")


def test_a_pruned_network_is_not_rebuilt_wrongly(tmp_path):
    network = load_detector(Path("yolo11n.yaml")).network
    network.model[0].conv = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
    torch.save({"model": network}, tmp_path / "pruned.pt")
    with pytest.raises(CheckpointError, match=r"its weights do not fit its description .* Give it in ONNX instead"):
        load_detector(tmp_path / "pruned.pt")


def test_the_activation_of_one_network_is_not_that_of_the_next(tmp_path):
    description = load_detector(Path("yolo11n.yaml")).network.yaml
    from ultralytics.nn import tasks  # noqa: PLC0415 - after detector.py prepared its environment

    network = tasks.DetectionModel(description | {"activation": "nn.ReLU()"}, verbose=False)
    tasks.Conv.default_act = nn.SiLU()
    torch.save({"model": network}, tmp_path / "relu.pt")
    first = load_detector(tmp_path / "relu.pt").network
    assert type(first.model[0].act) is nn.ReLU
    assert type(load_detector(Path("yolo11n.yaml")).network.model[0].act) is nn.SiLU


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_bare_pickle_is_named(protocol, tmp_path):
    canary, file = tmp_path / "canary", tmp_path / "hostile.pt"
    file.write_bytes(pickle.dumps(Attack(os.system, f"touch {canary}"), protocol=protocol))
    with pytest.raises(UnsafeFileError, match=r"posix\.system|nt\.system"):
        load_detector(file)
    assert not canary.exists()


def test_pickled_names_lists_without_loading(yolov8n):
    names = pickled_names(yolov8n)
    assert "ultralytics.nn.modules.C2f" in names
    assert "builtins.set" in names
    assert "torch._utils._rebuild_tensor_v2" in names


@pytest.mark.parametrize("name", ["yolov8n", "yolo26n"])
def test_a_checkpoint_saved_after_inference_computes_the_same(name, tmp_path):
    """ultralytics merges normalisation into convolutions for inference, and binds other forward methods to them."""
    detector = load_detector(Path(f"{name}.yaml"), seed=2)
    detector.network.fuse(verbose=False)
    torch.save({"model": detector.network}, tmp_path / "fused.pt")
    assert any(name.endswith(".forward_fuse") for name in pickled_names(tmp_path / "fused.pt"))
    loaded = load_detector(tmp_path / "fused.pt").network
    image = torch.rand(1, 3, TILE, TILE)
    with torch.no_grad():
        expected, found = (network(image) for network in (detector.network, loaded))
    assert torch.equal(expected[0], found[0])


def broken_files(folder, yolov8n):
    """Files that are no usable detector, and what the message must say."""
    whole = yolov8n.read_bytes()
    contents = {
        "empty.pt": (b"", "empty"),
        "cut.pt": (whole[: len(whole) // 2], "cut off or damaged"),
        "text.pt": (b"These are not the weights you are looking for.\n", "not a"),
        "list.pt": (None, "holds a list"),
        "tensors.pt": (None, "holds tensors without a network"),
        "scripted.pt": (None, "not a"),
    }
    for name, (content, _) in contents.items():
        if content is not None:
            (folder / name).write_bytes(content)
    torch.save([1, 2], folder / "list.pt")
    torch.save({"weight": torch.zeros(2)}, folder / "tensors.pt")
    with zipfile.ZipFile(folder / "scripted.pt", "w") as archive:
        archive.writestr("x/constants.pkl", b"")
    return {name: message for name, (_, message) in contents.items()}


def test_files_that_are_no_detector_get_one_line(tmp_path, yolov8n):
    for name, message in {**broken_files(tmp_path, yolov8n), "absent.pt": "no such file"}.items():
        with pytest.raises(CheckpointError) as caught:
            load_detector(tmp_path / name)
        text = str(caught.value)
        assert name in text
        assert "\n" not in text
        if name != "scripted.pt":
            assert message in text, text


def test_a_real_truncated_download_gets_one_line(shared_data):
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        load_detector(shared_data / "sam" / "mobile_sam_truncated.pt")


@pytest.mark.parametrize("name", ["yolo26n-cls.yaml", "yolov5nu.yaml", "missing.yaml"])
def test_unknown_architectures_are_refused(name):
    with pytest.raises(CheckpointError, match="no such file, nor the name of an architecture"):
        load_detector(Path(name))


def test_a_network_without_upright_boxes_is_refused(tmp_path):
    from ultralytics.nn.tasks import OBBModel  # noqa: PLC0415 - after detector.py prepared its environment

    torch.save({"model": OBBModel("yolo11n-obb.yaml", verbose=False)}, tmp_path / "obb.pt")
    with pytest.raises(CheckpointError, match="its head is OBB"):
        load_detector(tmp_path / "obb.pt")


def test_descriptions_may_only_name_layers(tmp_path):
    layers = {"backbone": [[-1, 1, "Conv", [16, 3, 2]]], "head": [[-1, 1, "nn.Identity", []]]}
    check_description(layers, Path("good.yaml"))
    check_description(layers | {"activation": "torch.nn.LeakyReLU(0.1)"}, Path("good.yaml"))
    with pytest.raises(UnsafeFileError, match="activation"):
        check_description(layers | {"activation": "__import__('os').getcwd()"}, Path("bad.yaml"))
    with pytest.raises(UnsafeFileError, match="torch_safe_load"):
        check_description(layers | {"head": [[-1, 1, "torch_safe_load", ["x"]]]}, Path("bad.yaml"))
    (tmp_path / "bad.yaml").write_text("backbone: 3\n")
    with pytest.raises(CheckpointError, match="not the description"):
        load_detector(tmp_path / "bad.yaml")
