"""Commands over plans: several devices, sweeps, pages, differences, and one sentence for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reattend.cli import main
from reattend.cost_model.plan.plan import SCHEMA, Plan
from reattend.options import sweep_of

from .commands import run


@pytest.mark.parametrize(
    ("text", "axis", "values"),
    [
        ("seq=1k:4k", "seq", (1024, 2048, 4096)),
        ("seq=1k,4k,32k", "seq", (1024, 4096, 32768)),
        ("batch=1:6", "batch", (1, 2, 4, 6)),
        ("past=512", "past", (512,)),
    ],
)
def test_sweeps_are_read(text: str, axis: str, values: tuple[int, ...]) -> None:
    assert sweep_of(text) == (axis, values)


def test_devices_stand_side_by_side(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", config, "--seq", "256", "--target", "h200", "--target", "a100", "--target", "h200")
    assert code == 0
    assert "2 attentions on h200, a100" in out
    code, out, _ = run(capsys, "plan", config, "--seq", "256", "--target", "h200", "--target", "a100", "--json")
    assert [p["device"]["name"] for p in json.loads(out)] == ["h200", "a100"]


@pytest.mark.slow
def test_a_sweep_shows_the_winner_at_each_size(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("plan", config, "--seq", "256", "--target", "h200", "--target", "cpu")
    code, out, _ = run(capsys, *arguments, "--sweep", "seq=64:256", "--sweep", "batch=1,3")
    assert code == 0
    lines = [x.split() for x in out.splitlines() if x]
    assert [x[0] for x in lines if x[0] in ("64", "128", "256")] == ["64", "128", "256"]
    assert [x[0] for x in lines if x[0] in ("1", "3") and x[1] != "sizes"] == ["1", "3"]
    assert any(x[0] == "h200:" for x in lines)
    code, out, _ = run(capsys, *arguments[:-2], "--sweep", "seq=64:256", "--json")
    made = Plan.from_json(out)
    assert made.sweeps[0].values == (64, 128, 256)
    assert made.axes["seq"]


@pytest.mark.slow
def test_a_batch_sweep_keeps_the_batch_that_was_asked(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "plan", config, "--seq", "64", "--sweep", "batch=1:4", "--json")
    made = Plan.from_json(out)
    assert made.sites[0].shape.size("b") == 1
    assert [p.value for p in made.sweeps[0].courses[0].points] == [1, 2, 4]


@pytest.mark.slow
def test_a_page_is_written(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = tmp_path / "plan.html"
    code, _, err = run(capsys, "plan", config, "--seq", "256", "--target", "h200", "--html", str(where))
    assert code == 0
    assert f"wrote {where}" in err
    text = where.read_text("utf-8")
    assert 'data-chart="sweep"' in text
    assert len(text.encode()) < 2e6


def test_a_page_falls_back_to_fixed_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    code, out, _ = run(capsys, "plan", "commands:bare_groups", "--html", str(tmp_path / "plan.html"))
    assert code == 0
    assert "1 attention" in out
    assert "sizes are fixed (grouped heads of symbolic number)" in out


def saved(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.slow
def test_plans_are_compared(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plans = {}
    for name, seq in (("short", "256"), ("long", "4k")):
        _, out, _ = run(capsys, "plan", config, "--seq", seq, "--target", "a100", "--json")
        plans[name] = saved(tmp_path / f"{name}.json", out)
    code, out, _ = run(capsys, "diff", plans["short"], plans["short"])
    assert code == 0
    assert "2 sites are as before" in out
    code, out, _ = run(capsys, "diff", plans["short"], plans["long"])
    assert code == 1
    assert "slower by more than 5%" in out
    code, out, _ = run(capsys, "diff", plans["short"], plans["long"], "--tolerance", "1000000", "--json")
    assert code == 0
    assert json.loads(out)["rows"][0]["ratio"] > 1
    code, out, _ = run(capsys, "diff", config, "--target", "h200", "--target", "a100", "--seq", "256")
    assert code == 0
    assert "on h200 → " in out


def test_explain_shows_what_stands_behind(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "explain", config, "--seq", "256", "--target", "h200")
    assert code == 0
    for words in ("3 passes over m", "1 pass over m1·m0", "█", "keys and values", "bytes of", "products:", "time by part", "spill", "3 passes: as lifted"):
        assert words in out
    _, out, _ = run(capsys, "explain", config, "0", "--seq", "256", "--json")
    assert json.loads(out)[0]["detail"]["passes_before"]


BAD = [
    (["plan", "{config}", "--target", "h200", "--target", "b2000"], "unknown target 'b2000' (did you mean 'b200'?); one of: a10, a100"),
    (["plan", "{config}", "--seq", "0"], "--seq 0 is too small: give at least 1"),
    (["plan", "{config}", "--batch", "0"], "--batch 0 is too small: give at least 1"),
    (["plan", "{config}", "--sweep", "seq"], "'seq' is no sweep over one of seq, past, batch: write seq=1k:1M"),
    (["plan", "{config}", "--sweep", "heads=1:4"], "'heads=1:4' is no sweep over one of seq, past, batch"),
    (["plan", "{config}", "--sweep", "seq=4k:1k"], "a sweep goes up: 4096 to 1024 is empty"),
    (["plan", "{config}", "--sweep", "seq=0:4k"], "a sweep starts at 1 or above, not at 0"),
    (["plan", "{config}", "--sweep", "seq=0,4k"], "sizes must be at least 1"),
    (["plan", "{config}", "--sweep", "seq=1q:4k"], "'1q' is no number of tokens"),
    (["plan", "{config}", "--seq", "64", "--sweep", "past=1k:4k"], "a prefill has no past: sweep past with --phase decode, or sweep seq"),
    (["plan", "{config}", "--html", "{folder}/none/plan.html"], "there is no folder"),
    (["plan", "{config}", "--html", "{folder}"], "it is a folder: give the path of a file"),
    (["plan", "{config}", "--weights", "fp5"], "weights in 'fp5' are not known: one of fp8, int8, int4"),
    (["plan", "{config}", "--cache", "int4"], "cache in 'int4' are not known: one of fp8, int8"),
    (["plan", "{folder}/readme.json"], "is no JSON file"),
    (["plan", "{folder}/other.json"], "has no model_type: it is no Hugging Face config.json"),
    (["plan", "{folder}/old.pt2"], "is no exported program that PyTorch"),
    (["diff", "{folder}/newer.json", "{folder}/newer.json"], f"the plan has schema {SCHEMA + 1}, newer than schema {SCHEMA}"),
    (["diff", "{folder}/none.json", "{folder}/none.json"], "does not exist: save a plan with `reattend plan MODEL --json"),
    (["diff", "{config}", "{config}"], "this is no plan: it has no schema number"),
    (["diff", "{config}"], "diff compares two plans (A.json B.json), or one MODEL on two devices"),
    (["diff", "{config}", "{config}", "--tolerance", "-1"], "--tolerance -1.0 is no share: give 0 or more"),
    (["bench", "{config}", "--seconds", "0"], "--seconds 0.0 is no time to measure in"),
    (["emit", "{config}", "--seq", "16", "-o", "{folder}/none/a.py"], "there is no folder"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_mistakes_give_one_sentence_and_exit_with_two(
    arguments: list[str], sentence: str, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "newer.json", json.dumps({"schema": SCHEMA + 1}))
    saved(tmp_path / "readme.json", "# no JSON")
    saved(tmp_path / "other.json", '{"name": "package"}')
    saved(tmp_path / "old.pt2", "PK but no archive")
    filled = [a.replace("{config}", config).replace("{folder}", str(tmp_path)) for a in arguments]
    code, _, err = run(capsys, *filled)
    assert code == 2
    assert sentence in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err


def test_a_sweep_refuses_before_it_captures(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reattend.rewriter.capture.export.from_export", lambda *_, **__: pytest.fail("captured"))
    for bad in (["--sweep", "seq=4k:1k"], ["--html", "/nowhere/at/all.html"]):
        with pytest.raises(SystemExit):
            main(["plan", config, *bad])


def test_a_program_of_another_version_says_how_to_save_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import zipfile

    import torch

    saved_now, saved_then = tmp_path / "now.pt2", tmp_path / "then.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.randn(1, 2),)), saved_now)
    with zipfile.ZipFile(saved_now) as now, zipfile.ZipFile(saved_then, "w") as then:
        for name in now.namelist():
            text = now.read(name)
            if name.endswith("models/model.json"):
                body = json.loads(text)
                body["schema_version"]["major"] += 90
                text = json.dumps(body).encode()
            then.writestr(name, text)
    code, _, err = run(capsys, "plan", str(saved_then))
    assert code == 2
    assert "is no exported program that PyTorch" in err
    assert "save it with torch.export.save under this version" in err
    assert len(err.strip().splitlines()) == 1


SOFTMAX = """attention   P=P, M=M, E=64, F=64
  inputs  Q: bf16[P,64], K: bf16[M,64], V: bf16[M,64]
  S[p,m] = sum_e f32(Q[p,e]) * f32(K[m,e])
  GM[p] = max_m S[p,m]
  SN[p,m] = exp(S[p,m] - GM[p])
  SD[p] = sum_m SN[p,m]
  O[p,f] = sum_m SN[p,m] / SD[p] * f32(V[m,f])
