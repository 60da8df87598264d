"""The page: one file, nothing from outside, everything that a plan says, small, and safe against what names contain."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from reattend.cost_model.devices.device import shipped
from reattend.cost_model.plan.plan import Plan
from reattend.cost_model.plan.plan import made as made_by
from reattend.cost_model.report.basis import basis_rows, basis_text
from reattend.cost_model.report.data import mask_text
from reattend.cost_model.report.page import check_path, page, swept
from reattend.cost_model.sites.site import PlanError
from reattend.cost_model.words import between
from tests.plans import CAUSAL, WINDOW, plan

PLAN = plan()
MESH = plan(mesh="tp=4")


class Reader(HTMLParser):
    """Elements, attributes and texts of a page; asserts that what opens closes."""

    VOID = ("meta", "link", "input", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag]


@pytest.fixture(scope="module")
def text() -> str:
    return page([PLAN])


@pytest.fixture(scope="module")
def read(text: str) -> Reader:
    return Reader(text)


def data(text: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    made: dict[str, object] = json.loads(found[1])["plans"][0]
    return made


def test_nothing_comes_from_outside(text: str, read: Reader) -> None:
    for _, attributes in read.elements:
        for name in ("src", "href", "action", "data"):
            assert re.match(r"#|data:,$", attributes.get(name) or "#"), attributes
    assert "@import" not in text
    assert not re.search(r"url\(|fetch\(|XMLHttp|import\(", text)
    # the name space of drawings is a name, not an address that is asked for
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}


def test_every_group_has_a_row_a_section_and_its_drawings(read: Reader) -> None:
    rows = [a for a in read.all("tr") if "data-group" in a]
    sections = [a for a in read.all("section") if "data-group" in a]
    assert len(rows) == len(sections) == 2
    charts = [(a["data-chart"], a.get("data-group")) for a in read.all("figure")]
    assert ("memory", None) in charts
    for group in ("0", "1"):
        assert {c for c, g in charts if g == group} == {"mask", "roofline", "parts", "sweep"}
    links = {a["href"] for a in read.all("a")}
    assert {f"#{s['id']}" for s in sections} <= links


def test_what_is_drawn_stands_in_text_as_well(text: str) -> None:
    assert mask_text(PLAN.sites[0]) in text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    for word in ("Left alone", "softmax over h", "Proved", "As lifted", "Passes as lifted", "no &lt;mask&gt;", "a note"):
        assert word in text


def test_names_cannot_break_out(text: str, read: Reader) -> None:
    assert text.count("</script>") == 2
    assert "Sample &lt;/script&gt;" in text
    assert data(text)["model"] == "Sample </script>"
    assert "a &lt;proof&gt; &amp; more" in text


def test_controls_can_be_named(read: Reader) -> None:
    """Drawings and tables that scroll have names, headings do not skip levels, ids are unique."""
    for tag, a in read.elements:
        if a.get("role") in ("region", "radiogroup", "img"):
            assert a.get("aria-label"), (tag, a)
    ids = [a["id"] for _, a in read.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, a in read.elements:
        if "aria-labelledby" in a:
            assert a["aria-labelledby"] in ids
    levels = [int(t[1]) for t, _ in read.elements if re.fullmatch(r"h\d", t)]
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert all("scope" in a for a in read.all("th"))


def test_a_plan_with_open_sizes_is_swept_by_itself(text: str) -> None:
    (found,) = swept(PLAN)
    assert found.axis == "seq"
    assert 1024 in found.values
    assert data(text)["memory"] is not None
    fixed = replace(PLAN, retake=None)
    assert swept(fixed) == ()
    charts = [a["data-chart"] for a in Reader(page([fixed])).all("figure")]
    assert "sweep" not in charts
    assert "memory" not in charts


def test_a_plan_from_a_file_gives_the_same_page(text: str) -> None:
    kept = replace(PLAN, sweeps=swept(PLAN))
    assert page([Plan.from_json(kept.to_json())]) == page([kept]) == text
    spread = replace(MESH, sweeps=swept(MESH))
    assert page([Plan.from_json(spread.to_json())]) == page([MESH])


def test_several_devices_share_a_page() -> None:
    read = Reader(page([PLAN, PLAN.at("a100")]))
    assert len([a for a in read.all("button") if a.get("role") == "radio"]) == 2
    assert len([a for a in read.all("div") if a.get("class") == "plan"]) == 2


def test_a_mesh_has_its_section() -> None:
    """Every way with what a device holds, does and sends; both drawings, both courses, and the ways that cannot be had."""
    text = page([MESH])
    read = Reader(text)
    charts = [a["data-chart"] for a in read.all("figure")]
    assert [c for c in charts if c and c.startswith("mesh")] == ["meshtime", "meshmemory", "meshsweep", "meshsweep"]
    assert MESH.sharding is not None
    for s in MESH.sharding.schemes:
        assert s.name in text
        assert s.assignment in text
    mesh = data(text)["mesh"]
    assert isinstance(mesh, dict)
    best = MESH.sharding.best
    assert best is not None
    assert mesh["best"] == best.name
    assert mesh["room"] == pytest.approx(0.9 * 141e9)
    first = mesh["ways"][0]
    assert (first["held"], first["sent"]) == (best.held_bytes, best.sent_bytes)
    (course,) = mesh["courses"]
    assert len(course["values"]) == len(course["best"]) == len(course["held"][0]["values"])
    assert {n for h in course["held"] for n in h["names"]} == set(course["names"])
    # a plan without a mesh says nothing of one
    assert data(page([PLAN]))["mesh"] is None
    assert "Spread over" not in page([PLAN])


def test_a_way_that_nobody_named_shows_by_itself() -> None:
    """The section reads what there is: a way of another name, one that does not fit, and one that cannot be had."""
    assert MESH.sharding is not None
    first = MESH.sharding.schemes[0]
    strange = replace(first, name="latents <cut> in 4", assignment="c→tp", why="approximate, and more", exact=False)
    large = replace(first, name="too large", feasible=False, cache_bytes=10**12, why="needs 1000 GB")
    ways = (strange, large, replace(first, name="never", feasible=False, parts={}, why="no such thing"))
    text = page([replace(MESH, sharding=replace(MESH.sharding, schemes=ways))])
    for word in ("latents &lt;cut&gt; in 4", "approximate, and more", "needs 1000 GB", "no such thing", "cannot be had"):
        assert word in text
    none = replace(MESH.sharding, schemes=ways[1:])
    assert "No way fits: needs 1000 GB" in page([replace(MESH, sharding=none)])


def test_times_stand_with_their_range_and_what_they_rest_on(text: str) -> None:
    """A band of 35%: from seconds / 1.35 to seconds · 1.35, in tables and in what is drawn; each number has its source."""
    cost = PLAN.sites[0].chosen.cost
    assert cost is not None
    assert between(cost.seconds, cost.band) in text
    assert between(1.35e-3, 0.35) == "1 to 1.82 ms"
    assert between(0.9e-3, 0.35) == "667 µs to 1.22 ms"
    made = data(text)
    assert made["device"]["band"] == 0.35  # type: ignore[index]
    rests = made["device"]["rests"]  # type: ignore[index]
    kinds = {r["name"]: r["kind"] for r in rests}
    assert (kinds["dram_bytes_per_s"], kinds["link_latency_seconds"]) == ("published", "assumed")
    assert "within a factor of 1.35, as stated" in text


def test_a_calibrated_number_is_told_from_one_of_the_file() -> None:
    cpu = shipped("cpu")
    own = replace(cpu, basis="calibrated", band=0.2, dram_bytes_per_s=1.5e10)
    kinds = {r["name"]: (r["kind"], r["source"]) for r in basis_rows(own)}
    assert kinds["dram_bytes_per_s"] == ("calibrated", "this machine")
    assert kinds["matrix_flops_per_s.f32"][0] == "measured"
    assert kinds["matrix_flops_per_s.f64"][0] == "assumed"
    assert "within a factor of 1.2, as measured" in basis_text(own)
    assert basis_rows(replace(cpu, name="nobody")) == []


def test_a_plan_without_attention_has_a_page() -> None:
    assert "No attention was found" in page([Plan((), (), PLAN.device)])


@pytest.mark.slow
def test_many_distinct_attentions_stay_below_two_megabytes() -> None:
    made = plan([CAUSAL, WINDOW] * 12, "h200")
    sites = tuple(replace(s, where=f"model.py:{i}") for i, s in enumerate(made.sites))
    many = replace(made, sites=sites, retake=None)
    assert len(many.groups) == 24
    assert len(page([many]).encode()) < 2e6


BROWSER = next((b for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if b), None)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium on the PATH")
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_every_figure_without_an_error(theme: str, width: int, tmp_path: Path) -> None:
    """Two devices, a mesh and a sweep. Before it prints, a page draws all figures of the device that is shown."""
    where = tmp_path / "plan.html"
    text = page([MESH, PLAN.at("cpu")])
    printed = '<script>dispatchEvent(new Event("beforeprint"));</script></body>'
    where.write_text(text.replace("</body>", printed), encoding="utf-8")
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
         f"--user-data-dir={tmp_path}", f"--window-size={width},2000",
         f"{where.as_uri()}?theme={theme}"],
        capture_output=True, text=True, check=True, timeout=120,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    assert f'data-theme="{theme}"' in done.stdout
    assert not re.search(r'="[^"]*(NaN|Infinity|undefined)', done.stdout)
    shown = done.stdout.split('data-plan="1"')[0]
    figures = re.findall(r'<figure class="chart[^>]*data-chart="(\w+)".*?</figure>', shown, re.DOTALL)
    drawn = re.findall(r'<figure class="chart[^>]*data-chart="(\w+)"(?:(?!</figure>).)*?<(?:svg|canvas) ', shown, re.DOTALL)
    assert figures == drawn
    assert {"mask", "roofline", "parts", "sweep", "memory", "meshtime", "meshmemory", "meshsweep"} == set(drawn)


def test_a_page_says_how_it_was_made_and_carries_plans_and_code() -> None:
    coded = [replace(s, candidates=tuple(replace(c, text="@triton.jit  # a < b") if c.is_tiled else c for c in s.candidates))
             for s in PLAN.sites]
    plans = [replace(PLAN, sites=tuple(coded)), PLAN.at("cpu")]
    text = page(plans, made_by(plans, "reattend plan 'a <model>' --html x.html"))
    read = Reader(text)
    assert any("Made by `reattend plan 'a <model>' --html x.html`, reattend " in t for _, t in read.texts)
    packed = re.findall(r'<script type="application/octet-stream" id="document\d">([^<]*)</script>', text)
    assert [Plan.from_json(zlib.decompress(base64.b64decode(x)).decode()) for x in packed] == plans
    code = [t for tag, t in read.texts if tag == "pre" and t == "@triton.jit  # a < b"]
    assert code
    assert len(code) == sum(any(c.feasible and c.is_tiled for c in PLAN.sites[g[0]].candidates) for g in PLAN.groups)
    assert len(read.all("button")) == len(Reader(page(plans)).all("button")) + len(plans)


def test_a_page_is_written_and_paths_are_checked_first(tmp_path: Path) -> None:
    fixed = replace(PLAN, retake=None)
    assert fixed.to_html(tmp_path / "plan.html").read_text("utf-8") == page([fixed], made_by([fixed]))
    check_path(tmp_path / "new.html")
    assert not (tmp_path / "new.html").exists()
    with pytest.raises(PlanError, match=r"there is no folder .*nowhere: make it, or give another path"):
        fixed.to_html(tmp_path / "nowhere" / "plan.html")
    with pytest.raises(PlanError, match=r"it is a folder: give the path of a file, such as .*plan\.html"):
        fixed.to_html(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match="cannot be written"):
        fixed.to_html(tmp_path / "file" / "plan.html")


def test_a_page_is_made_without_torch_and_triton(tmp_path: Path) -> None:
    where = tmp_path / "plan.json"
    where.write_text(replace(PLAN, retake=None).to_json(), encoding="utf-8")
    code = (
        "import sys; from reattend.cost_model.plan.plan import Plan; "
        f"Plan.from_json(open({str(where)!r}).read()).to_html({str(tmp_path / 'p.html')!r}); "
        "assert not {'torch', 'triton'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
