"""Architectures: one place knows them, by exact name; what it says agrees with the devices' files."""

from __future__ import annotations

import ast
import re
import tomllib
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from reattend.codegen.triton.kernel import build, default_mapping, shared_bytes
from reattend.codegen.vendor import use as vendor
from reattend.cost_model.devices.architecture import (
    FIRST_TILES_F32,
    UnknownArchitecture,
    architecture,
    cuda_name,
)
from reattend.cost_model.devices.device import Device, parse_device, shipped, targets
from reattend.cost_model.time.fit import shared_bytes as fitted_bytes
from reattend.patterns.mapping import TileMapping
from reattend.patterns.verdict import Refusal
from tests.codegen import attentions

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx90a", "gfx942", "gfx950")
GPUS = tuple(d for d in targets() if d.is_gpu)


@pytest.mark.parametrize("d", GPUS, ids=lambda d: d.name)
def test_devices_have_the_limits_of_their_architecture(d: Device) -> None:
    a = d.architecture
    assert (a.name, a.kind, a.threads_per_warp) == (d.arch, d.kind, d.threads_per_warp)
    assert a.shared_bytes_per_block == d.shared_bytes_per_block


@pytest.mark.parametrize("name", NAMES)
def test_an_architecture_is_whole(name: str) -> None:
    a = architecture(name)
    assert a.name == name
    assert a.kind == ("hip" if name.startswith("gfx") else "cuda")
    if a.kind == "cuda":
        assert cuda_name(a.major, a.capability % 10) == name
    assert a.matrix_instructions
    for tiles in (a.first_tiles, FIRST_TILES_F32):
        # some tile starts the widest head that a kernel takes
        assert max(tiles) == 1024
        assert all(rows >= 16 and keys >= 16 and warps in (4, 8) and stages >= 1 for rows, keys, warps, stages in tiles.values())
    # only what reads shared memory itself accumulates elsewhere
    assert a.instruction_rows or not a.tensor_memory


def test_what_was_read_back_and_published() -> None:
    """The table that kernels were built with before, number by number."""
    limits = {n: architecture(n).shared_bytes_per_block for n in NAMES}
    assert limits == {
        "sm_75": 65536, "sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448,
        "sm_103": 232448, "sm_120": 101376, "gfx90a": 65536, "gfx942": 65536, "gfx950": 163840,
    }
    rows = {n: architecture(n).instruction_rows for n in NAMES if architecture(n).instruction_rows}
    assert rows == {"sm_90": 64, "sm_100": 128, "sm_103": 128}
    assert {n for n in NAMES if architecture(n).tensor_memory} == {"sm_100", "sm_103"}
    assert architecture("sm_90").first_tiles[128] == (128, 64, 8, 3)


@pytest.mark.parametrize(
    ("name", "close"), [("sm_91", "sm_9"), ("sm90", "sm_90"), ("gfx941", "gfx94"), ("", ""), ("cpu", "")]
)
def test_an_unknown_one_is_said_in_a_sentence(name: str, close: str) -> None:
    with pytest.raises(UnknownArchitecture, match=rf"^unknown architecture '{name}'.*; one of: sm_75, ") as error:
        architecture(name)
    assert (f"did you mean '{close}" in str(error.value)) == bool(close)


def test_nothing_is_built_or_fitted_for_an_unknown_one() -> None:
    c = attentions.build(lambda score: score, dtype="f16").cascade
    made = (build(c, TileMapping(64, 64), "sm_999"), shared_bytes(c, TileMapping(64, 64), "sm_999"), default_mapping(c, "sm_999"))
    for refused in made:
        assert isinstance(refused, Refusal)
        assert "unknown architecture 'sm_999'" in refused.reason
    d = replace(shipped("h200"), arch="sm_999")
    with pytest.raises(UnknownArchitecture, match="sm_999"):
        fitted_bytes(TileMapping(64, 64), 64, 64, 2, d)


def test_a_device_file_of_an_unknown_one_is_refused() -> None:
    text = files("reattend.cost_model.devices").joinpath("h200.toml").read_text("utf-8")
    assert parse_device(text).name == tomllib.loads(text)["name"]
    with pytest.raises(UnknownArchitecture, match="'sm_9'"):
        parse_device(text.replace('arch = "sm_90"', 'arch = "sm_9"'))


@pytest.mark.parametrize(("name", "older"), [("sm_75", True), ("sm_80", False), ("sm_100", False), ("sm_120", False)])
def test_age_is_no_order_of_texts(name: str, older: bool) -> None:
    """As texts, sm_100 and sm_120 come before sm_80."""
    case = attentions.build(lambda score: score, dtype="f16")
    made = vendor.sdpa(case.cascade)
    assert not isinstance(made, Refusal)
    why = vendor.backends(made, replace(shipped("a100"), arch=name), case.sizes)
    assert ("older than sm_80" in why["flash"]) == older
    assert (next(iter(why)) == "cudnn") == (name == "sm_100")


def test_no_other_file_knows_an_architecture() -> None:
    """Texts of code that name one."""
    found = set()
    for layer in ("patterns", "cost_model", "codegen", "rewriter", "reattend"):
        for path in (ROOT / layer).rglob("*.py"):
            text = path.read_text("utf-8")
            if not re.search(r"sm_|gfx", text):
                continue
            texts = (n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant))
            named = {t for t in texts if isinstance(t, str) and re.fullmatch(r"(sm_|gfx)\w*", t)}
            found |= {(path.relative_to(ROOT).as_posix(), t) for t in named}
    assert {p for p, _ in found} == {"cost_model/devices/architecture.py"}


def test_no_other_file_compares_a_capability() -> None:
    """What an architecture can do is asked by name; only its own number goes to a compiler."""
    found = set()
    for layer in ("patterns", "cost_model", "codegen", "rewriter", "reattend"):
        for path in (ROOT / layer).rglob("*.py"):
            text = path.read_text("utf-8")
            if not re.search(r"\.(major|capability)\b", text):
                continue
            compared = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Compare))
            if any(isinstance(x, ast.Attribute) and x.attr in ("major", "capability") for n in compared for x in ast.walk(n)):
                found.add(path.relative_to(ROOT).as_posix())
    assert found == {"cost_model/devices/architecture.py"}
