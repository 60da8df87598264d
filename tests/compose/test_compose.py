"""Attentions composed at random are what their own code computes, whatever runs them; a dozen fixed ones, and new ones each time.

    COMPOSE_SEED=1234 ./run tests tests/compose -m slow      the draws of a run that failed, which names its seed
"""

from __future__ import annotations

import os
import random

import pytest
import torch

from ..tiers import one_in
from . import draws, judge, ways
from .draws import Draw
from .module import Composed
from .operands import inputs

FIXED = 12
SLOW = 100


def found_in(seed: int, number: int) -> tuple[list[judge.Finding], bool]:
    """What is found in a draw, and whether a kernel ran in it."""
    d = draws.draw(seed, number)
    judged = judge.judge(d, ways.of(number, d.grad != "none"))
    assert not judged.invalid, judged.invalid
    return judged.findings, any(k != "original" for ks in judged.kernels.values() for k in ks)


def told(findings: list[judge.Finding], seed: int, number: int) -> str:
    said = "\n".join(f"{f.kind} {f.way} {f.what}: {f.said}" for f in findings)
    return f"seed {seed}, draw {number}:\n{said}\npython -m tests.compose --draw '{draws.draw(seed, number)}'"


@pytest.mark.parametrize("number", one_in(6, range(FIXED)))
def test_a_draw_is_right_in_every_way(number: int) -> None:
    findings, _ = found_in(0, number)
    assert not findings, told(findings, 0, number)


