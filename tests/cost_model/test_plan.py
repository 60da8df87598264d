"""Plans: plain data that survives JSON, a table that people read, names of groups."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from reattend.cost_model.devices.device import shipped
from reattend.cost_model.plan.plan import SCHEMA, Plan
from reattend.cost_model.plan.table import candidates_table, plan_table
from reattend.cost_model.sites.site import (
    Candidate,
    MaskView,
    Miss,
    PlanError,
    Site,
    SiteShape,
    TileCounts,
    grouped,
    ranked,
)
from reattend.cost_model.time.cost import Cost
from reattend.cost_model.words import group_name, seconds_text

OURS = Candidate(
    "reattend", passes=1, cost=Cost(1e-3, "matrix", 10**12, 10**9, 10**9, {"matrix": 1e-3}), why="skips half",
    mapping='{"tile_p":128}', text="x = 1\n",
)
ORIGINAL = Candidate("original", passes=3, cost=Cost(1.2e-2, "memory", 10**12, 10**10, 10**9))
SDPA = Candidate("sdpa", feasible=False, why="a mask of three dimensions runs on the slow path")


def site(i: int, choice: str = "reattend") -> Site:
    return Site(
        name=f"model.layers.{i}.self_attn", where="/site/transformers/modeling_llama.py:210", kind="softmax",
        traits=frozenset({"causal", "gqa"}), shape=SiteShape({"b": 1, "h": 32, "p": 4096, "m": "s0", "e": 128}, "bf16"),
        mask=MaskView("m ≤ p", 0.51, TileCounts(128, 128, 1024, 528, 496, 32)), proofs=("keys are not written",),
        guards=("s0 ≥ 1",), candidates=(OURS, ORIGINAL, SDPA), choice=choice, cascade="QK = Σ_e Q·K",
        chosen_cascade="RM = max(RM, LM)",
    )


PLAN = Plan(
    sites=(*(site(i) for i in range(32)), site(40, "original")),
    misses=(Miss("/x/y.py:7", "product", "softmax over h, which the product does not reduce", "nothing to do"),) * 2,
    device=shipped("h200"),
    model="llama",
)


def test_json_round_trip() -> None:
    assert Plan.from_json(PLAN.to_json()) == PLAN
    assert Plan.from_json(replace(PLAN, device=shipped("cpu")).to_json()).device == shipped("cpu")


def test_json_keeps_text_and_drops_makers() -> None:
    made = Candidate("flex", cost=OURS.cost, maker=lambda: "def f(): ...")
    assert made.source() == "def f(): ..."
    again = Plan.from_json(replace(PLAN, sites=(replace(site(0), candidates=(made, OURS)),)).to_json()).sites[0]
    assert again.candidate("reattend").source() == "x = 1\n"
    with pytest.raises(ValueError, match="candidate 'flex' has no code of its own"):
        again.candidate("flex").source()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plan", "this is no plan: Expecting value"),
        ("{}", "it has no schema number"),
        ("[1]", "it has no schema number"),
        (json.dumps({"schema": SCHEMA + 1}), f"schema {SCHEMA + 1}, newer than schema {SCHEMA}, which this version reads"),
        (json.dumps({"schema": SCHEMA}), "the plan is damaged: 'sites'"),
    ],
)
def test_texts_that_are_no_plan_are_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_json(text)


def test_a_site_knows_its_choice_and_speedup() -> None:
    s = site(0)
    assert s.chosen is OURS
    assert s.speedup == pytest.approx(12)
    with pytest.raises(KeyError, match="no candidate 'flex'; one of reattend, original, sdpa"):
        s.candidate("flex")
    with pytest.raises(ValueError, match="candidate 'sdpa' has no code of its own: a mask of three"):
        SDPA.source()


def test_ranked_puts_the_infeasible_last() -> None:
    assert [c.name for c in ranked((SDPA, ORIGINAL, OURS))] == ["reattend", "original", "sdpa"]


HEADING = "llama: 33 attentions on h200 (NVIDIA H200 SXM 141 GB; uncalibrated times, ±35%), 44 ms in all"


def test_the_table_groups_identical_attentions() -> None:
    assert all(len(x) <= 160 for x in str(PLAN).splitlines())
    text = plan_table(PLAN, 220)
    lines = text.splitlines()
    assert lines[0] == HEADING
    (many,) = [x for x in lines if "×32" in x]
    assert many.split() == ["model.layers.[0-31].self_attn", "×32", "softmax", "causal", "gqa", "transformers/modeling_llama.py:210", "b=1", "h=32", "p=4096", "m=s0", "e=128", "bf16", "reattend", "1", "ms", "12.00×", "matrix", "skips", "half"]
    (one,) = [x for x in lines if "layers.40" in x]
    assert one.split()[-4:] == ["original", "12", "ms", "memory"]
    assert "left alone (2)" in text


def test_the_table_of_candidates_names_refusals() -> None:
    text = candidates_table((OURS, ORIGINAL, SDPA))
    assert "slow path" in text
    assert text.splitlines()[1].split()[:8] == ["reattend", "1", "ms", "matrix", "1", "1", "1", "1"]


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (["a.0.b", "a.1.b", "a.2.b"], "a.[0-2].b"),
        (["a.0.b", "a.2.b", "a.4.b"], "a.[0-4:2].b"),
        (["a.0.b", "a.1.b", "a.5.b"], "a.[0,1,5].b"),
        (["a.3.b"], "a.3.b"),
        (["x", "y"], "x"),
        (["a.0.b.0", "a.1.b.1"], "a.0.b.0"),
        (["h1.0", "h1.1"], "h1.[0-1]"),
    ],
)
def test_group_names(names: list[str], group: str) -> None:
    assert group_name(names) == group


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.5, "1.5 s"), (0.0123, "12.3 ms"), (4.5e-6, "4.5 µs"), (3e-8, "30 ns"), (1234.5, "1234 s")]
)
def test_seconds_have_three_digits(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_bounds_are_a_closed_set() -> None:
    with pytest.raises(ValueError, match="one of matrix, exp, memory, launch, link"):
        Cost(1.0, "luck", 0, 0, 0)


def test_plans_are_read_without_torch_and_triton(tmp_path) -> None:  # type: ignore[no-untyped-def]
    where = tmp_path / "plan.json"
    where.write_text(PLAN.to_json(), encoding="utf-8")
    code = (
        "import sys; from reattend.cost_model.plan.plan import Plan; "
        f"print(Plan.from_json(open({str(where)!r}).read())); assert not {{'torch', 'triton'}} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "×32" in done.stdout


def test_the_same_miss_of_many_layers_is_one_line() -> None:
    misses = [Miss("m.py:3", f"matmul in layers.{i}.attn", f"mul_{i} is written in place before it is read") for i in range(12)]
    other = Miss("m.py:9", "matmul in head", "a softmax over one element")
    (first, twelve), (last, one) = grouped([*misses, other])
    assert (first.what, twelve, one) == ("matmul in layers.[0-11].attn", 12, 1)
    assert last is not None
    assert last.reason == other.reason
