"""Run a program and print the functions that took longest, with what they called.

python examples/slowest.py PROGRAM ARGS...
"""

import sys

import fentry

with fentry.spawn(sys.argv[1:]) as tracing:
    status = tracing.wait()

rows = tracing.stat()  # most time first
print(f"status {status}, {len(rows)} functions were called, {tracing.lost} events lost")
for row in rows[:2]:
    total, itself = row["total_ns"] / 1e6, row["self_ns"] / 1e6
    print(f"{row['function']:<12} {row['hits']:>6} calls {total:>9.3f} ms, {itself:.3f} itself")
