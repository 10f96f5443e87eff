"""What a project ships: which files, under which id, and as which build context."""

from __future__ import annotations

import io
import os
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from airflow_deployer import content as content_module
from airflow_deployer.config import Project
from airflow_deployer.content import (
    File,
    ProjectContent,
    ProjectReader,
    files_id,
    ignore_rule,
    read_folder,
    read_project,
    write_context,
)
from airflow_deployer.errors import EXIT_USAGE, ProjectError


@pytest.fixture
def project(tmp_path: Path) -> Path:
    put(tmp_path, "dags/daily.py", "import airflow  # dag")
    return tmp_path


def put(project: Path, path: str, text: str = "x") -> Path:
    file = project / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def read(project: Path, paths: Project | None = None) -> ProjectContent:
    return read_project(project, paths or Project())


def paths_of(project: Path) -> list[str]:
    return [file.path for file in read(project).files]


def mistake(project: Path) -> ProjectError:
    with pytest.raises(ProjectError) as caught:
        read(project)
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.message.isprintable()
    return caught.value


def test_dag_content_is_dags_and_include_sorted(project: Path) -> None:
    for path in ("dags/b/x.py", "dags/a.txt", "include/sql/q.sql", "plugins/p.py", "README.md"):
        put(project, path)
    content = read(project)
    assert [file.path for file in content.dag_files] == [
        "dags/a.txt",
        "dags/b/x.py",
        "dags/daily.py",
        "include/sql/q.sql",
    ]
    assert [file.path for file in content.plugin_files] == ["plugins/p.py"]
    assert content.requirements is None


def test_folders_may_have_other_names(tmp_path: Path) -> None:
    put(tmp_path, "src/workflows/daily.py")
    put(tmp_path, "reqs/airflow.txt", "pandas")
    content = read(tmp_path, Project(dags="src/workflows", requirements="reqs/airflow.txt"))
    assert [file.path for file in content.files] == ["dags/daily.py", "requirements.txt"]


