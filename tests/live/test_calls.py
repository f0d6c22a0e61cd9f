"""calls.c, built in every way that a function can be entered: each function's count is the program's own.

The program counts itself (-DCOUNT) in a build of its own; the traced build holds no counters. The compiler's count
(-finstrument-functions) is the second witness.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.live.tracing import TRACERS, run, trace
from tests.programs.counts import cyg_counts, own_counts, run_counted

pytestmark = pytest.mark.live

ROUNDS = "6"
#: name -> (compiler, options, form that the functions must be hooked by)
FORMS = {
    "gcc-sled16": ("gcc", ("-fpatchable-function-entry=16",), "pie"),
    "clang-sled16": ("clang", ("-fpatchable-function-entry=16",), "pie"),
    "gcc-sled5": ("gcc", ("-fpatchable-function-entry=5",), "exec"),
    "gcc-fentry": ("gcc", ("-pg", "-mfentry"), "pie"),
    "clang-fentry": ("clang", ("-pg", "-mfentry"), "pie"),
    "gcc-nop-fentry": ("gcc", ("-pg", "-mfentry", "-mnop-mcount", "-mrecord-mcount"), "exec"),
    "gcc-mcount": ("gcc", ("-pg",), "pie"),
    "clang-mcount": ("clang", ("-pg",), "pie"),
    "gcc-jump": ("gcc", (), "pie"),
    "clang-jump": ("clang", (), "pie"),
    "gcc-cet": ("gcc", ("-fcf-protection=full", "-fpatchable-function-entry=16"), "pie"),
}
#: clang knows what these return and what they do not do, and leaves their calls out (gcc is told not to look: noipa)
ELIDED = {"tiny_nothing", "tiny_const", "tiny_same"}
SAMPLE = ("gcc-sled16", "clang-fentry", "gcc-mcount", "gcc-jump")


@pytest.fixture(scope="module")
def truth(build) -> dict[str, int]:
    done, text = run_counted([build("calls.c", flags=("-DCOUNT",)), ROUNDS])
    own = own_counts(text)
    instrumented = build("calls.c", flags=("-finstrument-functions",), extra=("cyg.c",))
    assert cyg_counts(instrumented, run_counted([instrumented, ROUNDS], "CYG_COUNTS")[1]) == own
    assert done.stdout.startswith("fib 610\n")
    return own


def cells() -> list:
    out = []
    for name, (cc, flags, kind) in FORMS.items():
        for opt in ("-O0", "-O2", "-O3"):
            full = opt != "-O2" or name not in SAMPLE
            out.append(pytest.param(cc, opt, flags, kind, id=f"{name}{opt}", marks=[pytest.mark.matrix] * full))
    return out


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize(("cc", "opt", "flags", "kind"), cells())
def test_each_call_is_counted(build, truth, tmp_path: Path, tracer: str, cc: str, opt: str, flags, kind: str) -> None:
    program = build("calls.c", cc=cc, opt=opt, flags=flags, kind=kind)
    seen = trace([program, ROUNDS], tmp_path, tracer=tracer, cwd=tmp_path)
    assert seen.did == run([program, ROUNDS], cwd=tmp_path)
    assert seen.outcome.lost == 0
    assert seen.writable_code == []
    assert not set(truth) & seen.unhooked or not flags, "a function with a sled always has room"
    # what has no room for a hook is known beforehand, by name
    real = set(truth) - seen.unhooked - (ELIDED if cc == "clang" and opt != "-O0" else set())
    assert {name: seen.counts.get(name) for name in real} == {name: truth[name] for name in real}
