"""Parquet: the trace as tables that DuckDB, Polars, pandas and Spark read.

====================  ============================================================================
``events.parquet``    :data:`fentry.record.event.SCHEMA`
``calls.parquet``     :data:`fentry.record.calls.SCHEMA`, each call when it ended; ``row`` and ``parent_row`` number
                      the calls of a thread by entry: join on (pid, tid, parent_row = row)
``functions.parquet`` site, name, module, address, size, form: join on site
``threads.parquet``   pid, tid, comm, lane
``meta.parquet``      key, value: what else ``meta.json`` says, each value as JSON
====================  ============================================================================

Every file's metadata hold ``fentry.schema`` = "1". A column may be added under the same number; it changes when
one goes, or changes its meaning. Row groups have about a million rows.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fentry.errors import AskedWrong
from fentry.export import Exporter, Header, by_thread
from fentry.record import calls, event
from fentry.record.calls import Matcher
from fentry.record.meta import utf8

SCHEMA_VERSION = 1
ROW_GROUP = 1 << 20


class Parquet(Exporter):
    """Writes Parquet files into a directory.

    Args:
        path: directory; made if absent, and files of these names in it are replaced.
        row_group: rows of a row group.
    """

    name = "parquet"

    def __init__(self, path: str | os.PathLike[str], row_group: int = ROW_GROUP) -> None:
        self._path = Path(path)
        self._row_group = max(1, row_group)
        self._lost = 0

    def begin(self, header: Header) -> None:
        """Write the small tables. Raises AskedWrong if the directory cannot be written."""
        self._header = header
        meta = header.meta
        self._matchers = {key: Matcher(header.returning) for key in header.lanes}
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            self._events = _Table(self._path / "events.parquet", event.SCHEMA, self._row_group)
            self._calls = _Table(self._path / "calls.parquet", calls.SCHEMA, self._row_group)
        except OSError as error:
            raise AskedWrong(f"cannot write to {self._path}: {error.strerror}", hint="name another place") from None
        self._write(
            "functions",
            {
                "site": pa.array(range(len(meta.sites)), pa.uint32()),
                "name": _strings([s.name for s in meta.sites]),
                "module": _strings([s.module for s in meta.sites]),
                "address": pa.array([s.address for s in meta.sites], pa.uint64()),
                "size": pa.array([s.size for s in meta.sites], pa.uint64()),
                "form": _strings([s.form for s in meta.sites]),
            },
        )
        self._write(
            "threads",
            {
                "pid": pa.array([t.pid for t in header.threads], pa.uint32()),
                "tid": pa.array([t.tid for t in header.threads], pa.uint32()),
                "comm": _strings([t.comm for t in header.threads]),
                "lane": pa.array([t.lane for t in header.threads], pa.uint32()),
            },
        )

    def rows(self, table: pa.Table) -> None:
        """Write events, and the calls that they ended."""
        self._events.add(table)
        for (pid, tid), part in by_thread(table):
            ended = self._matchers[pid, tid].feed(part)
            self._calls.add(calls.to_table(ended, self._header.meta.clock, pid=pid, tid=tid))

    def lost(self, count: int) -> None:
        """Keep it for the meta table."""
        self._lost += count

    def end(self) -> None:
        """Write calls that never ended, the meta table, and the files' footers."""
        clock = self._header.meta.clock
        for (pid, tid), matcher in self._matchers.items():
            self._calls.add(calls.to_table(matcher.finish(), clock, pid=pid, tid=tid))
        self._events.close()
        self._calls.close()
        whole = json.loads(self._header.meta.to_json())
        for bulky in ("sites", "tables", "threads"):
            del whole[bulky]
        whole["lost_unplaced"] = self._lost
        self._write("meta", {"key": _strings(list(whole)), "value": _strings([json.dumps(v) for v in whole.values()])})

    def _write(self, name: str, columns: dict[str, pa.Array]) -> None:
        table = pa.table(columns)
        pq.write_table(table.replace_schema_metadata(_METADATA), self._path / f"{name}.parquet")


_METADATA = {b"fentry.schema": str(SCHEMA_VERSION).encode()}


class _Table:
    """A Parquet file that gets rows in portions of any size and has row groups of one size."""

    def __init__(self, path: Path, schema: pa.Schema, row_group: int) -> None:
        self._schema = schema.with_metadata(_METADATA)
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._row_group = row_group
        self._held: list[pa.Table] = []
        self._count = 0

    def add(self, table: pa.Table) -> None:
        self._held.append(table.replace_schema_metadata(_METADATA))
        self._count += table.num_rows
        if self._count < self._row_group:
            return
        whole = pa.concat_tables(self._held).combine_chunks()
        done = self._count - self._count % self._row_group
        self._writer.write_table(whole.slice(0, done), row_group_size=self._row_group)
        self._held = [whole.slice(done)]
        self._count -= done

    def close(self) -> None:
        if self._count:
            self._writer.write_table(pa.concat_tables(self._held).combine_chunks(), row_group_size=self._row_group)
        self._writer.close()


def _strings(values: list[str]) -> pa.Array:
    return pa.array([utf8(value) for value in values], pa.string())
