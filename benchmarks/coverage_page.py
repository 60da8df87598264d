"""Rows of the walk as tables: for the terminal, and as the page docs/coverage.md.

    attentions   counted while eager runs, by code that detection knows nothing of
    found        those that are sites        named   misses with a reason        silent   what neither accounts for
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Row = dict[str, Any]
TITLES = ("library", "models", "attentions", "found", "named", "silent", "rewritten", "runs", "right", "moved", "wrong",
          "raised", "check differs", "stopped", "seconds")


def forced(row: Row) -> Row:
    """The run in which every attention that can be is rewritten; empty where there is none."""
    runs = [v for k, v in row.get("runs", {}).items() if k.endswith("forced") and "verdict" in v]
    return runs[0] if runs else {}


def ran(rows: Iterable[Row]) -> list[Row]:
    return [r for r in rows if forced(r)]


def found(row: Row) -> int:
    """Attentions of the count that are sites; a site beyond the count makes up for none of another model."""
    return min(int(row["attentions"]), int(forced(row).get("found", 0)))


def missing(row: Row) -> int:
    return int(row["attentions"]) - found(row)


def named(row: Row) -> int:
    """Of these, those that a report names: by a miss, or as a frame that Dynamo gave up."""
    run = forced(row)
    return missing(row) if run.get("given_up") else min(missing(row), sum(run.get("left", {}).values()))


def silent(row: Row) -> int:
    return missing(row) - named(row)


def fused(row: Row) -> int:
    """Attentions that are SDPA in PyTorch alone: as the model is written, or where Inductor's patterns put it."""
    seen = row.get("matcher", {})
    return min(int(row["attentions"]), int(seen.get("written", 0)) + int(seen.get("hits", 0)))


def verdicts(row: Row) -> Counter[str]:
    """How many runs of a model ended how; checks that differ are counted beside."""
    out: Counter[str] = Counter()
    for run in row.get("runs", {}).values():
        out[run.get("verdict", "eager fails")] += 1
        out["check differs"] += run.get("checks", {}).get("differs", 0) > 0
        out["check raised"] += run.get("checks", {}).get("raised", 0) > 0
    return +out


def line(name: str, rows: list[Row]) -> tuple[Any, ...]:
    """The figures of some models, in the order of the titles."""
    own = ran(rows)

    def total(of: Callable[[Row], int]) -> int:
        return sum(map(of, own))

    ends = sum((verdicts(r) for r in own), Counter[str]())
    rewritten = sum(n for r in own for k, n in forced(r).get("kernels", {}).items() if k != "original")
    return (
        name, len(own), total(lambda r: r["attentions"]), total(found), total(named), total(silent), rewritten,
        sum("verdict" in run for r in own for run in r["runs"].values()), *(ends[k] for k in TITLES[8:13]),
        sum("stopped" in r for r in rows), round(sum(r["seconds"] for r in rows)),
    )


def lines(rows: list[Row]) -> list[tuple[Any, ...]]:
    libraries = dict.fromkeys(r["library"] for r in rows)
    return [*(line(x, [r for r in rows if r["library"] == x]) for x in sorted(libraries)), line("together", rows)]


def table(rows: list[Row]) -> str:
    """One line a library, then every finding and every reason."""
    shown = [TITLES, *lines(rows)]
    widths = [max(len(str(x)) for x in column) for column in zip(*shown)]
    out = ["  ".join(str(x).rjust(w) for x, w in zip(one, widths)) for one in shown]
    out += [f"{name}: {why}" for name, why in findings(rows)]
    out += [f"left {n}×: {why}" for why, n, _ in reasons(rows)]
    return "\n".join(out)


def findings(rows: list[Row]) -> list[tuple[str, str]]:
    """What went wrong, or ended before it was known, model by model."""
    out: list[tuple[str, str]] = []
    for r in rows:
        name = f"{r['library']} {r['name']}"
        for kind, run in r.get("runs", {}).items():
            said = [v for k in ("why", "raised") if (v := run.get(k)) and run["verdict"] != "right"]
            said += [x for x in run.get("aside", ()) if not x.startswith("unchecked")] + run.get("errors", [])
            said += [x for x in run.get("left", ()) if x.startswith("a bug in reattend")]
            out += [(f"{name} {kind}", f"{run.get('verdict')}: {x}") for x in said]
        if str(r.get("backward", "right")).split(":")[0] not in ("right", "eager"):
            out.append((f"{name} backward", r["backward"]))
        if "stopped" in r:
            out.append((name, r["stopped"]))
    return out


def reasons(rows: list[Row]) -> list[tuple[str, int, list[str]]]:
    """Reasons of misses with how often and in which models, the commonest first; a node's number is no reason of its own."""
    many: Counter[str] = Counter()
    models: dict[str, dict[str, None]] = {}
    for r in ran(rows):
        for why, n in forced(r).get("left", {}).items():
            text = re.sub(r"_\d+\b", "", why)
            many[text] += n
            models.setdefault(text, {})[r["name"]] = None
    return [(why, n, list(models[why])) for why, n in many.most_common()]


# --- the page -------------------------------------------------------------------------------------------------------

