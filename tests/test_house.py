"""The house rules, kept true by reading the source: a page of `ast`, no dependency.

Each rule is a function from the parsed modules to complaints, and each is shown a bad snippet that it
has to complain about: a rule that cannot fail keeps nothing.

Rules, by name:

* layers      imports go downwards only; inside a layer, only the layer's own package; ``export``
              reads ``record`` and ``image`` alone (and ``errors``, which everyone may).
* arch names  an architecture's name is a word of its own folder only.
* target names  a target's name is a word of its own file, of the files beside it that are its parts, the
              command line and the package's front; only the latter two import it.
* code writes in ``engine``, only ``patch.py`` writes code; others may write data, and say so.
* length      a module over 700 lines says why: ``# house: long because ...`` in its first five lines.
* names       no manager, helper, util, misc, common or provider.
* public      what ``fentry.__all__`` lists exists and has a docstring.

Comments and docstrings may name what they like; code (identifiers, string constants) may not.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "fentry"

#: height of each layer; equal heights do not import each other. ``testing`` and ``cli`` see everything below.
HEIGHT = {
    "errors": 0,
    "image": 1,
    "record": 1,
    "arch": 2,
    "target": 3,
    "program": 4,
    "engine": 5,
    "tracers": 6,
    "export": 6,
    "testing": 7,
    "cli": 8,
}
#: layers that may see less than what lies below them
ONLY = {"export": {"errors", "image", "record"}}
#: may import anything: it is the door
FRONT = {"fentry", "fentry.__main__"}

LIMIT = 700
EXCUSE = re.compile(r"#\s*house: long because \S+")
BANNED = {"manager", "helper", "helpers", "util", "utils", "misc", "common", "provider"}

#: what a write of code looks like: a method of a target, or of an object held as one
WRITES = {"write", "write_many", "poke"}
#: files, buffers and streams have a `write` too; a target is what is called so here
TARGETS = {"target", "_target", "machine", "process"}
DATA = re.compile(r"#\s*house: data")


@dataclass(frozen=True)
class Module:
    """One source file: dotted name below ``fentry`` ("arch.riscv64.insn"; "fentry" for the front), text, tree."""

    name: str
    text: str
    tree: ast.Module

    @classmethod
    def parse(cls, name: str, text: str) -> Module:
        return cls(name, text, ast.parse(text))

    @property
    def layer(self) -> str:
        return self.name.split(".")[0]


def modules() -> list[Module]:
    """Every module of the package."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = list(path.relative_to(SOURCE).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        name = ".".join(parts) or "fentry"
        found.append(Module.parse("fentry.__main__" if name == "__main__" else name, path.read_text()))
    return found


def architectures() -> set[str]:
    """Folders of ``arch``."""
    return {p.parent.name for p in (SOURCE / "arch").glob("*/__init__.py")}


def targets() -> set[str]:
    """Files and folders of ``target`` that hold one: a subclass of ``Target``."""
    found = set()
    for module in modules():
        bases = {
            b.id
            for c in ast.walk(module.tree)
            if isinstance(c, ast.ClassDef)
            for b in c.bases
            if isinstance(b, ast.Name)
        }
        if module.name.startswith("target.") and "Target" in bases:
            found.add(module.name.split(".")[1])
    return found


