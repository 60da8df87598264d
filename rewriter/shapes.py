"""What is asked to be planned: shape options, and what names a model. Loads no torch: what is wrong is said at once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

FLOATS = ("f32", "bf16", "f16", "f64")
_LONG = {"float32": "f32", "fp32": "f32", "float": "f32", "bfloat16": "bf16", "float16": "f16", "half": "f16",
         "fp16": "f16", "float64": "f64", "fp64": "f64", "double": "f64"}


class UsageError(ValueError):
    """What the user asked for cannot be done; the message is one sentence that says what to change."""


@dataclass(frozen=True)
class Shapes:
    """The shape options of the command line. `seq` and `past` count tokens; `None` leaves the choice to the model."""

    batch: int = 1
    seq: int | None = None
    dtype: str | None = None
    phase: str = "prefill"
    past: int = 0
    attn: str | None = None

    def __post_init__(self) -> None:
        if self.phase not in ("prefill", "decode"):
            raise UsageError(f"--phase {self.phase} is not known: use prefill or decode")
        if self.attn not in (None, "eager", "sdpa"):
            raise UsageError(f"--attn {self.attn} is not known: use eager or sdpa")
        if self.dtype is not None and self.short_dtype not in FLOATS:
            raise UsageError(f"--dtype {self.dtype} is not known: use f32, bf16, f16 or f64")
        for option, value, low in (("--batch", self.batch, 1), ("--seq", self.seq, 1), ("--past", self.past, 0)):
            if value is not None and value < low:
                raise UsageError(f"{option} {value} is too small: give at least {low}")
        if self.past and self.phase == "prefill":
            raise UsageError(f"--past {self.past} is for --phase decode: a prefill has no tokens before it")

    @property
    def short_dtype(self) -> str | None:
        """The type by the name that cascades have for it: f32, bf16, …"""
        return _LONG.get(self.dtype, self.dtype) if self.dtype is not None else None

    def given(self) -> list[str]:
        """The options that say something else than their default, as they are written."""
        return [f"--{f.name}" for f in fields(self) if getattr(self, f.name) != f.default]


def check_spec(spec: str, shapes: Shapes) -> None:
    """Refuse what names no model, and options that it would not heed. Raises UsageError with one sentence."""
    path = Path(spec)
    if path.suffix in (".json", ".pt2"):
        if not path.is_file():
            raise UsageError(f"{spec} does not exist")
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"the folder {spec} holds no config.json: give one, or package.module:factory, or a .pt2 file")
    elif ":" not in spec:
        raise UsageError(f"{spec} is no model: give package.module:factory, the path of a config.json, or a .pt2 file")
    ignored = shapes.given()
    if path.suffix == ".pt2" and ignored:
        raise UsageError(f"{spec}: an exported program has its own sizes and types: leave {' and '.join(ignored)} out")
    if path.suffix != ".json" and not path.is_dir() and shapes.attn is not None:
        raise UsageError(f"{spec}: a factory builds its own model: leave --attn out")
