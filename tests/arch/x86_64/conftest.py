"""Real code to be tried on: this machine's own libraries."""

import subprocess
from dataclasses import dataclass

import pytest

from fentry.errors import BadImage
from fentry.image import Image
from tests.conftest import unavailable


@dataclass
class Library:
    """The text section of a shared library and the functions in it."""

    name: str
    path: str
    image: Image
    at: int
    text: bytes
    functions: list  # (address, size, room) of those in the text section, sorted

    def read(self, at, size):
        return self.image.read(at, size)

    def code(self, at, size):
        return self.text[at - self.at : at - self.at + size]


def open_library(path, name):
    image = Image.open(path, cache=False)
    section = next(s for s in image.sections if s.name == ".text")
    text = image.read(section.addr, section.size)
    found = [f for f in image.functions() if section.addr <= f.address < section.end and not f.cold]
    after = [f.address for f in found[1:]] + [section.end]
    rooms = [(f.address, f.size, max(f.size, end - f.address)) for f, end in zip(found, after, strict=True)]
    return Library(name, path, image, section.addr, text, rooms)


@pytest.fixture(scope="session")
def library(tool):
    """Open an installed library by soname; one that is not installed skips the test."""
    cached = subprocess.run([tool("ldconfig"), "-p"], capture_output=True, text=True, check=True).stdout
    opened = {}

    def find(name):
        if name not in opened:
            paths = [
                line.split(" => ")[1] for line in cached.splitlines() if line.split()[:1] == [name] and "x86-64" in line
            ]
            if not paths:
                unavailable(f"no x86_64 {name} on this machine (Debian packages: libc6, libsqlite3-0, libpython3.11)")
            try:
                opened[name] = open_library(paths[0], name)
            except BadImage as why:
                unavailable(str(why))
        return opened[name]

    return find
