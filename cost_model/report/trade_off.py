"""The trade-off of approximate methods as a picture: what each configuration that was tried saves, and its error.

    x: seconds saved over the best exact kernels      ● predicted   ○ measured beside the model, attention by attention
    y: largest error of the whole model's output, log scale; a line at the budget
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ..words import seconds_text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 70, 20, 20, 50
# Errors below this are drawn as this: a logarithm of 0 has no place.
LEAST = 1e-9


@dataclass(frozen=True)
class TradeOff:
    """A configuration: how many attentions run a method, predicted seconds saved, measured ones, and its largest error.

    `saved` and `measured` are over the best exact candidates of these attentions, a call of each; `measured` is None where
    a clock was not read. `installed`: the one that was; `held_out`: the error is of examples that had no part in the choice.
    """

    attentions: int
    saved: float
    measured: float | None
    error: float
    installed: bool = False
    held_out: bool = False

    def __str__(self) -> str:
        clock = f", measured {_signed(self.measured)}" if self.measured is not None else ""
        where = "held out" if self.held_out else "that configure"
        attentions = f"{self.attentions} attention{'s' * (self.attentions != 1)}"
        return f"{attentions}: {self.error:.1e} on examples {where}, predicted to save {_signed(self.saved)}{clock}"


def _signed(seconds: float) -> str:
    return seconds_text(seconds) if seconds >= 0 else f"-{seconds_text(-seconds)}"


def svg(points: Sequence[TradeOff], budget: float) -> str:
    """The picture as text. Raises ValueError where there is nothing to draw."""
    if not points:
        raise ValueError("nothing was tried: there is no trade-off to draw")
    saved = [x for p in points for x in (p.saved, p.measured) if x is not None]
    low, high = min(0.0, *saved), max(0.0, *saved) or 1.0
    finite = [p.error for p in points if math.isfinite(p.error)]
    logs = [math.log10(max(e, LEAST)) for e in (*finite, budget)]
    bottom, top = math.floor(min(logs)), math.ceil(max(logs)) + (math.floor(min(logs)) == math.ceil(max(logs)))

    def x_of(seconds: float) -> float:
        return LEFT + (seconds - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y_of(error: float) -> float:
        at = math.log10(max(error, LEAST)) if math.isfinite(error) else float(top)
        return TOP + (top - at) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    font = 'font-family="sans-serif" font-size="12"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {font}>']
    for power in range(bottom, top + 1):
        y = y_of(10.0**power)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/><text x="{LEFT - 8}" y="{y + 4:.1f}" '
                     f'text-anchor="end">1e{power}</text>')
    for i in range(5):
        seconds = low + (high - low) * i / 4
        parts.append(f'<text x="{x_of(seconds):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
                     f"{escape(_signed(seconds))}</text>")
    line = y_of(budget)
    parts.append(f'<path d="M{LEFT} {line:.1f}H{WIDTH - RIGHT}" stroke="#c00" stroke-dasharray="4 3"/>'
                 f'<text x="{WIDTH - RIGHT}" y="{line - 5:.1f}" text-anchor="end" fill="#c00">max_error {budget:g}</text>')
    for p in points:
        colour, size = ("#06c", 6) if p.installed else ("#888", 4)
        said = f"<title>{escape(str(p))}</title>"
        if p.measured is not None:
            parts.append(f'<path d="M{x_of(p.saved):.1f} {y_of(p.error):.1f}H{x_of(p.measured):.1f}" stroke="#ccc"/>'
                         f'<circle cx="{x_of(p.measured):.1f}" cy="{y_of(p.error):.1f}" r="{size}" fill="white" '
                         f'stroke="{colour}">{said}</circle>')
        parts.append(f'<circle cx="{x_of(p.saved):.1f}" cy="{y_of(p.error):.1f}" r="{size}" fill="{colour}">{said}</circle>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">'
                 "seconds saved a call (● predicted, ○ measured); blue is installed</text>"
                 f'<text x="14" y="{HEIGHT / 2:.0f}" text-anchor="middle" transform="rotate(-90 14 {HEIGHT / 2:.0f})">'
                 "largest relative error</text></svg>")
    return "\n".join(parts) + "\n"
