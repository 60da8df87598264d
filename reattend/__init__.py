"""reattend: an attention compiler for PyTorch. `model = reattend.optimize(model)`.

Names are loaded when they are first used (PEP 562), so that `import reattend` and `reattend --help` load no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import optimize, plan, processors, register, report, restore, verify
    from .cost_model.devices.device import Device, targets
    from .cost_model.plan.plan import Plan
    from .cost_model.sites.error import MeasuredError
    from .cost_model.sites.site import Candidate, Miss, Site
    from .cost_model.sites.sweep import Sweep
    from .patterns.methods.registry import methods
    from .rewriter.approximate.data import CalibrationError
    from .rewriter.choose.policy import Policy, StrictError
    from .rewriter.run.report import Report
    from .rewriter.run.verify import Verification

_WHERE = {
    "optimize": "api", "restore": "api", "report": "api", "plan": "api", "verify": "api", "register": "api",
    "processors": "api",
    "methods": "patterns.methods.registry", "CalibrationError": "rewriter.approximate.data",
    "MeasuredError": "cost_model.sites.error",
    "Policy": "rewriter.choose.policy", "StrictError": "rewriter.choose.policy", "Report": "rewriter.run.report",
    "Verification": "rewriter.run.verify", "targets": "cost_model.devices.device", "Device": "cost_model.devices.device",
    "Plan": "cost_model.plan.plan", "Site": "cost_model.sites.site", "Candidate": "cost_model.sites.site",
    "Miss": "cost_model.sites.site", "Sweep": "cost_model.sites.sweep",
}

__version__ = "0.1.0"
__all__ = [
    "CalibrationError", "Candidate", "Device", "MeasuredError", "Miss", "Plan", "Policy", "Report", "Site", "StrictError",
    "Sweep", "Verification", "methods", "optimize", "plan", "processors", "register", "report", "restore", "targets",
    "verify",
]


def __getattr__(name: str) -> Any:
    value = _method(name) if name not in _WHERE else getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def _method(name: str) -> object:
    """A method by the name of its class: `reattend.SinkWindow`. All of them are found by listing their rooms."""
    if name[:1].isupper():
        for m in importlib.import_module(".patterns.methods.registry", __name__).methods():
            if m.make.__name__ == name:
                return m.make
    raise AttributeError(f"module 'reattend' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