# What was found once, as small as it gets, and the ways that it was found in.
FOUND = {
    "float64's lowest number under a softmax in float32": (
        '{"dtype": "f64", "again": 18, "queries": 1, "keys": 5, "mask": "causal", "fill": "lowest", "row": "softmax32"}',
        ("default", "reattend", "sdpa"),
    ),
    "rows masked whole, beside a sink": (
        '{"mask": "data", "mask_spread": "b1p1", "form": "index_put_", "row": "sink"}', ("product", "checked reattend")
    ),
    "autocast inside an einsum": ('{"autocast": "bf16", "second": "einsum", "bias": "alibi"}', ("checked sdpa", "checked reattend")),
    "a prelude that reads the keys first": ('{"batch": 2, "group": 2, "product": "bmm", "bias": "keyed"}', ("product", "reattend")),
    "one query, one number a value": ('{"queries": 1, "keys": 5, "value": 1}', ("default", "product")),
    "a mask in 16 bits that SDPA is given under autocast": (
        '{"autocast": "f16", "grad": "all", "batch": 2, "kv_heads": 2, "queries": 3, "keys": 33, "size": 4, "layout": "projected",'
        ' "bias": "alibi_keys", "mask": "padding_float", "form": "added_data", "fill": "lowest", "empty": true, "row": "sdpa",'
        ' "out": "projected"}', ("sdpa", "checked sdpa")
    ),
    "sizes that are half of others": ('{"again": 2, "layout": "strided"}', ("sdpa", "product", "checked")),
    "the lowest number of 16 bits as a fill": (
        '{"dtype": "bf16", "queries": 9, "keys": 2, "mask": "stride", "form": "where", "fill": "lowest", "row": "logsumexp"}',
        ("product", "reattend"),
    ),
    "heads of a group as the queries of one step, a sink over all heads": (
        '{"again": 1, "batch": 2, "kv_heads": 3, "group": 4, "queries": 9, "heads_map": "folded", "row": "sink_log"}', ("sdpa",)
    ),
    "gradients of float32 that autocast rounded to 16 bits": (
        '{"autocast": "bf16", "grad": "inputs", "kv_heads": 2, "group": 4, "queries": 33, "keys": 17, "size": 2, "layout": "bphe",'
        ' "heads_map": "index_select", "bias": "table", "mask": "padding_int", "second_mask": "blocks", "fill": "-1e9",'
        ' "row": "sdpa", "seed": 260225688}', ("sdpa",)
    ),
    "a bias that all keys of a row share, whose gradient is 0": (
        '{"dtype": "f16", "grad": "all", "kv_heads": 3, "queries": 64, "size": 65, "layout": "stacked", "keys_map": "gathered",'
        ' "bias": "per_head", "row": "sdpa", "seed": 461625627}', ("sdpa",)
    ),
    "float64 beside a fill": (
        '{"dtype": "f64", "queries": 9, "keys": 2, "mask": "per_head", "form": "arithmetic", "fill": "-1e9", "row": "temperature"}',
        ("sdpa", "checked sdpa"),
    ),
    "rows without a key under a temperature": (
        '{"keys": 2, "mask": "causal", "row": "temperature"}', ("sdpa", "sdpa body", "slices", "checked sdpa")
    ),
    "rows without a key by the logarithm of a mask": (
        '{"keys": 2, "mask": "stride", "form": "logarithm"}', ("sdpa", "sdpa body", "product", "checked")
    ),
    "a product by hand beside one that is an operator": (
        '{"product": "mulsum", "scale": "inplace", "bias": "relative", "bias_inplace": true}', ("reattend", "checked")
    ),
    "rows without a key that sum their values": (
        '{"keys_map": "select", "mask": "causal", "fill": "lowest", "row": "logsumexp"}', ("sdpa body", "slices", "reattend")
    ),
    "a mask of whole rows": (
        '{"queries": 4, "keys": 3, "mask": "data", "mask_spread": "bhp1", "empty": true}', ("sdpa", "sdpa body", "checked")
    ),
    "gradients behind a saturated softmax": ('{"grad": "inputs", "size": 7, "spread": 5.0, "layout": "fused"}', ("sdpa",)),
    "gradients of rows whose NaN the model sets to 0": (
        '{"grad": "inputs", "again": 18, "keys": 1, "mask": "causal", "form": "added", "after": "nan_to_num"}',
        ("reattend", "checked reattend"),
    ),
    "the gradient of what repeats over the batch": (
        '{"grad": "all", "batch": 2, "shape": "merged", "row": "temperature"}', ("reattend", "sdpa")
    ),
    "a saturated softmax of what lies in one tensor": (
        '{"grad": "inputs", "kv_heads": 2, "size": 15, "spread": 5.0, "layout": "fused", "scale": "clamped", "seed": 347452391}',
        ("reattend", "sdpa")
    ),
    "a result beside the largest number of its type": (
        '{"dtype": "f16", "group": 2, "queries": 3, "spread": 5.0, "layout": "split", "scale": "learned_exp", "row": "relu2",'
        ' "out": "merged", "seed": 889965838}', ("product", "checked reattend")
    ),
    "the gradient of a row with one key beside a sink": (
        '{"grad": "all", "batch": 2, "queries": 1, "keys": 2, "size": 17, "scale": "learned_exp", "mask": "upper_left",'
        ' "form": "index_put_", "row": "sink32", "after": "dropout", "seed": 97645840}', ("reattend",)
    ),
    "inputs in another order than the attention reads them": (
        '{"grad": "inputs", "batch": 2, "kv_heads": 2, "second": "bmm", "bias": "relative"}', ("reattend",)
    ),
    "as many keys as batches and heads, which are one rank": (
        '{"batch": 3, "kv_heads": 3, "queries": 8, "keys_map": "pad", "second": "bmm", "row": "sink"}', ("reattend",)
    ),
    "slopes small beside scores of which each row has one": (
        '{"grad": "all", "spread": 5.0, "scale": "none", "bias": "alibi", "mask": "blocks", "row": "off_by_one",'
        ' "after": "nan_to_num", "out": "permuted", "seed": 456942335}', ("reattend",)
    ),
    "the gradient of a scale where each row has one key": (
        '{"grad": "all", "queries": 33, "keys": 3, "size": 80, "layout": "transposed", "product": "vecdot", "second": "weighed",'
        ' "scale": "per_head", "mask": "stride", "form": "added", "fill": "lowest", "seed": 69972808}', ("reattend",)
    ),
    "a fill of -1e9 that swallows the logarithm of a row": (
        '{"mask": "data", "mask_spread": "b11m", "form": "added", "fill": "-1e9", "empty": true, "row": "logsumexp"}',
        ("default", "reattend", "product")
    ),
    "a fill that a whole row gets added": (
        '{"mask": "data", "mask_spread": "b1p1", "form": "added", "fill": "lowest", "empty": true, "row": "logsumexp"}',
        ("default", "reattend", "product")
    ),
    "two einsums of other letters under autocast": (
        '{"autocast": "bf16", "product": "weighed", "second": "weighed", "bias": "alibi"}', ("product", "default")
    ),
    "values of fewer numbers than a vector": ('{"size": 16, "value": 4}', ("fused",)),
}


