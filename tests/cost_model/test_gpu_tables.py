"""The benchmark of measured GPU tables: its split, what it leaves out, and that it prices a row as the library does. No row needed."""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from reattend.cost_model.devices.device import shipped
from reattend.cost_model.devices.kernels import vendor_kernels
from reattend.cost_model.devices.latents import latent_kernels
from tests.loading import benchmark

FOLDER = str(Path(__file__).resolve().parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def tables() -> Iterator[ModuleType]:
    sys.path.insert(0, FOLDER)
    try:
        yield benchmark("gpu_tables")
    finally:
        sys.path.remove(FOLDER)


@pytest.fixture(scope="module")
def rows(tables: ModuleType) -> ModuleType:
    return sys.modules["gpu_rows"]


def row(rows: ModuleType, **given: Any) -> Any:
    values = {"table": "context", "device": "h200", "kernel": "fa3", "batch": 2, "queries": 1024, "keys": 1024, "heads": 32,
              "key_heads": 8, "head": 128, "value": 128, "window": 0, "seconds": 1e-4}
    return rows.Row(**{**values, **given})


def test_a_shape_lies_in_one_part_on_every_device(rows: ModuleType) -> None:
    for n in range(64, 2048, 64):
        parts = {row(rows, queries=n, keys=n, device=d, kernel=k, seconds=s).part
                 for d, k, s in (("h200", "fa3", 1e-4), ("a100", "fa2_paged", 3e-4))}
        assert len(parts) == 1


def test_the_parts_are_thirds(rows: ModuleType) -> None:
    counts = Counter(row(rows, batch=b, queries=n, keys=n).part for b in range(1, 30) for n in range(64, 4096, 64))
    assert set(counts) == {"fit", "choose", "judge"}
    assert max(counts.values()) < 1.15 * min(counts.values())


def test_rows_above_the_data_sheet_are_left_out(rows: ModuleType) -> None:
    limits = rows.Limits(2e15, 4.8e12, 50e6)
    assert rows._impossible(row(rows), limits) is None
    assert "FLOP" in rows._impossible(row(rows, seconds=1e-9), limits)
    decode = row(rows, table="generation", queries=1, keys=131072, batch=64, seconds=1e-4)
    assert "bytes" in rows._impossible(decode, limits)


def test_a_row_out_of_line_with_both_neighbours_is_left_out(rows: ModuleType) -> None:
    out: Counter[str] = Counter()
    given = [row(rows, batch=b, seconds=s) for b, s in ((1, 1e-5), (2, 9e-5), (4, 3e-5))]
    assert [r.batch for r in rows.smooth(given, out)] == [1, 4]
    assert sum(out.values()) == 1


def test_windows_of_decoding_and_other_kernels_are_left_out_and_counted(rows: ModuleType) -> None:
    out: Counter[str] = Counter()
    raw = {"attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "kernel_source": "vllm_flash_attn_fa3", "head_dim": 128,
           "num_heads": 8, "num_key_value_heads": 0, "batch_size": 1, "isl": 64, "step": 0, "latency": 0.01, "window_size": 0}
    kept = rows._row("h200", "context", raw, out)
    assert (kept.key_heads, kept.seconds, kept.table) == (8, 1e-5, "context")
    assert rows._row("h200", "context", {**raw, "window_size": 16}, out).table == "window"
    for kind, change in (("context", {"window_size": 64}), ("generation", {"window_size": 16}), ("context", {"isl": 1}),
                         ("context", {"attn_dtype": "fp8"}), ("context", {"head_dim": 512}), ("context", {"kernel_source": "x"})):
        assert rows._row("h200", kind, {**raw, **change}, out) is None
    assert sum(out.values()) == 6


def test_pairs_of_a_window(rows: ModuleType) -> None:
    r = row(rows, table="window", batch=1, heads=1, key_heads=1, queries=5, keys=5, window=2)
    assert r.pairs == 1 + 2 + 2 + 2 + 2


def test_the_absent_package_is_one_sentence(tables: ModuleType, rows: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rows, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["gpu_tables.py"])
    assert tables.main() == 2
    said = capsys.readouterr().err.strip()
    assert "pip install" in said
    assert "\n" not in said


def test_an_unknown_device_names_those_there_are(tables: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_tables.py", "--devices", "h900"])
    assert tables.main() == 2
    assert "no tables of h900" in capsys.readouterr().err


@pytest.mark.parametrize("given", [{}, {"table": "window", "window": 128}, {"table": "generation", "queries": 1, "keys": 4096}])
def test_fitting_prices_a_row_as_the_library_does(tables: ModuleType, rows: ModuleType, given: dict[str, Any]) -> None:
    r = row(rows, **given)
    d, h = shipped("h200"), tables.harnesses()["h200"]
    works = sys.modules["gpu_prices"].Works.of((r,), d, vendor_kernels()["fa3"])
    assert works.seconds(d, vendor_kernels()["fa3"], h, 1 << 13)[0] == pytest.approx(tables.priced(r, d, h)[0], rel=1e-6)


def test_a_fit_finds_what_rows_were_made_with(tables: ModuleType, rows: ModuleType) -> None:
    """Rows that the model itself made, with twice the program's clocks: the search comes back to them."""
    gpu_fit, prices = sys.modules["gpu_fit"], sys.modules["gpu_prices"]
    facts, d, h = vendor_kernels()["fa3"], shipped("h200"), tables.harnesses()["h200"]
    given = tuple(row(rows, batch=b, queries=n, keys=n) for b in (1, 8) for n in (256, 1024, 2048))
    slow = replace(facts, program_clocks=2 * facts.program_clocks)
    made = prices.Works.of(given, d, slow).seconds(d, slow, h, 600)
    cell = gpu_fit.Cell.of(d, facts, [replace(r, seconds=s) for r, s in zip(given, made)])
    start = tables.start([cell])
    name = "kernel.fa3.program_clocks"
    found = gpu_fit.fit([cell], start, [name], rounds=8)
    assert found[name] == pytest.approx(2 * start[name], rel=0.03)


def test_metrics_of_a_perfect_prediction(tables: ModuleType, rows: ModuleType) -> None:
    made = [tables.Judged(row(rows, seconds=s), s, 0.1, "matrix") for s in (1e-5, 2e-5, 3e-5)]
    m = tables.Metrics.of(made)
    assert (m.mape, m.bias, m.within) == (0, 0, 1)
    assert m.spearman == pytest.approx(1)


def test_a_write_of_the_cache_takes_a_block_a_token_or_its_bytes(tables: ModuleType, rows: ModuleType) -> None:
    """Up to 512 elements a token a block holds more threads; a token of many elements takes its bytes."""
    d, h = shipped("h200"), replace(tables.harnesses()["h200"], prompt_seconds=0.0)
    h = replace(h, sequence_seconds=0.0)
    seconds = [h.seconds(row(rows, batch=256, key_heads=k), d, 1e9) for k in (1, 4, 8, 64, 512)]
    assert seconds[1] == pytest.approx(4 * seconds[0], rel=0.1)
    assert seconds[2] < 1.3 * seconds[1]
    assert seconds[4] == pytest.approx(8 * seconds[3], rel=0.05)


def field(rows: ModuleType, measured: dict[str, float], predicted: dict[str, tuple[float, float]], table: str = "context") -> Any:
    return sys.modules["gpu_regret"].Field(row(rows, table=table), measured, predicted)


def test_regret_is_what_the_choice_loses(rows: ModuleType) -> None:
    regret = sys.modules["gpu_regret"]
    right = field(rows, {"vllm": 1.0, "other": 2.0}, {"vllm": (1.0, 0.1), "other": (3.0, 0.1)})
    wrong = field(rows, {"vllm": 1.5, "other": 1.0}, {"vllm": (1.0, 0.1), "other": (1.2, 0.1)})
    found = regret.Regret.of([right, wrong])
    assert (found.mean, found.right) == (0.25, 0.5)
    assert found.constant == {"other": 0.5, "vllm": 0.25}


def test_a_backend_that_is_little_known_has_to_be_clearly_faster_in_decoding(rows: ModuleType) -> None:
    times = {"vllm": (1.0, 0.05), "other": (0.9, 0.6)}
    assert field(rows, {"vllm": 1.0, "other": 1.0}, times, "generation").chosen == "vllm"
    assert field(rows, {"vllm": 1.0, "other": 1.0}, times, "context").chosen == "other"


def test_terms_of_a_backend_are_found_again(rows: ModuleType) -> None:
    """Times that are 1.5 times the kernel's and 3 us: the fit says so."""
    regret = sys.modules["gpu_regret"]
    calls = [regret.Call(row(rows, batch=b, queries=n, keys=n), k * 1e-6, 1e-9, 1.0, 0.0)
             for b, n, k in ((1, 64, 2), (1, 512, 9), (2, 1024, 70), (4, 2048, 500), (8, 4096, 4000))]
    found = regret.fit([(c, 1.5 * c.kernel + 3e-6) for c in calls])
    assert found.spread < 0.02
    assert found.of == "kernel"
    assert found.factor[128] == pytest.approx(1.5, rel=0.03)


def test_backends_of_every_device_are_known(tables: ModuleType, rows: ModuleType) -> None:
    regret = sys.modules["gpu_regret"]
    assert {d for d, _ in regret.known()} == set(rows.FOLDERS)
    for backends in regret.known().values():
        for rates in backends.values():
            assert set(rates) <= {"alone", "shared", "many"}
            assert all(t.spread < 1 and min(t.factor.values()) > 0 for t in rates.values())


def test_a_device_without_its_family_takes_nothing_fitted_from_it(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the family's fitted constants are, the answer is the same; what the kernel is stays."""
    across = sys.modules["gpu_across"]
    before = across.unseen("h200", bare=False)
    changed: dict[str, Any] = dict.fromkeys(across.KERNEL, 1.0)
    odd = replace(vendor_kernels()["fa3"], **changed)
    kernels = {**vendor_kernels(), "fa3": odd}
    monkeypatch.setattr(across, "vendor_kernels", lambda: kernels)
    given = across.shipped
    monkeypatch.setattr(across, "shipped", lambda n: replace(given(n), model=replace(
        given(n).model, **dict.fromkeys(across.DEVICE, 0.5))) if n in ("h100", "h200") else given(n))
    assert across.unseen("h200", bare=False) == before
    assert before[1].tiles == vendor_kernels()["fa3"].tiles


# --- kernels over latents and states ----------------------------------------------------------------------------------


def latent(**given: Any) -> Any:
    values = {"table": "mla_generation", "device": "h200", "kernel": "mla", "batch": 8, "queries": 1, "keys": 4096,
              "heads": 16, "key_heads": 1, "seconds": 1e-4}
    return sys.modules["gpu_latent"].LatentRow(**{**values, **given})


def test_forms_grow_with_what_they_do_and_not_below_what_must_move(tables: ModuleType) -> None:
    m = sys.modules["gpu_latent"]
    assert {t for _, t in latent_kernels()} == set(m.TABLES)
    for (device, table), constants in latent_kernels().items():
        d = shipped(device)
        given = [latent(table=table, device=device, batch=b, keys=n, heads=16, key_heads=16) for b in (4, 64) for n in (512, 8192)]
        few, longer, more, both = m.FORMS[table](m.Columns.of(given), d, constants)
        assert few <= longer <= both
        assert few < more <= both
        if table == "mla_generation":
            assert both > given[-1].key_bytes / d.dram_bytes_per_s
        if table == "mla_context":
            assert both > given[-1].flops / d.matrix_rate("bf16")


def test_a_fit_of_a_form_finds_what_rows_were_made_with(tables: ModuleType) -> None:
    m = sys.modules["gpu_latent"]
    d = shipped("h200")
    given = [latent(table="gdn_generation", batch=b, heads=h, key_heads=h) for b in (1, 8, 64, 512) for h in (4, 16, 64)]
    wanted = {**latent_kernels()["h200", "gdn_generation"], "memory": 0.6}
    seconds = m.FORMS["gdn_generation"](m.Columns.of(given), d, wanted)
    rows_ = [replace(r, seconds=float(s)) for r, s in zip(given, seconds)]
    found = m.fitted("gdn_generation", rows_, d)
    assert found["memory"] == pytest.approx(0.6, rel=0.02)
    assert m.band_of("gdn_generation", rows_, d, found) < 0.05


def test_latent_rows_are_split_by_shape_and_name_what_they_are(tables: ModuleType) -> None:
    m = sys.modules["gpu_latent"]
    assert latent(device="b200", seconds=1.0).part == latent().part
    out: Counter[str] = Counter()
    raw = {"batch_size": 2, "latency": 0.02, "mla_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "num_heads": 16, "isl": 1,
           "step": 99, "kernel_source": "default"}
    made = m._latent_row("h200", "mla_generation", raw, out)
    assert (made.keys, made.queries, made.seconds, made.key_bytes) == (100, 1, 2e-5, 2 * 2 * 100 * 576)
    assert m._latent_row("h200", "mla_generation", {**raw, "kv_cache_dtype": "fp8"}, out) is None
    assert m._latent_row("h200", "mla_context", raw, out) is None
    assert sum(out.values()) == 2
