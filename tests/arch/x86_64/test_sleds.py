"""Sleds that compilers really emit, found by the image and recognised here."""

from collections import Counter

import pytest

from fentry.arch import Refusal, Sled
from fentry.arch.x86_64 import ARCH
from fentry.image import Image

PATCHABLE = [
    ("gcc", "-fpatchable-function-entry=5"),
    ("gcc", "-fpatchable-function-entry=16"),
    ("gcc", "-fcf-protection -fpatchable-function-entry=7,2"),
    ("clang", "-fpatchable-function-entry=5"),
    ("clang", "-fcf-protection -fpatchable-function-entry=16"),
    ("clang", "-fpatchable-function-entry=11"),
]
CALLS = [
    ("gcc", "-pg -mfentry", "pie", "fentry", {5, 6}),
    ("gcc", "-pg -mfentry", "exec", "fentry", {5}),
    ("gcc", "-pg", "pie", "mcount", {5, 6}),
    ("gcc", "-pg", "exec", "mcount", {5}),
    ("clang", "-pg -mfentry", "exec", "fentry", {5}),
    ("clang", "-pg", "exec", "mcount", {5}),
]


@pytest.mark.parametrize("opt", ["-O0", "-O2"])
@pytest.mark.parametrize(("cc", "flags"), PATCHABLE)
def test_patchable(build, cc, flags, opt):
    image = Image.open(str(build("calls.c", cc=cc, opt=opt, flags=tuple(flags.split()))))
    hints = image.sleds()
    assert len(hints) > 3
    for address, hint in hints.items():
        assert hint.kind == "patchable"
        code = image.read(hint.address, 32)
        sled = ARCH.sled_at(code, hint.kind)
        assert isinstance(sled, Sled), (hex(address), code.hex(" "))
        assert code.startswith(sled.idle)
        assert ARCH.sled_at(image.read(address, 32), "scan") == sled or flags.endswith("=11")
        armed = ARCH.arm(hint.address, sled, hint.address + 0x1000000, balanced=False)
        assert len(armed) == sled.size
        # what a call returns to, up to the resume address, is whole nops
        rest = code[sled.size : sled.resume]
        assert all("nop" in text or "xchg" in text for _, _, text in ARCH.disassemble(rest, 0))


def test_short_sled_is_refused_and_an_entry_jump_goes_over_it(build):
    image = Image.open(str(build("calls.c", cc="gcc", opt="-O2", flags=("-fpatchable-function-entry=3",))))
    verdicts = Counter()
    for address, hint in image.sleds().items():
        sled = ARCH.sled_at(image.read(hint.address, 32), hint.kind)
        assert sled == Refusal("sled of 3 bytes is shorter than a 5-byte call")
        function = next(f for f in image.functions() if f.address == address)
        plan = ARCH.entry_window(image.read(address, function.size), address, function.size, function.size)
        verdicts[type(plan).__name__] += 1
    assert verdicts["Window"] > 3


@pytest.mark.parametrize(("cc", "flags", "kind", "form", "sizes"), CALLS)
def test_calls_of_mcount(build, cc, flags, kind, form, sizes):
    image = Image.open(str(build("calls.c", cc=cc, opt="-O2", kind=kind, flags=tuple(flags.split()))))
    hints = image.sleds()
    assert len(hints) > 3
    for hint in hints.values():
        assert hint.kind == form
        code = image.read(hint.address, 32)
        sled = ARCH.sled_at(code, hint.kind)
        assert isinstance(sled, Sled), code.hex(" ")
        assert sled.form == form
        assert sled.size in sizes
        assert len(ARCH.arm(hint.address, sled, hint.address, balanced=False)) == sled.size


def test_nop_in_place_of_fentry(build):
    flags = ("-pg", "-mfentry", "-mnop-mcount", "-mrecord-mcount")
    image = Image.open(str(build("calls.c", cc="gcc", opt="-O2", kind="exec", flags=flags)))
    hints = image.sleds()
    assert len(hints) > 3
    for hint in hints.values():
        sled = ARCH.sled_at(image.read(hint.address, 32), "fentry")
        assert sled == Sled("fentry", 5, bytes.fromhex("0f1f440000"), 5, "stack")
        assert ARCH.sled_at(image.read(hint.address, 32), "scan") == Sled("sled", 5, sled.idle, 5, "stack")
