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
    print(
        f"{row['function']:<12} {row['hits']:>6} calls {row['total_ns'] / 1e6:>9.3f} ms, {row['self_ns'] / 1e6:.3f} itself"
    )
