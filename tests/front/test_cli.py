"""The command line: every command, its JSON, its exit codes, and one sentence for every mistake."""

from __future__ import annotations

import ast
import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reattend.cli import main, tokens
from reattend.cost_model.plan.plan import Plan
from tests.tiers import few

from .commands import CONFIG, run, strict_model


def test_help_teaches_and_loads_no_torch() -> None:
    code = "import sys; from reattend.cli import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("False")
    for word in ("plan", "explain", "emit", "bench", "verify", "diff", "targets", "Examples", "config.json", "Exit codes"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "nope.json"], "nope.json does not exist"),
        (["plan", "nope.pt2"], "nope.pt2 does not exist"),
        (["plan", "nope"], "nope is no model"),
        (["plan", "a:b", "--phase", "train"], "--phase train is not known"),
        (["plan", "a:b", "--past", "1.5k"], "--past 1536 is for --phase decode"),
        (["plan", "a:b", "--attn", "eager"], "a factory builds its own model: leave --attn out"),
        (["explain", "a:b", "--dtype", "int8"], "--dtype int8 is not known"),
        (["verify", "a:b", "--candidate", "fast"], "--candidate fast is not known"),
    ],
)
def test_what_can_be_refused_early_loads_no_torch(arguments: list[str], said: str) -> None:
    code = f"import sys; from reattend.cli import main\ntry: main({arguments})\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout.strip() == "False"


def test_options_that_would_change_nothing_are_refused(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "plan", config, "--approximate")
    assert code == 2
    assert "give --mesh too" in err
    code, _, err = run(capsys, "plan", f"{strict_model.__module__}:strict_model", "--seq", "64")
    assert code == 2
    assert "brings its own inputs, which --seq would not change" in err
    path = tmp_path / "small.pt2"
    path.write_bytes(b"")
    code, _, err = run(capsys, "plan", str(path), "--seq", "64", "--batch", "2")
    assert code == 2
    assert "an exported program has its own sizes and types: leave --batch and --seq out" in err


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert out.startswith("reattend ")
    assert f"torch {torch.__version__.partition('+')[0]}" in out


@pytest.mark.parametrize("columns", few(["60", "80"], "60"))
def test_a_narrow_screen_has_a_line_a_cell(
    columns: str, config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    code, out, _ = run(capsys, "plan", config, "--seq", "1k", "--target", "h200", "--dtype", "bf16")
    assert code == 0
    head, *rest = out.partition("\n\n")[0].splitlines()
    assert "2 attentions on h200" in head
    assert all(len(line) <= int(columns) for line in rest), out
    assert any(line.split()[:1] == ["chosen"] for line in rest)


@pytest.mark.slow
def test_a_sweep_as_lines(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, every = tmp_path / "sweep.csv", tmp_path / "grid.csv"
    given = ("plan", config, "--target", "h200", "--target", "a100", "--sweep", "seq=1k:2k", "--csv", str(path))
    code, _, err = run(capsys, *given, "--grid", str(every))
    assert code == 0, err
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert {(r["axis"], r["value"], r["device"]) for r in rows} == {
        ("seq", n, d) for n in ("1024", "2048") for d in ("h200", "a100")
    }
    chosen = [r for r in rows if r["chosen"] == "1"]
    assert len(chosen) == 4
    for r in chosen:
        at = [float(x["seconds"]) for x in rows if (x["value"], x["device"]) == (r["value"], r["device"])]
        assert float(r["seconds"]) == min(at)
    grid = {(r["seq"], r["device"]): (r["choice"], r["seconds"]) for r in csv.DictReader(every.read_text().splitlines())}
    assert grid == {(r["value"], r["device"]): (r["candidate"], r["seconds"]) for r in chosen}
    for option in ("--csv", "--grid"):
        code, _, err = run(capsys, "plan", config, option, str(path))
        assert code == 2
        assert "give --sweep too" in err
    code, _, err = run(capsys, "plan", config, "--sweep", "seq=1k", "--sweep", "seq=2k", "--grid", str(every))
    assert code == 2
    assert "each axis once" in err


def test_a_screen_without_our_letters_has_them_spelt(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    with pytest.raises(SystemExit) as stop:
        main(["plan", config, "--seq", "64", "--target", "h200"])
    screen.flush()
    shown = screen.buffer.getvalue().decode("ascii")
    assert not stop.value.code
    assert "+/-" in shown
    assert "_attn x2" in shown


def test_emitted_code_says_what_it_was_made_for(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "emit", config, "--seq", "1k", "--target", "h200", "--dtype", "bf16")
    assert code == 0
    said = " ".join((ast.get_docstring(ast.parse(out)) or "").split())
    assert "Made by reattend" in said
    assert "of LlamaForCausalLM, h=8 p=1024 f=8 m=1024 e=8 bfloat16, on h200, predicted to take " in said


def test_what_does_not_fit_is_said_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG, "hidden_size": 32768, "intermediate_size": 131072, "num_hidden_layers": 2}))
    code, out, _ = run(capsys, "plan", str(path), "--seq", "64", "--target", "a100")
    assert code == 0
    assert "DOES NOT FIT: weights 1" in out.splitlines()[0]
    code, _, err = run(capsys, "verify", str(path), "--seq", "64")
    assert code == 2
    assert "are free here: give a config with fewer layers" in err


