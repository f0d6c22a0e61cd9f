"""Run benchmarks and write their pages: ``python -m benchmarks [--quick] [NAME ...]``."""

from __future__ import annotations

import argparse
import importlib
import sys
import time

from benchmarks.report import Result

#: module -> what it answers
NAMES = {
    "events": "ns per event of each tracer and form, beside hand-written code and uftrace",
    "riscv64": "guest instructions per event",
    "attach": "time to hook 1,000 and 20,000 functions of a running process",
    "throughput": "events per second to disk, and whether losses are counted right",
    "decode": "events per second made columns of",
    "verdicts": "how many functions of real libraries can be traced",
}


def main() -> int:
    """Run what was asked for; status 1 if something that must be reached is not."""
    listed = "\n".join(f"  {name:12s}{about}" for name, about in NAMES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=f"Measure.\n\n{listed}", formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which ones (default: all)")
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing is kept: does it work at all?")
    options = parser.parse_args()
    if unknown := [n for n in options.names if n not in NAMES]:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    missed = 0
    for name in options.names or NAMES:
        begun = time.monotonic()
        print(f"benchmarks: {name} ...", file=sys.stderr, flush=True)
        result: Result = importlib.import_module(f"benchmarks.{name}").run(quick=options.quick)
        result.quick = options.quick
        print(result.text())
        kept = f"results/{result.save().name}" if not options.quick else "not kept"
        print(f"benchmarks: {name}: {time.monotonic() - begun:.0f} s, {kept}", file=sys.stderr, flush=True)
        missed += sum(not limit.met for limit in result.limits)
    if missed:
        print(f"benchmarks: {missed} limits were missed", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
