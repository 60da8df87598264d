"""transformers' door in two processes: sharded parameters and heads dealt out, with nothing of ours that knows about either."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

import reattend

from . import test_doors, zoo

pytestmark = pytest.mark.slow


def sharded(model: Any, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def dealt_out(model: Any, mesh: Any) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for layer in model.layers:
        plan: dict[str, Any] = {n: ColwiseParallel() for n in ("q_proj", "k_proj", "v_proj")} | {"o_proj": RowwiseParallel()}
        parallelize_module(layer.self_attn, mesh, plan)


def work(rank: int, spread: Callable[[Any, Any], None], meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        own, door = test_doors.pair("mistral", test_doors.OURS)
        given = zoo.inputs("mistral", pad="left")
        spread(door, init_device_mesh("cpu", (2,)))
        with torch.no_grad():
            got, want = (zoo.valid("mistral", given, zoo.output_of(m(**given))) for m in (door, own))
        assert test_doors.relative(got, want) <= 1e-5
        report = reattend.report(door)
        assert report.kernels == {"reattend": 2}, str(report)
        assert {s.site.shape.size("h") for s in report.sites} == {4 if spread is sharded else 2}
        door.train()
        torch.autograd.backward(zoo.output_of(door(**given)).square().sum())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("spread", [sharded, dealt_out])
def test_two_processes(spread: Callable[[Any, Any], None], tmp_path: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    spawn(work, args=(spread, str(tmp_path / "meeting")), nprocs=2)  # type: ignore[no-untyped-call]
