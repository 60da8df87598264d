"""What two processes of a gloo group do with an optimised model; started by test_processes.py with a way's name.

    python -m tests.ways.processes WAY RANK SIZE FILE
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import reattend

from .ways import equal, numbers, optimised, ran, stack


def trained(model: Any, x: Tensor) -> Tensor:
    """The loss of one step and its backward."""
    loss: Tensor = model(x).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def ddp(rank: int) -> None:
    from torch.nn.parallel import DistributedDataParallel

    model = stack()
    ours = optimised(model)
    x = numbers(4, 24, 32)
    wrapped = DistributedDataParallel(ours)
    trained(wrapped, x[2 * rank : 2 * rank + 2])
    trained(model, x)
    for a, b in zip(ours.parameters(), model.parameters()):
        assert a.grad is not None
        assert b.grad is not None
        equal(a.grad, b.grad, 1e-4)
    assert ran(ours)


def fsdp2(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = stack()
    ours = copy.deepcopy(model)
    for layer in ours.layers:
        fully_shard(layer)
    fully_shard(ours)
    reattend.optimize(ours)
    x = numbers(2, 24, 32)
    equal(trained(ours, x), trained(model, x))
    with torch.no_grad():
        equal(ours(x), model(x))


def tensor_parallel(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    class Split(nn.Module):
        """Queries, keys and values apart, so that each process has half of the heads."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
            s = (q @ k.mT * 8**-0.5).softmax(-1)
            out: Tensor = self.out((s @ v).transpose(1, 2).flatten(2))
            return out

    torch.manual_seed(0)
    model = Split().eval()
    ours = copy.deepcopy(model)
    plan = {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(), "out": RowwiseParallel()}
    parallelize_module(ours, init_device_mesh("cpu", (2,)), plan)
    reattend.optimize(ours)
    x = numbers(2, 24, 32)
    with torch.no_grad():
        equal(ours(x), model(x))


def stages(rank: int) -> None:
    """One layer a process: the first sends what the second one goes on with."""
    model = stack()
    x = numbers(2, 24, 32)
    mine = reattend.optimize(copy.deepcopy(model.layers[rank]))
    with torch.no_grad():
        if rank == 0:
            dist.send(x + mine(x), 1)
            return
        dist.recv(x, 0)
        equal(x + mine(x), model(numbers(2, 24, 32)))
    assert ran(mine)


WAYS: Mapping[str, Callable[[int], None]] = {
    "ddp": ddp, "fsdp2": fsdp2, "tensor_parallel": tensor_parallel, "stages": stages,
}


def main() -> None:
    name, rank, size, file = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    WAYS[name](rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
