"""The census: every function of a module with exactly one verdict, the form chosen or the reason why not.

Decided from the file alone, before any target exists; the same verdicts serve ``fentry list``, ``fentry explain`` and
the engine, which checks the target's memory against them before it writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fentry.arch import Arch, Refusal, Rung, Sled, by_elf_machine
from fentry.errors import BadImage
from fentry.image import Function, Image
from fentry.target import Module

#: not functions in the ABI's sense: their own calling convention, or nothing ever calls them
_NEVER = {
    "its own calling convention": re.compile(
        r"_dl_tlsdesc_\w+|_dl_runtime_resolve\w*|_dl_runtime_profile\w*|__x86_\w*thunk\w*|__x86\.get_pc_thunk\.\w+"
        r"|__morestack\w*|__tls_desc\w*|__riscv_save_\d+|__riscv_restore_\d+|__restore_rt|__restore|__rt_sigreturn"
        r"|__kernel_\w+|_dl_static_init_tls_desc"
    ),
    "an instrumentation hook itself": re.compile(r"_?_?mcount|__fentry__|__gnu_mcount_nc|__cyg_profile_func_\w+"),
    "entered by a return, not by a call": re.compile(r"__start_context"),
    "the program's first instruction: nothing called it": re.compile(
        r"_start|_dl_start|_dl_start_user|__start|_rt_entry"
    ),
}
#: they save a return address and come back through it later: an entry is fine, a return hook is not
_RETURNS_TWICE = re.compile(
    r"(__)?(_|sig|_sig|__sig)?setjmp|savectx|(__)?getcontext|(__)?(libc_)?vfork|__vfork\w*|(__)?swapcontext|_setjmp_aligned"
)
#: they ask who called them: which library goes on searching behind itself, whose search path counts
_ASKS_CALLER = re.compile(r"(__)?(libc_)?(dl|_dl_)(m?open|v?sym)(_\w+)?")
#: the unwinder captures its own frame and leaves through another one
_UNWINDER = re.compile(
    r"_Unwind_\w+|__gcc_personality_v0|__gxx_personality_v0|_dl_find_object|(__)?dl_iterate_phdr|uw_\w+|unw_\w+|_U\w+|__libunwind_\w+"
    r"|__frame_state_for|__longjmp\w*|_?(sig)?longjmp|(__)?setcontext|__libc_siglongjmp|__longjmp_chk"
)
#: libraries that are nothing but an unwinder: their helpers, nameless once stripped, look at their own return addresses
_UNWINDER_LIBRARY = re.compile(r"lib(gcc_s|unwind)([-.].*)?")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What can be done with one function.

    Addresses are link-time; add the module's bias.
    """

    function: Function
    module: str
    main: bool
    sled: Sled | None
    site: int  #: address of the bytes to patch; the function's address where there is none
    reason: str  #: why not, or "" if ``sled``
    returns: bool = True  #: its return may be hooked
    returns_reason: str = ""

    @property
    def name(self) -> str:
        """Name of the function."""
        return self.function.name

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other names of the same address."""
        return self.function.aliases

    @property
    def form(self) -> str:
        """Form in one word, "-" if none."""
        return self.sled.form if self.sled else "-"

    @property
    def size(self) -> int:
        """Size of the function in bytes."""
        return self.function.size


@dataclass(frozen=True, slots=True)
class Census:
    """One image with the verdicts of all its functions, in address order."""

    image: Image
    arch: Arch
    module: str
    verdicts: list[Verdict]

    def find(self, name: str) -> Verdict | None:
        """The verdict of a function by name or alias."""
        for v in self.verdicts:
            if v.name == name or name in v.aliases:
                return v
        return None


def _never(function: Function) -> str:
    names = (function.name, *function.aliases)
    for reason, pattern in _NEVER.items():
        if any(pattern.fullmatch(n) for n in names):
            return reason
    if function.ifunc:
        return "an ifunc resolver: it runs before relocation is finished"
    if function.cold:
        return "a cold part: it is jumped to, not called"
    return ""


def take(image: Image, module: str = "", *, main: bool = False) -> Census:
    """Judge every function of `image`.

    Args:
        image: an open image.
        module: name shown for it; the file's base name if empty.
        main: it is the program itself.
    """
    arch = by_elf_machine(image.machine, image.bits)
    module = module or Path(image.path).name
    functions = image.functions()
    hints = image.sleds()
    verdicts: dict[int, Verdict] = {}
    bare: list[Function] = []
    unwinder = _UNWINDER_LIBRARY.fullmatch(module) is not None
    code = _Code(image)

    def judge(f: Function, sled: Sled | None, site: int, reason: str) -> None:
        returns, why = True, ""
        names = (f.name, *f.aliases)
        if any(_RETURNS_TWICE.fullmatch(n) for n in names):
            returns, why = False, "returns twice"
        elif any(_ASKS_CALLER.fullmatch(n) for n in names):
            returns, why = False, "asks for its return address"
        elif unwinder or any(_UNWINDER.fullmatch(n) for n in names):
            returns, why = False, "leaves through a frame that is not its own"
        elif sled is not None and sled.form in ("mcount", "sled16"):
            returns, why = False, f"form {sled.form} leaves no return address to hook"
        verdicts[f.address] = Verdict(f, module, main, sled, site, reason, returns, why)

    for f in functions:
        reason = _never(f)
        if reason or (f.address == image.entry and main):
            judge(f, None, f.address, reason or "the program's first instruction: nothing called it")
            continue
        hint = hints.get(f.address)
        if hint is not None:
            kind = hint.kind
            if kind == "nop" and hint.address == f.address + arch.landing_pad(code.read(f.address, 8)):
                kind = "fentry"  # a recorded nop at the entry stands for a call at the entry
            found = arch.sled_at(code.read(hint.address, 32), kind)
            if isinstance(found, Sled):
                judge(f, found, hint.address, "")
                continue
            if isinstance(found, Refusal) and arch.rung < Rung.MOVABLE:
                judge(f, None, hint.address, found.reason)
                continue
        else:
            start = f.address + arch.landing_pad(code.read(f.address, 8))
            found = arch.sled_at(code.read(start, 32), "scan")
            if isinstance(found, Sled):
                judge(f, found, start, "")
                continue
        bare.append(f)
    _without_sled(code, arch, bare, functions, judge)
    return Census(image, arch, module, [verdicts[f.address] for f in functions])


class _Code:
    """The executable bytes of an image, read once: tens of thousands of little reads take longer than the judging."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self.ranges = [(lo, hi, image.read(lo, hi - lo)) for lo, hi in image.executable_ranges()]

    def read(self, at: int, size: int) -> bytes:
        """Bytes at `at`, fewer at the end of a segment; none where there is nothing."""
        for lo, hi, text in self.ranges:
            if lo <= at and at + size <= hi:
                return text[at - lo : at - lo + size]
        segments = self._image.segments
        end = next((s.vaddr + s.memsz for s in segments if s.vaddr <= at < s.vaddr + s.memsz), at)
        try:
            return self._image.read(at, min(size, end - at))
        except BadImage:
            return b""


