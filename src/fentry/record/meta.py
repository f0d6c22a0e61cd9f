"""What a trace says about itself: ``meta.json``, version 1.

====================== =================================================================================
format, version        "fentry trace", 1
created                unix time in ns
clock                  kind "tsc" | "mono" | "icount" | "order"; hz (0: from the epochs); epoch: pairs
                       [clock value, unix ns], taken at the beginning and, once finished, at the end
arch                   kernel name of the instruction set
target                 kind, pid, comm, argv, exe
policy                 "drop" | "overwrite" | "block"
rings                  {number, size}: geometry; size in bytes
sites                  list of {name, module, address, size, form}; records name a site by its index
tables                 list of {base, stride, marks: {offset: kind}, sites}: see ``layout.Table``
ops                    what was asked for, one object per op; free form
modules                list of {name, path, build_id, bias, start, end}
threads                {tid: comm}
lost                   {where: events}: totals, also of what the stream itself cannot show
status                 {} while recording, then {"exited": n} | {"signalled": n} | {"detached": 0} ...
====================== =================================================================================

Unknown keys are ignored; a newer version is refused. Everything read is checked: a trace may come from anywhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fentry.errors import BadTrace
from fentry.record.event import Clock
from fentry.record.layout import Kind, Policy, Table

FORMAT = "fentry trace"
VERSION = 1
#: How every meta.json of ours begins, whatever the version.
HEAD = f'{{"format": "{FORMAT}"'.encode()

_U64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Site:
    """A traced function as records know it."""

    name: str
    module: str = ""
    address: int = 0
    size: int = 0
    form: str = ""


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """A loaded image of the traced program."""

    name: str
    path: str = ""
    build_id: str = ""
    bias: int = 0
    start: int = 0
    end: int = 0


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """What was traced."""

    kind: str = ""
    pid: int = 0
    comm: str = ""
    argv: tuple[str, ...] = ()
    exe: str = ""


@dataclass(frozen=True, slots=True)
class Meta:
    """All of ``meta.json``; see the module's docstring for the fields."""

    clock: Clock
    arch: str = ""
    created: int = 0
    target: TargetInfo = field(default_factory=TargetInfo)
    policy: Policy = Policy.DROP
    nrings: int = 1
    ring_size: int = 4096
    sites: tuple[Site, ...] = ()
    tables: tuple[Table, ...] = ()
    ops: tuple[dict[str, Any], ...] = ()
    modules: tuple[ModuleInfo, ...] = ()
    threads: Mapping[int, str] = field(default_factory=dict)
    lost: Mapping[str, int] = field(default_factory=dict)
    status: Mapping[str, int] = field(default_factory=dict)

    def comm(self, tid: int) -> str:
        """Name of a thread; the program's where the thread's own is not known, and "<...>" without either."""
        return self.threads.get(tid) or self.target.comm or "<...>"

    def to_json(self) -> bytes:
        """Write the file's text."""
        return json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "created": self.created,
                "clock": {"kind": self.clock.kind, "hz": self.clock.hz, "epoch": [list(p) for p in self.clock.epoch]},
                "arch": self.arch,
                "target": asdict(self.target),
                "policy": self.policy.name.lower(),
                "rings": {"number": self.nrings, "size": self.ring_size},
                "sites": [  # tens of thousands: dataclasses.asdict copies each value and takes a quarter of an attach
                    {"name": s.name, "module": s.module, "address": s.address, "size": s.size, "form": s.form}
                    for s in self.sites
                ],
                "tables": [
                    {
                        "base": t.base,
                        "stride": t.stride,
                        "marks": {str(offset): int(kind) for offset, kind in t.marks.items()},
                        "sites": list(t.sites),
                    }
                    for t in self.tables
                ],
                "ops": list(self.ops),
                "modules": [asdict(m) for m in self.modules],
                "threads": {str(tid): comm for tid, comm in self.threads.items()},
                "lost": dict(self.lost),
                "status": dict(self.status),
            }
        ).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Meta:
        """Read the file's text. Raises BadTrace for anything that is not what :meth:`to_json` writes."""
        try:
            top = _Object(json.loads(text), "meta.json")
        except (ValueError, RecursionError) as error:
            raise BadTrace(f"meta.json is not JSON: {error}", hint="the recording did not begin properly") from None
        if top.text("format") != FORMAT:
            raise BadTrace("meta.json is not of a fentry trace")
        version = top.number("version")
        if version > VERSION:
            raise BadTrace(f"the trace is of version {version}, this fentry reads {VERSION}", hint="update fentry")
        clock, rings, target = top.object("clock"), top.object("rings"), top.object("target")
        policy = top.text("policy").upper()
        if policy not in Policy.__members__:
            raise BadTrace(f"meta.json: policy {policy.lower()!r} is not known")
        return cls(
            clock=Clock(clock.text("kind"), clock.real("hz"), tuple(_pair(p) for p in clock.array("epoch"))),
            arch=top.text("arch"),
            created=top.number("created"),
            target=TargetInfo(
                target.text("kind"),
                target.number("pid"),
                target.text("comm"),
                tuple(str(a) for a in target.array("argv")),
                target.text("exe"),
            ),
            policy=Policy[policy],
            nrings=rings.number("number"),
            ring_size=rings.number("size"),
            sites=tuple(
                Site(s.text("name"), s.text("module"), s.number("address"), s.number("size"), s.text("form"))
                for s in top.objects("sites")
            ),
            tables=tuple(_table(t) for t in top.objects("tables")),
            ops=tuple(o for o in top.array("ops") if isinstance(o, dict)),
            modules=tuple(
                ModuleInfo(
                    m.text("name"),
                    m.text("path"),
                    m.text("build_id"),
                    m.signed("bias"),
                    m.number("start"),
                    m.number("end"),
                )
                for m in top.objects("modules")
            ),
            threads={tid: str(comm) for tid, comm in top.object("threads").by_number().items()},
            lost={str(k): v for k, v in top.object("lost").value.items() if type(v) is int},
            status={str(k): v for k, v in top.object("status").value.items() if type(v) is int},
        )


