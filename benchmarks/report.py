"""Results: a table for people and the same as JSON for programs, with the machine and the versions that made them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

Cell = str | int | float | None


@dataclass(slots=True)
class Table:
    """Rows under named columns; numbers are kept as they were measured and rounded only when shown."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[Cell]] = field(default_factory=list)

    def text(self) -> str:
        """Give the table as Markdown."""
        lines = [f"## {self.title}", "", "| " + " | ".join(self.columns) + " |"]
        lines.append("|" + "|".join("---" if i == 0 else "---:" for i in range(len(self.columns))) + "|")
        lines += ["| " + " | ".join(_shown(cell) for cell in row) + " |" for row in self.rows]
        return "\n".join(lines)


@dataclass(slots=True)
class Limit:
    """One thing that must be reached."""

    what: str
    measured: float
    limit: float
    unit: str = ""
    least: bool = False  #: `limit` is the least that will do, not the most

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.measured >= self.limit if self.least else self.measured <= self.limit


@dataclass(slots=True)
class Result:
    """All that one benchmark has to say."""

    name: str
    about: str  #: what was run and how to read it
    tables: list[Table] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    quick: bool = False

    def text(self) -> str:
        """Give the whole page."""
        parts = [f"# {self.name}", self.about]
        if self.quick:
            parts.append("Made with `--quick`: few rounds, do not quote.")
        if self.limits:
            table = Table("What must be reached", ("what", "measured", "limit", "unit", "met"))
            for x in self.limits:
                bound = f"{'>=' if x.least else '<='} {_shown(x.limit)}"
                table.rows.append((x.what, x.measured, bound, x.unit, "yes" if x.met else "**no**"))
            parts.append(table.text())
        parts += [table.text() for table in self.tables]
        if self.notes:
            parts.append("\n".join(["## Notes", "", *(f"- {note}" for note in self.notes)]))
        parts.append("\n".join(["## Machine", "", *(f"- {k}: {v}" for k, v in machine().items())]))
        return "\n\n".join(parts) + "\n"

    def save(self) -> Path:
        """Write ``results/NAME.md`` and ``results/NAME.json``; gives the first."""
        RESULTS.mkdir(exist_ok=True)
        page = RESULTS / f"{self.name}.md"
        page.write_text(self.text())
        data = asdict(self) | {"machine": machine()}
        for row, limit in zip(data["limits"], self.limits, strict=True):
            row["met"] = limit.met
        (RESULTS / f"{self.name}.json").write_text(json.dumps(data, indent=1) + "\n")
        return page


def _shown(cell: Cell) -> str:
    if cell is None:
        return ""
    if not isinstance(cell, float):
        return f"{cell:,}" if isinstance(cell, int) else cell
    return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.1f}" if abs(cell) >= 100 else f"{cell:.2f}"


def machine() -> dict[str, str]:
    """Name processor, kernel and versions; nothing that says whose machine it is."""
    import llvmlite
    import numpy as np
    import unicorn

    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    flags = Path("/proc/cpuinfo").read_text()
    return {
        "processor": f"{model}, {os.cpu_count()} cores{', virtual machine' if ' hypervisor' in flags else ''}",
        "kernel": ".".join(platform.release().split("-")[0].split(".")[:3]),
        "compiler": first_line("gcc"),
        "uftrace": first_line("uftrace"),
        "python": platform.python_version(),
        "llvmlite": llvmlite.__version__,
        "numpy": np.__version__,
        "unicorn": unicorn.__version__,
        "others at work": f"load average {os.getloadavg()[0]:.1f} at the end",
    }


def first_line(program: str) -> str:
    """First line of what a program says of its version, or that it is missing."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "not here"
    return done.stdout.splitlines()[0].strip()
