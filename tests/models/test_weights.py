"""Checkpoints: every kind that is read, and one clear line for everything that is not."""

import contextlib
import dataclasses
import pickle
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_anything import sam_model_registry

from dendsam_deploy.errors import CheckpointError, InvalidArgumentError, StorageError, UnsafeFileError
from dendsam_deploy.models.sam import build_sam
from dendsam_deploy.models.weights import (
    RECORD_KEY,
    STATE_KEY,
    TrainingRecord,
    load_sam,
    read_tensors,
    save_sam,
    sha256_of,
    write_tensors,
)


@pytest.fixture(scope="module")
def tiny_state():
    """State dict of a tiny SAM of 64 px with random weights."""
    torch.manual_seed(0)
    sam = build_sam("tiny", 64)
    with torch.no_grad():
        sam.image_encoder.pos_embed.normal_()
    return sam.state_dict()


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


class TestWhatIsRead:
    def test_plain_state_dict(self, tiny_state, tmp_path):
        path = tmp_path / "plain.pth"
        torch.save(tiny_state, path)
        loaded = load_sam(path)
        assert loaded.record == TrainingRecord("tiny", 64)
        assert equal(loaded.sam.state_dict(), tiny_state)
        assert not loaded.sam.training
        assert loaded.sha256 == sha256_of(path)

    def test_own_file_keeps_its_record(self, tiny_state, tmp_path):
        record = TrainingRecord("tiny", 64, 15.0, 2, {"held_out_iou": 0.8, "train_slices": [0, 10]})
        save_sam(tmp_path / "new" / "own.pt", tiny_state, record)
        loaded = load_sam(tmp_path / "new" / "own.pt")
        assert loaded.record == record
        assert equal(loaded.sam.state_dict(), tiny_state)
        assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["own.pt"]

    def test_half_precision_becomes_single(self, tiny_state, tmp_path):
        half = {key: value.half() for key, value in tiny_state.items()}
        save_sam(tmp_path / "half.pt", half, TrainingRecord("tiny", 64))
        state = load_sam(tmp_path / "half.pt").sam.state_dict()
        assert equal(state, {key: value.float() for key, value in half.items()})

    def test_mobile_sam_layout(self, tmp_path):
        torch.manual_seed(1)
        state = build_sam("vit_t").state_dict()
        assert "image_encoder.layers.0.blocks.0.conv1.c.weight" in state
        torch.save(state, tmp_path / "mobile_sam.pt")
        loaded = load_sam(tmp_path / "mobile_sam.pt")
        assert loaded.record == TrainingRecord("vit_t", 1024)
        assert equal(loaded.sam.state_dict(), state)

    def test_official_vit_b_at_half_its_size(self, tmp_path):
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in sam_model_registry["vit_b"]().state_dict().items()}
        state = {key: torch.randn(1).expand(shape) for key, shape in shapes.items()}  # a small file of large tensors
        torch.save(state, tmp_path / "vit_b.pth")
        loaded = load_sam(tmp_path / "vit_b.pth", 512)
        assert loaded.record == TrainingRecord("vit_b", 512)
        assert loaded.sam.image_encoder.img_size == 512
        found = loaded.sam.state_dict()
        resized = {key for key in state if state[key].shape != found[key].shape}
        assert resized == {"image_encoder.pos_embed"} | {
            f"image_encoder.blocks.{block}.attn.rel_pos_{axis}" for block in (2, 5, 8, 11) for axis in "hw"
        }
        assert all(torch.equal(found[key], state[key]) for key in state.keys() - resized)

    @pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")  # nothing is to be copied
    @pytest.mark.parametrize("model_type", ["vit_b", "vit_l", "vit_h"])
    def test_official_types_are_told_by_their_width(self, model_type, tmp_path):
        """A file that announces a type but lacks its tensors is named as what it is."""
        with torch.device("meta"):
            state = sam_model_registry[model_type]().state_dict()
        kept = ["patch_embed.proj.weight", "pos_embed", "no_mask_embed.weight", "iou_token.weight"]
        state = {key: torch.zeros(1).expand(value.shape) for key, value in state.items() if key.endswith(tuple(kept))}
        torch.save(state, tmp_path / "part.pth")
        with torch.device("meta"), pytest.raises(CheckpointError, match=f"not a complete {model_type} checkpoint"):
            load_sam(tmp_path / "part.pth")


