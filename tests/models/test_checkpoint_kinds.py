"""Every kind of SAM checkpoint, in the key layout of the program that makes it."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from sam_layouts import ForeignPackage, adapt, decoder_state, led, random_sam, training_checkpoint, unetr_state

from dendsam_deploy.errors import CheckpointError, InvalidArgumentError
from dendsam_deploy.models.adapters import AdapterFacts, merge_adapters
from dendsam_deploy.models.checkpoint_kinds import open_sam_file
from dendsam_deploy.models.image_encoder import ImageEncoderGraph
from dendsam_deploy.models.plain_encoder import PlainEncoder
from dendsam_deploy.models.reference import encode_tiles
from dendsam_deploy.models.weights import TrainingRecord, load_sam, save_sam


@pytest.fixture(scope="module")
def sam():
    return random_sam()


@pytest.fixture(scope="module")
def state(sam):
    return sam.state_dict()


def saved(content, folder, name="file.pt", **options):
    torch.save(content, folder / name, **options)
    return folder / name


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def kind_of(path):
    with open_sam_file(path) as (_, found):
        return found


@pytest.mark.parametrize("leader", ["", "sam.", "module.", "_orig_mod.", "_orig_mod.sam.", "module.sam.", "model.sam."])
def test_names_may_be_led_by_what_trainings_put_before_them(leader, state, tmp_path):
    path = saved(led(state, leader), tmp_path)
    assert kind_of(path).layout == "plain"
    assert equal(load_sam(path).sam.state_dict(), state)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module", "_orig_mod.module", "_checkpoint_wrapped_module"])
def test_a_wrapped_part_within_the_model(state, wrapper, tmp_path):
    inner = {key.replace("image_encoder.", f"image_encoder.{wrapper}."): value for key, value in state.items()}
    assert equal(load_sam(saved(inner, tmp_path)).sam.state_dict(), state)


@pytest.mark.parametrize(("leader", "old_format"), [("sam.", False), ("_orig_mod.sam.", True), ("module.sam.", False)])
def test_training_checkpoint_of_torch_em(leader, old_format, tmp_path):
    """Objects of a package that is not there: neither imported nor called, and named."""
    sam = random_sam(seed=1)
    with ForeignPackage() as module:
        content = training_checkpoint(sam, module, leader=leader)
        expected = {key: value.clone() for key, value in sam.state_dict().items()}
        path = saved(content, tmp_path, _use_new_zipfile_serialization=not old_format)
    loaded = load_sam(path)
    assert equal(loaded.sam.state_dict(), expected)
    assert (loaded.layout, loaded.record) == ("training", TrainingRecord("tiny", 64))
    found = kind_of(path)
    assert found.has_segmentation_decoder
    assert found.trained_by == "torch_em"
    assert {"torch_em.segmentation.SegmentationDataset", "torch_em.segmentation.rebuild_sampler"} <= set(found.foreign)
    assert {"epoch": 99, "iteration": 2000, "best_metric": 0.125}.items() <= found.progress.items()
    assert "torch_em" not in sys.modules


def test_export_with_segmentation_decoder(sam, state, tmp_path):
    path = saved({"model_state": state, "decoder_state": decoder_state(sam)}, tmp_path)
    loaded = load_sam(path)
    assert loaded.layout == "with-decoder"
    assert equal(loaded.sam.state_dict(), state)


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state", "model_state_dict"])
def test_wrappers_of_other_trainings(key, state, tmp_path):
    path = saved({key: led(state, "module."), "epoch": 3, "lr": 1e-4}, tmp_path)
    loaded = load_sam(path)
    assert loaded.layout == "wrapped"
    assert equal(loaded.sam.state_dict(), state)


def test_this_programs_own(state, tmp_path):
    save_sam(tmp_path / "own.pt", state, TrainingRecord("tiny", 64))
    assert kind_of(tmp_path / "own.pt").layout == "own"
    assert kind_of(tmp_path / "own.pt").trained_by == "dendsam-deploy"


class TestUnetr:
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_alone_it_cannot_answer_prompts_and_says_what_it_is_good_for(self, sam, wrapped, tmp_path):
        content = unetr_state(sam)
        path = saved({"model_state": content, "optimizer_state": {}, "init": {}} if wrapped else content, tmp_path)
        assert kind_of(path).layout == "unetr"
        with pytest.raises(CheckpointError, match=r"image encoder of a UNETR \(tiny\), but neither .*--start-base"):
            load_sam(path)

    def test_a_whole_sam_completes_it(self, sam, tmp_path):
        other = random_sam(seed=5)
        base = saved(other.state_dict(), tmp_path, "base.pt")
        loaded = load_sam(saved(unetr_state(sam), tmp_path), base=base)
        assert equal(loaded.sam.image_encoder.state_dict(), sam.image_encoder.state_dict())
        assert equal(loaded.sam.mask_decoder.state_dict(), other.mask_decoder.state_dict())
        assert equal(loaded.sam.prompt_encoder.state_dict(), other.prompt_encoder.state_dict())
        assert loaded.base_sha256 != loaded.sha256

    def test_adapters_in_it_are_merged_too(self, tmp_path):
        adapted = adapt(random_sam(), [0, 3])
        base = saved(random_sam().state_dict(), tmp_path, "base.pt")
        found = load_sam(saved(unetr_state(adapted), tmp_path), base=base)
        assert_same_embeddings(adapted, found.sam)

    def test_of_another_type_it_does_not_fit(self, sam, tmp_path):
        base = saved(random_sam("vit_t", 64).state_dict(), tmp_path, "base.pt")
        with pytest.raises(CheckpointError, match=r"holds a vit_t, but the encoder of .* is a tiny"):
            load_sam(saved(unetr_state(sam), tmp_path), base=base)

    def test_a_whole_sam_needs_no_other(self, state, tmp_path):
        path = saved(state, tmp_path)
        with pytest.raises(InvalidArgumentError, match="is a whole SAM"):
            load_sam(path, base=path)

    def test_an_incomplete_encoder_is_named(self, sam, tmp_path):
        content = unetr_state(sam)
        del content["encoder.neck.0.weight"]
        with pytest.raises(CheckpointError, match=r"1 tensors missing \(image_encoder.neck.0.weight\)"):
            load_sam(saved(content, tmp_path), base=tmp_path / "never-looked-at.pt")

    def test_a_segmentation_decoder_alone_is_no_sam(self, sam, tmp_path):
        with pytest.raises(CheckpointError, match="only a segmentation decoder of micro-sam"):
            load_sam(saved({"model_state": decoder_state(sam)}, tmp_path))


def assert_same_embeddings(adapted, merged):
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        torch.testing.assert_close(merged.image_encoder(image), adapted.image_encoder(image), atol=2e-5, rtol=1e-4)


class TestAdapters:
    @pytest.mark.parametrize(("parts", "rank"), [("qv", 4), ("q", 1), ("k", 2), ("v", 200), ("qkv", 3), ("", 4)])
    def test_the_merged_encoder_equals_the_adapted_one(self, parts, rank, tmp_path):
        adapted = adapt(random_sam(), [1, 2, 7], parts, rank, with_mlp=parts in ("", "qv"))
        loaded = load_sam(saved(adapted.state_dict(), tmp_path))
        assert_same_embeddings(adapted, loaded.sam)
        with pytest.raises(AssertionError):  # the adapters do matter
            assert_same_embeddings(random_sam(), loaded.sam)
        mlp = ("mlp 1", "mlp 2") if parts in ("", "qv") else ()
        assert loaded.adapters == AdapterFacts((rank,), (*parts, *mlp), (1, 2, 7))

    @pytest.mark.parametrize("form", ["added", "widened", None])
    def test_the_deployable_graph_equals_the_adapted_model(self, form, tmp_path):
        """From the file of adapters to the graph, against SAM's own preprocessing and the adapted encoder."""
        adapted = adapt(random_sam(), range(8), "qkv", 4, with_mlp=True)
        loaded = load_sam(saved(adapted.state_dict(), tmp_path))
        graph = ImageEncoderGraph(loaded.sam) if form is None else PlainEncoder(loaded.sam, form)
        tiles = torch.randint(0, 256, (2, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
        sizes = torch.tensor([[64, 64], [50, 64]])
        with torch.no_grad():
            found = graph(tiles, sizes)
        torch.testing.assert_close(found, encode_tiles(adapted, tiles, sizes), atol=5e-5, rtol=1e-3)

    def test_blocks_may_have_different_ranks(self, tmp_path):
        adapted = adapt(adapt(random_sam(), [0], "qkv", 2), [5], "v", 9)
        loaded = load_sam(saved(adapted.state_dict(), tmp_path))
        assert loaded.adapters.ranks == (2, 9)
        assert_same_embeddings(adapted, loaded.sam)

    def test_in_a_training_checkpoint(self, tmp_path):
        adapted = adapt(random_sam(), range(8), "qv", 4, with_mlp=True)
        with ForeignPackage() as module:
            path = saved(training_checkpoint(adapted, module, leader="_orig_mod.sam."), tmp_path)
        loaded = load_sam(path)
        assert (loaded.layout, loaded.adapters.blocks) == ("training", tuple(range(8)))
        assert_same_embeddings(adapted, loaded.sam)

    def test_micro_sams_list_of_the_same_adapters_is_no_second_one(self, tmp_path):
        adapted = adapt(random_sam(), [0])
        content = led(adapted.state_dict(), "sam.")
        content |= led(adapted.image_encoder.blocks[0].attn.qkv.state_dict(), "peft_blocks.0.")
        assert_same_embeddings(adapted, load_sam(saved(content, tmp_path)).sam)

    def test_rows_of_q_k_and_v_are_where_segment_anything_reads_them(self):
        """By hand: width 2, rank 1; W is zero, so the merged rows are the products themselves."""
        name = "image_encoder.blocks.0.attn.qkv"
        state = {
            f"{name}.qkv_proj.weight": np.zeros((6, 2), np.float32),
            f"{name}.w_a_linear_k.weight": np.array([[1, 2]], np.float32),
            f"{name}.w_b_linear_k.weight": np.array([[10], [100]], np.float32),
        }
        merged = merge_adapters(state)
        assert merged.keys() == {f"{name}.weight"}
        assert merged[f"{name}.weight"].tolist() == [[0, 0], [0, 0], [10, 20], [100, 200], [0, 0], [0, 0]]

    def test_half_precision_is_summed_in_more(self):
        """1 + 2^-12 is no half-precision number: it must not be lost."""
        state = {
            "b.mlp.mlp_layer.lin1.weight": np.ones((1, 1), np.float16),
            "b.mlp.w_a_linear_1.weight": np.full((1, 1), 2**-6, np.float16),
            "b.mlp.w_b_linear_1.weight": np.full((1, 1), 2**-6, np.float16),
        }
        assert merge_adapters(state)["b.mlp.lin1.weight"] == 1 + 2**-12

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            (lambda state, name: state.pop(f"{name}.w_b_linear_q.weight"), "has no counterpart"),
            (
                lambda state, name: state.update({f"{name}.w_a_linear_q.weight": torch.zeros(3, 7)}),
                "do not fit a layer",
            ),
            (
                lambda state, name: state.update({f"{name}.w_b_linear_q.weight": torch.zeros(192, 4)}),
                "do not fit a layer",
            ),
            (lambda state, name: state.pop(f"{name}.qkv_proj.weight"), "1 tensors missing"),
        ],
    )
    def test_incomplete_adapters_are_refused(self, change, complaint, tmp_path):
        state = dict(adapt(random_sam(), [0]).state_dict())
        change(state, "image_encoder.blocks.0.attn.qkv")
        with pytest.raises(CheckpointError, match=complaint):
            load_sam(saved(state, tmp_path))

    @pytest.mark.parametrize(
        ("extra", "kind"),
        [
            ("blocks.0.attn.qkv.FacTu.weight", "FacT"),
            ("blocks.0.mlp.down_proj.weight", "AdaptFormer"),
            ("blocks.0.attn.qkv.weight.absmax", "QLoRA"),
        ],
    )
    def test_kinds_that_cannot_be_merged_are_named(self, extra, kind, state, tmp_path):
        path = saved(state | {f"image_encoder.{extra}": torch.zeros(2, 2)}, tmp_path)
        with pytest.raises(CheckpointError, match=f"adapters of the kind {kind}"):
            load_sam(path)


