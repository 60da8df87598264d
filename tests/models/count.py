"""Counts attentions while a model runs: softmaxes that flow into a product, or into several. Shares no code with detection.

Over one key a softmax is 1, whatever the scores are: nothing is attended to, and nothing is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_SOFTMAX = ("softmax",)
_PRODUCTS = ("matmul", "__matmul__", "bmm", "einsum", "baddbmm", "__rmatmul__")
# What weights pass and stay weights: moves, windows and diagonals among them, and a convolution that mixes heads.
_THROUGH = ("to", "type_as", "dropout", "contiguous", "view", "reshape", "transpose", "permute", "float", "half",
            "bfloat16", "clone", "__getitem__", "nan_to_num", "masked_fill", "squeeze", "unsqueeze", "type", "double",
            "pad", "as_strided", "flatten", "unflatten", "expand", "split", "chunk", "unbind", "narrow", "swapaxes",
            "movedim", "conv2d")
# Functions of torch that hold a whole attention.
_WHOLE = ("scaled_dot_product_attention", "multi_head_attention_forward")


class CountAttention(TorchFunctionMode):
    """`with CountAttention() as c: model(...)`, then `c.count`, and how many of them are calls of SDPA, `c.fused`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.fused = 0
        # tensors that hold probabilities, with the softmax that they come from; kept alive, so that no address is used twice
        self._weights: dict[int, tuple[torch.Tensor, int]] = {}
        self._counted: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _WHOLE:
            self.count += name != _WHOLE[0] or args[1].shape[-2] > 1
            self.fused += name == _WHOLE[0] and args[1].shape[-2] > 1
            return out
        flat = [a for x in args for a in (x if isinstance(x, (list, tuple)) else [x]) if isinstance(a, torch.Tensor)]
        carried = {self._weights[id(a)][1] for a in flat if id(a) in self._weights}
        if name in _SOFTMAX:
            dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else None)
            if isinstance(dim, int) and out.dim() and out.shape[dim] == 1:
                return out
            self._weights[id(out)] = (out, id(out))
        elif carried and name in _PRODUCTS:
            self.count += len(carried - self._counted)
            self._counted |= carried
        elif carried and name in _THROUGH:
            for x in out if isinstance(out, (list, tuple)) else (out,):
                self._weights[id(x)] = (x, min(carried))
        return out
