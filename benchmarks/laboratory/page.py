"""The laboratory's rows as tables in text, and as one page with its plots drawn in it: no script, nothing loaded."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# One row as it lies in the results: laboratory.rows.Row as JSON.
Row = dict[str, Any]
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#6e7781")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 460, 280, 56, 40, 14, 12
# What lies below is drawn there: divergences of rounding have no logarithm worth a plot.
LEAST = 1e-6


@dataclass(frozen=True)
class Axis:
    """Values → a share of the axis, its ticks and its title."""

    title: str
    low: float
    high: float
    logarithmic: bool = False

    def at(self, x: float) -> float:
        low, high = self._scaled(self.low), self._scaled(self.high)
        return min(1.0, max(0.0, (self._scaled(x) - low) / (high - low)))

    def _scaled(self, x: float) -> float:
        return math.log10(max(x, LEAST)) if self.logarithmic else x

    @property
    def ticks(self) -> list[float]:
        if self.logarithmic:
            return [10.0**e for e in range(math.ceil(self._scaled(self.low)), math.floor(self._scaled(self.high)) + 1)]
        return [self.low + (self.high - self.low) * i / 4 for i in range(5)]


def said(interval: Row, digits: str = ".3f") -> str:
    return f"{interval['value']:{digits}} [{interval['low']:{digits}}, {interval['high']:{digits}}]"


def worst_head(row: Row) -> Row | None:
    """The head whose first percentile of kept mass is least; None where a method has no kept mass."""
    return min((h for h in row["heads"] if h["p1"]), key=lambda h: float(h["p1"]["value"]), default=None)


def share(x: float | None) -> str:
    return "–" if x is None else f"{x:.2f}"


def largest_error(row: Row) -> str:
    """Relative L2 behind the output projection of the head where it is largest."""
    errors = sorted((h["error"] for h in row["heads"]), key=lambda e: float(e["value"]))
    return said(errors[-1]) if errors else "–"


def speed(row: Row) -> str:
    """The method's attention beside the exact one, both by our kernel; a dash where none was timed."""
    if row["seconds"] is None:
        return "–"
    return f"{speed_up(row):.2f}×"


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("method", lambda r: str(r["method"])),
    ("pairs", lambda r: share(r["density"])),
    ("tiles", lambda r: share(r["tiles"])),
    ("accuracy", lambda r: said(r["answers"]["accuracy"])),
    ("of those it had right", lambda r: said(r["answers"]["kept"])),
    ("KL", lambda r: said(r["answers"]["kl"], ".2g")),
    ("p99 KL", lambda r: said(r["answers"]["kl_p99"], ".2g")),
    ("top-1 agrees", lambda r: said(r["answers"]["agreement"])),
    ("worst head: mean mass", lambda r: said(h["mean"]) if (h := worst_head(r)) else "–"),
    ("its p1", lambda r: said(h["p1"]) if (h := worst_head(r)) else "–"),
    ("its least", lambda r: f"{h['worst']['value']:.2g}" if (h := worst_head(r)) else "–"),
    ("largest error behind W", lambda r: largest_error(r)),
    ("speed at 4096", speed),
)


TASKS = ("recall", "needle", "text", "passages")


def cell(row: Row) -> tuple[str, str, str]:
    """What a row was measured on: model, task, size."""
    return row["model"], row["task"], row["size"]


def order(row: Row) -> int:
    """Tasks as they are told; rows of one stay in the order they were measured."""
    return TASKS.index(row["task"])


