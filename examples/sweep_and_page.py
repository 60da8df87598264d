"""One capture, many sizes and devices: which candidate wins where, and the plan as a page that opens in any browser."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, MistralForCausalLM

import reattend

CONFIG = Path(__file__).parent / "configs" / "mistral-tiny.json"
LENGTHS = [256 << i for i in range(8)]


def main() -> None:
    config = AutoConfig.for_model(**json.loads(CONFIG.read_text()))
    with torch.device("meta"):
        model = MistralForCausalLM(config).eval()
        tokens = torch.zeros(1, 1024, dtype=torch.long)

    plan = reattend.plan(model, (tokens,), {"use_cache": False}, target="h200", dynamic=True)
    sweep = plan.over("seq", LENGTHS, targets=("h200", "a100", "cpu"))
    print(sweep)
    for course in sweep.courses:
        seconds = [p.seconds or 0.0 for p in course.points]
        assert seconds == sorted(seconds), "longer is never faster"

    there = plan.at("a100", seq=8192)
    (one,) = [c for c in sweep.courses if c.device == "a100"]
    assert there.sites[0].chosen.seconds == one.points[LENGTHS.index(8192)].seconds, "a point of a sweep is a plan"

    with tempfile.TemporaryDirectory() as folder:
        page = plan.to_html(Path(folder) / "plan.html")
        print(f"{page.name}: {page.stat().st_size / 1e3:.0f} kB in one file")
        assert page.stat().st_size < 2e6


if __name__ == "__main__":
    main()