@pytest.mark.slow
def test_verify_is_of_our_kernel(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "verify", config, "--seq", "33", "--batch", "2")
    assert code == 0
    assert "verified: 2 attentions" in out
    code, out, _ = run(capsys, "verify", config, "--seq", "32", "--json")
    assert code == 0
    assert json.loads(out)["ok"] is True
    assert {s["kernel"] for s in json.loads(out)["sites"]} == {"reattend"}


def test_verify_is_of_a_named_kernel_or_says_that_it_was_of_none(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "verify", config, "--seq", "32", "--candidate", "sdpa", "--json")
    assert code == 0
    assert json.loads(out)["ok"] is True
    assert {s["kernel"] for s in json.loads(out)["sites"]} == {"sdpa"}
    code, out, _ = run(capsys, "verify", f"{strict_model.__module__}:strict_model")
    assert "verified: 0 attentions" in out
    assert "nothing was verified" in out


@pytest.mark.parametrize("command", ["plan", "explain", "emit", "bench", "verify", "diff", "targets"])
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"Example: reattend {command}" in out
    assert "--json" in out


def test_targets(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "targets")
    assert code == 0
    assert "h200" in out
    code, out, _ = run(capsys, "targets", "--json")
    assert {"cpu", "a100", "h100", "h200"} <= {d["name"] for d in json.loads(out)}


