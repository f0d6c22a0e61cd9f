"""Record a program's calls, write them as Parquet, and ask who called whom.

python examples/parquet.py PROGRAM ARGS...
"""

import sys

import pyarrow.parquet as pq

import fentry
from fentry.export import export
from fentry.export.parquet import Parquet

with fentry.spawn(sys.argv[1:], directory="calls.fentry") as tracing:
    tracing.wait()
export(fentry.load("calls.fentry"), Parquet("calls.parquet"))

# one row per call; a call's caller is the call of the same thread whose number is its parent_row
calls = pq.read_table("calls.parquet/calls.parquet", columns=["tid", "row", "parent_row", "site"])
names = pq.read_table("calls.parquet/functions.parquet", columns=["site", "name"])
calls = calls.join(names, "site")
edges = calls.select(["tid", "parent_row", "name"]).join(
    calls.select(["tid", "row", "name"]), ["tid", "parent_row"], ["tid", "row"], "inner", "", " of caller"
)
counts = edges.group_by(["name of caller", "name"]).aggregate([("name", "count")])
for edge in counts.sort_by([("name_count", "descending"), ("name", "ascending")]).slice(0, 5).to_pylist():
    print(f"{edge['name of caller']} -> {edge['name']}: {edge['name_count']}")
