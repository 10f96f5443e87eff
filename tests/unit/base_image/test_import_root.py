"""The modules of the project come from one version, whatever was on the path before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from airflow_deployer_pod import import_root

from tests.unit.base_image.conftest import POD_PACKAGE


@pytest.fixture
def content(tmp_path: Path) -> Path:
    """Two versions; `home` leads to the second one, which is live, by links."""
    for version in ("one", "two"):
        include = tmp_path / "content" / "versions" / version / "include"
        include.mkdir(parents=True)
        (include / "helper.py").write_text(f"NAME = '{version}'\n")
    (tmp_path / "content" / "versions" / "two" / "include" / "new.py").write_text("")
    (tmp_path / "content" / "current").symlink_to("versions/two")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "include").symlink_to("../content/current/include")
    return tmp_path / "content"


def test_only_one_version_can_be_imported(content: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, one, two = content.parent / "home", content / "versions" / "one", content / "versions" / "two"
    others = ["/somewhere/else", ""]
    monkeypatch.setattr(sys, "path", [str(home), str(two), str(two / "dags"), *others])
    monkeypatch.setenv("PYTHONPATH", f"{home}{os.pathsep}/somewhere/else")
    import_root.use_root(one, content)
    assert sys.path == [str(one), *others]
    assert os.environ["PYTHONPATH"] == f"{one}{os.pathsep}/somewhere/else"
    import_root.use_root(two, content)
    assert sys.path == [str(two), *others]


def test_a_namespace_package_is_not_put_together_from_two_versions(content: Path) -> None:
    code = f"""
from pathlib import Path
from airflow_deployer_pod.import_root import use_root
use_root(Path({str(content / "versions" / "one")!r}), Path({str(content)!r}))
from include.helper import NAME
print(NAME)
try:
    import include.new
except ImportError:
    print("no more")
"""
    path = os.pathsep.join([str(content.parent / "home"), str(POD_PACKAGE.parent)])
    run = subprocess.run(
        [sys.executable, "-B", "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert run.stdout == "one\nno more\n"
