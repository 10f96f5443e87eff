"""Package sources: the machine's own, and what is derived from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from airflow_deployer.local_cluster.native import packages
from airflow_deployer.local_cluster.native.packages import (
    Source,
    codename,
    configured_sources,
    missing,
    no_services,
    parse_deb822,
    parse_one_line,
    source_entries,
)

DEB822 = """\
# The release.
Types: deb
# a comment inside
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates bookworm-backports sid
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb deb-src
URIs: https://security.example/debian-security
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQ=
 -----END PGP PUBLIC KEY BLOCK-----

Types: deb
URIs: https://other.example/apt
Suites: stable
Components: main

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main
"""


def test_deb822() -> None:
    release, security, other = parse_deb822(DEB822)
    assert release == Source(
        ("deb",),
        ("http://mirror.example/debian",),
        ("bookworm", "bookworm-updates", "bookworm-backports", "sid"),
        ("main", "contrib"),
        (("Signed-By", "/usr/share/keyrings/debian-archive-keyring.gpg"),),
    )
    assert security.types == ("deb", "deb-src")
    assert security.options[0][1].splitlines()[1] == "-----BEGIN PGP PUBLIC KEY BLOCK-----"
    assert other.suites == ("stable",)


def test_one_line() -> None:
    text = """
    # deb http://commented.example/debian bookworm main
    deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian bookworm main contrib # trailing
    deb-src http://mirror.example/debian bookworm main
    nonsense
    """
    assert parse_one_line(text) == [
        Source(
            ("deb",),
            ("http://mirror.example/debian",),
            ("bookworm",),
            ("main", "contrib"),
            (("Signed-By", "/k.gpg"),),
        ),
        Source(("deb-src",), ("http://mirror.example/debian",), ("bookworm",), ("main",)),
    ]


def test_source_entries_keep_mirror_and_key_and_leave_other_releases_out() -> None:
    assert source_entries(parse_deb822(DEB822), "bookworm") == (
        "Types: deb-src\n"
        "URIs: http://mirror.example/debian\n"
        "Suites: bookworm bookworm-updates bookworm-backports\n"
        "Components: main\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
        "\n"
        "Types: deb-src\n"
        "URIs: https://security.example/debian-security\n"
        "Suites: bookworm-security\n"
        "Components: main\n"
        "Signed-By:\n"
        " -----BEGIN PGP PUBLIC KEY BLOCK-----\n"
        " .\n"
        " mQ=\n"
        " -----END PGP PUBLIC KEY BLOCK-----\n"
    )


def test_an_entry_survives_being_written_and_read() -> None:
    for source in parse_deb822(DEB822):
        assert parse_deb822(source.render()) == [source]


def test_configured_sources_reads_both_forms_and_ignores_other_files(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text("deb http://a.example/debian bookworm main\n")
    directory = tmp_path / "sources.list.d"
    directory.mkdir()
    (directory / "b.sources").write_text(
        "Types: deb\nURIs: http://b.example/debian\nSuites: bookworm\nComponents: main\n"
    )
    (directory / "c.list").write_text("deb http://c.example/debian bookworm main\n")
    (directory / "d.list.disabled").write_text("deb http://d.example/debian bookworm main\n")
    assert [source.uris[0] for source in configured_sources(tmp_path)] == [
        "http://a.example/debian",
        "http://b.example/debian",
        "http://c.example/debian",
    ]


def test_the_mirror_is_the_releases_main_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "codename", lambda: "bookworm")
    monkeypatch.setattr(packages, "configured_sources", lambda: parse_deb822(DEB822)[::-1])
    assert packages.debian_mirror() == "http://mirror.example/debian"
    monkeypatch.setattr(packages, "configured_sources", list)
    assert packages.debian_mirror() is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('ID=debian\nVERSION_CODENAME=bookworm\nPRETTY_NAME="Debian"\n', "bookworm"),
        ('ID="debian"\nVERSION_CODENAME="trixie"\n', "trixie"),
        ("ID=ubuntu\nVERSION_CODENAME=noble\n", ""),
    ],
)
def test_codename(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "os-release").write_text(text)
    assert codename(tmp_path / "os-release") == name
    assert codename(tmp_path / "missing") == ""


def test_missing_packages(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    assert missing({"a": str(tmp_path / "there"), "b": str(tmp_path / "not")}) == ["b"]


def test_no_service_starts_while_packages_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tmp_path / "policy-rc.d"
    monkeypatch.setattr(packages, "_POLICY", policy)
    with pytest.raises(KeyboardInterrupt), no_services():
        assert "exit 101" in policy.read_text()
        assert policy.stat().st_mode & 0o111
        left_behind = policy.read_text()
        raise KeyboardInterrupt
    assert not policy.exists()
    # One that a killed run has left is recognised and goes.
    policy.write_text(left_behind)
    with no_services():
        pass
    assert not policy.exists()
    # The machine's own stays.
    policy.write_text("#!/bin/sh\nexit 101\n")
    with no_services():
        pass
    assert policy.read_text() == "#!/bin/sh\nexit 101\n"
