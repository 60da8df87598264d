"""What a calibration measured, on disk example by example: one that was broken off goes on, one that ended is read again.

    <folder>/<key>/example-3.npz    what every method changed in it; rows' kept weights, and numbers as text
    <folder>/<key>/whole.json       errors of the whole model, by configuration and example

The key is a digest of the weights, the examples, the methods as they were fitted, the device and this package's own code:
anything else, and nothing is found. Written whole or not at all; what cannot be read is measured again, with a warning.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..check.verdicts import key
from ..graph.torch_private import tree_leaves
from .data import CalibrationError, Example
from .record import MethodSeen, SiteRecord

Records = Mapping[tuple[str, str], SiteRecord]


class Statistics:
    """The statistics of one calibration of a model; `said` is all else that they depend on."""

    def __init__(self, folder: str, model: nn.Module, examples: Iterable[Example], said: str) -> None:
        digest = hashlib.sha256(said.encode())
        for name, x in (*model.named_parameters(), *model.named_buffers()):
            _add(digest, name, x)
        for i, e in enumerate(examples):
            for x in tree_leaves((e.args, dict(e.kwargs))):
                _add(digest, str(i), x) if isinstance(x, Tensor) else digest.update(repr(x).encode())
        self.path = Path(folder) / key("calibration", digest.hexdigest())[:24]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as no:
            raise CalibrationError(f"Policy(keep): statistics cannot be kept in {folder}: {no.strerror or no}") from no
        self.whole: dict[str, float] = self._read_whole()

    def has(self, number: int) -> bool:
        """Is something kept of an example?"""
        return self._example(number).exists()

    def example(self, number: int, records: Records) -> bool:
        """Fill the records with what is kept of an example; False where nothing is."""
        path = self._example(number)
        if not path.exists():
            return False
        try:
            with np.load(path, allow_pickle=False) as kept:
                rows = json.loads(str(kept["said"]))
                masses = {int(n[4:]): kept[n] for n in kept.files if n.startswith("mass")}
            found = [((site, method), why, _seen(seen, masses.get(i))) for i, (site, method, why, seen) in enumerate(rows)]
            if any(at not in records for at, _, _ in found):
                raise ValueError("it has attentions that the model has not")
        except (OSError, ValueError, KeyError, TypeError) as no:
            warnings.warn(f"reattend: {path} cannot be read and is measured again: {no}", stacklevel=2)
            return False
        for at, why, seen in found:
            records[at].why = records[at].why or why
            if seen is not None:
                records[at].seen.append(seen)
        return True

    def keep_example(self, number: int, records: Records) -> None:
        """Keep what was seen of an example."""
        rows: list[Any] = []
        masses: dict[str, Any] = {}
        for (site, method), r in records.items():
            here: list[MethodSeen | None] = [s for s in r.seen if s.example == number]
            for s in here or [None]:
                if s is not None and s.mass is not None:
                    masses[f"mass{len(rows)}"] = s.mass.numpy()
                rows.append([site, method, r.why, None if s is None else {**asdict(s), "mass": None}])
        part = self.path / f"example-{number}.part.npz"
        np.savez(part, said=np.array(json.dumps(rows)), **masses)
        part.replace(self._example(number))

    def keep_whole(self, choice: Mapping[str, str], number: int, error: float) -> None:
        """Keep the error of the whole model under a choice on an example."""
        self.whole[whole_key(choice, number)] = error
        part = self.path / "whole.part"
        part.write_text(json.dumps(self.whole), encoding="utf-8")
        part.replace(self.path / "whole.json")

    def _example(self, number: int) -> Path:
        return self.path / f"example-{number}.npz"

    def _read_whole(self) -> dict[str, float]:
        path = self.path / "whole.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            return {str(k): float(v) for k, v in found.items()}
        except (OSError, ValueError, AttributeError, TypeError) as no:
            warnings.warn(f"reattend: {path} cannot be read and is measured again: {no}", stacklevel=2)
            return {}


def whole_key(choice: Mapping[str, str], number: int) -> str:
    """What a measured configuration is kept by."""
    return json.dumps([sorted(choice.items()), number])


def _seen(d: Any, mass: Any) -> MethodSeen | None:
    if d is None:
        return None
    rows = None if mass is None else torch.from_numpy(mass)
    return MethodSeen(**{**d, "mass": rows, "heads": tuple(d["heads"]), "parts": tuple(d["parts"])})


def _add(digest: Any, name: str, x: Tensor) -> None:
    digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
    digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
