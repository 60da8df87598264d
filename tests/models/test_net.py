"""No false alarm of the net over real architectures: every rewritten site agrees with the model's own code."""

from __future__ import annotations

import warnings

import pytest
import torch

import reattend

from . import zoo

pytestmark = pytest.mark.thin(12)

TYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
# Several kernels of ours to compile, or two stacks of layers.
LONG = {"gpt2", "whisper", "bart", "t5", "gpt_oss", "gemma2"}
SITES = [
    pytest.param(name, candidate, marks=pytest.mark.slow if candidate == "reattend" and name in LONG else ())
    for name in zoo.CONFIGS
    for candidate in ("reattend", "sdpa")
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("name", "candidate"), SITES)
def test_every_site_agrees(name: str, candidate: str, dtype: torch.dtype) -> None:
    model = zoo.build(name, dtype=dtype)
    given = zoo.inputs(name, pad="left", dtype=dtype)
    if "input_ids" in given and name in zoo.PAIRS:
        given["decoder_input_ids"] = given["input_ids"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*keeps the original code.*")
        reattend.optimize(model, policy=reattend.Policy(allow=candidate, deny="original", check=1), example=given)
    report = reattend.report(model)
    assert not report.given_up
    assert all(c.ok for c in report.checks), report.checks
    assert len(report.checks) == sum(s.kernel != "original" for s in report.sites)
