"""Every exception of fentry: fields first, a one-line message, then what to try.

One root, :class:`TraceError`, and four families:

* :class:`AskedWrong`    the request cannot be right (bad glob, no such function);
* :class:`TargetRefused` the target said no (it is gone, it is another user's, memory faulted);
* :class:`CannotHere`    this machine or this function cannot do it (unsupported, out of reach);
* :class:`EngineBug`     this should never happen; the message says what to report.

``exit_code`` is what the command line returns: 2 for a wrong request, 1 for the rest.
"""

from __future__ import annotations


class TraceError(Exception):
    """Root of all errors.

    Args:
        message: one line: what was wanted, where, what was found.
        hint: what to try next, or an empty string.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  try: {self.hint}" if self.hint else self.message


class AskedWrong(TraceError):
    """The request cannot be right, whatever the target is."""

    exit_code = 2


class NothingMatched(AskedWrong):
    """A filter matched no traceable function."""


class BadImage(TraceError):
    """A file is not an ELF image that can be read: truncated, hostile, or something else."""

    def __init__(self, path: str, why: str, *, hint: str = "") -> None:
        super().__init__(f"{path}: {why}", hint=hint)
        self.path = path
        self.why = why


class BadTrace(TraceError):
    """A trace directory cannot be read: absent, of another version, or damaged."""


class TargetRefused(TraceError):
    """The target, or the kernel on its behalf, said no."""


class Gone(TargetRefused):
    """The target exited, or replaced its image by exec, while it was being worked on."""

    def __init__(self, message: str, *, status: int | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status  #: wait status as of os.waitpid, where it is known


class Denied(TargetRefused):
    """Not permitted; the message names the rule (uid, Yama, capability, seccomp)."""


class Fault(TargetRefused):
    """Target memory could not be read or written."""

    def __init__(self, at: int, size: int, what: str = "read", *, hint: str = "") -> None:
        super().__init__(f"cannot {what} {size} bytes of target memory at {at:#x}", hint=hint)
        self.at = at
        self.size = size


class CannotHere(TraceError):
    """This machine, target, architecture or function cannot do what was asked."""


class Unsupported(CannotHere):
    """An ability or a rung of the ladder is absent."""


class OutOfReach(CannotHere):
    """A jump or call cannot span the distance."""

    def __init__(self, at: int, to: int, reach: int) -> None:
        super().__init__(f"{to:#x} is out of reach of {at:#x} (limit {reach:#x} bytes)")
        self.at = at
        self.to = to
        self.reach = reach


class Rejected(CannotHere):
    """An instruction or a function may not be touched; ``reason`` is its verdict."""

    def __init__(self, reason: str, *, at: int = 0) -> None:
        super().__init__(f"{reason} at {at:#x}" if at else reason)
        self.reason = reason
        self.at = at


class PatchMismatch(TraceError):
    """Code is not what it must be before (or after) a write. Patching stops here."""

    def __init__(self, at: int, expect: bytes, found: bytes, *, when: str = "before") -> None:
        super().__init__(
            f"code at {at:#x} is not what it must be {when} the write: "
            f"expected {expect.hex(' ')}, found {found.hex(' ')}",
            hint="something else patches this program; nothing more was written. "
            "If a tracer was killed there earlier: fentry recover PID",
        )
        self.at = at
        self.expect = expect
        self.found = found


class RegisterNotSaved(CannotHere):
    """A register was asked for that this entry did not save; it never reads as zero."""

    def __init__(self, name: str) -> None:
        super().__init__(f"register {name} was not saved here", hint="ask for the full view (save_regs)")
        self.name = name


class EngineBug(TraceError):
    """An invariant of fentry itself does not hold. Please report the message."""
