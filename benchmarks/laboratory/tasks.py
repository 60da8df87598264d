"""Tasks with known answers: words [B, N] in, at some positions the word that is asked for; deterministic by seed.

    recall    multi-query associative recall, the generator of Zoology (Arora et al. 2023, arXiv 2312.04927, section 4.1):
              k1 v1 … kD vD, then every key once more at a gap of power law; asked is its value
    needle    D pairs k v scattered over filler, all keys asked at the very end: what a window of keys must lose
    text      characters of some of the repository's own documents, each the answer to those before it

One difference from Zoology: what stands between queries is drawn from words of its own. Fillers drawn from all words repeat
keys where the vocabulary is small, and then no model can be right every time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

KEYS, VALUES, FILLERS = 96, 96, 32
# keys are words 1 …, then values, then fillers; word 0 is nobody
WORDS = 1 + KEYS + VALUES + FILLERS
NOBODY = -100
POWER = 0.01
ROOT = Path(__file__).parents[2]
SYMBOLS = 97
# Pages that say what does not change often: a model learns them anew when one of them does.
PAGES = (
    "LICENSE", "docs/decisions/*.md", "docs/tutorials/*.md", "docs/cascade.md", "docs/sparsity.md", "docs/sharding.md",
    "docs/how-to-add-an-operator.md", "docs/mutation.md",
)


@dataclass(frozen=True)
class Batch:
    """words [B, N] and labels [B, N], int64; a label is NOBODY (-100) where nothing is asked.

    `finish` makes logits of what the model gives for all words together, where these are not the logits.
    """

    words: Tensor
    labels: Tensor
    finish: Callable[[Tensor], Tensor] = lambda given: given


@dataclass(frozen=True)
class Size:
    """One shape of a task: N tokens with D pairs (text has none)."""

    tokens: int
    pairs: int = 0

    def __str__(self) -> str:
        return f"{self.tokens}" + (f" tokens, {self.pairs} pairs" if self.pairs else " tokens")


def _drawn(size: int, batch: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys without replacement within a row, and values, [B, D]."""
    keys = torch.rand(batch, KEYS, generator=g).argsort(-1)[:, :size] + 1
    return keys, torch.randint(1 + KEYS, 1 + KEYS + VALUES, (batch, size), generator=g)


def _fillers(batch: int, tokens: int, g: torch.Generator) -> Tensor:
    return torch.randint(1 + KEYS + VALUES, WORDS, (batch, tokens), generator=g)


def recall(size: Size, batch: int, g: torch.Generator) -> Batch:
    """Gaps are drawn without replacement with p(i) ∝ a · i^(a - 1), a = 0.01: the key is asked at 2D + 2 · gap."""
    d, n = size.pairs, size.tokens
    if n % 2 or 4 * d > n or d > KEYS:
        raise ValueError(f"{d} pairs need an even number of at least {4 * d} tokens and {d} keys, given {n} and {KEYS}")
    keys, values = _drawn(d, batch, g)
    words, labels = _fillers(batch, n, g), torch.full((batch, n), NOBODY)
    words[:, 0 : 2 * d : 2], words[:, 1 : 2 * d : 2] = keys, values
    slots = torch.arange(1, (n - 2 * d) // 2 + 1, dtype=torch.float64)
    # the order of log p + Gumbel noise is a draw without replacement
    noise = -torch.rand(batch, len(slots), generator=g, dtype=torch.float64).log().neg().log()
    asked = 2 * d + 2 * ((POWER - 1) * slots.log() + noise).topk(d).indices
    return Batch(words.scatter_(1, asked, keys), labels.scatter_(1, asked, values))


def needle(size: Size, batch: int, g: torch.Generator) -> Batch:
    """Pairs at even positions anywhere before the last 2D words, where each key is asked once, fillers between."""
    d, n = size.pairs, size.tokens
    if n % 2 or 4 * d > n or d > KEYS:
        raise ValueError(f"{d} pairs need an even number of at least {4 * d} tokens and {d} keys, given {n} and {KEYS}")
    keys, values = _drawn(d, batch, g)
    words, labels = _fillers(batch, n, g), torch.full((batch, n), NOBODY)
    at = 2 * torch.rand(batch, n // 2 - d, generator=g).argsort(-1)[:, :d]
    words.scatter_(1, at, keys).scatter_(1, at + 1, values)
    order = torch.rand(batch, d, generator=g).argsort(-1)
    words[:, n - 2 * d :: 2], labels[:, n - 2 * d :: 2] = keys.gather(1, order), values.gather(1, order)
    return Batch(words, labels)


@cache
def characters() -> tuple[Tensor, Tensor]:
    """The documents as symbols: what is trained on, and the last tenth of every document, which never is."""
    train, held = [], []
    for path in sorted(p for pattern in PAGES for p in ROOT.glob(pattern)):
        # printable ASCII is 0 … 94, a line's end 95, any other character 96
        symbols = [95 if c == "\n" else ord(c) - 32 if " " <= c <= "~" else 96 for c in path.read_text(encoding="utf-8")]
        cut = len(symbols) * 9 // 10
        train += symbols[:cut]
        held += symbols[cut:]
    return torch.tensor(train), torch.tensor(held)


def _text(size: Size, batch: int, g: torch.Generator, of: int) -> Batch:
    source = characters()[of]
    start = torch.randint(len(source) - size.tokens, (batch, 1), generator=g)
    taken = source[start + torch.arange(size.tokens + 1)]
    return Batch(taken[:, :-1], taken[:, 1:])


@dataclass(frozen=True)
class Task:
    """A task: its words, how training batches are drawn, how held-out ones are."""

    name: str
    words: int
    draw: Callable[[Size, int, torch.Generator], Batch]
    held: Callable[[Size, int, torch.Generator], Batch]

    def batch(self, size: Size, examples: int, seed: int, *, held_out: bool = True) -> Batch:
        """`examples` examples; held-out ones come from seeds (and, of text, from pages) that training never draws."""
        # an offset that no step of a training reaches
        g = torch.Generator().manual_seed(seed + (1 << 40 if held_out else 0))
        return (self.held if held_out else self.draw)(size, examples, g)


TASKS = {
    "recall": Task("recall", WORDS, recall, recall),
    "needle": Task("needle", WORDS, needle, needle),
    "text": Task("text", SYMBOLS, lambda s, b, g: _text(s, b, g, 0), lambda s, b, g: _text(s, b, g, 1)),
}