def test_the_content_id_depends_on_paths_modes_and_bytes_alone(
    project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = read(project).content_id
    file = project / "dags/daily.py"
    os.utime(file, (1, 1))
    file.chmod(0o640)
    assert read(project).content_id == first

    elsewhere = tmp_path_factory.mktemp("other")
    put(elsewhere, "dags/daily.py", file.read_text())
    assert read(elsewhere).content_id == first

    seen = {first}
    for change in (
        lambda: file.write_text("other"),
        lambda: file.chmod(0o755),
        lambda: file.rename(project / "dags/weekly.py"),
        lambda: put(project, "include/a"),
        lambda: put(project, "include/b"),
    ):
        change()
        seen.add(read(project).content_id)
    assert len(seen) == 6


def test_where_one_file_ends_and_the_next_begins_matters(tmp_path: Path) -> None:
    put(tmp_path, "one/dags/a.py", "ab")
    put(tmp_path, "one/dags/b.py", "c")
    put(tmp_path, "two/dags/a.py", "a")
    put(tmp_path, "two/dags/b.py", "bc")
    assert read(tmp_path / "one").content_id != read(tmp_path / "two").content_id


def test_plugins_and_requirements_change_the_image_but_not_the_content(project: Path) -> None:
    before = read(project)
    put(project, "plugins/p.py")
    plugin = read(project)
    put(project, "requirements.txt", "pandas\n")
    requirements = read(project)
    assert before.content_id == plugin.content_id == requirements.content_id
    tags = [content.image_tag("base") for content in (before, plugin, requirements)] + [requirements.image_tag("other")]
    assert len(set(tags)) == 4
    assert all(tag.startswith(before.content_id[:12]) for tag in tags)


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n  # yet\n"])
def test_requirements_that_ask_for_nothing_are_none(project: Path, text: str) -> None:
    put(project, "requirements.txt", text)
    assert read(project).requirements is None


def test_what_editors_and_python_leave_behind_is_ignored(project: Path) -> None:
    for name in (
        "__pycache__/daily.cpython-313.pyc",
        "daily.pyc",
        ".git/config",
        ".daily.py.swp",
        "daily.py~",
        "#daily.py#",
        "4913",
        ".DS_Store",
        ".nfs00000000001",
        ".ipynb_checkpoints/a.py",
        "daily.py___jb_tmp___",
    ):
        put(project, f"dags/{name}")
    (project / "dags/.#daily.py").symlink_to("user@host.1234")  # Emacs' lock
    assert paths_of(project) == ["dags/daily.py"]


def test_deployerignore_filters_with_git_syntax(project: Path) -> None:
    for path in (
        "dags/tests/t.py",
        "dags/a.md",
        "dags/keep.md",
        "include/big/data.csv",
        "include/small.csv",
        "plugins/a.md",
    ):
        put(project, path)
    put(project, ".deployerignore", "# comment\n*.md\n!keep.md\ntests/\n/include/big\n")
    assert paths_of(project) == ["dags/daily.py", "dags/keep.md", "include/small.csv"]


def test_airflowignore_is_copied_and_filters_nothing(project: Path) -> None:
    put(project, "dags/.airflowignore", "helpers/\n")
    put(project, "dags/helpers/h.py")
    assert paths_of(project) == ["dags/.airflowignore", "dags/daily.py", "dags/helpers/h.py"]


def test_names_with_spaces_unicode_and_newlines(project: Path) -> None:
    names = ["dags/mit leerzeichen.py", "dags/naïve_日本.py", "dags/new\nline.py"]
    for name in names:
        put(project, name)
    content = read(project)
    assert set(names) < {file.path for file in content.files}
    assert set(names) < set(unpacked(content))


def test_a_name_that_is_not_utf8_is_refused(project: Path) -> None:
    os.close(os.open(os.fsencode(project / "dags") + b"/\xff.py", os.O_CREAT))
    assert "its name is not UTF-8 text" in mistake(project).message


def test_links_inside_the_project_are_files_and_folders(project: Path) -> None:
    put(project, "shared/lib/a.py", "shared")
    (project / "dags/lib").symlink_to("../shared/lib")
    (project / "dags/again.py").symlink_to(project / "dags/daily.py")
    content = read(project)
    assert [file.path for file in content.files] == ["dags/again.py", "dags/daily.py", "dags/lib/a.py"]
    assert unpacked(content)["dags/lib/a.py"] == b"shared"


def test_a_link_out_of_the_project_is_refused(project: Path) -> None:
    (project / "dags/passwd").symlink_to("/etc/passwd")
    error = mistake(project)
    assert "dags/passwd: it is a symbolic link to /etc/passwd, outside the project" in error.message
    assert ".deployerignore" in error.hint


@pytest.mark.parametrize(("target", "reason"), [("missing", "leads nowhere"), ("link.py", "leads in a circle")])
def test_a_broken_link_is_refused(project: Path, target: str, reason: str) -> None:
    (project / "dags/link.py").symlink_to(target)
    assert f"dags/link.py: it is a symbolic link that {reason}" in mistake(project).message


@pytest.mark.parametrize("target", [".", ".."])
def test_a_link_to_a_folder_above_is_refused(project: Path, target: str) -> None:
    (project / "dags/sub").mkdir()
    (project / "dags/sub/up").symlink_to(target)
    assert "dags/sub/up: it is a symbolic link to a folder that holds it" in mistake(project).message


def test_a_socket_and_a_pipe_are_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("dags/s")
        assert "dags/s: it is a socket, not a file" in mistake(project).message
    (project / "dags/s").unlink()
    os.mkfifo(project / "dags/pipe")
    assert "dags/pipe: it is a named pipe, not a file" in mistake(project).message


def test_a_device_is_refused(project: Path) -> None:
    (project / "dags/null").symlink_to("/dev/null")
    assert "dags/null: it is a symbolic link to /dev/null, outside the project" in mistake(project).message
    (project / "dags/null").unlink()
    if os.getuid() == 0:
        os.mknod(project / "dags/null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        assert "dags/null: it is a device, not a file" in mistake(project).message


def test_a_file_that_is_too_large_is_refused_without_being_read(project: Path) -> None:
    with put(project, "include/large.bin").open("r+b") as stream:
        stream.truncate(500_000_000)  # a hole: it takes no space
    started = time.process_time()
    error = mistake(project)
    assert time.process_time() - started < 0.2
    assert error.message == "Cannot deploy include/large.bin: it has 500 MB, and `project.max_file_size` allows 100 MB."
    assert "set project.max_file_size" in error.hint
    assert len(read(project, Project(max_file_size="500M")).files) == 2


def test_an_ignored_file_may_be_anything(project: Path) -> None:
    os.mkfifo(project / "dags/pipe")
    (project / "dags/link").symlink_to("/etc/passwd")
    put(project, ".deployerignore", "pipe\nlink\n")
    assert paths_of(project) == ["dags/daily.py"]


@pytest.mark.parametrize(
    ("path", "mode", "message"),
    [
        ("dags/secret.py", 0o000, "Cannot read dags/secret.py: Permission denied."),
        ("dags/sub", 0o000, "Cannot read the folder dags/sub: Permission denied."),
        (".", 0o600, "Cannot read the folder dags: Permission denied."),
    ],
)
def test_what_cannot_be_read_is_named(path: str, mode: int, message: str) -> None:
    """In a process of its own, without root's permission to read everything."""
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        for file in ("dags/daily.py", "dags/secret.py", "dags/sub/a.py"):
            put(project, file)
        (project / path).chmod(mode)
        run = read_as_nobody(project)
        project.chmod(0o700)
    assert run.stdout == f"{message}\n", run.stderr


def read_as_nobody(project: Path) -> subprocess.CompletedProcess[str]:
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from airflow_deployer.config import Project\n"
        "from airflow_deployer.content import read_project\n"
        "from airflow_deployer.errors import ProjectError\n"
        "project = Path(sys.argv[1])\n"
        "if os.getuid() == 0:\n"
        "    for path in [project, *project.rglob('*')]:\n"
        "        os.chown(path, 65534, -1)\n"
        "    os.setgroups([])\n"
        "    os.setresuid(65534, 65534, 65534)\n"
        "try:\n"
        "    read_project(project, Project())\n"
        "except ProjectError as error:\n"
        "    print(error.message)\n"
    )
    return subprocess.run([sys.executable, "-c", code, str(project)], capture_output=True, text=True, check=False)


def test_no_dags_folder(tmp_path: Path) -> None:
    error = mistake(tmp_path)
    assert f"Cannot deploy {tmp_path}: it has no folder dags/" in error.message
    assert "mkdir dags" in error.hint


@pytest.mark.parametrize("name", [None, "README.md", "__pycache__/a.pyc"])
def test_no_dag_file(tmp_path: Path, name: str | None) -> None:
    (tmp_path / "dags").mkdir()
    if name:
        put(tmp_path, f"dags/{name}")
    assert "dags/ holds no DAG file" in mistake(tmp_path).message


def test_a_file_in_place_of_a_folder(project: Path) -> None:
    put(project, "include")
    assert "Cannot deploy include: it is not a folder" in mistake(project).message


def test_an_ignore_file_that_cannot_be_read(project: Path) -> None:
    (project / ".deployerignore").write_bytes(b"\xff")
    assert "Cannot read .deployerignore: it is not UTF-8 text" in mistake(project).message


def unpacked(content: ProjectContent, dockerfile: str | None = None) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(context(content, dockerfile))) as archive:
        return {
            member.name: stream.read()
            for member in archive.getmembers()
            if member.isfile() and (stream := archive.extractfile(member))
        }


