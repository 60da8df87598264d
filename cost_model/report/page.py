"""Plans as one self-contained page: text and tables are written here, what is drawn is drawn by the page's own script.

    plans → data (plain, JSON in the page) → page.html (jinja2) with page.css and the script inside

No network, no other file. Identical attentions share one section, so that a page stays small however deep the model.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ..sites.axes import powers_of_two
from ..sites.course import SweepError
from ..sites.findings import Findings
from ..sites.site import PlanError, Site
from ..sites.sweep import Sweep
from ..sites.sweeping import sweep
from ..words import bytes_text, seconds_text, short_path, tokens_text
from .data import plan_data

# The lengths that a page sweeps over by itself.
SHORTEST, LONGEST = 512, 1 << 17


def check_path(path: str | Path) -> None:
    """Raise PlanError where a file cannot be written: before the work, not after it."""
    where = Path(path)
    folder = where.parent
    if not folder.is_dir():
        raise PlanError(f"{path} cannot be written: there is no folder {folder}: make it, or give another path")
    if where.is_dir():
        raise PlanError(f"{path} cannot be written: it is a folder: give the path of a file, such as {where / 'plan.html'}")
    try:
        # Opening for appending asks the system itself, and leaves what is there.
        existed = where.exists()
        where.open("ab").close()
        if not existed:
            where.unlink()
    except OSError as error:
        raise PlanError(f"{path} cannot be written ({error.strerror}): give another path") from None


@dataclass(frozen=True)
class Made:
    """How a page was made, in a sentence, and the plans as JSON, one each, for whoever wants to read on elsewhere."""

    by: str
    documents: tuple[str, ...]


def write_page(plans: Sequence[Findings], path: str | Path, made: Made | None = None) -> Path:
    """Write plans of one model, one for each device, as a page. Raises PlanError where the path cannot be written."""
    check_path(path)
    Path(path).write_text(page(plans, made), encoding="utf-8")
    return Path(path)


def page(plans: Sequence[Findings], made: Made | None = None) -> str:
    """The page's text. Plans with open sizes and without a sweep are swept over their context length.

    With `made` it says how it was made, and carries the plans and the code of our kernels.
    """
    # Who makes no page does not wait for its templates.
    import jinja2
    from markupsafe import Markup

    data = [plan_data(p, swept(p)) for p in plans]
    documents = [base64.b64encode(zlib.compress(x.encode(), 9)).decode() for x in made.documents] if made else []
    sources = [[_source(p.sites[members[0]]) for members in p.groups] for p in plans] if made else []
    text = json.dumps({"plans": data}, ensure_ascii=False, separators=(",", ":"))
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"seconds": seconds_text, "bytes": bytes_text, "tokens": tokens_text, "short": short_path}
    return environment.from_string(_part("page.html")).render(
        plans=data, title=plans[0].model or "plan", by=made.by if made else "", documents=documents, sources=sources,
        css=Markup(_part("page.css")), js=Markup(_script()),
        # What could close the script element is written as an escape.
        data=Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")),
    )


def _source(site: Site) -> str:
    """The code of our kernel for an attention; nothing where it has none."""
    ours = next((c for c in site.candidates if c.feasible and c.is_tiled), None)
    return ours.source() if ours is not None and (ours.text or ours.maker is not None) else ""


def swept(plan: Findings) -> tuple[Sweep, ...]:
    """The sweeps of a plan, or one of its own over the first axis of length that is open."""
    axis = next((a for a in ("seq", "past") if a in plan.axes), None)
    if plan.sweeps or plan.retake is None or axis is None or not plan.sites:
        return plan.sweeps
    moved = [s for s in plan.symbols if s.name in plan.axes[axis]]
    own = max(s.value for s in moved)
    high = min([max(LONGEST, 2 * own), *(s.high for s in moved if s.high is not None)])
    values = powers_of_two(min(SHORTEST, 1 << (own.bit_length() - 1), high), high)
    try:
        return (sweep(plan, axis, [*values, own]),)
    except SweepError:
        return ()


def _script() -> str:
    """The page's script: its files in order, with names of their own."""
    parts = "\n".join(_part(name) for name in ("tools.js", "charts.js", "mesh.js", "page.js"))
    return f'"use strict";\n(() => {{\n{parts}}})();'


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")
