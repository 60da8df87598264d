"""docs/ways.md is the table of the tests."""

from __future__ import annotations

import re

from . import test_generate, test_libraries, test_processes, test_single  # noqa: F401
from .ways import PAGE, ROWS


def test_the_page_has_a_row_for_each_way_that_is_tested() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    shown = {way: outcome for way, outcome in rows if way not in ("way", "---") and not way.startswith("-")}
    assert shown == ROWS
