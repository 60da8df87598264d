"""What approximations of attention do to models that need it, without a download: quality against density and speed.

    python benchmarks/quality.py [--models recall,text,minilm] [--tasks recall,needle,text,passages] [--threads 1]
                                 [--methods "moba by head,xattention"] [--budgets 0.125,0.25,0.5] [--examples 32]
                                 [--cache build/laboratory] [--page build/quality.html] [--table docs/laboratory.md]

Trains small causal models with rotary positions on this CPU (once: they are kept in the cache as safetensors, and a training
that was cut off goes on), runs each task's held-out examples as the model is written and under every method and selection at
every budget, and prints what became of the answers: accuracy, divergence with its 99th percentile, what heads keep.
Intervals are 95% bootstraps by example. Writes benchmarks/results/quality_cpu.json, where rows of tasks that were not asked
for now stay, a page with plots, and with --table the document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import timing
import torch
from laboratory import minilm, page
from laboratory.budgets import AT, laws
from laboratory.by_head import ByHead
from laboratory.laws import Law, Refused
from laboratory.models import Shape
from laboratory.rows import Row, held_out, logits, measured
from laboratory.selections import SELECTIONS, Selection
from laboratory.speed import TOKENS, seconds
from laboratory.tasks import SYMBOLS, WORDS, Batch, Size
from laboratory.training import Recipe, trained
from torch import nn

from reattend.patterns.verdict import Refusal

RECIPES = {
    "recall": Recipe(
        "recall", Shape(WORDS),
        (
            ("recall", Size(64, 8), 64), ("needle", Size(64, 8), 64), ("recall", Size(128, 16), 32),
            ("needle", Size(128, 8), 32), ("recall", Size(256, 32), 16), ("needle", Size(512, 8), 8),
        ),
        steps=1500,
    ),
    "text": Recipe("text", Shape(SYMBOLS), (("text", Size(256), 16),), steps=400),
}
# What each model is asked.
CELLS = {"recall": (("recall", Size(512, 32)), ("needle", Size(512, 8))), "text": (("text", Size(256)),)}
START, END = "<!-- measured -->", "<!-- end of measured -->"


def under_all(
    name: str, model: nn.Module, task: str, size: Size, batch: Batch, over: Sequence[Selection | Law | ByHead | str]
) -> Iterator[Row]:
    """A task of a model under each of these."""
    exact = logits(model, batch)
    for under in over:
        try:
            if isinstance(under, str):
                raise Refused(under)
            yield measured(model, name, task, size, under, exact, batch)
        except Refused as no:
            print(f"{task:7} {size!s:22} not for this attention: {no}", flush=True)


def rows_of(
    name: str, tasks: Sequence[str], budgets: Sequence[float], examples: int, cache: Path, wanted: Callable[[str], bool]
) -> Iterator[Row]:
    """These tasks of a model under every wanted selection and registered method at every budget."""
    anchors = [kind(share) for kind in SELECTIONS if wanted(kind.__name__) for share in budgets]
    if name == minilm.NAME:
        where = minilm.folder()
        if "passages" not in tasks:
            return
        if where is None:
            print(minilm.ABSENT)
            return
        size, batch = minilm.passages(where, min(examples, minilm.MOST))
        yield from under_all(name, minilm.Embedder(where), "passages", size, batch, anchors)
        return
    model = trained(RECIPES[name], cache, say=True)
    for task, size in (x for x in CELLS[name] if x[0] in tasks):
        made = laws(model, name, task, size, budgets, cache, RECIPES[name].key(), wanted)
        yield from under_all(name, model, task, size, held_out(task, size, examples), [*anchors, *made])


def with_table(text: str, table: str) -> str:
    """The document with what was measured between its two marks."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{table}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join((*RECIPES, minilm.NAME)))
    parser.add_argument("--tasks", default="recall,needle,text,passages")
    parser.add_argument("--methods", default="", help="only these, by name (\"moba by head\"); rows of others stay")
    parser.add_argument("--budgets", default="0.125,0.25,0.5")
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("build/laboratory"))
    parser.add_argument("--page", type=Path, default=Path("build/quality.html"))
    parser.add_argument("--table", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    budgets, tasks, rows = [float(x) for x in given.budgets.split(",")], given.tasks.split(","), []
    only = {x.strip() for x in given.methods.split(",") if x.strip()}

    def wanted(family: str) -> bool:
        return not only or family in only

    for name in given.models.split(","):
        for row in rows_of(name, tasks, budgets, given.examples, given.cache, wanted):
            rows.append(json.loads(json.dumps(row.as_json())))
            print(page.plain(rows[-1]), flush=True)
    rows = [*kept({page.cell(r) for r in rows}, wanted), *rows]
    rows.sort(key=page.order)
    fill_speeds(rows)
    written = timing.write("quality_cpu", rows)
    about = f"Intervals are 95% bootstraps by example; {timing.processor()}."
    given.page.parent.mkdir(parents=True, exist_ok=True)
    given.page.write_text(page.page(rows, about), encoding="utf-8")
    if given.table:
        given.table.write_text(with_table(given.table.read_text(encoding="utf-8"), page.markdown(rows)), encoding="utf-8")
    print(f"written to {written} and {given.page}")


def fill_speeds(rows: list[page.Row]) -> None:
    """Put the times of methods that have a budget into their rows, where none are."""
    known: dict[tuple[str, float], tuple[float, float] | Refusal] = {}
    for r in rows:
        name, share = page.family(r), r["budget"]
        if r["seconds"] is not None or name not in AT:
            continue
        if (name, share) not in known:
            known[name, share] = seconds(Law(AT[name](TOKENS, share)))
        found = known[name, share]
        if isinstance(found, Refusal):
            print(f"no kernel of {name}: {found}")
        else:
            r["seconds"], r["dense"] = found


def kept(measured_now: set[tuple[str, str, str]], wanted: Callable[[str], bool]) -> list[page.Row]:
    """Rows that lie in the results from before, of other cells and of methods that were not asked for."""
    path = timing.RESULTS / "quality_cpu.json"
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return [r for r in before if page.cell(r) not in measured_now or not wanted(page.family(r))]


if __name__ == "__main__":
    main()
