"""A variant that nobody has a kernel for, in plain PyTorch: it is found, planned and run like any other.

s(p, m) = cap · tanh( QK · scale · cos(rate_h · (p − m)) / cap ),   keys up to the query, at most `reach` back
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import reattend


class WaveAttention(nn.Module):
    """Scores wax and wane with the distance, at a rate of their own in each head, inside a cap."""

    rate: Tensor

    def __init__(self, width: int, heads: int, reach: int, cap: float = 20.0) -> None:
        super().__init__()
        self.heads, self.reach, self.cap = heads, reach, cap
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.register_buffer("rate", torch.linspace(0.01, 0.1, heads))

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        distance = torch.arange(n, device=x.device)[:, None] - torch.arange(n, device=x.device)[None, :]
        score = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        score = score * torch.cos(self.rate[:, None, None] * distance)
        score = self.cap * torch.tanh(score / self.cap)
        score = score.masked_fill((distance < 0) | (distance >= self.reach), float("-inf"))
        mixed = score.softmax(-1) @ v
        joined: Tensor = self.out(mixed.transpose(1, 2).reshape(b, n, width))
        return joined


def main() -> None:
    torch.manual_seed(0)
    model = WaveAttention(width=256, heads=4, reach=100).eval()
    x = torch.randn(1, 1500, 256)
    with torch.no_grad():
        # the first call in a process may be less exact: PyTorch's vector functions are being set up in its threads
        model(x)
        before = model(x)

    plan = reattend.plan(model, (x,))
    print(plan)
    (site,) = plan.sites
    assert "window" in site.traits
    assert site.mask is not None
    assert site.mask.density < 0.25, "most tiles are never visited"

    model = reattend.optimize(model)
    with torch.no_grad():
        after = model(x)
    error = ((after - before).abs().max() / before.abs().max()).item()
    print(f"largest difference, relative to the largest output: {error:.1e}")
    assert error < 1e-5
    print(reattend.report(model))


if __name__ == "__main__":
    main()
