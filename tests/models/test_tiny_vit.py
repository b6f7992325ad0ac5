"""MobileSAM's encoder against the key table of its real checkpoint and its published definition, written out below."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from torch.nn import functional

from dendsam_deploy.models.sam import build_sam
from dendsam_deploy.models.tiny_vit import TinyViTEncoder

SIDE = 160  # 20 x 20 and 10 x 10 cells: windows of 7 and of 14 both have to be padded


@pytest.fixture(scope="module")
def encoder():
    """Return an encoder in which no parameter has a value, such as 0 or 1, that could hide a mistake."""
    torch.manual_seed(0)
    encoder = TinyViTEncoder(SIDE).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in encoder.state_dict().items():
            if name.endswith(("running_var", "bn.weight", "norm.weight", "neck.1.weight", "neck.3.weight")):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif "bias" in name or name.endswith("running_mean"):
                tensor.normal_(0, 0.3, generator=generator)
    return encoder


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_tensors_are_exactly_those_of_the_real_checkpoint(shared_data):
    index = json.loads((shared_data / "sam" / "mobile_sam_state_dict_index.json").read_text())
    state = build_sam("vit_t").state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == {
        entry["name"]: entry["shape"] for entry in index
    }


@torch.no_grad()
def test_equals_the_published_definition(encoder, images):
    expected = published_encoder(encoder.state_dict(), images)
    assert expected.shape == (2, 256, SIDE // 16, SIDE // 16)
    torch.testing.assert_close(encoder(images), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(
    "spoil",
    [
        {"bias_of_row_first": False},
        {"padding_after_norm": True},
        {"last_stride": 2},
    ],
)
def test_the_comparison_notices_other_definitions(encoder, images, spoil):
    other = published_encoder(encoder.state_dict(), images, **spoil)
    mine = encoder(images)
    assert other.shape != mine.shape or (other - mine).abs().max() > 1e-3


@torch.no_grad()
def test_new_weights_take_effect_in_evaluation_mode():
    torch.manual_seed(3)
    encoder = TinyViTEncoder(64).eval()
    image = torch.randn(1, 3, 64, 64)
    before = encoder(image)
    table = encoder.get_parameter("layers.1.blocks.0.attn.attention_biases")
    table.normal_()
    assert not torch.allclose(encoder(image), before, atol=1e-4)


def test_every_parameter_that_computes_gets_a_gradient():
    torch.manual_seed(4)
    encoder = TinyViTEncoder(64).train()
    encoder(torch.randn(2, 3, 64, 64)).square().sum().backward()
    idle = {name for name, parameter in encoder.named_parameters() if parameter.grad is None}
    assert idle == {"norm_head.weight", "norm_head.bias", "head.weight", "head.bias"}


def test_sam_predictor_runs_with_it():
    torch.manual_seed(5)
    predictor = SamPredictor(build_sam("vit_t", 64))
    predictor.set_image(np.random.default_rng(0).integers(0, 255, (48, 60, 3), np.uint8))
    masks, scores, logits = predictor.predict(box=np.array([5, 5, 30, 30]), multimask_output=False)
    assert masks.shape == (1, 48, 60)
    assert scores.shape == (1,)
    assert logits.shape == (1, 16, 16)


@torch.no_grad()
def test_attention_layer_exports_to_onnx(tmp_path):
    """The rest of the encoder is convolutions; exporting all of it takes half a minute."""
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(6)
    layer = TinyViTEncoder(64).eval().layers[3]
    features = torch.randn(2, 320, 4, 4)
    program = torch.export.export(layer, (features,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.onnx.export(program, (), tmp_path / "layer.onnx", opset_version=20, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "layer.onnx"), providers=["CPUExecutionProvider"])
    for count in (1, 2):
        found = session.run(None, {session.get_inputs()[0].name: features[:count].numpy()})[0]
        np.testing.assert_allclose(found, layer(features[:count]).numpy(), atol=1e-5)


# The definition, from the paper's text and MobileSAM's settings: plain functions of a table of tensors.


def published_encoder(state, x, *, last_stride=1, bias_of_row_first=True, padding_after_norm=False):
    """Return the embeddings of images ``(b, 3, S, S)``."""
    x = convolution(state, "patch_embed.seq.0", x, stride=2, padding=1)
    x = convolution(state, "patch_embed.seq.2", functional.gelu(x), stride=2, padding=1)
    for block in ("layers.0.blocks.0", "layers.0.blocks.1"):
        x = functional.gelu(x + inverted_bottleneck(state, block, x, stride=1))
    strides = {0: 2, 1: 2, 2: last_stride}
    x = inverted_bottleneck(state, "layers.0.downsample", x, strides[0])
    for layer, (depth, heads, window) in {1: (2, 4, 7), 2: (6, 5, 14), 3: (2, 10, 7)}.items():
        for index in range(depth):
            block = f"layers.{layer}.blocks.{index}"
            shape = WindowAttention(heads, window, bias_of_row_first, padding_after_norm)
            x = x + shape(state, f"{block}.attn", x)
            x = convolution(state, f"{block}.local_conv", x, padding=1)
            x = x + perceptron(state, f"{block}.mlp", x)
        if layer in strides:
            x = inverted_bottleneck(state, f"layers.{layer}.downsample", x, strides[layer])
    x = channel_norm(state, "neck.1", functional.conv2d(x, state["neck.0.weight"]))
    return channel_norm(state, "neck.3", functional.conv2d(x, state["neck.2.weight"], padding=1))


def convolution(state, name, x, stride=1, padding=0):
    """Convolve without bias, then normalise by running statistics; depthwise where the kernel has one channel."""
    kernel = state[f"{name}.c.weight"]
    x = functional.conv2d(x, kernel, stride=stride, padding=padding, groups=x.shape[1] // kernel.shape[1])
    mean, variance, gain, shift = (
        state[f"{name}.bn.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(variance + 1e-5) * gain + shift


def inverted_bottleneck(state, name, x, stride):
    """Widen, look around, narrow; activations between, none behind."""
    x = functional.gelu(convolution(state, f"{name}.conv1", x))
    x = functional.gelu(convolution(state, f"{name}.conv2", x, stride, padding=1))
    return convolution(state, f"{name}.conv3", x)


@dataclass(frozen=True)
class WindowAttention:
    """Attention inside each window, head by head; cells beyond the image are zeros before the layer norm."""

    heads: int
    window: int
    bias_of_row_first: bool
    padding_after_norm: bool

    def __call__(self, state, name, x):
        out = torch.zeros_like(x)
        for image, result in zip(x, out, strict=True):
            for y0 in range(0, x.shape[2], self.window):
                for x0 in range(0, x.shape[3], self.window):
                    here = (slice(None), slice(y0, y0 + self.window), slice(x0, x0 + self.window))
                    result[here] = self.of_window(state, name, image[here])
        return out

    def of_window(self, state, name, real):
        channels, height, width = real.shape
        window = torch.zeros(channels, self.window, self.window, dtype=real.dtype)
        window[:, :height, :width] = real
        gain, shift = state[f"{name}.norm.weight"], state[f"{name}.norm.bias"]
        tokens = functional.layer_norm(window.flatten(1).T, (channels,), gain, shift)
        if self.padding_after_norm:
            outside = torch.ones(self.window, self.window, dtype=torch.bool)
            outside[:height, :width] = False
            tokens[outside.flatten()] = 0
        mixed = torch.cat([self.of_head(state, name, tokens, head) for head in range(self.heads)], 1)
        answer = mixed @ state[f"{name}.proj.weight"].T + state[f"{name}.proj.bias"]
        return answer.T.reshape(window.shape)[:, :height, :width]

    def of_head(self, state, name, tokens, head):
        width = tokens.shape[1] // self.heads
        query, key, value = (
            tokens @ state[f"{name}.qkv.weight"][rows].T + state[f"{name}.qkv.bias"][rows]
            for rows in (slice(first, first + width) for first in width * (3 * head + np.arange(3)))
        )
        bias = state[f"{name}.attention_biases"][head][self.distance_index()]
        return (query @ key.T / math.sqrt(width) + bias).softmax(1) @ value

    def distance_index(self):
        """Return the place of each pair of cells in the table of distances, which counts up along a row first."""
        row, column = np.divmod(np.arange(self.window**2), self.window)
        dy, dx = abs(row[:, None] - row), abs(column[:, None] - column)
        return torch.from_numpy(dy * self.window + dx if self.bias_of_row_first else dx * self.window + dy)


def perceptron(state, name, x):
    """Normalise the channels of each cell and pass them through two linear layers."""
    x = x.permute(0, 2, 3, 1)
    x = functional.layer_norm(x, x.shape[-1:], state[f"{name}.norm.weight"], state[f"{name}.norm.bias"])
    x = functional.gelu(functional.linear(x, state[f"{name}.fc1.weight"], state[f"{name}.fc1.bias"]))
    return functional.linear(x, state[f"{name}.fc2.weight"], state[f"{name}.fc2.bias"]).permute(0, 3, 1, 2)


def channel_norm(state, name, x):
    """Normalise the channels of each cell, with SAM's epsilon."""
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    x = (x - mean) / torch.sqrt(variance + 1e-6)
    return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]
