"""r11 in use across calls: what gcc's -fipa-ra does, found in compiled code and in the emulator's arithmetic."""

import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from iced_x86 import Decoder, InstructionInfoFactory, Register, RegisterExt

from fentry.arch import Sled
from fentry.arch.x86_64 import ARCH, insn, scratch
from fentry.image import Image

# A leaf that needs few registers, and callers with more values than registers that survive calls.
SOURCE = """
static __attribute__((noinline)) int leaf(int x) { return x * 3 + 1; }
static __attribute__((noinline)) int through(int x) { return leaf(x + 1) + 2; }
static __attribute__((noinline)) int apart(int x) { return x * 5 + 2; }
extern int elsewhere(int);
static __attribute__((noinline)) int outward(int x) { return elsewhere(x) + 3; }
#define PRESSED(name, f) int name(int *p, int a, int b, int c, int d, int e, int n) { \\
  int s = 0, g = a*b, h = b*c, i = c*d, j = d*e, k = a^e, l = b^d, m = a+c, o = b+e; \\
  for (int q = 0; q < n; q++) { s += f(p[q]); s ^= g; s += h; s ^= i; s += j; s ^= k; s += l; s ^= m; s += o; \\
    g += a; h += b; i += c; j += d; k += e; } return s; }
PRESSED(one, leaf)
PRESSED(two, through)
PRESSED(three, outward)
int four(int x) { return apart(x) + apart(x + 1); }
"""


@pytest.fixture
def plans(tool, tmp_path):
    """Compile SOURCE as a library; gives {function: plan}."""

    def make(*flags):
        (tmp_path / "a.c").write_text(SOURCE)
        made = tmp_path / "a.so"
        subprocess.run([tool("gcc"), "-O2", "-fPIC", "-shared", *flags, "-o", made, tmp_path / "a.c"], check=True)
        image = Image.open(str(made), cache=False)
        text = next(s for s in image.sections if s.name == ".text")
        inside = [f for f in image.functions() if text.addr <= f.address < text.end]
        jobs = [(f.address, f.size, f.size) for f in inside]
        code = image.read(text.addr, text.size)
        found = insn.plan_entries(code, text.addr, jobs, image.read)
        return dict(zip([f.name for f in inside], found, strict=True))

    return make


def test_functions_that_a_caller_keeps_r11_across(plans):
    found = plans()
    assert found["leaf"] == insn.KEPT  # kept across directly, and by what `two` assumes of `through`
    assert found["through"] in (insn.KEPT, insn.CALL)
    for name in ("one", "two", "three", "apart"):
        assert isinstance(found[name], Sled), name
    assert found["outward"] not in (insn.KEPT, insn.ARGUMENT)  # who calls another library keeps nothing


@pytest.mark.parametrize("flags", [("-fno-ipa-ra",), ("-pg", "-mfentry"), ("-fpatchable-function-entry=3",)])
def test_code_built_for_tracing_keeps_nothing(plans, flags):
    assert insn.KEPT not in plans(*flags).values()


def test_known_user_in_a_real_library(library):
    """sqlite3 reads variable-length integers with a function that its callers know to leave r11 alone."""
    lib = library("libsqlite3.so.0")
    found = insn.plan_entries(lib.text, lib.at, lib.functions, lib.read)
    kept = sum(plan == insn.KEPT for plan in found)
    assert 0 < kept < 0.02 * len(found)


@given(
    st.binary(min_size=1, max_size=24), st.sampled_from([b"", b"\x4d", b"\x45\x0f", b"\xc4\x42", b"\x41", b"\x62\x52"])
)
def test_no_encoding_of_r11_is_missed(noise, prefix):
    """Whatever names r11 by iced's account has a prefix that the scan marks."""
    code = (prefix + noise)[:15]
    one = Decoder(64, code).decode()
    if one.is_invalid:
        return
    used = InstructionInfoFactory().info(one).used_registers()
    named = any(RegisterExt.full_register(u.register) == Register.R11 for u in used)
    # syscall destroys it unnamed; the two-byte VEX form can name it as a destination only
    if named and one.code != insn.Code.SYSCALL and not one.is_privileged and 0xC5 not in code[:-1]:
        marks = scratch._mentions(np.frombuffer(code + b"\0" * 16, np.uint8))
        assert any(mark < one.len for mark in marks), ARCH.disassemble(code, 0)
