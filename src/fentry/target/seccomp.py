"""What a seccomp filter says to a system call, found out by running the filter here, not the call there.

Programs that record make a few system calls inside the traced process (who am I; wait a little). Under a filter that
does not allow them they would kill it; so the filter is fetched and asked first.

Sources: seccomp(2); ptrace(2) PTRACE_SECCOMP_GET_FILTER; Linux ``include/uapi/linux/seccomp.h``, ``filter.h`` and
``net/core/filter.c`` (the opcodes that seccomp_check_filter lets through).
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Iterable, Sequence

from fentry.errors import Gone
from fentry.target import procfs, ptrace

_GET_FILTER = 0x420C
_ALLOW, _LOG, _KILL = 0x7FFF0000, 0x7FFC0000, 0x80000000
_AUDIT_ARCH = 0xC000003E  #: AUDIT_ARCH_X86_64: the machine whose registers ptrace.py knows
_DATA = 64  #: sizeof(struct seccomp_data): nr, arch, instruction pointer, six arguments
_WORD = 0xFFFFFFFF
_MEMORY = 16  #: BPF_MEMWORDS

Instruction = tuple[int, int, int, int]  #: code, jt, jf, k


def forbidden(tid: int, numbers: Iterable[int]) -> str:
    """Why a stopped thread may not make all of these system calls, or "". Raises Gone."""
    mode = procfs.status(tid).get("Seccomp", "0")
    if mode == "0":
        return ""
    if mode == "1":
        return "strict seccomp mode allows it nothing but read and write"
    try:
        filters = _filters(tid)
    except OSError as error:
        if error.errno == errno.ESRCH:
            raise Gone(f"thread {tid} was killed") from None
        return f"it is under a seccomp filter that cannot be looked at ({error.strerror})"
    for nr in numbers:
        if any(run(program, nr) & 0xFFFF0000 not in (_ALLOW, _LOG) for program in filters):
            return f"its seccomp filter does not allow system call {nr}, which recording makes in it"
    return ""


def _filters(tid: int) -> list[list[Instruction]]:
    """All filters of a stopped thread. Raises OSError."""
    found: list[list[Instruction]] = []
    while True:
        try:
            count = ptrace.request(_GET_FILTER, tid, len(found))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return found
            raise
        buffer = ctypes.create_string_buffer(8 * count)
        ptrace.request(_GET_FILTER, tid, len(found), ctypes.addressof(buffer))
        found.append(list(struct.iter_unpack("<HBBI", buffer.raw)))


def run(program: Sequence[Instruction], nr: int) -> int:
    """Give what a filter returns for system call `nr` with arguments of zero; kill for one that is malformed."""
    data = struct.pack("<II", nr, _AUDIT_ARCH).ljust(_DATA, b"\0")
    a = x = pc = 0
    memory = [0] * _MEMORY
    while pc < len(program):
        code, jt, jf, k = program[pc]
        pc += 1
        kind, operand = code & 7, x if code & 8 else k
        if kind == 6:  # RET
            return a if code & 0x18 == 0x10 else k
        if kind in (0, 1):  # LD, LDX
            mode = code & 0xE0
            if mode == 0x20 and k <= _DATA - 4:
                value = struct.unpack_from("<I", data, k)[0]
            elif mode in (0x00, 0x60, 0x80):
                value = {0x00: k, 0x60: memory[k % _MEMORY], 0x80: _DATA}[mode]
            else:
                return _KILL
            a, x = (value, x) if kind == 0 else (a, value)
        elif kind in (2, 3):  # ST, STX
            memory[k % _MEMORY] = a if kind == 2 else x
        elif kind == 4:
            a = _alu(code & 0xF0, a, operand)
        elif kind == 5:
            if code & 0xF0 == 0:
                pc += k
            else:
                holds = {0x10: a == operand, 0x20: a > operand, 0x30: a >= operand, 0x40: bool(a & operand)}
                pc += jt if holds.get(code & 0xF0) else jf
        elif code & 0x80:  # TXA
            a = x
        else:  # TAX
            x = a
    return _KILL


def _alu(op: int, a: int, b: int) -> int:
    """One arithmetic instruction; dividing by zero gives what makes no filter allow anything: zero."""
    match op:
        case 0x00:
            a += b
        case 0x10:
            a -= b
        case 0x20:
            a *= b
        case 0x30:
            a = a // b if b else 0
        case 0x40:
            a |= b
        case 0x50:
            a &= b
        case 0x60:
            a <<= b & 31
        case 0x70:
            a >>= b & 31
        case 0x80:
            a = -a
        case 0xA0:
            a ^= b
    return a & _WORD
