"""Steps of whole models beside AIConfigurator's estimates: milliseconds a token, and until the first one. Needs no GPU.

    python benchmarks/gpu_whole.py [--models Meta-Llama-3.1-8B,Qwen3-32B] [--devices h200,b200] [--layers 8] [--json FILE]
    python benchmarks/gpu_whole.py --check

The packages `aiconfigurator` and `aiconfigurator-core` have the configs of the models, and interpolate their tables of
measured kernels (engine vllm, captured graphs); we plan the same config. Both say what the model takes, neither has run it.
With --layers both are asked about so many layers of the model, which takes minutes less. --check ends with 1 where more than
a fifth of the steps differ by more than 15 %.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from gpu_rows import FOLDERS, package_version
from gpu_rows import folder as tables_folder

from reattend.cost_model.devices.device import device
from reattend.cost_model.plan.plan import Plan
from reattend.rewriter.choose.policy import Policy
from reattend.rewriter.run.planning import plan_spec
from reattend.rewriter.shapes import Shapes

NEAR = 0.15
# Share of steps that may differ by more.
FAR = 0.2
# Model → repository there, and devices of a mesh.
MODELS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "Meta-Llama-3.1-8B": ("meta-llama", (1, 2)), "Meta-Llama-3.1-70B": ("meta-llama", (4,)), "Qwen3-8B": ("Qwen", (1,)),
    "Qwen3-32B": ("Qwen", (1,)), "Qwen3-30B-A3B": ("Qwen", (1, 2)), "Qwen3-235B-A22B": ("Qwen", (8,)),
    "DeepSeek-V3": ("deepseek-ai", (8,)),
}
# Sequences and tokens of each in a cache, or of a prompt.
DECODE = ((1, 1024), (16, 4096), (64, 2048), (128, 1024))
PREFILL = ((1, 1024), (1, 4096), (4, 2048))


@dataclass(frozen=True)
class Compared:
    """One step: milliseconds by us and by them, and our band."""

    model: str
    device: str
    phase: str
    batch: int
    length: int
    tp: int
    own: float
    other: float
    band: float

    @property
    def off(self) -> float:
        return self.own / self.other - 1

    def __str__(self) -> str:
        where = f"{self.model} {self.device}{f' tp={self.tp}' if self.tp > 1 else ''}"
        return (
            f"{where:34s} {self.phase:8s} {self.batch:5d} {self.length:7d} {self.own:9.2f} {self.other:9.2f} "
            f"{self.off:+7.1%} ±{self.band:.0%}"
        )


def configured(model: str, folder: Path, layers: int) -> Path:
    """The model's config, as transformers' own classes read it: weights in 16 bits, no code of the repository; `layers` of
    it, 0: all.
    """
    where = tables_folder().parents[1] / "model_configs"
    body = json.loads((where / f"{MODELS[model][0]}--{model}_config.json").read_text("utf-8"))
    for name in ("auto_map", "quantization_config"):
        body.pop(name, None)
    if layers and "first_k_dense_replace" in body:
        # they count every layer as one of experts, which of 61 makes no odds
        body["first_k_dense_replace"] = 0
    body["num_hidden_layers"] = min(layers or body["num_hidden_layers"], body["num_hidden_layers"])
    (folder / model).mkdir(exist_ok=True)
    path = folder / model / "config.json"
    path.write_text(json.dumps(body), "utf-8")
    return path


def ours(spec: Path, phase: str, tp: int, device_name: str) -> Plan:
    """A plan with open sizes: captured once."""
    seq, past = (None, 1024) if phase == "decode" else (1024, 0)
    shapes = Shapes(batch=2, seq=seq, dtype="bf16", phase=phase, past=past)
    policy = Policy(mesh=f"tp={tp}" if tp > 1 else None)
    return plan_spec(str(spec), shapes, device(device_name), policy, dynamic=True)


def theirs(spec: Path, device_name: str, phase: str, batch: int, length: int, tp: int) -> float | None:
    """Their milliseconds; None where their tables do not hold the step."""
    from aiconfigurator.cli.api import cli_estimate

    plain = dict.fromkeys(("gemm_quant_mode", "kvcache_quant_mode", "fmha_quant_mode", "moe_quant_mode"), "bfloat16")
    try:
        made = cli_estimate(
            str(spec.parent), FOLDERS[device_name], mode="static_gen" if phase == "decode" else "static_ctx",
            backend_name="vllm", batch_size=batch, isl=length, osl=2, tp_size=tp, moe_tp_size=tp, moe_ep_size=1, **plain,
        )
    except (RuntimeError, ValueError, KeyError) as no:
        print(f"  left out: {spec.parent.name} on {device_name}: {str(no).splitlines()[0][:150]}", file=sys.stderr)
        return None
    return made.tpot if phase == "decode" else made.ttft


def compared(model: str, devices: list[str], folder: Path, layers: int) -> Iterator[Compared]:
    spec = configured(model, folder, layers)
    for tp in MODELS[model][1]:
        for phase, points in (("decode", DECODE), ("prefill", PREFILL)):
            plan = ours(spec, phase, tp, devices[0])
            for name in devices:
                for batch, length in points:
                    other = theirs(spec, name, phase, batch, length, tp)
                    if other is None:
                        continue
                    sizes = {"past" if phase == "decode" else "seq": length, "batch": batch}
                    at = plan.at(name, **{axis: n for axis, n in sizes.items() if axis in plan.axes})
                    if at.step is None:
                        print(f"  left out: {model} on {name}: {at.step_why}", file=sys.stderr)
                        continue
                    yield Compared(model, name, phase, batch, length, tp, at.step.seconds * 1e3, other, at.step.band)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", default=",".join(MODELS))
    p.add_argument("--devices", default="h200,b200")
    p.add_argument("--layers", type=int, default=0)
    p.add_argument("--json", type=Path)
    p.add_argument("--check", action="store_true")
    given = p.parse_args()
    if find_spec("aiconfigurator") is None:
        print("nothing to compare with: pip install aiconfigurator (its own environment is best)", file=sys.stderr)
        return 2
    logging.disable(logging.WARNING)
    print(f"aiconfigurator-core {package_version()} (vllm) beside our plans, bf16, milliseconds\n")
    print(f"{'':34s} {'phase':8s} {'batch':>5s} {'tokens':>7s} {'ours':>9s} {'theirs':>9s} {'off':>7s} band", flush=True)
    found: list[Compared] = []
    with tempfile.TemporaryDirectory() as folder:
        for model in given.models.split(","):
            for c in compared(model, given.devices.split(","), Path(folder), given.layers):
                print(c, flush=True)
                found.append(c)
    near = statistics.fmean(abs(c.off) <= NEAR for c in found)
    mean = statistics.fmean(abs(c.off) for c in found)
    print(f"\n{len(found)} steps: {mean:.1%} apart on average, {near:.0%} within {NEAR:.0%}")
    if given.json:
        given.json.write_text(json.dumps([asdict(c) for c in found], indent=1))
    return int(given.check and near < 1 - FAR)


if __name__ == "__main__":
    sys.exit(main())
