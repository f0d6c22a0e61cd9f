"""Count calls in a running process for a second; it goes on afterwards.

python examples/attach.py PID GLOB...
"""

import sys

import fentry

pid, *globs = sys.argv[1:]
with fentry.attach(int(pid), tracer="profile", functions=globs) as tracing:
    tracing.wait(timeout=1.0)

for row in tracing.stat():
    mean = row["total_ns"] / row["hits"] / 1e3
    print(f"{row['module']}:{row['function']} {row['hits']} calls, {mean:.3f} us each")
