"""The graph whose speed is the machine's peak: it multiplies what it says, so often as it says."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import onnx
import pytest

from dendsam_deploy.bundle.parity import Combination
from dendsam_deploy.errors import BundleError
from dendsam_deploy.evaluate import matrix_peak
from dendsam_deploy.evaluate.matrix_peak import Chain, engine_peak, numpy_peak, product_graph
from dendsam_deploy.evaluate.operations import graph_flop
from dendsam_deploy.runtimes.runner import CallableRunner

SMALL = Chain(48, 3)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_the_graph_is_valid_and_holds_the_products(precision) -> None:
    model = onnx.load_from_string(product_graph(SMALL, precision))
    onnx.checker.check_model(model, full_check=True)
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert len(products) == SMALL.length
    assert model.graph.input[0].name == "x"


def test_the_count_is_what_the_graph_executes(tmp_path) -> None:
    (tmp_path / "p.onnx").write_bytes(product_graph(SMALL, "fp32"))
    assert graph_flop(tmp_path / "p.onnx", {"x": np.ones((1, SMALL.size), np.float32)}) == SMALL.flop


def reference(row, steps):
    """Return the column maxima of ((row + w) w) w w."""
    weight = onnx.numpy_helper.to_array(onnx.load_from_string(product_graph(SMALL, "fp32")).graph.initializer[0])
    product = (row + weight).astype(np.float64)
    for _ in range(steps):
        product = product @ weight
    return product.max(axis=0)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", 0.02), ("int8", 0.3)])
def test_engines_really_compute_it(precision, tolerance, monkeypatch) -> None:
    found = []
    maker = matrix_peak.ENGINES["onnxruntime"]

    def spying(path, spec, options):
        runner = maker(path, spec, options)
        run = runner.run

        def keep(inputs):
            outputs = run(inputs)
            found.append((inputs["x"], outputs["y"]))
            return outputs

        monkeypatch.setattr(runner, "run", keep)
        return runner

    monkeypatch.setattr(matrix_peak, "ENGINES", MappingProxyType({"onnxruntime": spying}))
    monkeypatch.setattr(matrix_peak, "_LEAST_SECONDS", 0.0)
    assert engine_peak(Combination("onnxruntime", "cpu", precision), None, SMALL) > 0
    row, result = found[0]
    assert len(found) > 1
    expected = reference(row, SMALL.length)
    np.testing.assert_allclose(result[0], expected, atol=tolerance * np.abs(expected).max())


def test_an_engine_without_such_products_has_no_peak(monkeypatch) -> None:
    def refuse(path, spec, options):
        def run(inputs):
            raise BundleError("no kernel")

        return CallableRunner(spec, run)

    monkeypatch.setattr(matrix_peak, "ENGINES", MappingProxyType({"onnxruntime": refuse}))
    assert engine_peak(Combination("onnxruntime", "cpu", "bf16"), None, SMALL) is None


def test_numpy_has_a_peak(monkeypatch) -> None:
    monkeypatch.setattr(matrix_peak, "_LEAST_SECONDS", 0.0)
    assert numpy_peak(SMALL) > 0
