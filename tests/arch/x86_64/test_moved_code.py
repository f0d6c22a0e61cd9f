"""Moved instructions behave as in place: run both in the emulator from the same random state and compare everything.

The state is the general registers, flags, xmm registers, a stack, a data area that pointers point into, and the whole
image (for rip-relative operands). A run ends where execution leaves the window, or faults.
"""

import random

import pytest
import unicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unicorn import x86_const

from fentry.arch import Sled
from fentry.arch.x86_64 import ARCH, facts, insn

DATA, DATA_SIZE = 0x10_0000_0000, 0x10000
STACK, STACK_SIZE = 0x20_0000_0000, 0x4000
COPIES, COPIES_SIZE = 0x3000_0000, 0x40_0000
GENERAL = [getattr(x86_const, f"UC_X86_REG_{name.upper()}") for name in facts.GENERAL]
XMM = [getattr(x86_const, f"UC_X86_REG_XMM{i}") for i in range(16)]
RSP, RIP, FLAGS = x86_const.UC_X86_REG_RSP, x86_const.UC_X86_REG_RIP, x86_const.UC_X86_REG_EFLAGS


class Machine:
    """An emulated x86_64 with one image mapped, that runs a range of code until it is left."""

    def __init__(self, base, image):
        self.uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        self.low = base & -4096
        self.size = (base - self.low + len(image) + 4095) & -4096
        self.areas = [(DATA, DATA_SIZE), (STACK, STACK_SIZE)]
        for at, size in [*self.areas, (self.low, self.size), (COPIES, COPIES_SIZE)]:
            self.uc.mem_map(at, size)
        self.uc.mem_write(base, image)
        self.next_copy = COPIES
        self.inside = (0, 0)
        self.left = 0
        self.written = {}  # (address, size) of what was written in the image: the bytes before
        self.uc.hook_add(unicorn.UC_HOOK_CODE, self._step)
        self.uc.hook_add(unicorn.UC_HOOK_MEM_WRITE, self._write)

    def _step(self, uc, at, size, _):
        self.steps += 1
        if not self.inside[0] <= at < self.inside[1] or self.steps > 200:
            self.left = at
            uc.emu_stop()

    def _write(self, uc, kind, at, size, value, _):
        if self.low <= at < self.low + self.size:
            self.written.setdefault((at, size), bytes(uc.mem_read(at, size)))

    def restore(self):
        """Undo what a run wrote in the image."""
        for (at, _), old in reversed(self.written.items()):
            self.uc.mem_write(at, old)
        self.written.clear()

    def copy(self, code):
        """Put code where none was before (nothing translated of it is cached)."""
        at = self.next_copy
        self.next_copy += (len(code) + 31) & -16
        self.uc.mem_write(at, code)
        return at

    def run(self, start, size, seed):
        """Run from a state made of `seed`. Gives (left for, or fault and where), and the state."""
        rnd = random.Random(seed)
        for at, length in self.areas:
            self.uc.mem_write(at, rnd.randbytes(256) * (length // 256))
        for reg in GENERAL:
            pointer = DATA + DATA_SIZE // 2 + rnd.randrange(-64, 64) * 8
            self.uc.reg_write(reg, rnd.choice([pointer, pointer, pointer, 0, 1, rnd.getrandbits(64)]))
        for reg in XMM:
            self.uc.reg_write(reg, rnd.getrandbits(128))
        top = STACK + STACK_SIZE // 2
        self.uc.reg_write(RSP, top)
        self.uc.mem_write(top, (DATA + 0x100).to_bytes(8, "little"))  # where a ret goes
        self.uc.reg_write(x86_const.UC_X86_REG_FS_BASE, DATA + 0x1000)
        self.uc.reg_write(FLAGS, 2 | rnd.getrandbits(12) & facts.ARITHMETIC_FLAGS)
        self.inside, self.left, self.steps = (start, start + size), 0, 0
        end = ""
        try:
            self.uc.emu_start(start, 0)
        except unicorn.UcError as why:
            end = str(why)
        if self.inside[0] <= self.left < self.inside[1]:
            end = "loops"
        values = [self.uc.reg_read(reg) for reg in (*GENERAL, *XMM)]
        flags = self.uc.reg_read(FLAGS) & facts.ARITHMETIC_FLAGS
        memory = [bytes(self.uc.mem_read(at, length)) for at, length in self.areas]
        image = [(at, bytes(self.uc.mem_read(at, length))) for at, length in sorted(self.written)]
        place = self.uc.reg_read(RIP) - start if end else self.left
        self.restore()
        return end, place, (values, flags, memory, image)


def compare(machine, sled, at, seed):
    """Run `sled.idle` in place and moved, from one seed. True if it ran to an end, False if both faulted alike."""
    to = machine.next_copy
    moved = ARCH.displace(sled, at, to, at + sled.size)
    assert machine.copy(moved.code) == to
    before = machine.run(at, sled.size, seed)
    after = machine.run(to, len(moved.code), seed)
    where = f"{sled.idle.hex(' ')} at {at:#x} moved as {moved.code.hex(' ')}"
    assert before[0] == after[0], where
    if before[0] == "loops":  # interrupted somewhere
        return True
    assert before[2] == after[2], where
    if not before[0]:
        assert before[1] == after[1], where
    elif before[1] in dict(moved.moves):
        assert dict(moved.moves)[before[1]] == after[1], where
    return not before[0]


@pytest.mark.parametrize("name", ["libc.so.6", "libsqlite3.so.0", "libpython3.11.so.1.0"])
def test_windows_of_real_functions(library, name):
    lib = library(name)
    plans = insn.plan_entries(lib.text, lib.at, lib.functions, lib.read)
    low = min(segment.vaddr for segment in lib.image.segments)
    high = max(segment.vaddr + segment.memsz for segment in lib.image.segments)
    image = bytearray(high - low)
    for segment in lib.image.segments:
        image[segment.vaddr - low : segment.vaddr - low + segment.filesz] = lib.image.read(
            segment.vaddr, segment.filesz
        )
    machine = Machine(low + 0x1000_0000, bytes(image))  # page 0 cannot be code's home in a process either
    seen = set()
    ran = relative = 0
    for (address, _, _), plan in zip(lib.functions, plans, strict=True):
        if not isinstance(plan, Sled):
            continue
        kind = (plan.size, plan.idle if not plan.relative else plan.idle[:3])
        if kind in seen or len(seen) > 400:
            continue
        seen.add(kind)
        site = address + ARCH.landing_pad(lib.code(address, 4))
        relative += plan.relative
        ran += compare(machine, plan, site + 0x1000_0000, seed=site)
    print(f"{name}: {len(seen)} different windows, {relative} relative, {ran} ran to their end")
    assert ran > 0.5 * len(seen) > 50


def pick(lib, rnd, count):
    """Random whole instructions of a library that stay in line."""
    flow = insn.FlowControl.NEXT
    out = []
    while len(out) < count:
        address, size, _ = rnd.choice(lib.functions)
        code = lib.code(address, min(size, 4096))
        inside = [i for i in insn.Decoder(64, code) if i.flow_control == flow and not i.is_ip_rel_memory_operand]
        out += [code[i.ip : i.ip + i.len] for i in rnd.sample(inside, min(5, len(inside))) if not i.is_privileged]
    return out[:count]


BASE = 0x40_0000


@pytest.fixture(scope="module")
def bare():
    return Machine(BASE, b"\x90" * 0x200000)


@pytest.fixture(scope="module")
def real_instructions(library):
    return pick(library("libc.so.6"), random.Random(7), 3000)


BRANCHES = st.one_of(
    st.sampled_from([bytes([op]) for op in (*range(0x70, 0x80), 0xE0, 0xE1, 0xE2, 0xE3, 0xEB)]).flatmap(
        lambda op: st.integers(-128, 127).map(lambda d: op + d.to_bytes(1, "little", signed=True))
    ),
    st.sampled_from([b"\xe9", *(bytes([0x0F, op]) for op in range(0x80, 0x90))]).flatmap(
        lambda op: st.integers(-0x10000, 0x10000).map(lambda d: op + d.to_bytes(4, "little", signed=True))
    ),
    st.sampled_from(["488b05", "488d0d", "0f1005", "8005", "c705", "ff35", "480fb61d", "0fbae0", "48ff05"]).flatmap(
        # a page or more away: a store into the page it runs in makes the emulator start the instruction again
        lambda op: st.integers(0x1100, 0xFFFF).map(lambda d: operand(bytes.fromhex(op), d))
    ),
)


def operand(opcode, distance):
    """A rip-relative operand; some of these have an immediate behind the displacement."""
    tail = {0x80: 1, 0xC7: 4, 0xE0: 0}.get(opcode[-1] if opcode[-1] == 0xE0 else opcode[0], 0)
    if opcode[-1] == 0xE0:  # bt eax, imm8
        return opcode + b"\x05"
    return opcode + distance.to_bytes(4, "little") + b"\x5a" * tail


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_sequences_of_real_instructions_and_branches(bare, real_instructions, data):
    """Up to four instructions: real ones, with relative branches and operands among them."""
    parts = data.draw(
        st.lists(
            st.one_of(st.integers(0, len(real_instructions) - 1).map(real_instructions.__getitem__), BRANCHES),
            min_size=1,
            max_size=4,
        )
    )
    code = b"".join(parts)
    at = BASE + data.draw(st.integers(0x80000, 0x100000))
    if bare.next_copy > COPIES + COPIES_SIZE - 4096:
        bare.uc.ctl_flush_tb()
        bare.next_copy = COPIES
    starts, pos = [], 0
    for part in parts:
        starts.append(pos)
        pos += len(part)
    # What the plan refuses is not asked for: branches to the middle of the window.
    for source, to in ARCH.branch_targets(code, at):
        if at < to < at + len(code):
            return
        assert source - at in starts
    bare.uc.mem_write(at, code)
    bare.uc.ctl_remove_cache(at, at + len(code))
    try:
        compare(bare, Sled("entry-jump", len(code), code, len(code), moved=True), at, data.draw(st.integers(0, 2**32)))
    finally:
        bare.uc.mem_write(at, b"\x90" * len(code))
        bare.uc.ctl_remove_cache(at, at + len(code))
