"""Kernels over latents and states on GPUs: constants by device and form, read from latents.toml.

    mla_generation   one query of all heads over latents that they share
    mla_context      prompts on keys and values that were made of latents
    gdn_context, gdn_generation   chunks and steps of gated delta rules
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("latents.toml")


@cache
def latent_kernels() -> Mapping[tuple[str, str], Mapping[str, float]]:
    """(device, form) → its constants and its band; devices without measured rows are not there."""
    body = tomllib.loads(FILE.read_text("utf-8"))
    return {(d, form): c for d, forms in body.items() if d != "thresholds" for form, c in forms.items()}