def _without_sled(
    code: _Code, arch: Arch, bare: Sequence[Function], functions: Sequence[Function], judge: object
) -> None:
    """Judge functions that have no sled: the entry jump, planned for a whole text range at once."""
    assert callable(judge)
    if not bare:
        return
    starts = [f.address for f in functions]
    following = dict(zip(starts, [*starts[1:], 1 << 63], strict=True))
    for lo, hi, text in code.ranges:
        inside = [f for f in bare if lo <= f.address < hi]
        if not inside:
            continue
        jobs = []
        for f in inside:
            room = min(following[f.address], hi) - f.address
            jobs.append((f.address, min(f.size, room), room))
        planned = arch.plan_entries(text, lo, jobs, code.read)
        for f, plan in zip(inside, planned, strict=True):
            if isinstance(plan, Sled):
                pad = arch.landing_pad(text[f.address - lo : f.address - lo + 8])
                judge(f, plan, f.address + pad, "")
            else:
                judge(f, None, f.address, plan.reason)
    known = {f.address for lo, hi, _ in code.ranges for f in bare if lo <= f.address < hi}
    for f in bare:
        if f.address not in known:
            judge(f, None, f.address, "not in executable memory")


@dataclass(frozen=True, slots=True)
class Site:
    """One function of a loaded module that can be hooked; addresses are the target's."""

    verdict: Verdict
    module: Module
    at: int  #: address of the bytes to patch
    function: int  #: address of the function

    @property
    def name(self) -> str:
        """Name of the function."""
        return self.verdict.name

    @property
    def sled(self) -> Sled:
        """Its sled."""
        assert self.verdict.sled is not None
        return self.verdict.sled


def sites(module: Module, verdicts: Iterable[Verdict]) -> list[Site]:
    """Place verdicts in a target where `module` is loaded; those without a form are left out."""
    return [
        Site(v, module, v.site + module.bias, v.function.address + module.bias) for v in verdicts if v.sled is not None
    ]
