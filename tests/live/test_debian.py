"""Programs as Debian ships them, from their first instruction to their last."""

from __future__ import annotations

import random

import pytest

from tests.live.tracing import TRACERS, run, trace
from tests.programs.counts import callgrind_counts

pytestmark = pytest.mark.live

SQL = b"""\
create table t(a integer primary key, b text, c real);
with recursive n(i) as (values(1) union all select i + 1 from n where i < 2000)
insert into t select i, hex(i * 7919), i / 7.0 from n;
create index tb on t(b);
begin; delete from t where a % 10 = 3; rollback;
select count(*), sum(length(b)), min(b), max(b), round(sum(c), 3) from t;
select substr(b, 1, 1), count(*) from t group by 1 order by 2 desc, 1;
select t1.a, t2.b from t t1 join t t2 on t1.a = t2.a + 1 where t2.b like '3__4%' limit 5;
explain query plan select * from t where b = 'x';
select nosuch from t;
select json_extract('{"a": [1, 2, {"b": 3}]}', '$.a[2].b'), printf('%08.3f|%q', 3.14159, "it's");
"""
PYTHON = """\
import collections, hashlib, json, re, sys, threading, zlib
words = [hashlib.sha256(str(n).encode()).hexdigest()[:6] for n in range(200)]
print(json.dumps(collections.Counter(w[0] for w in words).most_common(3)))
print(re.sub(r"(a+)(\\d)", r"\\2\\1", " ".join(words))[:80], zlib.crc32("".join(words).encode()))
results = []
threads = [threading.Thread(target=lambda n=n: results.append(sum(range(n * 1000)))) for n in range(5)]
[t.start() for t in threads]; [t.join() for t in threads]
print(sorted(results))
def deep(n):
    return n and 1 + deep(n - 1)
print(deep(400))
try:
    deep(10**6)
except RecursionError as error:
    print(type(error).__name__)
def numbers():
    try:
        yield from range(3)
    finally:
        print("closed")
print(list(numbers()))
sys.exit(5)
"""
BYTES = random.Random(7).randbytes(60_000) + b"abcabcabd" * 5000


@pytest.mark.parametrize("tracer", TRACERS)
def test_sqlite3(tool, tmp_path, tracer: str) -> None:
    argv = [tool("sqlite3"), ":memory:"]
    seen = trace(argv, tmp_path, tracer=tracer, wanted=["libsqlite3*:*"], stdin=SQL)
    assert seen.did == run(argv, stdin=SQL)
    assert b"nosuch" in seen.did.stderr
    assert seen.outcome.lost == 0
    assert seen.writable_code == []
    assert seen.counts["sqlite3_prepare_v2"] > 0


def test_sqlite3_functions_are_called_as_often_as_valgrind_says(tool, tmp_path) -> None:
    """The library is stripped: what it exports has names, and callgrind sees calls of those."""
    tool("valgrind")
    argv = [tool("sqlite3"), ":memory:"]
    seen = trace(argv, tmp_path, tracer="profile", wanted=["libsqlite3*:*"], stdin=SQL)
    (library,) = {row.module for row in seen.rows}
    told = callgrind_counts(argv, module=library, stdin=SQL)
    names = {"sqlite3_prepare_v2", "sqlite3_step", "sqlite3_finalize", "sqlite3_column_text", "sqlite3_open_v2"} & set(
        told
    )
    assert len(names) >= 3, sorted(told)[:50]
    assert {name: seen.counts.get(name) for name in names} == {name: told[name] for name in names}


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("options", [["-6"], ["-T2", "--block-size=32KiB"]], ids=["one", "threads"])
def test_xz_round_trip(tool, tmp_path, tracer: str, options: list[str]) -> None:
    xz = tool("xz")
    packed = run([xz, "-c", *options], stdin=BYTES)
    (tmp_path / "pack").mkdir()
    (tmp_path / "unpack").mkdir()
    pack = trace([xz, "-c", *options], tmp_path / "pack", tracer=tracer, wanted=["*:*"], stdin=BYTES)
    assert pack.did == packed
    unpack = trace([xz, "-dc"], tmp_path / "unpack", tracer=tracer, wanted=["*:*"], stdin=packed.stdout)
    assert (unpack.did.status, unpack.did.stdout) == (0, BYTES)
    assert pack.outcome.lost == unpack.outcome.lost == 0
    assert pack.counts["lzma_code"] > 0
    assert pack.writable_code == unpack.writable_code == []


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("wanted", [["*"], ["libc.so.6:*"]], ids=["own", "libc"])
def test_python3(tool, tmp_path, tracer: str, wanted: list[str]) -> None:
    tool("python3")
    argv = ["/usr/bin/python3", "-I", "-c", PYTHON]
    plain = run(argv)
    assert plain.status == 5
    seen = trace(argv, tmp_path, tracer=tracer, wanted=wanted)
    assert seen.did == plain
    assert seen.outcome.lost == 0
    assert seen.writable_code == []
    assert sum(seen.counts.values()) > 10_000
