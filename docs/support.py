"""Write docs/support.md: what works where, found out by asking the code.

    .venv/bin/python docs/support.py          # from the top of a clone; tests/test_support.py tells when it is due

Forms are what the census says of test programs that real compilers built; abilities are looked up on a target of each
kind; reasons are read from the source. Only the limits at the end are written by hand.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from fentry import arch as archs  # noqa: E402 - the clone's own, and its tests, found by the line above
from fentry.engine import census  # noqa: E402 - as above
from fentry.image import Image  # noqa: E402 - as above
from fentry.target import Target, process, unicorn  # noqa: E402 - as above
from tests.programs.build import build as build_program  # noqa: E402 - as above

PAGE = ROOT / "docs" / "support.md"

#: (compiler, options, kind of program) of the table of forms; the function looked at is `fib` of calls.c
BUILDS = (
    ("gcc", (), "pie"),
    ("gcc", ("-fpatchable-function-entry=16",), "pie"),
    ("gcc", ("-pg", "-mfentry"), "pie"),
    ("gcc", ("-pg",), "pie"),
    ("riscv64-linux-gnu-gcc", (), "static"),
    ("riscv64-linux-gnu-gcc", ("-fpatchable-function-entry=4",), "static"),
    ("riscv64-linux-gnu-gcc", ("-march=rv64g", "-fpatchable-function-entry=2"), "static"),
    ("riscv64-linux-gnu-gcc", ("-pg",), "static"),
)

ABILITIES = {
    "allocator": "memory mapped in it",
    "shared": "memory that both sides see",
    "code_sync": "written code made seen",
    "stepper": "one instruction at a time",
}


def architectures() -> list[str]:
    """Rows: name, rung, exceptions, where contexts are found."""
    rows = [
        "| architecture | rung | exceptions pass return hooks | a thread's context is found by |",
        "|---|---|---|---|",
    ]
    for a in sorted(archs.all_archs(), key=lambda a: -a.rung):
        context = a.dialect.segment_register or f"a table hashed by {a.tp}"
        exceptions = "yes" if a.unwinds else "no: C++ programs get entries only"
        rows.append(f"| {a.name} | {a.rung.value}, {a.rung.name.lower()} | {exceptions} | {context} |")
    return rows


def forms(build: Callable[..., Path]) -> list[str]:
    """Rows: how a program was built, how its functions are hooked, whether their returns are."""
    rows = ["| built by | with | form | returns |", "|---|---|---|---|"]
    for cc, flags, kind in BUILDS:
        found = census.take(Image.open(str(build("calls.c", cc=cc, flags=flags, kind=kind))), main=True).find("fib")
        assert found is not None
        returns = ("hooked" if found.returns else found.returns_reason) if found.sled else ""
        form = found.form if found.sled else f"none: {found.reason}"
        options = " ".join(f"`{flag}`" for flag in flags) or "nothing special"
        rows.append(f"| {cc} | {options} | {form} | {returns} |")
    return rows


def _targets(build: Callable[..., Path]) -> Iterator[Target]:
    native = process.spawn([str(build("calls.c", cc="gcc", kind="pie"))])
    yield native
    native.kill()
    native.close()
    emulated = unicorn.load(build("calls.c", cc="riscv64-linux-gnu-gcc", kind="static"))
    yield emulated
    emulated.close()


def targets(build: Callable[..., Path]) -> list[str]:
    """Rows: an ability, and what each kind of target says of it."""
    columns: dict[str, list[str]] = {}
    for target in _targets(build):
        has = ["yes" if getattr(target, name) is not None else "no" for name in ABILITIES]
        has.append("`icount`, `order`" if target.clock_at else "`tsc`, `order`")
        has.append("between slices" if target.sliced else "while it runs")
        has.append("a system call" if target.system_calls else "never: rings are drained before they are full")
        has.append("yes" if type(target).relatives is not Target.relatives else "no: no program there forks")
        columns[target.kind] = has
    questions = [f"{text} (`{name}`)" for name, text in ABILITIES.items()]
    questions += ["clocks", "rings are drained", "programs wait for room by", "forked children are restored, too"]
    rows = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    rows += [f"| {q} | " + " | ".join(has[i] for has in columns.values()) + " |" for i, q in enumerate(questions)]
    return rows


def _text(node: ast.expr | None, module: ast.Module) -> str:
    """A message as people see it, with `...` for what is filled in; "" if it is not spelled in the module."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values)
    if isinstance(node, ast.Name):
        named = (s.value for s in module.body if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == node.id)
        return _text(next(named, None), module)
    return str(node.value) if isinstance(node, ast.Constant) else ""


