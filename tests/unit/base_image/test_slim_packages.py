"""What is taken from the installed packages: real shared libraries still load afterwards."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from airflow_deployer_pod.slim_packages import mapped_size, slim, without_sections


def libraries() -> list[Path]:
    """The shared libraries of the packages that the tests run with."""
    found = sorted(Path(sysconfig.get_path("purelib")).rglob("*.so"))
    assert found
    return found[:20]


def test_only_what_lies_behind_the_mapped_part_goes() -> None:
    for library in libraries():
        data = library.read_bytes()
        kept = without_sections(data)
        size = mapped_size(data)
        assert size is not None
        assert len(kept) == min(size, len(data))
        assert kept[64:] == data[64 : len(kept)]
        assert without_sections(kept) == kept


@pytest.mark.parametrize("data", [b"", b"\x7fELF\x02\x01", b"#!/bin/sh\n", b"\x7fELF\x01\x01" + bytes(100)])
def test_any_other_file_stays(data: bytes) -> None:
    assert without_sections(data) == data


def test_slimmed_libraries_load(tmp_path: Path) -> None:
    package = tmp_path / "msgspec"
    import msgspec

    source = Path(msgspec.__file__).parent
    for file in source.iterdir():
        if file.is_file():
            (package / file.name).parent.mkdir(exist_ok=True)
            (package / file.name).write_bytes(file.read_bytes())
    (package / "tests").mkdir()
    (package / "tests/test_it.py").write_text("x = 1\n")
    (package / "it.pyi").write_text("x: int\n")
    assert slim(tmp_path) > 0
    assert not (package / "tests").exists()
    assert not list(tmp_path.rglob("*.pyi"))
    program = "import msgspec; print(msgspec.__file__, msgspec.json.decode(b'[1]'))"
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", program],
        env={"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip().endswith("[1]")
    assert str(tmp_path) in done.stdout
