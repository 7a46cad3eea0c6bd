"""The supernet's Transformer as PyTorch users write it: `nn.Module`s and their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-6  # of Flax's LayerNorm


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * heads * size)
        self.out = nn.Linear(heads * size, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(*qkv.unbind())
        return self.out(context.transpose(1, 2).reshape(batch, tokens, -1))


class Block(nn.Module):
    """A pre-LN Transformer block."""

    def __init__(self, dim: int, heads: int, size: int, neurons: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, EPSILON)
        self.attention = Attention(dim, heads, size)
        self.norm2 = nn.LayerNorm(dim, EPSILON)
        self.up = nn.Linear(dim, neurons)
        self.down = nn.Linear(neurons, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """The network of one client; `load` fills it from the supernet's parameters.

    Args:
      params: of the supernet or a slice of it: path -> array, block l as "blocks/l/...".
      blocks: the kept blocks, in order.
    """

    def __init__(self, params: Mapping[str, np.ndarray], blocks: list[int]) -> None:
        super().__init__()
        patch_dim, dim = params["embed/kernel"].shape
        self.patch = nn.Conv2d(1, dim, int(patch_dim**0.5), int(patch_dim**0.5))
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.zeros(1, *params["position"].shape))
        shapes = [params[f"blocks/{block}/attention/out_kernel"].shape[:2] for block in blocks]
        neurons = [params[f"blocks/{block}/mlp/up_bias"].shape[0] for block in blocks]
        own = [Block(dim, h, k, f) for (h, k), f in zip(shapes, neurons, strict=True)]
        self.blocks = nn.Sequential(*own)
        self.norm = nn.LayerNorm(dim, EPSILON)
        self.head = nn.Linear(dim, params["classifier/bias"].shape[0])
        self._numbered = list(zip(blocks, own, strict=True))
        self.load(params)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, height, width, 1] -> logits [B, classes]."""
        x = self.patch(images.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x)[:, 0]))

    def places(self) -> dict[str, Any]:
        """Each parameter as the supernet lays it out, but for its shape: a view to read or fill."""
        side = self.patch.kernel_size[0]
        views = {
            "embed/kernel": self.patch.weight.reshape(-1, side * side).T,
            "embed/bias": self.patch.bias,
            "cls": self.cls,
            "position": self.position,
            "norm/scale": self.norm.weight,
            "norm/bias": self.norm.bias,
            "classifier/kernel": self.head.weight.T,
            "classifier/bias": self.head.bias,
        }
        for number, block in self._numbered:
            for half, norm, into, out in (
                ("attention", block.norm1, block.attention.qkv, block.attention.out),
                ("mlp", block.norm2, block.up, block.down),
            ):
                first, last = ("qkv", "out") if half == "attention" else ("up", "down")
                name = f"blocks/{number}/{half}"
                views |= {
                    f"{name}/norm/scale": norm.weight,
                    f"{name}/norm/bias": norm.bias,
                    f"{name}/{first}_kernel": into.weight.T,
                    f"{name}/{first}_bias": into.bias,
                    f"{name}/{last}_kernel": out.weight.T,
                    f"{name}/{last}_bias": out.bias,
                }
        return views

    @torch.no_grad()
    def load(self, params: Mapping[str, np.ndarray]) -> None:
        """Copies the parameters in."""
        for name, view in self.places().items():
            view.copy_(torch.from_numpy(np.array(params[name])).reshape(view.shape))
