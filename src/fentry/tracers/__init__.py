"""Tracers: what a person asks for by name. One file each; a tracer turns options into ops.

A tracer says what it records and which clock it needs; where it is put, and what becomes of its events, is
the session's business (:mod:`fentry.tracers.session`).
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache

from fentry.engine.ops import Op
from fentry.errors import AskedWrong


@dataclass(frozen=True, slots=True)
class Options:
    """What can be asked of tracers; one that has no use for an option refuses it.

    Attributes:
        retval: record return values.
        depth: record only calls less than this deep, 0 = any.
        threshold: record only calls that took at least this many clock units.
        times: profile: total, self, min and max as well as hits.
        parent: function: record the caller.
    """

    retval: bool = False
    depth: int = 0
    threshold: int = 0
    times: bool = True
    parent: bool = True


class Tracer(ABC):
    """One way of tracing."""

    name: str
    summary: str  #: one line for --help
    events: bool = True  #: writes events (else: aggregates in the target)
    options: frozenset[str] = frozenset()  #: names of Options fields it understands

    @abstractmethod
    def op(self, options: Options, *, clock: str) -> Op:
        """Give the op to put at each site. Raises AskedWrong for options that do not go together."""

    def check(self, options: Options) -> None:
        """Refuse options that this tracer does not know. Raises AskedWrong."""
        default = Options()
        for field in ("retval", "depth", "threshold", "times", "parent"):
            if getattr(options, field) != getattr(default, field) and field not in self.options:
                raise AskedWrong(f"tracer {self.name} has no option {field}", hint="see fentry record --help")


@cache
def all_tracers() -> dict[str, Tracer]:
    """Every tracer found in this folder, by name."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        tracer = getattr(importlib.import_module(f"{__name__}.{info.name}"), "TRACER", None)
        if tracer is not None:
            found[tracer.name] = tracer
    return found


def load(name: str) -> Tracer:
    """Give a tracer by name. Raises AskedWrong."""
    tracers = all_tracers()
    if name not in tracers:
        raise AskedWrong(f"no tracer {name!r}", hint="tracers: " + ", ".join(sorted(tracers)))
    return tracers[name]