class TestMobileSam:
    def test_the_real_table_of_tensors(self, shared_data, tmp_path):
        """Every name, shape and type of the published checkpoint, in its order."""
        index = json.loads((shared_data / "sam" / "mobile_sam_state_dict_index.json").read_text())
        entries = index["tensors"] if isinstance(index, dict) else index
        generator = torch.Generator().manual_seed(3)
        content = OrderedDict()
        for entry in entries:
            shape = entry["shape"]
            whole = "Long" in str(entry.get("storage_type", entry.get("dtype")))
            content[entry["name"]] = torch.tensor(7) if whole else torch.rand(shape, generator=generator)
        loaded = load_sam(saved(content, tmp_path))
        assert loaded.record == TrainingRecord("vit_t", 1024)
        assert equal(loaded.sam.state_dict(), content)

    def test_led_and_wrapped(self, tmp_path):
        state = random_sam("vit_t", 64).state_dict()
        loaded = load_sam(saved({"model_state": led(state, "sam."), "optimizer_state": {}}, tmp_path), 64)
        assert (loaded.layout, loaded.record) == ("training", TrainingRecord("vit_t", 64))
        assert equal(loaded.sam.state_dict(), state)


class TestTrueVitB:
    """The official size, small on disk: every tensor is one number, shown in its full shape."""

    def test_training_checkpoint_with_adapters(self, tmp_path):
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in random_shapes().items()}
        state = {f"sam.{key}": torch.full((1,), 0.01).expand(shape) for key, shape in shapes.items()}
        loaded = load_sam(saved({"model_state": state, "optimizer_state": {"state": {}}}, tmp_path), 256)
        assert loaded.record == TrainingRecord("vit_b", 256)
        assert loaded.adapters == AdapterFacts((4,), ("q", "v"), tuple(range(12)))
        merged = loaded.sam.image_encoder.blocks[11].attn.qkv.weight
        rows = [merged[:768], merged[768:1536], merged[1536:]]
        expected = [0.01 + 4 * 0.01**2, 0.01, 0.01 + 4 * 0.01**2]
        for part, value in zip(rows, expected, strict=True):
            torch.testing.assert_close(part, torch.full_like(part, value))


