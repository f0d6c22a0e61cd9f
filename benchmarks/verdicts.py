"""How many functions of real libraries can be traced as they are, and how long finding that out takes."""

from __future__ import annotations

import ctypes.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.report import Limit, Result, Table
from fentry.engine import census
from fentry.image import Image

ABOUT = """\
Libraries as the distribution ships them, without sleds: functions that the entry jump can take. *Seconds* is one census
in a fresh process, without and with our caches."""

LIBRARIES = ("c", "sqlite3", "python3.11")
LEAST = 16
SHARE = 90.0


def find(name: str) -> Path | None:
    """File of a shared library that the loader knows, or Debian's own libpython."""
    soname = ctypes.util.find_library(name)
    if soname is None:
        return None
    for line in subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout.splitlines():
        if line.split(" ", 1)[0].strip() == soname and "=>" in line:
            return Path(line.rsplit("=> ", 1)[1])
    return None


def seconds(path: Path, cache: Path) -> float:
    """Time of one census in a fresh process, imports not counted."""
    code = (
        "import sys, time; from fentry.engine import census; from fentry.image import Image; t = time.perf_counter(); "
        "census.take(Image.open(sys.argv[1])); print(time.perf_counter() - t)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return float(done.stdout)


def run(*, quick: bool = False) -> Result:
    """Measure; one page."""
    result = Result("verdicts", ABOUT)
    table = Table(
        "Functions that can be traced",
        ("library", "functions", "traced", "%", f"of {LEAST} bytes and more", "traced", "%", "s, cold", "s, warm"),
    )
    reasons = Table("Why not", ("library and reason", "functions", f"of {LEAST} bytes and more"))
    result.tables += [table, reasons]
    for name in LIBRARIES:
        path = find(name)
        if path is None:
            result.notes.append(f"lib{name} is not installed here")
            continue
        cache = Path(tempfile.mkdtemp())
        try:
            cold = seconds(path, cache)
            warm = statistics.median(seconds(path, cache) for _ in range(1 if quick else 5))
        finally:
            shutil.rmtree(cache)
        verdicts = census.take(Image.open(path)).verdicts
        assert all((v.sled is None) == bool(v.reason) for v in verdicts), "a verdict is a form or a reason"
        large = [v for v in verdicts if v.size >= LEAST]
        good, good_large = (sum(v.sled is not None for v in group) for group in (verdicts, large))
        share = 100 * good_large / len(large)
        table.rows.append(
            (
                *(path.name, len(verdicts), good, 100 * good / len(verdicts)),
                *(len(large), good_large, share, cold, warm),
            )
        )
        result.limits.append(Limit(f"{path.name}: functions of {LEAST} bytes and more", share, SHARE, "%", least=True))
        why = Counter(v.reason for v in verdicts if v.reason)
        why_large = Counter(v.reason for v in large if v.reason)
        reasons.rows += [(f"{path.name}: {reason}", n, why_large[reason]) for reason, n in why.most_common(8)]
    return result