def context(content: ProjectContent, dockerfile: str | None = None) -> bytes:
    target = io.BytesIO()
    write_context(target, content.files, dockerfile)
    return target.getvalue()


def test_the_context_holds_the_files_with_plain_modes(project: Path) -> None:
    put(project, "dags/run.sh", "#!/bin/sh").chmod(0o700)
    content = read(project)
    data = context(content, "FROM base\n")
    os.utime(project / "dags/daily.py", (1, 1))
    assert context(read(project), "FROM base\n") == data
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert [(member.name, oct(member.mode), member.uid) for member in archive.getmembers()] == [
            ("Dockerfile", "0o644", 0),
            ("dags", "0o755", 0),
            ("dags/daily.py", "0o644", 0),
            ("dags/run.sh", "0o755", 0),
        ]
    assert unpacked(content, "FROM base\n")["Dockerfile"] == b"FROM base\n"


@pytest.mark.parametrize("text", ["y", "yy", ""])
def test_a_file_that_changes_between_id_and_context_is_an_error(project: Path, text: str) -> None:
    file = put(project, "dags/a.py", "x")
    content = read(project)
    file.write_text(text)
    with pytest.raises(ProjectError, match=r"Cannot deploy dags/a.py: it changed while it was being read"):
        context(content)


def test_a_file_that_vanishes_between_id_and_context_is_an_error(project: Path) -> None:
    file = put(project, "dags/a.py", "x")
    content = read(project)
    file.unlink()
    with pytest.raises(ProjectError, match="it changed while it was being read"):
        context(content)


