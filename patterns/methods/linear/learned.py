"""Inputs of a method that were learned beforehand: known at its site, compared by what they hold, given to its cascade."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..fitted import FittedMethod
from ..method import SelectionWork
from ..selecting.steps import Learned


@dataclass(frozen=True)
class LearnedInputs:
    """A supply of arrays; they are moved to where the attention's tensors are."""

    names: tuple[str, ...]
    arrays: tuple[Learned, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return ()

    def run(self, torch: ModuleType, tensors: Mapping[str, Any], sizes: Mapping[str, int]) -> Mapping[str, Any]:
        device = next(iter(tensors.values())).device
        return {n: torch.from_numpy(x.values).to(device) for n, x in zip(self.names, self.arrays, strict=True)}

    def work(self, sizes: Mapping[str, int]) -> SelectionWork:
        return SelectionWork()


class LearnedMethod(FittedMethod):
    """A method whose parts for each attention are kept in a file (safetensors), as "attention.part"."""

    @property
    @abstractmethod
    def file(self) -> str:
        """Where they are kept."""

    @property
    @abstractmethod
    def parts(self) -> tuple[str, ...]:
        """Their names."""

    @abstractmethod
    def with_parts(self, parts: Mapping[str, Any]) -> LearnedMethod:
        """The method of one attention, from arrays by part. Raises ValueError for others."""

    @property
    def options(self) -> tuple[()]:
        return ()
