"""What an architecture of GPUs is, whatever device has it: limits, matrix instructions, tiles to start from. By exact name.

Sources, beside each number:
    [G] CUDA C++ programming guide, technical specifications per compute capability
    [I] AMD's CDNA instruction set references
    [P] PTX guide, shapes of `wgmma` and `tcgen05.mma`
    [T] torch's sdp_utils.cpp, 2.11 to 2.13
    [R] read back from our kernels, compiled ahead of time by Triton: no spills, and the names in their assembly
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

# torch's FlashAttention kernels want the asynchronous copies of this one. [T]
OLDEST_FLASH = "sm_80"
# Query rows, keys, warps and stages of a first mapping.
Tiles = tuple[int, int, int, int]


class UnknownArchitecture(ValueError):
    """No architecture has this name; the sentence names the closest and all known ones."""


@dataclass(frozen=True)
class Architecture:
    """`capability` is ten times CUDA's compute capability, 0 for AMD.

    `instruction_rows` are the rows of one matrix instruction where it reads its operands from shared memory, 0 where they
    pass through registers. With `tensor_memory` it accumulates there. `first_tiles` are those to start from, by the widest
    operand. `like` names the architecture that our kernels were compiled for where they were not for this one.
    """

    name: str
    kind: str
    capability: int
    threads_per_warp: int
    shared_bytes_per_block: int
    first_tiles: Mapping[int, Tiles] = field(hash=False, repr=False)
    matrix_instructions: tuple[str, ...]
    instruction_rows: int = 0
    tensor_memory: bool = False
    like: str = ""

    @property
    def major(self) -> int:
        """CUDA's major compute capability; 0 for AMD."""
        return self.capability // 10

    @property
    def compiled_as(self) -> str:
        """The architecture whose compiled kernels tell what those for this one take."""
        return self.like or self.name

    @property
    def cudnn_first(self) -> bool:
        """Does torch try cuDNN's attention before its own, for heads of 256? On Hopper and Blackwell in servers. [T]"""
        return self.major in (9, 10)

    @property
    def takes_flash(self) -> bool:
        """Are torch's FlashAttention kernels built for it? On CUDA from OLDEST_FLASH on. [T]"""
        return self.kind != "cuda" or self.major >= 8


# [R] for sm_80, sm_90, sm_100, gfx942; those of sm_80 for what was not read back.
_AMPERE = {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2), 1024: (32, 32, 8, 1)}
_HOPPER = {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (128, 64, 8, 2), 1024: (32, 32, 8, 2)}
_BLACKWELL = {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2), 1024: (32, 32, 8, 2)}
_CDNA = {64: (128, 64, 4, 2), 128: (128, 64, 4, 2), 256: (64, 32, 4, 2), 1024: (32, 16, 4, 1)}
# Products in fp32 run on the vector lanes of any architecture. [R]
FIRST_TILES_F32 = {32: (64, 32, 4, 2), 64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 1024: (16, 16, 8, 1)}


def _cuda(
    capability: int, kilobytes: int, tiles: Mapping[int, Tiles] = _AMPERE, reads: str = "", rows: int = 0, like: str = ""
) -> Architecture:
    """`kilobytes` of shared memory that one block may have, 32 threads in a warp [G]; `reads` names an instruction [R]."""
    names = (reads, "HMMA") if reads else ("HMMA",)
    return Architecture(
        f"sm_{capability}", "cuda", capability, 32, 1024 * kilobytes, tiles, names, rows, reads == "UTCHMMA", like
    )


def _cdna(name: str, kilobytes: int) -> Architecture:
    """`kilobytes` of local data share [I]; 64 threads in a wavefront [I]; `v_mfma` [I]."""
    return Architecture(name, "hip", 0, 64, 1024 * kilobytes, _CDNA, ("v_mfma",))


_KNOWN: Mapping[str, Architecture] = {
    a.name: a
    for a in (
        # Turing, Ampere, Ada [G]
        _cuda(75, 64), _cuda(80, 163), _cuda(86, 99, like="sm_80"), _cuda(89, 99, like="sm_80"),
        # Hopper: 64 rows of a warp group [P]
        _cuda(90, 227, _HOPPER, "HGMMA", 64),
        # Blackwell: 128 rows [P]; on workstations as Ada [G]
        _cuda(100, 227, _BLACKWELL, "UTCHMMA", 128), _cuda(103, 227, _AMPERE, "UTCHMMA", 128, "sm_100"),
        _cuda(120, 99, like="sm_80"),
        # CDNA 2, 3 and 4 [I]
        _cdna("gfx90a", 64), _cdna("gfx942", 64), _cdna("gfx950", 160),
    )
}


def architecture(name: str) -> Architecture:
    """The architecture of this name, such as "sm_90" or "gfx942". Raises UnknownArchitecture."""
    found = _KNOWN.get(name)
    if found is not None:
        return found
    close = difflib.get_close_matches(name, list(_KNOWN), n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise UnknownArchitecture(f"unknown architecture {name!r}{hint}; one of: {', '.join(_KNOWN)}")


def cuda_name(major: int, minor: int) -> str:
    """The name of a compute capability's architecture."""
    return f"sm_{major}{minor}"