@pytest.mark.parametrize("name", one_in(6, FOUND))
def test_what_was_found_is_right(name: str) -> None:
    text, chosen = FOUND[name]
    findings = judge.judge(draws.read(text), chosen).findings
    assert not findings, findings


@pytest.mark.slow
def test_new_draws_are_right_in_every_way() -> None:
    seed = int(os.environ.get("COMPOSE_SEED") or random.SystemRandom().randrange(1 << 30))
    wrong, ran = [], 0
    for number in range(SLOW):
        findings, kernel = found_in(seed, number)
        ran += kernel
        if findings:
            wrong.append(told(findings, seed, number))
    assert not wrong, "\n\n".join(wrong)
    # Draws that are all left alone show nothing.
    assert ran >= SLOW // 3, (seed, ran)


def test_draws_repeat_and_print_themselves() -> None:
    for number in range(200):
        d = draws.draw(5, number)
        assert d == draws.draw(5, number) == draws.read(str(d)) == draws.valid(d)


def test_every_choice_is_drawn() -> None:
    seen = [draws.draw(5, n) for n in range(4000)]
    for name, choices in draws.CHOICES.items():
        if name != "seed":
            assert {getattr(d, name) for d in seen} >= set(choices), name


def test_a_draw_shrinks_to_what_is_at_fault() -> None:
    d = next(d for n in range(4000) if (d := draws.draw(5, n)).row == "sink" and d.mask == "window")
    small = draws.shrunk(d, lambda other: other.row == "sink" and other.mask == "window")
    assert small == draws.valid(Draw(row="sink", mask="window"))


def test_in_float64_every_float_is_wide() -> None:
    """The reference of a module in 16 bits rounds nothing but what it is given."""
    d = draws.read('{"dtype": "bf16", "rope": "half", "norm": "rms", "bias": "alibi_constant", "mask": "window", "row": "sink32"}')
    model = Composed(d)
    given = list(inputs(d, 5, 5).values())
    model.mode = "noted"
    model.begin()
    assert model(*given).dtype == torch.bfloat16
    assert model.noted
    wide = model.widened()
    wide.begin()
    assert wide(*[x.double() if x.is_floating_point() else x for x in given]).dtype == torch.float64


@pytest.mark.parametrize(("fault", "kind"), [("value", "wrong"), ("type", "shape"), ("raise", "raised")])
def test_a_fault_is_found(fault: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is off in one value, answers another type or raises."""

    def spoilt(gm: torch.fx.GraphModule, way: str) -> ways.Rewritten:
        def run(*values: torch.Tensor) -> object:
            (out,) = gm.forward(*values)
            if fault == "raise":
                raise RuntimeError("no such kernel")
            if fault == "type":
                return (out.double(),)
            out = out.clone()
            out.view(-1)[3] += 1e-3
            return (out,)

        return ways.Rewritten(run, ("reattend",))

    monkeypatch.setattr(ways, "_rewritten", spoilt)
    found = judge.judge(draws.valid(Draw(mask="causal")), ("default",)).findings
    assert [(f.kind, f.way) for f in found] == [(kind, "default")], found
