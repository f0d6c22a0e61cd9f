"""Tables against the headers and libraries they describe."""

import subprocess

import capstone
import pytest
import unicorn
from unicorn import x86_const

from fentry.arch.x86_64 import ARCH, facts


def test_registers_are_in_the_order_of_the_kernels_struct(tool, tmp_path):
    lines = "".join(f'printf("%zu\\n", offsetof(struct user_regs_struct, {name}));' for name in facts.REGS)
    source = f"#include <stdio.h>\n#include <stddef.h>\n#include <sys/user.h>\nint main(void) {{ {lines} }}"
    subprocess.run([tool("gcc"), "-x", "c", "-", "-o", tmp_path / "a"], input=source, text=True, check=True)
    offsets = subprocess.run([tmp_path / "a"], capture_output=True, text=True, check=True).stdout.split()
    assert [int(offset) for offset in offsets] == list(range(0, 8 * len(facts.REGS), 8))


@pytest.mark.parametrize("number", range(16))
def test_general_registers_are_in_encoding_order(number):
    push = (b"\x41" if number > 7 else b"") + bytes([0x50 + number % 8])
    assert ARCH.disassemble(push, 0)[0][2] == f"push %{facts.GENERAL[number]}"


def test_foreign_names_exist():
    for name, constant in facts.UNICORN_REGS.items():
        assert name in facts.REGS
        assert hasattr(x86_const, constant)
    assert set(facts.REGS) - set(facts.UNICORN_REGS) == {"orig_rax"}
    assert hasattr(unicorn, facts.UNICORN_ARCH)
    assert hasattr(unicorn, facts.UNICORN_MODE)
    assert all(hasattr(capstone, mode) for mode in (facts.CAPSTONE_ARCH, *facts.CAPSTONE_MODES))
    assert set(facts.DWARF) == {*facts.GENERAL, "rip"}
    assert set(facts.GDB_REGS) <= set(facts.REGS)


def test_roles_name_registers():
    roles = (*facts.ARGS, *facts.RETURNS, *facts.CALLEE_SAVED, *facts.SYSCALL_ARGS, facts.SCRATCH, facts.STATIC_CHAIN)
    assert set(roles) <= set(facts.GENERAL)
    assert facts.SCRATCH not in {*facts.ARGS, *facts.RETURNS, *facts.CALLEE_SAVED, facts.STATIC_CHAIN}
    for name in (facts.PC, facts.SP, facts.TP, facts.FLAGS):
        assert name in facts.REGS


def test_nops_are_nops():
    for length, nop in enumerate(facts.NOPS):
        assert len(nop) == length
        if nop:
            ((_, raw, text),) = ARCH.disassemble(nop, 0)
            assert raw == nop
            assert "nop" in text or text == "xchg %ax,%ax"
