"""Graphs made from slightly wrong modules: every mistake of an exporter that leaves shapes alone."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import pytest
from sabotage import Tensors, failures, from_torch, sabotaged

torch = pytest.importorskip("torch")
from segment_anything.modeling import image_encoder  # noqa: E402 - after the check for torch
from torch import nn  # noqa: E402

from dendsam_deploy.export.reference import ReferenceOptions, reference_inputs, sam_outputs  # noqa: E402
from dendsam_deploy.models.sam import build_sam  # noqa: E402

WINDOW_BLOCK, GLOBAL_BLOCK = 1, 3


def test_the_modules_themselves_pass(session, truth, sam):
    assert failures(from_torch(session, sam, lambda sam: None), truth) == set()


def no_relative_position(sam, block: int) -> None:
    sam.image_encoder.blocks[block].attn.use_rel_pos = False


def swapped_relative_position(sam) -> None:
    attention = sam.image_encoder.blocks[GLOBAL_BLOCK].attn
    attention.rel_pos_h, attention.rel_pos_w = attention.rel_pos_w, attention.rel_pos_h


def mirrored_relative_position(sam) -> None:
    attention = sam.image_encoder.blocks[WINDOW_BLOCK].attn
    attention.rel_pos_h.data = attention.rel_pos_h.data.flip(0)


def scaled_relative_position(sam) -> None:
    """The query is not scaled where it meets the relative position."""
    attention = sam.image_encoder.blocks[WINDOW_BLOCK].attn
    for table in (attention.rel_pos_h, attention.rel_pos_w):
        table.data *= attention.scale


def skipped_block(sam) -> None:
    sam.image_encoder.blocks = sam.image_encoder.blocks[:-1]


def permuted_heads(sam) -> None:
    attention = sam.image_encoder.blocks[WINDOW_BLOCK].attn
    width = attention.qkv.weight.shape[1]
    weight = attention.qkv.weight.data.view(3, attention.num_heads, -1, width)
    attention.qkv.weight.data = torch.stack([weight[0].roll(1, 0), weight[1], weight[2]]).reshape(3 * width, width)


def tanh_gelu(part: str, sam) -> None:
    for module in getattr(sam, part).modules():
        if isinstance(module, nn.GELU):
            module.approximate = "tanh"


def other_epsilon(sam) -> None:
    for module in sam.image_encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5


def rounded(dtype, part: str, sam) -> None:
    for parameter in getattr(sam, part).parameters():
        parameter.data = parameter.data.to(dtype).float()


def quantised(sam) -> None:
    """8-bit weights with a scale for each output, the usual dynamic quantisation."""
    for module in sam.image_encoder.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.data.abs().amax(dim=1, keepdim=True) / 127
            module.weight.data = (module.weight.data / scale).round() * scale


def transposed_position(sam) -> None:
    sam.image_encoder.pos_embed.data = sam.image_encoder.pos_embed.data.transpose(1, 2)


def shifted_position(sam) -> None:
    table = sam.image_encoder.pos_embed.data
    sam.image_encoder.pos_embed.data = (table + table.roll(1, 2)) / 2


def other_normalisation(mean: float, std: float, sam) -> None:
    sam.pixel_mean += mean
    sam.pixel_std *= std


def swapped_channels(sam) -> None:
    """Three equal channels, but the mean and standard deviation of the wrong ones."""
    sam.pixel_mean, sam.pixel_std = sam.pixel_mean.flip(0), sam.pixel_std.flip(0)


def one_channel(sam) -> None:
    sam.image_encoder.patch_embed.proj.weight.data[:, 1:] = 0


def forgotten_bias(sam) -> None:
    sam.image_encoder.patch_embed.proj.bias.data.zero_()


ENCODERS = {
    "no relative position in one window block": partial(no_relative_position, block=WINDOW_BLOCK),
    "no relative position in one global block": partial(no_relative_position, block=GLOBAL_BLOCK),
    "relative position of rows and columns swapped": swapped_relative_position,
    "relative position mirrored": mirrored_relative_position,
    "relative position scaled": scaled_relative_position,
    "last block skipped": skipped_block,
    "one projection's heads permuted": permuted_heads,
    "GELU by tanh": partial(tanh_gelu, "image_encoder"),
    "epsilon of LayerNorm": other_epsilon,
    "weights rounded to fp16": partial(rounded, torch.float16, "image_encoder"),
    "weights rounded to bf16": partial(rounded, torch.bfloat16, "image_encoder"),
    "weights quantised": quantised,
    "position embedding transposed": transposed_position,
    "position embedding half a cell off": shifted_position,
    "mean": partial(other_normalisation, 1.0, 1.0),
    "standard deviation": partial(other_normalisation, 0.0, 1.01),
    "channels swapped": swapped_channels,
    "one channel only": one_channel,
    "bias forgotten": forgotten_bias,
}


@pytest.mark.parametrize("change", ENCODERS.values(), ids=ENCODERS.keys())
def test_a_wrong_encoder_is_found(session, truth, sam, change):
    found = failures(from_torch(session, sam, change, ("encoder",)), truth)
    assert {"embedding_relative_rms", "padded_tile_relative_max"} & found
    assert "logits_max_over_std" not in found, "the decoder is judged by itself"


def no_half_pixel(sam) -> None:
    encoder, embed = sam.prompt_encoder, sam.prompt_encoder._embed_boxes
    encoder._embed_boxes = lambda boxes: embed(boxes - 0.5)


def normalised_by_last_pixel(sam) -> None:
    encoder, embed = sam.prompt_encoder, sam.prompt_encoder._embed_boxes
    size = encoder.input_image_size[0]
    encoder._embed_boxes = lambda boxes: embed(boxes * size / (size - 1))


def swapped_corners(sam) -> None:
    points = sam.prompt_encoder.point_embeddings
    points[2], points[3] = points[3], points[2]


def half_cell(sam) -> None:
    encoder = sam.prompt_encoder

    def shifted() -> torch.Tensor:
        height, width = encoder.image_embedding_size
        grid = torch.stack(torch.meshgrid(torch.arange(width) / width, torch.arange(height) / height, indexing="xy"))
        return encoder.pe_layer._pe_encoding(grid.permute(1, 2, 0)).permute(2, 0, 1)[None]

    encoder.get_dense_pe = shifted


def transposed_grid(sam) -> None:
    encoder, dense = sam.prompt_encoder, sam.prompt_encoder.get_dense_pe
    encoder.get_dense_pe = lambda: dense().transpose(2, 3)


def no_mask_embedding(sam) -> None:
    sam.prompt_encoder.no_mask_embed.weight.data.zero_()


def padding_point(sam) -> None:
    encoder, embed = sam.prompt_encoder, sam.prompt_encoder._embed_boxes

    def padded(boxes: torch.Tensor) -> torch.Tensor:
        return torch.cat([embed(boxes), encoder.not_a_point_embed.weight.expand(len(boxes), 1, -1)], dim=1)

    encoder._embed_boxes = padded


def other_mask_token(token: int, sam) -> None:
    decoder, predict = sam.mask_decoder, sam.mask_decoder.predict_masks
    order = [token, *(other for other in range(4) if other != token)]
    decoder.predict_masks = lambda **inputs: tuple(output[:, order] for output in predict(**inputs))


def other_iou(sam) -> None:
    decoder, predict = sam.mask_decoder, sam.mask_decoder.predict_masks

    def mixed(**inputs):
        masks, iou = predict(**inputs)
        return masks, iou.flip(1)

    decoder.predict_masks = mixed


def skipped_layer(sam) -> None:
    sam.mask_decoder.transformer.layers = sam.mask_decoder.transformer.layers[:1]


def no_final_attention(sam) -> None:
    sam.mask_decoder.transformer.final_attn_token_to_image.out_proj.weight.data.zero_()


def key_bias_in_values(sam) -> None:
    attention = sam.mask_decoder.transformer.layers[0].cross_attn_token_to_image
    attention.v_proj.bias.data.zero_()


DECODERS = {
    "box corners at pixel edges": no_half_pixel,
    "boxes normalised by the last pixel": normalised_by_last_pixel,
    "corners swapped": swapped_corners,
    "position encoding half a cell off": half_cell,
    "position encoding transposed": transposed_grid,
    "no embedding for the missing mask": no_mask_embedding,
    "padding point": padding_point,
    "token 1": partial(other_mask_token, 1),
    "token 3": partial(other_mask_token, 3),
    "predicted IoU of another token": other_iou,
    "one layer skipped": skipped_layer,
    "final attention without effect": no_final_attention,
    "bias of values forgotten": key_bias_in_values,
    "GELU by tanh": partial(tanh_gelu, "mask_decoder"),
    "weights rounded to fp16": partial(rounded, torch.float16, "mask_decoder"),
}


@pytest.mark.parametrize("change", DECODERS.values(), ids=DECODERS.keys())
def test_a_wrong_decoder_is_found(session, truth, sam, change):
    found = failures(from_torch(session, sam, change, ("decoder",)), truth)
    assert {"logits_max_over_std", "logits_rms_over_std", "predicted_iou_max_difference"} & found
    assert not {metric for metric in found if metric.startswith(("embedding", "padded"))}


def test_other_weights_behind_the_same_name_are_found(session, truth, sam):
    torch.manual_seed(9)
    other = build_sam("tiny", 128)
    found = failures(from_torch(session, other, lambda sam: None), truth)
    assert {"embedding_cosine", "logits_rms_over_std", "mask_iou_mean", "instances_pq50"} <= found


@pytest.mark.parametrize("windows", ["unpadded", "padded after the projection"])
def test_windows_that_are_not_padded_as_they_should_be_are_found(session, truth, monkeypatch, windows):
    """The tokens of 160 px do not fill windows of 8; their padding takes part in the attention."""
    torch.manual_seed(3)
    sam = build_sam("tiny", 160)
    inputs = reference_inputs(ReferenceOptions(160, boxes=4))
    truth = dataclasses.replace(truth, inputs=inputs, sam=sam_outputs(sam, inputs), detector=None, detected=None)
    manifest = session.manifest
    session = dataclasses.replace(
        session,
        manifest=dataclasses.replace(
            manifest,
            preprocessing=dataclasses.replace(manifest.preprocessing, tile_size_px=160),
            decoding=dataclasses.replace(manifest.decoding, region_sizes=(10,)),
        ),
        detector=None,
    )
    assert failures(from_torch(session, sam, lambda sam: None), truth) == set()
    partition = image_encoder.window_partition

    def mirrored(x: torch.Tensor, window: int):
        missing = -x.shape[1] % window
        filled = nn.functional.pad(x.permute(0, 3, 1, 2), (0, missing, 0, missing), mode="replicate")
        return partition(filled.permute(0, 2, 3, 1), window)

    def nudged(x: torch.Tensor, window: int):
        windows, padded = partition(x, window)
        return torch.where(windows == 0, 0.1, windows), padded

    monkeypatch.setattr(image_encoder, "window_partition", mirrored if windows == "unpadded" else nudged)
    assert "embedding_relative_rms" in failures(from_torch(session, sam, lambda sam: None), truth)


def test_half_precision_has_limits_too(session, truth, sam):
    """What passes for bf16 is what bf16 can do, not whatever is called so."""

    def at_bf16(change, role: str) -> set[str]:
        wrong = from_torch(session, sam, change, (role,))
        graph = getattr(wrong, role)
        graph.spec = dataclasses.replace(graph.spec, precision="bf16")
        return failures(dataclasses.replace(wrong, precision="bf16"), truth)

    assert at_bf16(partial(rounded, torch.float16, "image_encoder"), "encoder") == set()
    assert "embedding_relative_rms" in at_bf16(skipped_block, "encoder")
    assert "logits_rms_over_std" in at_bf16(partial(other_mask_token, 1), "decoder")


@pytest.mark.parametrize(("precision", "offset"), [("fp16", 1e5), ("bf16", 300.0)])
def test_a_residual_that_half_precision_cannot_hold_is_found(session, truth, sam, precision, offset):
    """LayerNorm subtracts what all channels share, in fp32 at least: half throughout, it overflows or is rounded away.

    Published checkpoints reach such magnitudes.
    """
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]

    def lifted(sam) -> None:
        sam.image_encoder.patch_embed.proj.bias.data += offset
        neck = sam.image_encoder.neck[0].weight.data
        neck -= neck.mean(dim=1, keepdim=True)  # blind for what all channels share

    right = from_torch(session, sam, lifted, ("encoder",))
    tiles = {"tiles": truth.inputs.tiles, "sizes": truth.inputs.sizes}
    expected = dataclasses.replace(truth.sam, embeddings=right.encoder.run(tiles)["embeddings"])
    truth = dataclasses.replace(truth, sam=expected, detected=None)
    assert not {metric for metric in failures(right, truth) if metric.startswith(("embedding", "padded", "not_finite"))}
    narrow = copy.deepcopy(sam)
    lifted(narrow)
    narrow.image_encoder.to(dtype)

    @torch.no_grad()
    def encode_in_half(inputs: Tensors, run: object) -> Tensors:
        images = [
            narrow.preprocess(tile[:height, :width].expand(1, 3, -1, -1).float())
            for tile, (height, width) in zip(torch.tensor(inputs["tiles"]), inputs["sizes"].tolist(), strict=True)
        ]
        encoded = [narrow.image_encoder(image.to(dtype)).float() for image in images]
        return {"embeddings": torch.cat(encoded).numpy()}

    wrong = sabotaged(right, "encoder", encode_in_half)
    wrong.encoder.spec = dataclasses.replace(wrong.encoder.spec, precision=precision)
    found = failures(dataclasses.replace(wrong, precision=precision), truth)
    assert ("not_finite" if precision == "fp16" else "embedding_relative_rms") in found
