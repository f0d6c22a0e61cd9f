"""Run a riscv64 program in the emulator and print its calls, to a depth of three.

python examples/emulate.py PROGRAM ARGS...

The clock counts the program's own instructions: what is printed is the same on every machine.
"""

import sys

import fentry

with fentry.emulate(*sys.argv[1:], exclude=["fib"], depth=3) as tracing:
    print("status", tracing.wait())

calls = tracing.calls().select(["row", "depth", "function", "dur"]).sort_by("row").to_pylist()
for call in calls[:8]:
    print(f"{'  ' * call['depth']}{call['function']}: {call['dur']} instructions")
print(f"{len(calls)} calls")
