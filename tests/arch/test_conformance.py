"""Every architecture passes the conformance suite, and a broken one does not."""

import pytest

from fentry.arch import all_archs
from fentry.testing.arch import check_arch

#: a sled of nops as compilers leave it
SLEDS = {"x86_64": [b"\x90" * 5, bytes.fromhex("0f1f440008") + b"\x90" * 3], "riscv64": [bytes.fromhex("13000000") * 2]}


@pytest.mark.parametrize("arch", all_archs(), ids=lambda a: a.name)
def test_conformance(arch):
    results = check_arch(arch, SLEDS[arch.name])
    assert {r.name: r.reason for r in results if r.verdict != "passed"} == {}
    assert len(results) >= 9


class Broken:
    """An architecture with one verb replaced."""

    def __init__(self, arch, **verbs):
        self.arch, self.verbs = arch, verbs

    def __getattr__(self, name):
        return self.verbs[name] if name in self.verbs else getattr(self.arch, name)


def raising(*_args, **_more):
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("verb", "instead", "rule"),
    [
        ("length", lambda code: 99, "A length is 0"),
        ("disassemble", lambda code, at: [], "Disassembly covers"),
        ("entry_window", raising, "Any bytes are a window"),
        ("arm", lambda site, sled, slot, balanced: sled.idle, "An armed sled"),
        ("slot", lambda plan: b"", "A slot is as long"),
        ("saved_pcs", lambda stack: [(0, 1)], "No signal frame"),
    ],
)
@pytest.mark.parametrize("arch", all_archs(), ids=lambda a: a.name)
def test_a_broken_one_is_found(arch, verb, instead, rule):
    results = check_arch(Broken(arch, **{verb: instead}), SLEDS[arch.name])
    failed = [r.name for r in results if r.verdict == "failed"]
    assert any(name.startswith(rule) for name in failed), failed
