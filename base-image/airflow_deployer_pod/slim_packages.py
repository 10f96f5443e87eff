"""Make the installed packages smaller while the image is built, without taking anything that a program uses.

    python slim_packages.py SITE_PACKAGES

- Debug information of shared libraries: what lies behind the last segment that the loader maps (elf(5), program
  headers), which is a sixth of everything that is installed.
- The packages' own tests, and type stubs, which only editors read.
"""

from __future__ import annotations

import shutil
import struct
import sys
from pathlib import Path

_ELF_64_LITTLE = b"\x7fELF\x02\x01"
# Offsets in the file header, and the sizes there (elf(5), Elf64_Ehdr).
_PROGRAM_HEADERS, _SECTION_HEADERS, _SIZES = 32, 40, 54
_HEADER_SIZE = 64


def mapped_size(data: bytes) -> int | None:
    """How many bytes from the start of a 64-bit little-endian ELF file the loader needs; None for any other file."""
    if not data.startswith(_ELF_64_LITTLE) or len(data) < _HEADER_SIZE:
        return None
    (start,) = struct.unpack_from("<Q", data, _PROGRAM_HEADERS)
    size, count = struct.unpack_from("<HH", data, _SIZES)
    end: int = max(_HEADER_SIZE, start + size * count)
    for position in range(start, start + size * count, size):
        # Elf64_Phdr: type, flags, offset, virtual and physical address, size in the file.
        _, _, offset, _, _, in_file = struct.unpack_from("<IIQQQQ", data, position)
        end = max(end, offset + in_file)
    return end


def without_sections(data: bytes) -> bytes:
    """The mapped part of an ELF file, whose header no longer names the sections that are gone."""
    end = mapped_size(data)
    if end is None or end >= len(data):
        return data
    kept = bytearray(data[:end])
    struct.pack_into("<Q", kept, _SECTION_HEADERS, 0)
    # Number of section headers, and which of them holds the names.
    struct.pack_into("<HH", kept, _SIZES + 6, 0, 0)
    return bytes(kept)


def slim(packages: Path) -> int:
    """Slim everything below a folder; return the bytes that were saved."""
    saved = 0
    for folder in [path for path in packages.rglob("tests") if path.is_dir()]:
        saved += sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        shutil.rmtree(folder)
    for file in packages.rglob("*.pyi"):
        saved += file.stat().st_size
        file.unlink()
    for file in packages.rglob("*.so*"):
        if file.is_file() and not file.is_symlink():
            data = file.read_bytes()
            kept = without_sections(data)
            if kept is not data:
                file.write_bytes(kept)
                saved += len(data) - len(kept)
    return saved


if __name__ == "__main__":
    print(f"{slim(Path(sys.argv[1])) / 1e6:.0f} MB saved")