def test_a_folder_of_its_own(tmp_path: Path) -> None:
    put(tmp_path, "Dockerfile")
    put(tmp_path, "sub/a.py")
    put(tmp_path, "__pycache__/a.pyc")
    files = read_folder(tmp_path)
    assert [file.path for file in files] == ["Dockerfile", "sub/a.py"]
    assert files_id(files, "a") != files_id(files, "b")


class Reads:
    """Counts the files that are opened for their bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._paths: list[str] = []
        # What was just written counts as settled, so that no test has to wait for it.
        monkeypatch.setattr(content_module, "_SETTLED_NS", 5_000_000)
        plain = content_module._read_file

        def read_file(source: str, *rest: Any, **options: Any) -> File:
            self._paths.append(source)
            return plain(source, *rest, **options)

        monkeypatch.setattr(content_module, "_read_file", read_file)

    def taken(self) -> list[str]:
        """The names of the files that were read since the last call."""
        names = sorted(Path(path).name for path in self._paths)
        self._paths.clear()
        return names


def test_reading_again_reads_only_what_changed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(monkeypatch)
    for name in ("dags/a.py", "dags/b.py", "include/c.sql", "plugins/p.py", "requirements.txt"):
        put(project, name, "first")
    time.sleep(0.02)
    reader = ProjectReader(project, Project())
    first = reader.read()
    assert reads.taken() == ["a.py", "b.py", "c.sql", "daily.py", "p.py", "requirements.txt"]
    assert reader.read() == first
    assert reads.taken() == []

    put(project, "dags/a.py", "other")
    time.sleep(0.02)
    assert reader.read() == read(project) != first
    assert reads.taken() == ["a.py", *sorted(["a.py", "b.py", "c.sql", "daily.py", "p.py", "requirements.txt"])]


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.write_text("X"),
        lambda file: file.write_text("longer"),
        lambda file: file.chmod(0o755),
        lambda file: file.unlink(),
        lambda file: (file.with_name("new").write_text("y"), file.with_name("new").rename(file)),
        lambda file: (file.unlink(), file.symlink_to("daily.py")),
        lambda file: (file.rename(file.with_name("c.py")), file.with_name("b.py").rename(file)),
    ],
)
def test_no_change_goes_unseen(
    project: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]
) -> None:
    Reads(monkeypatch)
    file = put(project, "dags/a.py", "x")
    put(project, "dags/b.py", "y")
    time.sleep(0.02)
    reader = ProjectReader(project, Project())
    before = reader.read()
    change(file)
    assert reader.read() == read(project) != before


def test_a_file_that_was_just_written_is_not_trusted_to_be_settled(project: Path) -> None:
    file = put(project, "dags/a.py", "x")
    reader = ProjectReader(project, Project())
    before = reader.read()
    status = file.stat()
    file.write_text("y")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as if within one tick of the clock
    assert reader.read().content_id == read(project).content_id != before.content_id


def test_the_rule_of_what_is_ignored(project: Path) -> None:
    put(project, ".deployerignore", "*.md\n/include/big\n")
    ignored = ignore_rule(project)
    left_out = ["dags/a.md", "dags/__pycache__/a.cpython-313.pyc", "dags/.a.py.swp", ".git/index", "include/big/x"]
    assert [path for path in (*left_out, "dags/a.py", "include/x", "deployer.toml") if ignored(path)] == left_out


def test_two_thousand_files_take_no_time(tmp_path: Path) -> None:
    for number in range(2000):
        put(tmp_path, f"dags/team{number % 40}/dag{number}.py", "x = 1\n" * 200)
    started = time.process_time()
    reader = ProjectReader(tmp_path, Project())
    reader.read()
    assert time.process_time() - started < 0.5
