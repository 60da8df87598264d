"""Where the CPU seconds of the tests go: by file, by test, by fixture, by process; a busy machine changes them little.

`pytest --cpu-times FILE` appends a line for each phase of each test, from every worker; `python -m tests.cpu_times FILE` ranks them.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest


def cpu_seconds() -> float:
    """Of this process and of the children it has waited for."""
    return sum(os.times()[:4])


class CpuTimes:
    """A plugin: what each phase of a test and each fixture took, appended to a file as JSON, one line each."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _note(self, kind: str, name: str, before: float) -> None:
        line = json.dumps({"kind": kind, "name": name, "cpu_s": round(cpu_seconds() - before, 4)})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None]:
        return (yield from self._phase("setup", item))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None]:
        return (yield from self._phase("call", item))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None]:
        return (yield from self._phase("teardown", item))

    def _phase(self, kind: str, item: pytest.Item) -> Generator[None]:
        before = cpu_seconds()
        try:
            yield
        finally:
            self._note(kind, item.nodeid, before)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[object]) -> Generator[None, object, object]:
        before = cpu_seconds()
        try:
            return (yield)
        finally:
            self._note("fixture", f"{fixturedef.baseid}::{fixturedef.argname}", before)

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Generator[None, Any, Any]:
        before = cpu_seconds()
        try:
            return (yield)
        finally:
            if isinstance(collector, pytest.File):
                self._note("import", collector.nodeid, before)

    def pytest_unconfigure(self) -> None:
        self._note("process", f"{os.environ.get('PYTEST_XDIST_WORKER', 'main')}", 0.0)


def ranked(lines: Iterable[str], rows: int) -> str:
    """The `rows` names of each kind that took the most; a test is its three phases, a file its tests and its import."""
    spent: dict[str, Counter[str]] = {kind: Counter() for kind in ("process", "file", "test", "fixture", "import")}
    for line in lines:
        noted = json.loads(line)
        kind, name, cpu_s = noted["kind"], noted["name"], noted["cpu_s"]
        if kind in ("setup", "call", "teardown"):
            kind = "test"
        spent[kind][name] += cpu_s
        if kind in ("test", "import"):
            spent["file"][name.split("::")[0]] += cpu_s
    parts = []
    for kind, names in spent.items():
        parts.append(f"{kind}: {sum(names.values()):.0f} CPU seconds in {len(names)}")
        parts += [f"{cpu_s:9.2f}  {name}" for name, cpu_s in names.most_common(rows)]
    return "\n".join(parts)


if __name__ == "__main__":
    print(ranked(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines(), int(sys.argv[2]) if len(sys.argv) > 2 else 25))