class TestOtherImageSize:
    def test_a_smooth_position_table_keeps_its_shape(self, tiny_state, tmp_path):
        """A table that is linear in the position stays linear, away from its borders."""
        ramp = torch.linspace(0, 3, 4)
        table = (ramp[:, None] + 10 * ramp)[None, :, :, None].expand(1, 4, 4, 192)
        state = tiny_state | {"image_encoder.pos_embed": table.contiguous()}
        torch.save(state, tmp_path / "plain.pth")
        loaded = load_sam(tmp_path / "plain.pth", 128)
        assert loaded.record.image_size == 128
        found = loaded.sam.image_encoder.pos_embed[0, 3:5, 3:5, 0].detach()
        expected = torch.tensor([[1.25 * 11, 1.25 + 17.5], [1.75 + 12.5, 1.75 * 11]])
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0)

    def test_relative_positions_as_segment_anything_interpolates_them(self, tiny_state, tmp_path):
        torch.save(tiny_state, tmp_path / "plain.pth")
        resized = load_sam(tmp_path / "plain.pth", 128).sam.image_encoder.blocks[3].attn
        length = 2 * 8 - 1
        assert resized.rel_pos_h.shape == (length, 64)
        source = tiny_state["image_encoder.blocks.3.attn.rel_pos_h"]
        expected = torch.nn.functional.interpolate(source.T[None], size=length, mode="linear")[0].T
        assert torch.equal(resized.rel_pos_h.detach(), expected)

    def test_own_size_changes_nothing(self, tiny_state, tmp_path):
        torch.save(tiny_state, tmp_path / "plain.pth")
        assert equal(load_sam(tmp_path / "plain.pth", 64).sam.state_dict(), tiny_state)

    def test_an_impossible_wish_is_an_argument_error(self, tiny_state, tmp_path):
        torch.save(tiny_state, tmp_path / "plain.pth")
        with pytest.raises(InvalidArgumentError, match="image size of 100 px"):
            load_sam(tmp_path / "plain.pth", 100)


