"""Lua from its Debian source, built in every way: the interpreter, its C library and its loader, each function hooked.

The witness is the compiler: the same source with -finstrument-functions counts its own calls while it is traced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import unavailable
from tests.live.tracing import TRACERS, run, trace
from tests.programs import debian
from tests.programs.build import Missing
from tests.programs.counts import callgrind_counts, cyg_counts

pytestmark = pytest.mark.live

SCRIPT = Path(__file__).with_name("every.lua")
SAMPLE = {
    ("gcc", "-O2", "patchable"),
    ("clang", "-O0", "fentry"),
    ("gcc", "-O3", "none"),
    ("clang", "-O2", "none"),
}


def lua(*how: str) -> Path:
    try:
        return debian.lua(*how)
    except Missing as missing:
        unavailable(str(missing))


def cells() -> list:
    return [
        pytest.param(*cell, id="".join(cell), marks=[] if cell in SAMPLE else [pytest.mark.matrix])
        for cc in ("gcc", "clang")
        for opt in ("-O0", "-O2", "-O3")
        for cell in ((cc, opt, way) for way in ("patchable", "fentry", "mcount", "none"))
    ]


def whole(counts: Mapping[str, int]) -> dict[str, int]:
    """Add up what a compiler split a function into: ``luaH_get.isra.0`` is luaH_get, its cold part is no call."""
    out = Counter[str]()
    for name, hits in counts.items():
        out[name.partition(".")[0]] += hits
    return dict(out)


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize(("cc", "opt", "way"), cells())
def test_the_script_says_the_same(tmp_path, tracer: str, cc: str, opt: str, way: str) -> None:
    program = lua(cc, opt, way)
    seen = trace([program, SCRIPT], tmp_path, tracer=tracer, wanted=["*:*"], cwd=tmp_path)
    plain = run([program, SCRIPT], cwd=tmp_path)
    assert plain.status == 3
    assert seen.did == plain
    assert seen.outcome.lost == 0
    assert seen.writable_code == []
    assert seen.counts["luaV_execute"] > 100
    assert seen.counts["lua_resume"] == 5 * 13 + 2


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize(
    ("cc", "opt"), [("gcc", "-O0"), ("clang", "-O2"), pytest.param("gcc", "-O2", marks=pytest.mark.matrix)]
)
def test_the_compiler_counts_the_same_calls(tmp_path, tracer: str, cc: str, opt: str) -> None:
    """One run, two counters: ours at each entry, and the compiler's calls at the beginning of each function."""
    program = lua(cc, opt, "cyg")
    counts = tmp_path / "counts"
    seen = trace([program, SCRIPT], tmp_path, tracer=tracer, env={"CYG_COUNTS": str(counts)})
    told = whole(cyg_counts(program, counts.read_text()))
    traced = whole(seen.counts)
    assert len(told) > 250
    assert {name: traced.get(name) for name in told} == told


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("cc", "opt", "way"), [("gcc", "-O2", "none"), ("gcc", "-O2", "patchable"), ("gcc", "-O3", "fentry")]
)
def test_callgrind_counts_the_same_calls(tool, tmp_path, monkeypatch, cc: str, opt: str, way: str) -> None:
    tool("valgrind")
    monkeypatch.chdir(tmp_path)
    program = lua(cc, opt, way)
    told = callgrind_counts([program, SCRIPT])
    seen = trace([program, SCRIPT], tmp_path, tracer="function")
    both = {n for n in set(told) & set(seen.counts) if n.startswith(("lua", "str_", "auxsort"))}
    assert len(both) > 150
    different = {n: (told[n], seen.counts[n]) for n in both if told[n] != seen.counts[n]}
    assert different == {}
