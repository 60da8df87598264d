"""Private parts of PyTorch lie behind one file: nothing else names one, each has its row in the docs, a lost one is said."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.rewriter.graph import torch_private
from reattend.rewriter.graph.torch_private import PARTS, Private, TorchChanged

ROOT = Path(__file__).resolve().parent.parent.parent
THE_FILE = "rewriter/graph/torch_private.py"
FILES = sorted(p for layer in ("reattend", "rewriter", "codegen", "cost_model", "patterns") for p in (ROOT / layer).rglob("*.py"))
# Emitted files stand alone and cannot ask ours: what their text names, by the file that holds the text.
EMITTED = {
    ("codegen/vendor/flex.py", "torch._guards.detect_fake_mode"),
    ("codegen/skeletons/cpu.py", "torch._scaled_dot_product_flash_attention_for_cpu"),
}
# Names with an underscore that belong to others: named tuples, transformers, Triton's interpreter.
OTHERS = {"_replace", "_from_config", "_model_mapping", "_convert_float", "_patch_lang"}
# Undocumented without an underscore.
UNDOCUMENTED = r"torch\.fx\.experimental\b|torch\.ops\.higher_order\b|\.node\.(expr|hint|shape_env|maybe_as_int)\b|partial_fx_graph|compile_subgraph_reason"
# What such a name ends in: of other attributes no text is made.
ENDS = set(re.findall(r"\w+", re.sub(r"\\[b.]", " ", UNDOCUMENTED)))
PRIVATE = re.compile(rf"torch(\.\w+)*\._[a-zA-Z]\w*(\.\w+)*|{UNDOCUMENTED}")


@cache
def nodes(text: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(text)))


def private_names(text: str, own: set[str]) -> Iterator[str]:
    """The private parts of torch that a file names: imported, as an attribute of anything, or in a text."""
    known = own | OTHERS
    torch_names = {"torch": "torch"}
    documents = {
        id(n.body[0].value)
        for n in nodes(text)
        if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)) and n.body and isinstance(n.body[0], ast.Expr)
    }
    for n in nodes(text):
        match n:
            case ast.Import(names):
                torch_names |= {a.asname: a.name for a in names if a.asname and a.name.split(".")[0] == "torch"}
                yield from (a.name for a in names if PRIVATE.search(a.name))
            case ast.ImportFrom(module=str(module), level=0) if module.split(".")[0] == "torch":
                torch_names |= {a.asname or a.name: f"{module}.{a.name}" for a in n.names}
                yield from (f"{module}.{a.name}" for a in n.names if PRIVATE.search(f"{module}.{a.name}"))
    for n in nodes(text):
        if isinstance(n, ast.Attribute):
            lent = n.attr.startswith("_") and not n.attr.startswith("__") and n.attr not in known
            if not lent and n.attr not in ENDS:
                continue
            path = ast.unparse(n)
            first, _, rest = path.partition(".")
            whole = f"{torch_names.get(first, first)}.{rest}"
            if lent or re.fullmatch(rf"(torch\.[\w.]+|.*)({UNDOCUMENTED})", whole):
                yield whole
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in documents:
            yield from (m[0] for m in PRIVATE.finditer(n.value))


def defined(text: str) -> set[str]:
    """Names that a file defines itself: functions, classes, fields, and what it sets on `self`."""
    names: set[str] = set()
    for n in nodes(text):
        match n:
            case ast.FunctionDef(name) | ast.ClassDef(name) | ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                names.add(name)
    return names


def test_no_other_file_names_a_private_part_of_torch() -> None:
    assert len(FILES) > 150
    texts = {p.relative_to(ROOT).as_posix(): p.read_text("utf-8") for p in FILES}
    own = set().union(*(defined(t) for name, t in texts.items() if name != THE_FILE))
    found = {(name, part) for name, t in texts.items() if name != THE_FILE for part in private_names(t, own)}
    nodes.cache_clear()
    assert found == EMITTED


@pytest.mark.parametrize(
    "text",
    [
        "import torch._dynamo", "from torch._guards import TracingContext", "from torch import _C", "torch._C.f()",
        "import torch as t\nt._C.f()", "from torch import nn\nnn.modules.module._hooks", "op._schema",
        "module._compiled_call_impl = f", "x.node.expr", "from torch.fx.experimental.proxy_tensor import make_fx",
        "torch.ops.higher_order.f", "getattr(torch, 'x')\ny = 'torch._C.g'", "torch.ops.aten._to_copy.default",
        "getattr(gm, 'compile_subgraph_reason')",
    ],
)
def test_a_private_part_is_seen_however_it_is_named(text: str) -> None:
    assert list(private_names(text, set()))


@pytest.mark.parametrize("text", ["torch.compile(f)", "torch.__version__", "self._own()", "'torch.export'", "x.node.users"])
def test_a_public_part_is_no_private_one(text: str) -> None:
    assert not list(private_names(text, {"_own"}))


def row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def test_the_table_of_the_docs_is_that_of_the_file() -> None:
    """Row by row, so that neither side has an entry more."""
    text = (ROOT / "docs" / "compatibility.md").read_text("utf-8")
    section = text.split("## Private parts of PyTorch")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert rows[: len(PARTS)] == [row((f"`{p.shown}`", p.use, p.since, p.without)) for p in PARTS]
    assert {re.findall("`(.*?)`", r)[0] for r in rows[len(PARTS) :]} == {part for _, part in EMITTED}


def test_every_part_that_is_a_name_is_there() -> None:
    # Dynamo sets this one while it compiles
    named = [p for p in PARTS if ":" in p.path and not p.path.endswith("tls.current_tx")]
    assert len(named) > 30
    for part in named:
        part.found()


def test_a_part_that_is_gone_is_said_in_a_sentence() -> None:
    part = Private("torch._guards:no_such_name", "the fake mode of a graph", "2.2", "no graph can be rewritten")
    wanted = rf"PyTorch {re.escape(torch.__version__)} lacks torch\._guards\.no_such_name \(the fake mode of a graph\): no graph"
    for gone in (part, replace(part, path="torch.no_such_module:x", use="x")):
        with pytest.raises(TorchChanged, match="lacks torch"):
            gone.found()
    with pytest.raises(TorchChanged, match=wanted):
        part.found()


class Small(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x


@pytest.mark.parametrize("name", ["CALL_HOOK", "OWN_CALL", "FX_TRACING", "FUNCTORCH", "DISPATCH", "HOOK_GUARDS", "SAVED_HOOKS"])
def test_a_model_is_not_touched_where_its_calls_cannot_be_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    part: Private = getattr(torch_private, name)
    lost = replace(part, path=part.path + "_lost")
    monkeypatch.setattr(torch_private, "_EACH_CALL", (lost,))
    model = Small()
    with pytest.raises(TorchChanged, match=rf"{part.use}\): no model can be optimised"):
        reattend.optimize(model)
    assert model._compiled_call_impl is None


def test_reports_say_less_where_dynamo_notes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("METRICS", "COMPILE_ID", "FRAME"):
        part: Private = getattr(torch_private, name)
        monkeypatch.setattr(torch_private, name, replace(part, path=part.path + "_lost"))
    model, x = Small(), torch.randn(1, 2, 16, 8)
    wanted = model(x)
    torch.testing.assert_close(reattend.optimize(model)(x), wanted)
    (piece,) = reattend.report(model).pieces
    assert piece.calls == 1
    assert not piece.recompiled


def test_a_capture_is_said_as_long_as_a_flag_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch_private.said_to_compile():
        assert torch.compiler.is_compiling()
    assert not torch.compiler.is_compiling()
    monkeypatch.delattr("torch.compiler._is_compiling_flag")
    with torch_private.said_to_compile():
        assert not hasattr(torch.compiler, "_is_compiling_flag")
