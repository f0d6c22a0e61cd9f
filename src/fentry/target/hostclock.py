"""This machine's cheapest counter, read from Python: what a traced process records as its time.

Only here is a host's clock asked. The counter (x86: time stamp counter; arm64: CNTVCT; riscv64: time) is the same for
every process of the machine; its rate is measured against CLOCK_MONOTONIC over the length of a recording.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding as llvm

_IR = """
declare i64 @llvm.readcyclecounter()
define i64 @counter() {
  %now = call i64 @llvm.readcyclecounter()
  ret i64 %now
}
"""
_kept: list[Any] = []


@cache
def _reader() -> Callable[[], int]:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(_IR), machine)
    engine.finalize_object()
    _kept.append(engine)  # the code lives as long as the engine
    return ctypes.CFUNCTYPE(ctypes.c_uint64)(engine.get_function_address("counter"))


def counter() -> int:
    """The counter now."""
    return int(_reader()())


def pair(clock: Callable[[], int] = time.time_ns) -> tuple[int, int]:
    """(counter, `clock` in ns) of one moment, the tightest of a few tries."""
    best = (1 << 63, 0, 0)
    for _ in range(16):
        before = counter()
        now = clock()
        after = counter()
        best = min(best, (after - before, (before + after) // 2, now))
    return best[1], best[2]


@cache
def hz() -> float:
    """Counts per second, measured over 20 ms against CLOCK_MONOTONIC (10^-5 or better); cached."""
    c0, t0 = counter(), time.monotonic_ns()
    while time.monotonic_ns() - t0 < 20_000_000:
        pass
    c1, t1 = counter(), time.monotonic_ns()
    return (c1 - c0) * 1e9 / (t1 - t0)
