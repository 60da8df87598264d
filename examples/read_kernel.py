"""Reading an emitted kernel: one file a person could have written, with the cascade as its header; it runs without reattend.

The attention has a window and a cap. Its Triton file is written for an H100 that need not be there, and checked in Triton's
interpreter where Triton is installed; its CPU file is run here.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import reattend

WINDOW, CAP = 48, 20.0

# Run in a process of its own: loads an emitted file and tensors, saves what `attention` returns.
RUNNER = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("emitted", sys.argv[1])
emitted = importlib.util.module_from_spec(spec)
sys.modules["emitted"] = emitted
spec.loader.exec_module(emitted)
torch.save(emitted.attention(**torch.load(sys.argv[2])), sys.argv[3])
assert "reattend" not in sys.modules
"""


class Capped(nn.Module):
    """Capped scores of a causal window; queries [b, 4, n, 32] on two key heads."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        p = torch.arange(q.shape[2], device=q.device)[:, None]
        m = torch.arange(k.shape[2], device=q.device)[None, :]
        s = torch.tanh(q @ k.transpose(-1, -2) * 0.125 / CAP) * CAP
        s = s.masked_fill((m > p) | (p - m >= WINDOW), float("-inf"))
        return s.softmax(-1) @ v


def emitted(source: str, inputs: tuple[Tensor, ...], interpreted: bool) -> Tensor:
    """What the file's `attention` gives for the tensors, in a process that never imports reattend."""
    (function,) = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "attention")
    named = dict(zip([a.arg for a in function.args.args], inputs, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        code, given, result = (Path(folder) / n for n in ("emitted.py", "inputs.pt", "output.pt"))
        code.write_text(source, encoding="utf-8")
        torch.save(named, given)
        environment = {**os.environ, "TRITON_INTERPRET": "1"} if interpreted else dict(os.environ)
        subprocess.run([sys.executable, "-c", RUNNER, code, given, result], check=True, env=environment)
        answer: Tensor = torch.load(result)
    return answer


def show(source: str, *functions: str) -> None:
    """Print the file's header and a few of its functions."""
    tree = ast.parse(source)
    print(ast.get_docstring(tree, clean=False), "\n")
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in functions:
            print(ast.get_source_segment(source, node), "\n")


def main() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(1, 4, 111, 32), torch.randn(1, 2, 111, 32), torch.randn(1, 2, 111, 32)
    model = Capped()
    expected = model(*inputs)

    far = reattend.plan(model, inputs, target="h100").sites[0].candidate("reattend").source()
    print(f"Triton, {len(far.splitlines())} lines. The header, and what is particular to this attention:\n")
    show(far, "products", "step")

    here = reattend.plan(model, inputs, target="cpu").sites[0].candidate("reattend").source()
    print(f"CPU, {len(here.splitlines())} lines; its mask and score:\n")
    show(here, "attention")

    texts = {"CPU": (here, False)}
    if importlib.util.find_spec("triton") is not None:
        texts["Triton, interpreted"] = (far, True)
    for name, (source, interpreted) in texts.items():
        error = (emitted(source, inputs, interpreted) - expected).abs().max().item()
        print(f"{name}: largest difference from the model {error:.1e}")
        assert error < 1e-5


if __name__ == "__main__":
    main()