class Canary:
    """An object whose unpickling writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@dataclasses.dataclass
class Foreign:
    """An object of a class that only its author has."""

    value: int = 1


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def refused(path, expected):
    with pytest.raises(CheckpointError) as error:
        load_sam(path)
    text = one_line(error)
    assert text.startswith(f"{path}: ")
    assert expected in text


class TestWhatIsRefused:
    def test_missing(self, tmp_path):
        refused(tmp_path / "no.pt", "no such file; give the path of a checkpoint (.pt or .pth)")

    def test_folder(self, tmp_path):
        refused(tmp_path, "is a folder; give the path of a checkpoint (.pt or .pth)")

    def test_empty(self, tmp_path):
        (tmp_path / "empty.pt").touch()
        refused(tmp_path / "empty.pt", "the file is empty; download or copy it again")

    @pytest.mark.parametrize("content", [b"a line of text\n", b"\x00" * 100, b"PK", b"II*\x00" + b"\x08" * 50])
    def test_other_kinds_of_file(self, content, tmp_path):
        (tmp_path / "other.pt").write_bytes(content)
        refused(tmp_path / "other.pt", "not a torch checkpoint")

    def test_a_broken_download(self, shared_data):
        refused(shared_data / "sam" / "mobile_sam_truncated.pt", "cut off or damaged (1,835,008 bytes); download")

    def test_every_cut_of_a_file(self, tiny_state, tmp_path):
        whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
        torch.save(dict(list(tiny_state.items())[-5:]), whole)
        content = whole.read_bytes()
        for length in range(4, len(content), len(content) // 40):
            cut.write_bytes(content[:length])
            refused(cut, "cut off or damaged")

    def test_yolo(self, shared_data):
        refused(
            shared_data / "yolo" / "yolov8n.pt", "holds an Ultralytics network, expected SAM; give it as the detector"
        )

    def test_a_whole_pickled_model(self, tmp_path):
        torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
        refused(tmp_path / "whole.pt", "holds a whole pickled torch.nn.modules.linear.Linear; save its state_dict()")

    @pytest.mark.parametrize("as_torch_file", [True, False])
    def test_malicious_pickles_do_not_run(self, tiny_state, tmp_path, as_torch_file):
        path, canary = tmp_path / "bad.pt", tmp_path / "canary"
        content = dict(tiny_state) | {"x": Canary(canary)}
        if as_torch_file:
            torch.save(content, path)
        else:
            path.write_bytes(pickle.dumps({"x": Canary(canary)}))
        with pytest.raises(UnsafeFileError, match=r"loading it would call .*; it was not loaded"):
            load_sam(path)
        assert not canary.exists()
        torch.load(path, weights_only=False) if as_torch_file else pickle.loads(path.read_bytes())
        assert canary.exists()  # the bait was live

    def test_state_of_another_model(self, tmp_path):
        torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
        refused(tmp_path / "linear.pt", "not a SAM checkpoint: expected image_encoder, prompt_encoder, mask_decoder")

    def test_a_part_of_a_sam(self, tiny_state, tmp_path):
        part = {key: value for key, value in tiny_state.items() if key.startswith("image_encoder")}
        torch.save(part, tmp_path / "encoder.pt")
        refused(tmp_path / "encoder.pt", "found image_encoder")

    @pytest.mark.parametrize("content", [[1, 2], {}, torch.zeros(3), {"model": {"weight": torch.zeros(2)}}, {3: 4}])
    def test_other_contents(self, content, tmp_path):
        torch.save(content, tmp_path / "other.pt")
        refused(tmp_path / "other.pt", "expected")

    def test_missing_and_unknown_tensors_are_counted_and_named(self, tiny_state, tmp_path):
        state = dict(tiny_state)
        del state["mask_decoder.iou_token.weight"]
        state["image_encoder.extra"] = torch.zeros(1)
        torch.save(state, tmp_path / "holed.pt")
        refused(
            tmp_path / "holed.pt",
            "not a complete tiny checkpoint: 1 tensors missing (mask_decoder.iou_token.weight), 1 unknown "
            "(image_encoder.extra)",
        )

    def test_unknown_width(self, tiny_state, tmp_path):
        state = tiny_state | {"image_encoder.patch_embed.proj.weight": torch.zeros(100, 3, 16, 16)}
        torch.save(state, tmp_path / "wide.pt")
        refused(tmp_path / "wide.pt", "its patch embedding is 100 wide, expected one of 768 (vit_b)")

    def test_tensors_of_other_shapes(self, tiny_state, tmp_path):
        state = tiny_state | {"mask_decoder.iou_token.weight": torch.zeros(1, 128)}
        torch.save(state, tmp_path / "shapes.pt")
        refused(tmp_path / "shapes.pt", "tensors do not fit tiny: size mismatch for mask_decoder.iou_token.weight")

    @pytest.mark.parametrize("side", [0, 3, 100_000])
    def test_absurd_position_tables_allocate_nothing(self, tiny_state, tmp_path, side):
        table = torch.zeros(1).expand(1, side, side, 192)  # one number on disk
        torch.save(tiny_state | {"image_encoder.pos_embed": table}, tmp_path / "absurd.pt")
        refused(tmp_path / "absurd.pt", f"image size of {16 * side} px is not possible")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_diverged_training(self, tiny_state, tmp_path, value):
        broken = tiny_state["mask_decoder.iou_token.weight"].clone()
        broken[0, 7] = value
        torch.save(tiny_state | {"mask_decoder.iou_token.weight": broken}, tmp_path / "nan.pt")
        refused(tmp_path / "nan.pt", "mask_decoder.iou_token.weight holds NaN or infinite values")

    @pytest.mark.parametrize(
        "record",
        [
            {},
            {"model_type": "tiny"},
            {"model_type": "vit_x", "image_size": 64},
            {"model_type": "tiny", "image_size": "64"},
            {"model_type": "tiny", "image_size": 64, "zoom": float("nan")},
            {"model_type": "tiny", "image_size": 64, "zoom": "2"},
            {"model_type": "tiny", "image_size": 64, "colour": "red"},
            "tiny",
        ],
    )
    def test_records_of_other_versions(self, tiny_state, tmp_path, record):
        torch.save({STATE_KEY: tiny_state, RECORD_KEY: record}, tmp_path / "own.pt")
        refused(tmp_path / "own.pt", "written by another version of dendsam-deploy")

    def test_a_record_with_an_impossible_size(self, tiny_state, tmp_path):
        save_sam(tmp_path / "own.pt", tiny_state, TrainingRecord("tiny", 70))
        refused(tmp_path / "own.pt", "image size of 70 px is not possible")

    @settings(deadline=None, max_examples=60)
    @given(data=st.data(), old_format=st.booleans())
    def test_damaged_bytes_never_raise_anything_else(self, tmp_path_factory, data, old_format):
        path = tmp_path_factory.mktemp("fuzz") / "damaged.pt"
        torch.save({"a": torch.zeros(2, 3), "b": {"c": [1, 2.0]}}, path, _use_new_zipfile_serialization=not old_format)
        content = bytearray(path.read_bytes())
        for place, value in data.draw(
            st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), min_size=1, max_size=4)
        ):
            content[place] = value
        path.write_bytes(content)
        with contextlib.suppress(CheckpointError, UnsafeFileError):  # a name of one letter less may be a harmful one
            read_tensors(path)


class TestWriting:
    def test_refused_place(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(StorageError) as error:
            write_tensors(tmp_path / "file" / "out.pt", {"a": torch.zeros(1)})
        assert "cannot be written" in one_line(error)

    def test_a_full_disk_leaves_the_older_file(self, tmp_path):
        path = tmp_path / "out.pt"
        write_tensors(path, {"a": torch.zeros(3)})
        before = path.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # stands in for the end of the disk
        try:
            with pytest.raises(StorageError) as error:
                write_tensors(path, {"a": torch.zeros(1 << 20)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert one_line(error).startswith(f"{path}: cannot be written (File too large); free space")
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]
