"""The board that an emulated bare-metal program runs on: a serial port, a power switch, machine-mode traps.

Addresses and registers are those that most boards and emulators agree on:

=========== ========= ================================================================================
0x00100000  finisher  SiFive test device: a 32-bit write of 0x5555 ends the run with status 0, of
                      0x3333 | status << 16 with that status, of 0x7777 (reset) with status 0
0x10000000  uart      16550: a byte written to offset 0 goes to standard output; offset 0 reads standard
                      input; offset 5 (line status) says "ready", and bit 0 that a byte has come
=========== ========= ================================================================================

There are no interrupts. A trap goes to the program's vector if it set one, in direct mode; else it ends the run.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from dataclasses import dataclass

from unicorn import Uc

from fentry.target.guestspace import Space
from fentry.target.linuxfiles import Stream, stream_file
from fentry.target.linuxsignal import Ended

FINISHER, UART, DEVICE_SIZE = 0x10_0000, 0x1000_0000, 0x1000
_DATA, _LINE_CONTROL, _LINE_STATUS = 0, 3, 5  # 16550 registers
_MIE, _MPIE, _MPP = 1 << 3, 1 << 7, 3 << 11  # mstatus fields, privileged ISA 3.1.6


@dataclass(frozen=True, slots=True)
class TrapRegs:
    """The emulator's numbers of the registers that a trap into machine mode writes."""

    vector: int
    pc: int
    cause: int
    value: int
    status: int
    privilege: int


class Board:
    """Devices and trap entry of one machine.

    Args:
        uc: the machine.
        space: its memory; the devices are put into it.
        traps: registers of trap entry.
        stdin: what the serial port receives.
        stdout: where it sends.
    """

    def __init__(self, uc: Uc, space: Space, traps: TrapRegs, stdin: Stream, stdout: Stream) -> None:
        self.ended: Ended | None = None
        self._traps = traps
        self._input = stream_file(stdin, 0)
        self._output = stream_file(stdout, 1)
        self._waiting = b""
        self._unsent = bytearray()
        self._latch = False
        uc.mmio_map(FINISHER, DEVICE_SIZE, None, None, self._finish, None)
        uc.mmio_map(UART, DEVICE_SIZE, self._uart_read, None, self._uart_write, None)
        space.device(FINISHER, DEVICE_SIZE, "[finisher]")
        space.device(UART, DEVICE_SIZE, "[uart]")

    def close(self, uc: Uc) -> None:
        """Unmap the devices: the machine holds their functions, and those hold the machine."""
        self.flush()
        uc.mem_unmap(FINISHER, DEVICE_SIZE)
        uc.mem_unmap(UART, DEVICE_SIZE)

    def flush(self) -> None:
        """Send what the serial port has gathered (it gathers lines)."""
        data, self._unsent = bytes(self._unsent), bytearray()
        if self._output.sink is not None:
            if data:
                self._output.sink.write(data)
            return
        while data:
            data = data[os.write(self._output.fd, data) :]

    def enter_trap(self, uc: Uc, set_pc: Callable[[int], None], pc: int, cause: int, value: int) -> bool:
        """Enter the program's trap handler. Gives False if it has none."""
        t = self._traps
        vector = uc.reg_read(t.vector) & ~3
        if not vector:
            return False
        came_from = uc.reg_read(t.privilege)
        uc.reg_write(t.privilege, 3)
        status = uc.reg_read(t.status)
        enabled = _MPIE if status & _MIE else 0
        uc.reg_write(t.status, status & ~(_MIE | _MPIE | _MPP) | enabled | came_from << 11)
        for number, what in ((t.pc, pc), (t.cause, cause), (t.value, value)):
            uc.reg_write(number, what)
        set_pc(vector)
        return True

    def privilege(self, uc: Uc) -> int:
        """Give the mode that the hart is in: 0 user, 1 supervisor, 3 machine."""
        return int(uc.reg_read(self._traps.privilege))

    def _finish(self, uc: Uc, offset: int, _size: int, value: int, _data: object) -> None:
        codes = {0x5555: 0, 0x7777: 0, 0x3333: value >> 16 & 0xFFFF}
        if offset == 0 and value & 0xFFFF in codes:
            self.ended = Ended("exited", codes[value & 0xFFFF])
            uc.emu_stop()

    def _uart_write(self, _uc: Uc, offset: int, _size: int, value: int, _data: object) -> None:
        if offset == _LINE_CONTROL:
            self._latch = bool(value & 0x80)  # offset 0 is the divisor now
        elif offset == _DATA and not self._latch:
            self._unsent.append(value & 0xFF)
            if value & 0xFF == 0x0A or len(self._unsent) >= 1024:
                self.flush()

    def _uart_read(self, _uc: Uc, offset: int, _size: int, _data: object) -> int:
        if offset == _LINE_STATUS:
            return 0x60 | int(self._byte_waits())
        if offset == _DATA and not self._latch and self._byte_waits():
            first, self._waiting = self._waiting[0], self._waiting[1:]
            return first
        return 0

    def _byte_waits(self) -> bool:
        """Look for input without waiting for it."""
        if not self._waiting:
            if self._input.source is not None:
                self._waiting = self._input.source.read(1)
            elif select.select([self._input.fd], [], [], 0)[0]:
                self._waiting = os.read(self._input.fd, 1)
        return bool(self._waiting)
