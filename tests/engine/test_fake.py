"""The fake target keeps the rules of targets as far as it can: it does not run."""

import pytest

from fentry.arch import all_archs
from fentry.testing.fake import FakeTarget
from fentry.testing.target import Probe, check_target


@pytest.mark.parametrize("arch", all_archs(), ids=lambda a: a.name)
def test_conformance(arch):
    def make():
        return FakeTarget(
            arch.name,
            [(0x10000, b"\x11" * 4096, "r-x", "prog"), (0x11000, bytes(8192), "rw-", "prog")],
            [{arch.sp: 0x12800, arch.pc: 0x10000}],
        )

    def probe(target):
        at = 0x10040
        return Probe(at, b"\x22" * 8, lambda: target.read(at, 8), (arch.sp, arch.tp))

    results = {r.name: r for r in check_target(make, probe)}
    failed = {n: r.reason for n, r in results.items() if r.verdict == "failed"}
    assert not failed
    assert {n for n, r in results.items() if r.verdict == "unsupported"} == {"A step executes one instruction"}