def random_shapes():
    """Shapes of ViT-B with micro-sam's adapters in every block."""
    from segment_anything import sam_model_registry  # noqa: PLC0415 - slow

    shapes = {}
    for key, value in sam_model_registry["vit_b"]().state_dict().items():
        shapes[key.replace(".attn.qkv.", ".attn.qkv.qkv_proj.")] = value
    for block in range(12):
        for part in "qv":
            name = f"image_encoder.blocks.{block}.attn.qkv"
            shapes[f"{name}.w_a_linear_{part}.weight"] = torch.empty(4, 768)
            shapes[f"{name}.w_b_linear_{part}.weight"] = torch.empty(768, 4)
    return shapes


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (["image_encoder.trunk.pos_embed", "sam_prompt_encoder.a", "sam_mask_decoder.a"], "a SAM 2"),
        (["vision_encoder.pos_embed", "prompt_encoder.a", "mask_decoder.a"], "Hugging Face"),
    ],
)
def test_relatives_are_told_from_it(names, family, tmp_path):
    with pytest.raises(CheckpointError, match=f"not a SAM checkpoint: it is .*{family}"):
        load_sam(saved({"model": {name: torch.zeros(1) for name in names}}, tmp_path))


class TestNormalisation:
    def test_that_of_sam_is_no_unknown_tensor(self, sam, state, tmp_path):
        path = saved(state | {"pixel_mean": sam.pixel_mean, "pixel_std": sam.pixel_std}, tmp_path)
        assert equal(load_sam(path).sam.state_dict(), state)

    def test_another_one_is_refused(self, state, tmp_path):
        path = saved(state | {"pixel_mean": torch.zeros(3, 1, 1)}, tmp_path)
        with pytest.raises(CheckpointError, match="normalises images by another pixel_mean"):
            load_sam(path)