_HEAD = """# Coverage

Which attentions of real models are found, and is what runs instead of them right? This page is made, not typed:
`python benchmarks/coverage.py` walks through the models, `--matcher` asks PyTorch's own matcher, and `--table
docs/coverage.md` writes what is below from `benchmarks/results/coverage_cpu.json`. A test holds the two together.

Every architecture that a library names is built small, with random weights none of which is near zero, and called in
a process of its own with a time box. **Attentions** are counted while the model runs as written: softmaxes that flow
into a product, and calls of SDPA, by code that shares nothing with detection. **Found** are those that are sites of a
report; **named**, misses that have a reason there, or a frame that Dynamo gave up; **silent** is what neither
accounts for. **Torch alone** are the attentions that are SDPA without us, of those in models that PyTorch's matcher
was asked about: as a model is written, or where one of Inductor's patterns matched in its captured graph.
**Rewritten** is what a kernel of ours computed where the policy allows no other. Each model runs in float32 and
bfloat16, as chosen and with our kernels forced, and every output is held against float64 as [design.md](design.md)
says: *right*; *moved*, where the model itself moves as far when what its modules give moves by a unit in the last
place (an expert, a bucket); or *wrong*.
"""


def page(kept: Mapping[str, Any]) -> str:
    """docs/coverage.md for the rows of a walk."""
    rows: list[Row] = sorted(kept["models"], key=lambda r: (r["library"], r["name"]))
    libraries = ", ".join(
        f"{k} {v}" for k, v in sorted({n: v for known in kept["versions"].values() for n, v in known.items()}.items())
    )
    run = ran(rows)
    parts = [
        _HEAD, f"{len(rows)} architectures were tried and {len(run)} of them ran, on one thread of {kept['device']}, "
        f"{kept['date']}, with\n{libraries}.\n",
        _libraries(rows), _missing(run), _reasons(rows), _findings(rows), _not_run(rows),
    ]
    return "\n".join(x for x in parts if x)


def _grid(titles: Iterable[object], body: Iterable[Iterable[object]]) -> str:
    cells = [[str(x).replace("|", "\\|") for x in row] for row in (titles, *body)]
    rule = ["---"] * len(cells[0])
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:])) + "\n"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "–"


def _libraries(rows: list[Row]) -> str:
    def own(library: str) -> list[Row]:
        return [r for r in ran(rows) if library in (r["library"], "together")]

    body = []
    for name, models, attentions, seen, said, lost, rewritten, *rest in lines(rows):
        asked = [r for r in own(name) if "matcher" in r]
        whole = sum(r["attentions"] for r in asked)
        torch = f"{sum(map(fused, asked))} of {whole} ({_share(sum(map(fused, asked)), whole)})" if whole else "–"
        body.append((name, models, attentions, seen, _share(seen, attentions), said, lost, torch, rewritten, *rest))
    titles = (*TITLES[:4], "share", *TITLES[4:6], "torch alone", *TITLES[6:])
    return _grid(titles, body)


def _missing(rows: list[Row]) -> str:
    """Models in which fewer are found than counted, each with its reasons."""
    body = [
        (f"{r['library']} {r['name']}", r["attentions"], found(r), "; ".join(_left(r)) or "silent")
        for r in rows if missing(r)
    ]
    if not body:
        return "## Attentions that are not found\n\nNone.\n"
    return "## Attentions that are not found\n\n" + _grid(("model", "attentions", "found", "why"), body)


def _left(row: Row) -> list[str]:
    run = forced(row)
    given_up = run.get("given_up")
    said = [f"a frame that Dynamo gave up: {str(given_up[0])[:80]} …"] if isinstance(given_up, list) else []
    return said + [f"{why} ×{n}" if n > 1 else why for why, n in run.get("left", {}).items()]


def _reasons(rows: list[Row]) -> str:
    all_of = reasons(rows)
    whole = sum(n for _, n, _ in all_of)
    body = [
        (why, n, _share(n, whole), ", ".join(models[:3]) + (f" and {len(models) - 3} more" if len(models) > 3 else ""))
        for why, n, models in all_of
    ]
    head = (
        "## Misses by reason\n\nWhat a report names, in the order of how often: attentions that are not found, and places "
        "that look like one\nand are none that the count knows (states, routers, projections).\n\n"
    )
    return head + _grid(("reason", "misses", "share", "models"), body) if body else ""


def _findings(rows: list[Row]) -> str:
    alike: dict[tuple[str, str], list[str]] = {}
    for name, said in findings(rows):
        if not said.startswith("moved"):
            # the same at several attentions of one run, in other numbers
            alike.setdefault((name, re.sub(r"[\d.e-]+", "", said)), []).append(said)
    body = [(name, said[0] + (f" (×{len(said)})" if len(said) > 1 else "")) for (name, _), said in alike.items()]
    if not body:
        return "## Findings\n\nNo run is wrong, none raised, no check differs, no model was stopped.\n"
    return "## Findings\n\n" + _grid(("model and run", "what"), body)


def _not_run(rows: list[Row]) -> str:
    """Models that the walk cannot build, or call, as they are written."""
    kinds: dict[str, list[str]] = {}
    for r in rows:
        if not forced(r) and "stopped" not in r:
            why = r.get("eager") or next((v["eager"] for v in r.get("runs", {}).values() if "eager" in v), "")
            kinds.setdefault(_kind(why), []).append(r["name"])
    if not kinds:
        return ""
    body = [(why, len(names), ", ".join(names)) for why, names in sorted(kinds.items(), key=lambda kv: -len(kv[1]))]
    return (
        "## Not walked\n\nArchitectures that the walk's settings do not build small, or that none of its inputs calls, "
        "without us.\n\n" + _grid(("eager PyTorch says", "models", "which"), body)
    )


def _kind(why: str) -> str:
    """The kind of an error: what was raised, and its first words."""
    parts = re.sub(r"^RuntimeError: (?=\w+(Error|Large): )", "", why).split(": ")
    return parts[0] if parts[0] != "TooLarge" else "more than 40 million parameters when shrunk"