def test_plan(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", config, "--seq", "1k", "--target", "h200", "--dtype", "bf16")
    assert code == 0
    assert "2 attentions on h200" in out
    assert "[1, 1024]" in out
    code, out, _ = run(capsys, "plan", config, "--seq", "64", "--json")
    assert len(Plan.from_json(out).sites) == 2


def test_plan_a_decoding_step(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", config, "--phase", "decode", "--past", "4k", "--batch", "8", "--target", "a100")
    assert code == 0
    assert "decode" in out
    assert "4097" in out


@pytest.mark.slow
def test_plan_with_symbolic_sizes(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", config, "--seq", "64", "--batch", "2", "--dynamic", "--json")
    assert code == 0
    assert any(isinstance(n, str) for n in Plan.from_json(out).sites[0].shape.sizes.values())


@pytest.mark.slow
def test_explain(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "explain", config, "--seq", "64")
    assert code == 0
    for word in ("as lifted", "Σ_m", "proved", "candidates on cpu", "chosen:", "(×2)"):
        assert word in out
    code, out, _ = run(capsys, "explain", config, "model.layers.1.self_attn", "--seq", "64", "--json")
    (site,) = json.loads(out)
    assert site["name"] == "model.layers.1.self_attn"
    assert {c["name"] for c in site["candidates"]} == {"original", "sdpa", "flex", "reattend"}
    code, by_number, _ = run(capsys, "explain", config, "1", "--seq", "64", "--json")
    assert json.loads(by_number)[0]["name"] == site["name"]


def test_emit(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "attention.py"
    code, out, err = run(capsys, "emit", config, "--seq", "64", "-o", str(target))
    assert code == 0
    assert "wrote" in err
    text = target.read_text()
    compile(text, str(target), "exec")
    assert "import reattend" not in text
    code, out, _ = run(capsys, "emit", config, "--seq", "64", "--json")
    assert json.loads(out)["source"] == text


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return "commands"


def test_a_strict_plan_with_a_miss_exits_with_one(here: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "plan", f"{here}:strict_model", "--strict")
    assert code == 1
    assert "live dropout" in out
    assert "live dropout" in err


def test_a_model_without_a_graph_is_planned_in_pieces(here: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "plan", f"{here}:branching_model")
    assert code == 0
    assert "def forward" not in err
    assert "1 attention" in out
    assert "broken at" in out
    assert "commands.py" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["plan"], "Missing argument 'MODEL'"),
        (["plna"], "No such command 'plna'"),
        (["plan", "nothing"], "nothing is no model"),
        (["plan", "{config}", "--target", "h2000"], "unknown target 'h2000' (did you mean 'h200'?)"),
        (["plan", "{config}", "--seq", "4q"], "'4q' is no number of tokens"),
        (["plan", "{config}", "--dtype", "int3"], "--dtype int3 is not known"),
        (["plan", "{config}", "--phase", "later"], "use prefill or decode"),
        (["plan", "{config}", "--sqe", "4"], "No such option"),
        (["explain", "{config}", "nowhere", "--seq", "16"], "no attention is named 'nowhere'"),
        (["emit", "{config}", "--seq", "16", "--candidate", "fast"], "no candidate is named 'fast'"),
        (["emit", "{config}", "--seq", "16", "--candidate", "original"], "keeps the original code"),
    ],
)
def test_mistakes_give_one_sentence_and_exit_with_two(
    arguments: list[str], sentence: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *[a.replace("{config}", config) for a in arguments])
    assert code == 2
    assert sentence in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["plan", "verify"])
@pytest.mark.parametrize(
    ("factory", "sentence"),
    [("narrow", "(RuntimeError: mat1 and mat2 shapes cannot be"), ("misnamed", "unexpected keyword argument 'x'): change them")],
)
def test_inputs_that_are_not_for_the_model_are_no_defect_of_ours(
    command: str, factory: str, sentence: str, here: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, command, f"{here}:{factory}")
    assert code == 2
    assert "reattend: Linear itself fails on these inputs" in err
    assert sentence in err
    assert "defect" not in err
    assert len(err.strip().splitlines()) == 1


def test_debug_shows_the_traceback(config: str) -> None:
    with pytest.raises(ValueError, match="unknown target"):
        main(["plan", config, "--target", "h2000", "--debug"])


def test_token_counts() -> None:
    assert [tokens("4_096"), tokens("131,072"), tokens("1.5k")] == [4096, 131072, 1536]
    assert [tokens("4096"), tokens("4k"), tokens("128K"), tokens("1M")] == [4096, 4096, 131072, 1 << 20]


def test_targets_calibrates_first_and_says_how_far_it_is_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dataclasses import replace

    from reattend.codegen.measure import calibrate
    from reattend.cost_model.calibration.calibrate import keep
    from reattend.cost_model.devices.device import Device, shipped

    monkeypatch.setenv("REATTEND_CALIBRATION", str(tmp_path / "calibration.json"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def measured(d: Device, watch: object) -> tuple[Device, tuple[calibrate.Checked, ...]]:
        assert d is shipped("cpu")
        found = replace(d, title="a quick one", basis="calibrated", band=0.2)
        keep(found)
        return found, (calibrate.Checked("sdpa, causal", 1e-3, 1.1e-3), calibrate.Checked("original, causal", 2e-3, 1.8e-3))

    monkeypatch.setattr(calibrate, "calibrate", measured)
    code, out, err = run(capsys, "targets", "--calibrate")
    assert code == 0
    assert "sdpa, causal: 1 ms, predicted 1.1 ms" in err
    assert "a quick one: off by 10.0% on average on 2 timings that nothing was fitted to; plans state ±20%" in err
    assert "calibration.json" in err
    line = next(x for x in out.splitlines() if x.startswith("cpu"))
    assert "a quick one" in line
    assert "calibrated" in line
    assert "±20%" in line