"""
NORM = """layer norm   P=P, E=E
  inputs  X: f32[P,E]
  MU[p] = sum_e X[p,e] / 512
  VA[p] = sum_e (X[p,e] - MU[p]) * (X[p,e] - MU[p]) / 512
  Y[p,e] = (X[p,e] - MU[p]) * rsqrt(VA[p] + 0.00001)
"""


def test_a_cascade_is_explained_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cascade.txt"
    path.write_text(SOFTMAX)
    code, out, _ = run(capsys, "explain", str(path), "--target", "h200", "--size", "P=4k", "--size", "M=128k")
    assert code == 0
    assert "3 passes over m (K 3×, V 1×)" in out
    assert "1 pass: defer, then partition, then repair" in out
    assert "candidates on h200, best first" in out
    code, out, _ = run(capsys, "explain", str(path), "--target", "h200", "--size", "P=64", "--size", "M=64", "--json")
    assert json.loads(out)[0]["detail"]["passes_before"][0]["count"] == 3
    path.write_text(NORM)
    code, out, _ = run(capsys, "explain", str(path), "--target", "h200", "--size", "P=4k", "--size", "E=512")
    assert code == 0
    assert "3 passes over e (X 3×)" in out
    assert "one Einsum after the other on h200:" in out
    assert "no attention:" in out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "leaves M, P open: give --size M=4096 --size P=4096"),
        (("--size", "P=4k", "--size", "M=4k", "--size", "Z=1"), "has no open size Z: it has M, P"),
        (("--size", "P"), "'P' is no size"),
    ],
)
def test_sizes_of_a_cascade(
    given: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cascade.txt"
    path.write_text(SOFTMAX)
    code, _, err = run(capsys, "explain", str(path), *given)
    assert code == 2
    assert said in err


def test_sizes_are_for_cascades(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "explain", config, "--size", "M=4")
    assert code == 2
    assert "--size is for a cascade in a .txt" in err
    code, _, err = run(capsys, "explain", str(tmp_path / "none.txt"))
    assert code == 2
    assert "none.txt" in err


def test_a_plan_says_what_the_whole_step_takes_and_what_fits(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("plan", config, "--target", "h200", "--phase", "decode", "--past", "64", "--batch", "4", "--dtype", "bf16")
    page = tmp_path / "plan.html"
    code, out, _ = run(capsys, *asked, "--weights", "fp8", "--cache", "fp8", "--html", str(page))
    assert code == 0
    for words in ("a token of each sequence: ", "weights in fp8 and caches in fp8", "of it attention ", "the largest that fit: batch "):
        assert words in out
        assert words in page.read_text(encoding="utf-8")
    code, out, _ = run(capsys, *asked, "--json")
    plain = Plan.from_json(out)
    assert Plan.from_json(plain.to_json()) == plain
    assert plain.step is not None
    assert (plain.step.phase, plain.step.batch, plain.step.context) == ("decode", 4, 65)
    assert plain.step.weight_bytes == plain.weight_bytes
    code, out, _ = run(capsys, *asked[:2], "--seq", "64", "--json")
    assert (Plan.from_json(out).step, Plan.from_json(out).step_why) == (None, "the whole model is priced on GPUs: cpu is none")
    with pytest.raises(ValueError, match="read from a file"):
        plain.stored("fp8")
