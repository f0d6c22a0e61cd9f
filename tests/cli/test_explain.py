"""``fentry explain``: whole texts for both architectures, addresses and what the compiler decides blanked."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import HERE, fentry

TOOLS = {"x86_64": ("gcc", ()), "riscv64": ("riscv64-linux-gnu-gcc", ("-mno-relax",))}
NUMBER = re.compile(r"(?<![\w.])-?(?:0x[0-9a-f]+|\d+)\b")


def blanked(text: str) -> str:
    """Blank what may differ from one machine, compiler or version to the next.

    In the slot and behind, bytes and numbers depend on where things are and how large the programs came out; in the
    function itself they do not, but for the armed bytes. The register story is the source's own.
    """
    out: list[str] = []
    section = ""
    for line in text.splitlines():
        if line and not line.startswith(" "):
            section = line.split(",")[0]
        if section == "registers" and not line.startswith(section):
            continue
        if match := re.match(r" +[0-9a-f]+: ((?:[0-9a-f]{2} )+) *(.*)", line):
            code, what = match.groups()
            if section in ("slot", "moved instructions") or "; to the slot" in what or "jalr" in what:
                code, what = "..", NUMBER.sub("_", what)
            what = re.sub(r"0x[0-9a-f]+", "_", " ".join(what.split()))
            line = f"  _: {code.strip():<24} {what}"
        elif section == "programs":
            line = NUMBER.sub("_", line)
        else:
            line = re.sub(r"0x[0-9a-f]+", "_", line)
        out.append(line.rstrip())
    return "\n".join(out) + "\n"


def explained(path: Path, function: str, tracer: str) -> str:
    done = fentry("explain", "-p", tracer, str(path), function)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode()


@pytest.mark.parametrize("arch", TOOLS)
@pytest.mark.parametrize(
    ("function", "tracer"), [("sledded", "function"), ("sledded", "function_graph"), ("bare", "function_graph")]
)
def test_explain(
    build: Callable[..., Path], golden: Callable[[str, str], None], arch: str, function: str, tracer: str
) -> None:
    cc, flags = TOOLS[arch]
    path = build(HERE / f"two.{arch}.s", cc=cc, kind="static", flags=("-nostdlib", "-Wl,--build-id=none", *flags))
    golden(f"explain-{arch}-{function}-{tracer}.txt", blanked(explained(path, function, tracer)))


@pytest.mark.parametrize("arch", TOOLS)
def test_register_story_and_programs(build: Callable[..., Path], arch: str) -> None:
    cc, flags = TOOLS[arch]
    path = build(HERE / f"two.{arch}.s", cc=cc, kind="static", flags=("-nostdlib", "-Wl,--build-id=none", *flags))
    text = explained(path, "sledded", "function_graph")
    assert "\nregisters\n  Register story" in text
    verbose = fentry("explain", "-v", str(path), "sledded").stdout.decode()
    assert len(verbose.splitlines()) > len(text.splitlines()) + 50