# -- what the rules look at -------------------------------------------------------------------------
def imports(module: Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name below ``fentry``) of every import of the package, relative ones resolved.

    Imports that only type checkers see are no exception: a layer that must name what lies above it
    knows it.
    """
    package = module.name.split(".")
    is_package = module.name == "fentry" or (SOURCE.joinpath(*package) / "__init__.py").exists()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "fentry" or alias.name.startswith("fentry."):
                    yield node.lineno, alias.name.removeprefix("fentry").removeprefix(".") or "fentry"
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                up = package[: len(package) - node.level + is_package]
                origin = ".".join([*up, *([node.module] if node.module else [])])
            elif node.module and (node.module == "fentry" or node.module.startswith("fentry.")):
                origin = node.module.removeprefix("fentry").removeprefix(".")
            else:
                continue
            if origin:
                yield node.lineno, origin
            else:  # from fentry import errors, spawn
                for alias in node.names:
                    yield node.lineno, alias.name if alias.name in HEIGHT else "fentry"


def words(module: Module) -> Iterator[tuple[int, str]]:
    """(line, text) of every identifier and string constant that is code; docstrings are left out."""
    prose: set[int] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            prose.add(id(node.value))
    for node in ast.walk(module.tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield line, node.value
        elif isinstance(node, ast.Name):
            yield line, node.id
        elif isinstance(node, ast.Attribute):
            yield line, node.attr
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            yield line, node.arg
        elif isinstance(node, ast.alias):
            yield line, f"{node.name} {node.asname or ''}"
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield line, node.module
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield line, node.name


def says(text: str, name: str) -> bool:
    """Whether `name` is a word of `text`: "unicorn_x" and "Unicorn" say "unicorn", "unicorns" does not."""
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", text, re.IGNORECASE) is not None


# -- the rules ---------------------------------------------------------------------------------------
def rule_layers(all_modules: list[Module]) -> Iterator[str]:
    for module in all_modules:
        if module.name in FRONT:
            continue
        if module.layer not in HEIGHT:
            yield f"{module.name}: {module.layer} is not a layer"
            continue
        for line, origin in imports(module):
            layer = origin.split(".")[0]
            if layer == module.layer:
                continue
            if layer not in HEIGHT:
                yield f"{module.name}:{line}: imports {origin}, which is no layer (the front is for users)"
            elif HEIGHT[layer] >= HEIGHT[module.layer]:
                yield f"{module.name}:{line}: imports {origin}, which is not below {module.layer}"
            elif module.layer in ONLY and layer not in ONLY[module.layer]:
                yield f"{module.name}:{line}: imports {origin}; {module.layer} reads {sorted(ONLY[module.layer])} only"


def rule_arch_names(all_modules: list[Module], names: set[str]) -> Iterator[str]:
    for module in all_modules:
        own = module.name.split(".")[1:2] if module.layer == "arch" else []
        for line, text in words(module):
            for name in sorted(names):
                if says(text, name) and own != [name]:
                    yield f"{module.name}:{line}: names architecture {name}"


def rule_target_names(all_modules: list[Module], names: set[str]) -> Iterator[str]:
    for module in all_modules:
        if module.layer == "cli" or module.name in FRONT:
            continue
        own = "".join(module.name.split(".")[1:2]) if module.layer == "target" else ""
        for line, origin in imports(module):
            imported = "".join(origin.split(".")[1:2]) if origin.startswith("target.") else ""
            if imported in names - {own}:
                yield f"{module.name}:{line}: imports target {imported}"
        if own and own not in names:
            continue  # a file beside the targets is a part of one or of several, and may say of which
        for node in ast.walk(module.tree):
            # "process" is an English word too, so of strings only those count that are nothing but the name
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names - {own}:
                yield f"{module.name}:{node.lineno}: names target {node.value}"
            if isinstance(node, ast.ClassDef):
                for name in sorted(names - {own}):
                    if node.name.lower().startswith(name):
                        yield f"{module.name}:{node.lineno}: class {node.name} names target {name}"


def rule_code_writes(all_modules: list[Module]) -> Iterator[str]:
    for module in all_modules:
        if module.layer != "engine" or module.name == "engine.patch":
            continue
        lines = module.text.splitlines()
        for node in ast.walk(module.tree):
            if (
                not isinstance(node, ast.Call)
                or not isinstance(node.func, ast.Attribute)
                or node.func.attr not in WRITES
            ):
                continue
            held = node.func.value
            holder = held.attr if isinstance(held, ast.Attribute) else held.id if isinstance(held, ast.Name) else ""
            said = any(DATA.search(line) for line in lines[node.lineno - 1 : node.end_lineno])
            if holder in TARGETS and not said:
                yield (
                    f"{module.name}:{node.lineno}: writes to the target; "
                    "code goes through engine.patch, and data says so: # house: data, what it is"
                )


def rule_length(all_modules: list[Module]) -> Iterator[str]:
    for module in all_modules:
        lines = module.text.splitlines()
        if len(lines) > LIMIT and not any(EXCUSE.match(line) for line in lines[:5]):
            yield f"{module.name}: {len(lines)} lines without a reason"


def rule_names(all_modules: list[Module]) -> Iterator[str]:
    for module in all_modules:
        called = [(1, part) for part in module.name.split(".")]
        called += [(n.lineno, n.name) for n in ast.walk(module.tree) if isinstance(n, ast.ClassDef)]
        for line, name in called:
            parts = {p.lower() for p in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}
            for banned in sorted(parts & BANNED):
                yield f"{module.name}:{line}: {name} is called a {banned}; say what it is"


def rule_public(names: dict[str, object], listed: list[str]) -> Iterator[str]:
    for name in listed:
        if name not in names:
            yield f"fentry.__all__ lists {name}, which does not exist"
        elif (inspect.isclass(names[name]) or inspect.isroutine(names[name])) and not inspect.getdoc(names[name]):
            yield f"fentry.{name} has no docstring"
    if len(set(listed)) != len(listed):
        yield "fentry.__all__ lists a name twice"


# -- the house ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rule", [rule_layers, rule_code_writes, rule_length, rule_names])
def test_house(rule) -> None:
    assert list(rule(modules())) == []


def test_house_names_of_architectures() -> None:
    assert architectures(), "no architecture found: the rule would check nothing"
    assert list(rule_arch_names(modules(), architectures())) == []


def test_house_names_of_targets() -> None:
    assert targets(), "no target found: the rule would check nothing"
    assert list(rule_target_names(modules(), targets())) == []


def test_house_public_names_are_documented() -> None:
    front = importlib.import_module("fentry")
    assert front.__all__, "the front lists no names: the rule would check nothing"
    assert list(rule_public(vars(front), list(front.__all__))) == []


# -- every rule can fail -----------------------------------------------------------------------------
def complaints(rule, name: str, text: str, *args: object) -> list[str]:
    return list(rule([Module.parse(name, text)], *args))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("errors", "import fentry.image"),
        ("image", "from fentry.record import layout"),  # sideways
        ("arch.toy", "from fentry.target import Target"),  # upwards
        ("arch.toy", "from ..target import Target"),
        ("engine.slots", "def f():\n    from fentry.tracers import graph"),
        ("target.live", "from fentry import engine"),
        ("engine.slots", "from fentry import spawn"),
        ("export.text", "from fentry.arch import load"),  # below, but not for export
        ("export.text", "from fentry.tracers.graph import G"),
        ("testing.check", "import fentry.cli.record"),
        ("stray", "x = 1"),
    ],
)
def test_layers_can_fail(name: str, text: str) -> None:
    assert len(complaints(rule_layers, name, text)) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "engine.slots",
            "from fentry.arch import Sled\nfrom fentry.errors import TraceError\nfrom .patch import Patch",
        ),
        ("cli.record", "import fentry.testing.capture\nimport fentry.engine"),
        ("export.text", "from fentry.record.layout import Kind\nfrom fentry import image"),
        ("fentry", "from fentry.cli import main"),
    ],
)
def test_layers_can_pass(name: str, text: str) -> None:
    assert complaints(rule_layers, name, text) == []


@pytest.mark.parametrize(
    "text",
    [
        'if arch == "riscv64": ...',
        "import fentry.arch.riscv64",
        "riscv64_nop = 1",
        "def f(riscv64): ...",
        'x = "linux-riscv64"',
    ],
)
def test_arch_names_can_fail(text: str) -> None:
    assert complaints(rule_arch_names, "engine.slots", text, {"riscv64", "x86_64"})
    assert complaints(rule_arch_names, "arch.x86_64.code", text, {"riscv64", "x86_64"})
    assert not complaints(rule_arch_names, "arch.riscv64.code", text, {"riscv64", "x86_64"})


def test_arch_names_leaves_prose_alone() -> None:
    text = '"""On riscv64 this is two words."""\nx = 1  # x86_64: one\ndef f():\n    """Not riscv64."""\n'
    assert complaints(rule_arch_names, "engine.slots", text, {"riscv64", "x86_64"}) == []


@pytest.mark.parametrize(
    "text", ['if target.kind == "unicorn": ...', "from fentry.target.unicorn import Machine", "class UnicornSite: ..."]
)
def test_target_names_can_fail(text: str) -> None:
    assert complaints(rule_target_names, "engine.slots", text, {"unicorn", "process"})
    assert not complaints(rule_target_names, "cli.record", text, {"unicorn", "process"})
    assert not complaints(rule_target_names, "target.unicorn", text, {"unicorn", "process"})
    assert complaints(rule_target_names, "target", text, {"unicorn", "process"})
    assert complaints(rule_target_names, "target.process", text, {"unicorn", "process"})


def test_target_names_lets_parts_say_whose_they_are() -> None:
    names = {"unicorn", "process"}
    assert complaints(rule_target_names, "target.room", "class ProcessRoom: ...", names) == []
    assert complaints(rule_target_names, "target.process", "from fentry.target import room", names) == []
    assert complaints(rule_target_names, "target.room", "from fentry.target.process import Process", names)


@pytest.mark.parametrize(
    "text", ["target.write(at, code)", "self.target.write(at, b'x')", "self._target.write_many([\n(at, code),\n])"]
)
def test_code_writes_can_fail(text: str) -> None:
    assert complaints(rule_code_writes, "engine.slots", text)
    assert not complaints(rule_code_writes, "engine.patch", text)
    assert not complaints(rule_code_writes, "tracers.graph", text)
    first, _, rest = text.partition("\n")
    assert not complaints(rule_code_writes, "engine.slots", f"{first}  # house: data, a ring header\n{rest}")


def test_code_writes_leaves_files_alone() -> None:
    assert complaints(rule_code_writes, "engine.journal", "out.write(b'x')") == []


def test_length_can_fail() -> None:
    long = "x = 1\n" * (LIMIT + 1)
    assert complaints(rule_length, "engine.slots", long)
    assert not complaints(rule_length, "engine.slots", "# house: long because it is one table\n" + long)
    assert complaints(rule_length, "engine.slots", "# house: long because\n" + long)


@pytest.mark.parametrize(
    ("name", "text"),
    [("engine.utils", ""), ("engine.ring_helper", ""), ("engine.slots", "class RingManager: ..."), ("common", "")],
)
def test_names_can_fail(name: str, text: str) -> None:
    assert complaints(rule_names, name, text)


def test_names_looks_at_whole_words() -> None:
    assert complaints(rule_names, "engine.slots", "class Uncommon: ...\nclass Utility: ...") == []


def test_public_can_fail() -> None:
    def undocumented() -> None: ...

    assert list(rule_public({}, ["gone"]))
    assert list(rule_public({"undocumented": undocumented}, ["undocumented"]))
    assert list(rule_public({"SOURCE": SOURCE}, ["SOURCE", "SOURCE"]))
    assert not list(rule_public({"modules": modules}, ["modules"]))