@dataclass(frozen=True, slots=True)
class _Object:
    """A JSON object whose members are asked for by type."""

    value: dict[str, Any]
    where: str

    def __post_init__(self) -> None:
        if not isinstance(self.value, dict):
            raise BadTrace(f"{self.where} is not an object")

    def _bad(self, key: str, what: str) -> BadTrace:
        return BadTrace(f"{self.where}: {key!r} is not {what}")

    def text(self, key: str) -> str:
        value = self.value.get(key, "")
        if not isinstance(value, str):
            raise self._bad(key, "text")
        return value

    def number(self, key: str, low: int = 0) -> int:
        value = self.value.get(key, 0)
        if type(value) is not int or not low <= value <= _U64:
            raise self._bad(key, "a number of 64 bits")
        return value

    def signed(self, key: str) -> int:
        return self.number(key, -(1 << 63))

    def real(self, key: str) -> float:
        value = self.value.get(key, 0)
        if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value <= 1e18:
            raise self._bad(key, "a frequency")
        return float(value)

    def array(self, key: str) -> list[Any]:
        value = self.value.get(key, [])
        if not isinstance(value, list):
            raise self._bad(key, "a list")
        return value

    def object(self, key: str) -> _Object:
        return _Object(self.value.get(key, {}), f"{self.where}: {key}")

    def objects(self, key: str) -> list[_Object]:
        return [_Object(item, f"{self.where}: {key}[{i}]") for i, item in enumerate(self.array(key))]

    def by_number(self) -> dict[int, Any]:
        """Members by their keys, which are decimal numbers."""
        out = {}
        for key, value in self.value.items():
            if not (key.isascii() and key.isdigit() and len(key) < 20):
                raise self._bad(key, "a number")
            out[int(key)] = value
        return out


def utf8(name: str) -> str:
    """Spell out lone surrogates (bytes of a name that are no text), which no file format of text takes."""
    return name.encode("utf-8", "backslashreplace").decode()


def _pair(value: Any) -> tuple[int, int]:
    good = isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 <= n <= _U64 >> 1 for n in value)
    if not good:
        raise BadTrace("meta.json: clock: an epoch is not a pair of numbers")
    return value[0], value[1]


def _table(table: _Object) -> Table:
    marks = {}
    for offset, kind in table.object("marks").by_number().items():
        if type(kind) is not int or kind not in tuple(Kind):
            raise BadTrace(f"{table.where}: a mark of kind {kind!r}")
        marks[offset] = Kind(kind)
    sites = table.array("sites")
    if not all(type(s) is int and -1 <= s < 1 << 32 for s in sites):
        raise BadTrace(f"{table.where}: a site that is not an index")
    return Table(table.number("base"), table.number("stride"), marks, sites)
