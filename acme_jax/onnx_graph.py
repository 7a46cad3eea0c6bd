"""A small writer of ONNX graphs: operations are added one by one, each result has a name.

Needs the package onnx, an optional extra; it is imported only when a graph is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

OPSET = 20
"""Of ONNX's operators: the first with Gelu; onnxruntime has it since 1.17 (2024)."""

_IR_VERSION = 9  # the format of ONNX files that came with opset 20


class ExportError(ValueError):
    """A format that cannot be written; the message says why."""


class Graph:
    """A graph under construction.

    Raises:
      ExportError: the package onnx is missing.
    """

    def __init__(self) -> None:
        try:
            import onnx
        except ImportError:
            raise ExportError(
                "ONNX files need the package onnx; install it with: pip install onnx onnxruntime"
            ) from None
        self._onnx = onnx
        self._nodes: list[Any] = []
        self._tensors: dict[str, Any] = {}
        self._constants: dict[tuple[Any, ...], str] = {}

    def add(
        self, op: str, *inputs: str, scope: str = "", outputs: int = 1, **attributes: Any
    ) -> Any:
        """Adds an operation of the standard set; returns the name of its result, or the names."""
        place = f"{scope}/{op.lower()}{len(self._nodes)}".lstrip("/")
        names = [place] if outputs == 1 else [f"{place}.{i}" for i in range(outputs)]
        self._nodes.append(
            self._onnx.helper.make_node(op, list(inputs), names, name=place, **attributes)
        )
        return names[0] if outputs == 1 else names

    def weight(self, name: str, value: Any) -> str:
        """Stores a float32 tensor under its name."""
        array = np.ascontiguousarray(value, np.float32)
        self._tensors[name] = self._onnx.numpy_helper.from_array(array, name)
        return name

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """Stores a small constant; equal ones share a tensor."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant{len(self._constants)}"
            self._tensors[name] = self._onnx.numpy_helper.from_array(array, name)
            self._constants[key] = name
        return self._constants[key]

    def integers(self, *values: int) -> str:
        """An int64 vector: shapes, axes and indices."""
        return self.constant(values, np.int64)

    def reshape(self, x: str, *shape: int, scope: str = "") -> str:
        """Reshape; -1 stands for the batch."""
        name: str = self.add("Reshape", x, self.integers(*shape), scope=scope)
        return name

    def finish(
        self,
        inputs: tuple[str, Any, Sequence[int]],
        output: tuple[str, str, Sequence[int]],
        facts: Mapping[str, str],
    ) -> bytes:
        """The checked, serialised model.

        Args:
          inputs: name, NumPy dtype and the shape of one sample.
          output: name in the file, name of the result here, shape of one sample.
          facts: kept as the file's metadata.

        Raises:
          ExportError: larger than an ONNX file may be, 2 GB.
        """
        helper, (name, dtype, shape) = self._onnx.helper, inputs
        self._nodes.append(helper.make_node("Identity", [output[1]], [output[0]], name=output[0]))
        graph = helper.make_graph(
            self._nodes,
            "acme-jax device model",
            [
                helper.make_tensor_value_info(
                    name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), ["batch", *shape]
                )
            ],
            [
                helper.make_tensor_value_info(
                    output[0], self._onnx.TensorProto.FLOAT, ["batch", *output[2]]
                )
            ],
            list(self._tensors.values()),
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=_IR_VERSION,
            producer_name="acme-jax",
        )
        helper.set_model_props(model, dict(facts))
        if model.ByteSize() >= 2**31:
            raise ExportError(
                f"the model has {model.ByteSize()} bytes; an ONNX file may have 2 GB. Use StableHLO"
            )
        self._onnx.checker.check_model(model, full_check=True)
        content: bytes = model.SerializeToString(deterministic=True)
        return content


def dense(graph: Graph, name: str, kernel: np.ndarray, bias: np.ndarray, x: str) -> str:
    """A dense layer over the last axis."""
    x = graph.add("MatMul", x, graph.weight(f"{name}.kernel", kernel), scope=name)
    result: str = graph.add("Add", x, graph.weight(f"{name}.bias", bias), scope=name)
    return result


def layer_norm(
    graph: Graph, name: str, weights: Mapping[str, np.ndarray], x: str, epsilon: float
) -> str:
    """LayerNorm over the last axis."""
    scale = graph.weight(f"{name}.scale", weights["scale"])
    bias = graph.weight(f"{name}.bias", weights["bias"])
    result: str = graph.add("LayerNormalization", x, scale, bias, epsilon=epsilon, scope=name)
    return result
