"""How many events per second reach the disk, and whether losses are counted right."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.programs import Traced, hot
from benchmarks.report import Limit, Result, Table
from fentry.record.layout import Policy
from fentry.record.store import Trace

ABOUT = """\
One thread, tracer function without callers: one record of 16 bytes per call, drained to disk while it runs. *Asked* is
the pace that the program keeps by itself; *kept* the pace at which it really called. Recorded plus lost must be the
calls."""

RATE = 5e6


def run(*, quick: bool = False) -> Result:
    """Measure; one page."""
    ms, burst = (1000, 2_000_000) if quick else (10_000, 50_000_000)
    result = Result("throughput", ABOUT)
    table = Table(
        "Events to disk",
        (
            "policy, ring",
            "asked, M/s",
            "kept, M/s",
            "calls",
            "recorded",
            "lost",
            "in the trace",
            "recorded + lost - calls",
        ),
    )
    result.tables.append(table)
    cases = [
        ("block, 1 MiB", Policy.BLOCK, 1 << 20, RATE),
        ("block, 1 MiB", Policy.BLOCK, 1 << 20, 0.0),
        ("drop, 1 MiB", Policy.DROP, 1 << 20, RATE),
        ("drop, 64 KiB", Policy.DROP, 1 << 16, 0.0),
    ]
    for name, policy, ring, rate in cases:
        command = f"pace {rate:.0f} {ms}" if rate else f"burst {burst}"
        with tempfile.TemporaryDirectory() as scratch:
            at = Path(scratch) / "trace"
            program = Traced(
                hot("-fpatchable-function-entry=5"),
                at,
                "function",
                drained=True,
                parent=False,
                policy=policy,
                ring_size=ring,
            )
            with program:
                calls, ns = (int(word) for word in program.ask(command).split())
            outcome = program.outcome
            there = sum(batch.num_rows for batch in Trace.open(at).events())
        kept = calls / ns * 1e3
        balance = outcome.events + outcome.lost - calls
        table.rows.append((name, rate / 1e6 or "all it can", kept, calls, outcome.events, outcome.lost, there, balance))
        result.limits.append(Limit(f"{name}, {_pace(rate)}: calls not accounted for", abs(balance), 0))
        result.limits.append(Limit(f"{name}, {_pace(rate)}: recorded but not in the trace", outcome.events - there, 0))
        if policy is Policy.BLOCK:
            result.limits.append(Limit(f"{name}, {_pace(rate)}: lost", outcome.lost, 0))
            if rate:
                result.limits.append(Limit(f"{name}: pace", kept, 0.99 * rate / 1e6, "M/s", least=True))
    return result


def _pace(rate: float) -> str:
    return f"{rate / 1e6:.0f} M/s" if rate else "all it can"
