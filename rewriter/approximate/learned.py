"""What a method has learned for each attention: read from its file, or fitted on examples that configure and kept there.

    file    "attention.part" → tensor, safetensors; whole or not at all
    fit     queries and keys as the model's own code has them, their first tokens, layer by layer (feature_maps)

A file that is there is taken as it is, and never written: what a plan was made with stays what it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ...patterns.methods.linear.hedgehog import Hedgehog
from ...patterns.methods.linear.learned import LearnedMethod
from ...patterns.methods.method import Method, Replacement
from ...patterns.methods.selecting import steps as st
from ...patterns.methods.selecting.program import TableProgram, bound, laid_out
from ...patterns.verdict import Refusal
from ..choose import choose
from .data import CalibrationError, Example, call
from .feature_maps import FeatureMaps, fit, load_parts, save
from .record import Recorder

# Tokens of an example that maps are fitted on at most: their rows are held whole.
TOKENS = 512


def learned(
    model: nn.Module, m: LearnedMethod, recorder: Recorder, examples: Sequence[Example]
) -> Mapping[str, Method | Refusal]:
    """The method at each attention with the parts that its file has for it, or why it has none. Within `recorder.at_work`.

    Raises CalibrationError where the file cannot be read.
    """
    path = Path(m.file)
    if not m.file:
        return {s: m.refuse("it needs a file for what it learns: give its name") for s in recorder.sites}
    if not path.exists():
        if not isinstance(m, Hedgehog):
            raise CalibrationError(f"{m}: there is no file {m.file}, and nothing fits it here")
        found = _fitted(model, m, recorder, examples)
        if made := {s: x for s, x in found.items() if isinstance(x, FeatureMaps)}:
            save(path, made)
        refused = {s: m.refuse(x) for s, x in found.items() if isinstance(x, str)}
    else:
        refused = {}
    try:
        parts = load_parts(path) if path.exists() else {}
    except Exception as no:
        raise CalibrationError(f"{m}: {m.file} cannot be read: {type(no).__name__}: {no}") from no
    return {s: refused.get(s) or _with_parts(m, s, parts) for s in recorder.sites}


def _with_parts(m: LearnedMethod, site: str, parts: Mapping[str, Mapping[str, Tensor]]) -> Method | Refusal:
    here = parts.get(site)
    if here is None or not set(m.parts) <= set(here):
        has = ", ".join(sorted(n or "the attention" for n in parts)[:3]) or "none"
        return m.refuse(f"its file has no {', '.join(m.parts)} for this attention; it has parts of {has}")
    try:
        return m.with_parts({n: x.float().numpy() for n, x in here.items()})
    except ValueError as no:
        return m.refuse(str(no))


def _fitted(
    model: nn.Module, m: Hedgehog, recorder: Recorder, examples: Sequence[Example]
) -> dict[str, FeatureMaps | str]:
    captured: dict[str, list[tuple[Tensor, Tensor]]] = {}
    why: dict[str, str] = {}
    scales: dict[str, float] = {}

    def see(d: choose.Decision, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
        view, site = attention(d.found.cascade), d.site.name
        assert isinstance(view, Attention), view
        program, able = bound(view, st.Everything(st.Products(st.Queries(), st.Keys()))), m.replace(view)
        if not isinstance(program, TableProgram) or not isinstance(able, Replacement):
            why[site] = program if isinstance(program, str) else able.reason if isinstance(able, Refusal) else ""
            return
        q, k = _operands(program, tensors)
        if q.shape[-2] != k.shape[-2] or program.own is None or not m.window:
            why[site] = "its maps are fitted where queries and keys are one text, under a causal mask"
            return
        scales[site] = program.scale
        captured.setdefault(site, []).append((q, k))

    recorder.watch, before = see, recorder.watch
    try:
        for e in examples:
            call(model, e)
    finally:
        recorder.watch = before
    out: dict[str, FeatureMaps | str] = dict(why)
    for site, pairs in captured.items():
        same = [p for p in pairs if p[0].shape == pairs[0][0].shape]
        if len(same) < 2:
            out[site] = "its maps are fitted on two examples of one length, or more"
            continue
        n = same[0][0].shape[-2]
        allowed = torch.ones(n, n, dtype=torch.bool, device=same[0][0].device).tril()
        out[site] = fit(same[:-1], same[-1], allowed, scales[site], count=m.features, window=m.window).maps
    return out


def _operands(p: TableProgram, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Queries and keys [batch, heads, tokens, width] in float32, a key head for each query head, the first tokens."""
    q, k = (laid_out(tensors[x.tensor], x).detach().float() for x in (p.q, p.k))
    k = k.repeat_interleave(p.k.group, -3)
    q, k = (x.reshape(-1, *x.shape[-3:])[..., :TOKENS, :].clone() for x in (q, k))
    return q, k