def test_the_same_name_twice_with_different_values_is_refused(state, tmp_path):
    key = "mask_decoder.iou_token.weight"
    path = saved(state | {f"sam.{key}": torch.zeros_like(state[key])}, tmp_path)
    with pytest.raises(CheckpointError, match=f"holds {key} twice"):
        load_sam(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("old_format", [False, True])
def test_every_precision(dtype, old_format, state, tmp_path):
    content = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    path = saved(content, tmp_path, _use_new_zipfile_serialization=not old_format)
    expected = {key: value.float() if value.is_floating_point() else value for key, value in content.items()}
    assert equal(load_sam(path).sam.state_dict(), expected)


def test_views_parameters_and_shared_storages(state, tmp_path):
    """As torch writes them: transposed, cut out of a larger one, wrapped in a parameter, two of one storage."""
    content = dict(state)
    whole = torch.randn(3, 256, 256)
    for place, key in enumerate(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")):
        content[f"mask_decoder.transformer.layers.0.{key}.weight"] = whole[place].t()
    content["mask_decoder.iou_token.weight"] = torch.nn.Parameter(torch.randn(1, 256))
    loaded = load_sam(saved(content, tmp_path)).sam.state_dict()
    assert all(torch.equal(loaded[key], content[key]) for key in content)