def reasons() -> list[str]:
    """Every reason with which a function is refused: those of the census, then those of each architecture."""
    found = [("everywhere", reason) for reason in census._NEVER]
    source = ast.parse(inspect.getsource(census._never))
    found += [("everywhere", _text(n.value, source)) for n in ast.walk(source) if isinstance(n, ast.Return)]
    for path in sorted((ROOT / "src/fentry/arch").glob("*/*.py")):
        module = ast.parse(path.read_text())
        for node in ast.walk(module):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Refusal":
                found.append((path.parent.name, _text(node.args[0], module)))
    return [f"- {where}: {text}" for where, text in dict.fromkeys(found) if text]


#: (what is met, what happens, why)
LIMITS = (
    (
        "`vfork`, `setjmp` and its kin, `getcontext`, `swapcontext`",
        "entries only",
        "they return twice, or through a saved address",
    ),
    (
        "functions of an unwinder, all of libgcc_s and libunwind",
        "entries only",
        "they look at their own return addresses",
    ),
    ("`-pg` without `-mfentry` (form mcount)", "entries only", "the call sits behind the prologue"),
    (
        "a call in the first bytes of a function without a sled",
        "refused",
        "its return address would lie in an island while it runs",
    ),
    (
        "a stack outside the mirrored window",
        "entries only, as events of kind plain",
        "there is no shadow slot for the return address",
    ),
    (
        "no room for the mirror (`RLIMIT_AS`, `mlockall`)",
        "entries only, said in a note",
        "the mirror takes 16 TiB of address space, hardly any memory",
    ),
    (
        "a program that uses the `gs` base itself (Wine)",
        "refused",
        "the base is where programs find their thread's context",
    ),
    (
        "a hardware shadow stack switched on",
        "refused, with the switch to turn it off",
        "injected system calls restore frames by hand",
    ),
    ("a seccomp filter, without CAP_SYS_ADMIN", "refused when attaching", "it may kill the thread for mapping memory"),
    (
        "gdb beside a tracer",
        "callers are lost behind hooks, unless given the file of `fentry symbols`; in recording programs even then",
        "debuggers learn of code from files; programs have no frame information",
    ),
    (
        "a frame left by `longjmp`",
        "its call ends without a true duration, marked so",
        "nothing runs when a frame is abandoned",
    ),
    (
        "more than 256 threads at once (`--threads`)",
        "the policy decides: wait, or drop and count",
        "each has a ring of its own",
    ),
    (
        "a `block` ring whose reader died",
        "dropped and counted after about 2 s",
        "a traced program must not wait for the dead",
    ),
    ("dynamically linked programs in the emulator", "refused", "it has no loader"),
    ("more than one hart in the emulator", "not there", "its system calls make no threads"),
    ("C++ programs on riscv64", "entries only, said in a note", "landing pads are not built there yet"),
    ("functions without a sled on riscv64", "refused", "entry jumps are not built there yet"),
    ("32-bit programs; live processes on other machines", "refused", "not built yet"),
    ("Go", "untested; exits would break it", "its runtime moves stacks and checks return addresses"),
)

TEXT = """\
# What works where

Written by `docs/support.py` from the code; the limits at the end are written by hand.

## Architectures

How far a port has come is its [rung](port-an-arch.md#the-ladder): 1 known, 2 trapped, 3 sledded, 4 direct, 5 movable.
A rung includes those below it; nothing uses 2 and 4 yet: there are no probes inside functions, and no direct calls.

{architectures}

## Forms

How a function is hooked depends on what its compiler left. What the census says of one function of the same source:

{forms}

On architectures of rung 5 a program needs no preparation. `fentry list -v` gives every function's form or
reason, `fentry explain` shows the bytes.

## Targets

{targets}

Each kind keeps every rule of the conformance suite in [`fentry.testing`](../src/fentry/testing/target.py): see
[`test_process.py`](../tests/target/test_process.py) and [`test_conformance.py`](../tests/target/test_conformance.py).

## Why a function may be refused

{reasons}

## Limits

{limits}
"""


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def page(build: Callable[..., Path]) -> str:
    """The whole page; `build` is :func:`tests.programs.build.build`, or one that skips what is not installed."""
    return TEXT.format(
        architectures="\n".join(architectures()),
        forms="\n".join(forms(build)),
        targets="\n".join(targets(build)),
        reasons="\n".join(reasons()),
        limits="\n".join(["| what is met | what happens | why |", "|---|---|---|", *map(_row, LIMITS)]),
    )


if __name__ == "__main__":
    PAGE.write_text(page(build_program))