def groups(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by model, task and size, in the order they were measured."""
    out: dict[tuple[str, str, str], list[Row]] = {}
    for r in rows:
        out.setdefault(cell(r), []).append(r)
    return out


def heading(key: tuple[str, str, str], rows: Sequence[Row]) -> str:
    a = rows[0]["answers"]
    return (
        f"{key[1]}, {key[2]}, model {key[0]}: {a['answers']} answers in {a['examples']} held-out examples, "
        f"accuracy as written {said(a['original'])}"
    )


def markdown(rows: Iterable[Row]) -> str:
    """Tables, one for each model, task and size."""
    out = []
    for key, part in groups(rows).items():
        out += [f"### {key[1]}, {key[2]}", "", heading(key, part) + ".", ""]
        out += ["| " + " | ".join(n for n, _ in COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        out += ["| " + " | ".join(f(r) for _, f in COLUMNS) + " |" for r in part]
        out.append("")
    return "\n".join(out)


def plain(row: Row) -> str:
    """A row as a line of the terminal."""
    a, h = row["answers"], worst_head(row)
    mass = f"p1 mass {h['p1']['value']:.3f}" if h else "no kept mass"
    return (
        f"{row['task']:7} {row['size']:22} {row['method']:36} tiles {share(row['tiles']):4}  "
        f"accuracy {said(a['accuracy'])}  p99 KL {said(a['kl_p99'], '.2g')}  {mass}  speed {speed(row)}"
    )


def share_left(row: Row) -> float:
    return float(row["tiles"])


def speed_up(row: Row) -> float:
    return float(row["dense"] / row["seconds"])


def plot(rows: Sequence[Row], x: Callable[[Row], float], y: Callable[[Row], Row], across: Axis, up: Axis) -> str:
    """One curve a method, its points joined in the order of x, their intervals as bars."""
    inner, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def px(v: float) -> float:
        return LEFT + inner * across.at(v)

    def py(v: float) -> float:
        return TOP + tall * (1 - up.at(v))

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for t in across.ticks:
        out.append(f'<text x="{px(t):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{t:.3g}</text>')
    for t in up.ticks:
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(t):.1f}" y2="{py(t):.1f}" class="grid"/>')
        out.append(f'<text x="{LEFT - 6}" y="{py(t) + 4:.1f}" text-anchor="end">{t:.3g}</text>')
    out.append(f'<text x="{LEFT + inner / 2}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(across.title)}</text>')
    turned = f'transform="translate(13 {TOP + tall / 2}) rotate(-90)"'
    out.append(f'<text {turned} text-anchor="middle">{html.escape(up.title)}</text>')
    for name, colour in zip(names(rows), colours(rows)):
        points = [(x(r), y(r)) for r in sorted((r for r in rows if family(r) == name), key=x)]
        line = " ".join(f"{px(a):.1f},{py(b['value']):.1f}" for a, b in points)
        out.append(f'<polyline points="{line}" stroke="{colour}" fill="none"/>')
        for a, b in points:
            title = html.escape(f"{name} at {a:.3g}: {said(b, '.3g')}")
            ends = f'y1="{py(b["low"]):.1f}" y2="{py(b["high"]):.1f}"'
            place = f'cx="{px(a):.1f}" cy="{py(b["value"]):.1f}" r="3.2" fill="{colour}"'
            out.append(f'<g stroke="{colour}"><line x1="{px(a):.1f}" x2="{px(a):.1f}" {ends}/>')
            out.append(f"<circle {place}><title>{title}</title></circle></g>")
    return "".join(out) + "</svg>"


def family(row: Row) -> str:
    """A method without its parameters: one curve."""
    return family_of(str(row["method"]))


def family_of(method: str) -> str:
    return method.partition("(")[0].partition(":")[0]


def names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(family(r) for r in rows))


def colours(rows: Sequence[Row]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(names(rows)))]


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #1f2328 }
svg { width: 460px; max-width: 100%; font: 11px system-ui, sans-serif }
svg text { fill: #57606a }
.grid { stroke: #d8dee4 }
polyline { stroke-width: 1.6 }
table { border-collapse: collapse; font-size: 12px; font-variant-numeric: tabular-nums }
td, th { padding: 2px 8px; border-bottom: 1px solid #d8dee4; text-align: left; white-space: nowrap }
.wide { overflow-x: auto }
.key span { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em }
"""


def page(rows: Sequence[Row], about: str) -> str:
    """The whole page: of each model, task and size its plots over density and speed, and its table."""
    out = ["<!doctype html><html lang=en><meta charset=utf-8><title>The laboratory</title>", f"<style>{STYLE}</style>"]
    out.append(f"<h1>Quality of approximations</h1><p>{html.escape(about)}</p>")
    tiles = Axis("share of tiles that are left", 0, 1)
    for key, part in groups(rows).items():
        most = max(1.0, *(r["answers"]["kl_p99"]["high"] for r in part))
        divergence = Axis("99th percentile of KL on answers, nats", LEAST, 10.0 ** math.ceil(math.log10(most)), True)
        accuracy = Axis("accuracy on answers", 0, 1)
        out.append(f"<h2>{html.escape(f'{key[1]}, {key[2]}')}</h2><p>{html.escape(heading(key, part))}.</p><p class=key>")
        out += [f'<span style="background:{c}"></span>{html.escape(n)}' for n, c in zip(names(part), colours(part))]
        out.append("</p>")
        ran = [r for r in part if r["seconds"] is not None]
        fast = Axis("speed-up of our kernel at 4096 tokens, same share", 0, max([1.0, *map(speed_up, ran)]))
        sparse = [r for r in part if r["tiles"] is not None]
        for rows_, x, across in ((sparse, share_left, tiles), (ran, speed_up, fast)):
            if rows_:
                out.append(plot(rows_, x, lambda r: r["answers"]["accuracy"], across, accuracy))
                out.append(plot(rows_, x, lambda r: r["answers"]["kl_p99"], across, divergence))
        out.append("<div class=wide><table><tr>" + "".join(f"<th>{html.escape(n)}</th>" for n, _ in COLUMNS) + "</tr>")
        for r in part:
            out.append("<tr>" + "".join(f"<td>{html.escape(f(r))}</td>" for _, f in COLUMNS) + "</tr>")
        out.append("</table></div>")
    return "".join(out) + "</html>"
