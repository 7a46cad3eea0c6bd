"""The dense header as a part of an ONNX graph; see `acme_jax.export_onnx`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from acme_jax import dense_header
from acme_jax.blocks import Params
from acme_jax.dense_header import Channels, Layer
from acme_jax.device_model import DeviceModel
from acme_jax.header_ops import EPSILON
from acme_jax.onnx_graph import Graph, dense, layer_norm
from nas import cells
from nas.cells import OPS


class HeaderWriter:
    """`dense_header.apply` on grids [B, gh, gw, n]; None where n is 0."""

    def __init__(self, graph: Graph, model: DeviceModel) -> None:
        self.graph, self.cell, self.dims = graph, model.cell, model.header_dims
        self.stem, self.layers = dense_header.layout(model.header_dims, model.cell, model.kept)
        self.params = jax.tree.map(np.asarray, model.header)
        self.blank = ""

    def run(self, tokens: str) -> str:
        """Logits of tokens [B, T, D]."""
        graph, grid = self.graph, (self.dims.grid_height, self.dims.grid_width)
        # A channel of zeros with the batch's size, for what has no channel of its own.
        first = graph.add("Gather", tokens, graph.integers(0), axis=2, scope="header")
        zero = graph.add("Mul", first, graph.constant(0.0), scope="header")
        self.blank = graph.reshape(zero, -1, *grid, 1, scope="header")
        stem = None
        if self.stem:
            weights = self.params["stem"]
            hidden = graph.add("MatMul", tokens, graph.weight("stem.kernel", weights["kernel"]))
            stem = self.norm("stem.norm", weights["norm"], hidden)
            stem = graph.reshape(stem, -1, *grid, len(self.stem), scope="stem")
        older = newer = stem
        for number, (weights, layer) in enumerate(
            zip(self.params["layers"], self.layers, strict=True)
        ):
            older, newer = newer, self.layer(f"layer{number}", weights, layer, [older, newer])
        classifier = self.params["classifier"]
        bias = graph.weight("classifier.bias", classifier["bias"])
        if newer is None:
            mean = graph.add("ReduceMean", self.blank, graph.integers(1, 2), keepdims=0)
            result: str = graph.add("Add", mean, bias, scope="classifier")
            return result
        active = graph.add("Relu", newer, scope="classifier")
        mean = graph.add("ReduceMean", active, graph.integers(1, 2), keepdims=0, scope="classifier")
        return dense(graph, "classifier", classifier["kernel"], classifier["bias"], mean)

    def layer(
        self, name: str, weights: Params, layer: Layer, nodes: list[str | None]
    ) -> str | None:
        """One stacked cell."""
        graph, cell = self.graph, self.cell
        for block, (x, op_x, y, op_y) in enumerate(cell):
            sides = []
            for slot, node, op in ((2 * block, x, op_x), (2 * block + 1, y, op_y)):
                channels, side = layer.nodes[node], nodes[node]
                if slot in layer.slots:
                    parts = layer.slots[slot]
                    side = self.sep(f"{name}.slot{slot}", weights["ops"][str(slot)], side, parts)
                    channels = parts[2]
                elif side is not None:
                    side = self.plain(name, OPS[op], side)
                if side is not None:
                    sides.append(self.spread(side, channels, layer.nodes[block + 2]))
            nodes.append(
                None if not sides else sides[0] if len(sides) == 1 else graph.add("Add", *sides)
            )
        if not layer.output:
            return None
        total = ""
        for node in cells.static_loose_ends(cell):
            grid = nodes[node]
            if grid is None:
                continue
            kernel = graph.weight(f"{name}.loose{node}", weights["loose"][str(node)])
            mixed = graph.add("MatMul", graph.add("Relu", grid, scope=name), kernel, scope=name)
            total = graph.add("Add", total, mixed, scope=name) if total else mixed
        return self.norm(f"{name}.norm", weights["norm"], total or None)

    def sep(
        self, name: str, weights: Params, grid: str | None, channels: tuple[Channels, ...]
    ) -> str | None:
        """A separable convolution."""
        graph = self.graph
        for part, inputs, outputs in zip(
            dense_header.HALVES, channels[:2], channels[1:], strict=True
        ):
            half, place = weights[part], f"{name}.{part}"
            if not outputs:
                grid = None
                continue
            if grid is not None:
                size = half["depthwise"].shape[0]
                grid = graph.add("Relu", grid, scope=place)
                kernel = half["depthwise"].transpose(2, 0, 1)[:, None]  # [n, 1, k, k]
                if size == 1:
                    flat = graph.weight(f"{place}.depthwise", kernel.reshape(-1))
                    grid = graph.add("Mul", grid, flat, scope=place)
                else:
                    grid = self.channels_first(
                        place, grid, "Conv", graph.weight(f"{place}.depthwise", kernel),
                        group=len(inputs), pads=[size // 2] * 4, kernel_shape=[size, size],
                    )  # fmt: skip
                pointwise = graph.weight(f"{place}.pointwise", half["pointwise"])
                grid = graph.add("MatMul", grid, pointwise, scope=place)
            grid = self.norm(f"{place}.norm", half, grid)
        return grid

    def plain(self, name: str, op: str, grid: str) -> str:
        """An operation without weights."""
        if op == "identity":
            return grid
        kind = {"avgpool3": "AveragePool", "maxpool3": "MaxPool"}[op]
        return self.channels_first(name, grid, kind, kernel_shape=[3, 3], pads=[1] * 4)

    def channels_first(self, name: str, grid: str, op: str, *more: str, **attributes: Any) -> str:
        """An operation of ONNX that wants [B, n, gh, gw]."""
        grid = self.graph.add("Transpose", grid, perm=[0, 3, 1, 2], scope=name)
        grid = self.graph.add(op, grid, *more, scope=name, **attributes)
        result: str = self.graph.add("Transpose", grid, perm=[0, 2, 3, 1], scope=name)
        return result

    def norm(self, name: str, weights: Params, x: str | None) -> str:
        """LayerNorm over the channels; of nothing, its bias."""
        if x is None:
            bias = self.graph.weight(f"{name}.bias", weights["bias"])
            result: str = self.graph.add("Add", self.blank, bias, scope=name)
            return result
        return layer_norm(self.graph, name, weights, x, EPSILON)

    def spread(self, side: str, channels: Channels, union: Channels) -> str:
        """As `dense_header`: channels to their places in a sum."""
        if channels == union:
            return side
        index = dense_header.source_channels(channels, union)
        whole = self.graph.add("Concat", side, self.blank, axis=-1, scope="spread")
        result: str = self.graph.add(
            "Gather", whole, self.graph.integers(*index.tolist()), axis=3, scope="spread"
        )
        return result
