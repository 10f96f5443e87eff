"""`deployer lock` with the real uv, on a package index of a few files that this machine serves."""

from __future__ import annotations

import http.server
import json
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from airflow_deployer.airflow_profiles import AIRFLOW_1, AIRFLOW_2, AIRFLOW_3, PROFILES, Profile
from airflow_deployer.base_context import context_files, find_lock, locked_versions
from airflow_deployer.config import Images, Settings
from airflow_deployer.errors import ConfigurationError, DeployerError, RequirementsError
from airflow_deployer.locking import lock, requirements
from airflow_deployer.progress import Silent


class Index:
    """A package index (https://peps.python.org/pep-0691/): a folder of wheels that hold nothing but their metadata."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.packages: dict[str, list[dict[str, object]]] = {}

    def add(
        self,
        name: str,
        version: str,
        *needs: str,
        day: str = "",
        yanked: str | bool = False,
        python: str = "",
    ) -> None:
        wheel = f"{name.replace('-', '_')}-{version}"
        file = self.folder / f"{wheel}-py3-none-any.whl"
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nProvides-Extra: postgres\n"
        metadata += f"Requires-Python: {python}\n" if python else ""
        metadata += "".join(f"Requires-Dist: {need}\n" for need in needs)
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(f"{wheel}.dist-info/METADATA", metadata)
            archive.writestr(f"{wheel}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr(f"{wheel}.dist-info/RECORD", "")
        entry: dict[str, object] = {"filename": file.name, "url": f"/{file.name}", "hashes": {}, "yanked": yanked}
        self.packages.setdefault(name, []).append(entry | ({"upload-time": f"{day}T09:00:00Z"} if day else {}))


def _handler(index: Index) -> type[http.server.SimpleHTTPRequestHandler]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(index.folder))

        def do_GET(self) -> None:
            name = self.path.strip("/")
            if name not in index.packages:
                super().do_GET()
                return
            page = {"meta": {"api-version": "1.1"}, "name": name, "files": index.packages[name]}
            body = json.dumps(page).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/vnd.pypi.simple.v1+json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def end_headers(self) -> None:
            self.send_header("Cache-Control", "no-store")
            super().end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    index = Index(tmp_path / "index")
    index.folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(index))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    index.url = f"http://127.0.0.1:{server.server_port}"
    for name, value in (("DEFAULT_INDEX", index.url), ("CACHE_DIR", str(tmp_path / "cache")), ("HTTP_RETRIES", "0")):
        monkeypatch.setenv(f"UV_{name}", value)
    index.add("apache-airflow", "2.10.4", "pendulum")
    index.add("apache-airflow", "2.10.5", "pendulum", "psycopg2; extra == 'postgres'")
    index.add("apache-airflow", "2.11.2", "pendulum")
    index.add("pendulum", "3.0.0")
    index.add("psycopg2", "2.9.9")
    yield index
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


def settings_for(version: str, **images: Any) -> Settings:
    airflow = msgspec.structs.replace(Settings().airflow, version=version)
    return msgspec.structs.replace(Settings(), airflow=airflow, images=Images(**images))


def refused(project: Path, version: str, kind: type[DeployerError]) -> DeployerError:
    with pytest.raises(kind) as caught:
        lock(project, settings_for(version), Silent())
    assert list(project.iterdir()) == []
    return caught.value


def test_a_lock_holds_every_package_with_hashes_and_no_address(index: Index, project: Path) -> None:
    report = lock(project, settings_for("2.10.5"), Silent())
    file = project / "airflow-2.10.5.txt"
    assert report.document() == {
        "airflow_version": "2.10.5",
        "python": "3.11",
        "file": str(file),
        "packages": 3,
        "changed": True,
    }
    text = file.read_text()
    assert locked_versions(file) == {"apache-airflow": "2.10.5", "pendulum": "3.0.0", "psycopg2": "2.9.9"}
    assert text.count("--hash=sha256:") == 3
    assert "deployer lock 2.10.5" in text
    assert "127.0.0.1" not in text
    assert "-r -" not in text
    assert [path.name for path in project.iterdir()] == [file.name]


def test_a_second_lock_changes_nothing_until_the_first_is_deleted(index: Index, project: Path) -> None:
    lock(project, settings_for("2.10.5"), Silent())
    file = project / "airflow-2.10.5.txt"
    before = file.stat()
    index.add("pendulum", "3.1.0")
    again = lock(project, settings_for("2.10.5"), Silent())
    assert not again.changed
    assert again.lines()[0] == ("lock", f"{file}, unchanged")
    assert file.stat() == before
    file.unlink()
    assert lock(project, settings_for("2.10.5"), Silent()).changed
    assert locked_versions(file)["pendulum"] == "3.1.0"


def test_the_packages_are_those_of_the_releases_own_day(index: Index, project: Path) -> None:
    index.add("apache-airflow", "2.9.3", "yarl", day="2024-07-15")
    for version, day in (("1.9.4", "2024-07-01"), ("1.9.5", "2024-07-15"), ("1.22.0", "2025-10-06")):
        index.add("yarl", version, day=day)
    lock(project, settings_for("2.9.3"), Silent())
    assert locked_versions(project / "airflow-2.9.3.txt") == {"apache-airflow": "2.9.3", "yarl": "1.9.5"}


def test_a_release_that_does_not_exist(index: Index, project: Path) -> None:
    error = refused(project, "2.10.9", ConfigurationError)
    assert error.message == "Cannot lock Airflow 2.10.9: there is no such release."
    assert error.hint.endswith("nearest: 2.10.5 and 2.11.2.")
    assert refused(project, "9.9.9", ConfigurationError).hint.endswith("nearest: 2.11.2.")


def test_a_yanked_release(index: Index, project: Path) -> None:
    index.add("apache-airflow", "2.11.0", yanked="The wrong RC was mistakenly released!")
    error = refused(project, "2.11.0", ConfigurationError)
    assert error.message == (
        "Cannot lock Airflow 2.11.0: this release was yanked: The wrong RC was mistakenly released!"
    )
    assert error.hint.endswith("nearest: 2.10.5 and 2.11.2.")


def test_a_release_for_other_pythons(index: Index, project: Path) -> None:
    index.add("apache-airflow", "2.11.1", python=">=3.14")
    error = refused(project, "2.11.1", RequirementsError)
    assert "no packages fit together for Python 3.11: apache-airflow==2.11.1 requires Python >=3.14" in error.message


def test_packages_that_do_not_fit_together(index: Index, project: Path) -> None:
    index.add("apache-airflow", "2.10.3", "pendulum<3")
    error = refused(project, "2.10.3", RequirementsError)
    assert error.message.startswith("Cannot lock Airflow 2.10.3: no packages fit together for Python 3.11: ")
    assert "pendulum<3" in error.message
    assert "\n" not in error.message


def test_an_index_without_airflow(index: Index, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"{index.url}/other")
    error = refused(project, "2.10.5", DeployerError)
    assert "the package index has no apache-airflow" in error.message
    assert "UV_DEFAULT_INDEX" in error.hint


def test_an_index_that_cannot_be_reached(index: Index, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://team:secret@127.0.0.1:9")
    error = refused(project, "2.10.5", DeployerError)
    assert "the package index cannot be reached: http://127.0.0.1:9/apache-airflow/" in error.message
    assert "Connection refused" in error.message
    assert error.exit_code == 1


def test_a_lock_that_cannot_be_written_leaves_the_old_one(index: Index, project: Path) -> None:
    (project / ".airflow-2.10.5.txt.new").mkdir()
    with pytest.raises(ConfigurationError, match=r"Cannot write .*/airflow-2.10.5.txt: Is a directory"):
        lock(project, settings_for("2.10.5"), Silent())


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.series)
def test_the_locks_that_come_along_hold_what_their_profile_asks_for(profile: Profile, tmp_path: Path) -> None:
    file = find_lock(tmp_path, settings_for(profile.locked))
    assert file is not None
    text, versions = file.read_text(), locked_versions(file)
    assert versions["apache-airflow"] == profile.locked
    assert "psycopg2-binary" in versions
    assert text.count("==") == len(versions)
    assert text.count("--hash=sha256:") > len(versions)
    assert "://" not in text


def test_what_is_resolved_is_airflow_with_its_profiles_pins() -> None:
    assert requirements("3.2.1", AIRFLOW_3) == "apache-airflow[postgres]==3.2.1\nasyncpg\n"
    assert "sqlalchemy<1.4\n" in requirements("1.10.14", AIRFLOW_1)
    assert requirements("2.9.3", AIRFLOW_2) == "apache-airflow[postgres]==2.9.3\n"


def test_the_projects_own_lock_wins(tmp_path: Path) -> None:
    own = tmp_path / "airflow-3.3.2.txt"
    own.write_text("apache-airflow==3.3.2\n")
    assert find_lock(tmp_path, settings_for("3.3.2")) == own
    sent = {file.path: file.source for file in context_files(own)}
    assert sent["requirements.txt"] == str(own)
    assert "Dockerfile" in sent
    assert not [path for path in sent if path.startswith("requirements/")]


def test_a_version_without_a_lock_is_refused_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"Airflow 2\.10\.5.* there is no airflow-2\.10\.5\.txt") as caught:
        find_lock(tmp_path, settings_for("2.10.5"))
    assert caught.value.hint == "deployer lock"
    assert find_lock(tmp_path, settings_for("2.10.5", base="ghcr.io/team/base:1")) is None
