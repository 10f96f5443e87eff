"""How Airflow's error texts become findings; the texts are what Airflow 3.3.2 on Python 3.13 wrote."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.unit.base_image.conftest import POD_PACKAGE

ENVIRONMENT = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(POD_PACKAGE.parent)}

MACHINERY = """Traceback (most recent call last):
  File "/opt/airflow/lib/python3.13/site-packages/airflow/dag_processing/importers/python_importer.py", line 9, in parse
    loader.exec_module(new_module)
    ~~~~~~~~~~~~~~~~~~^^^^^^^^^^^^
  File "<frozen importlib._bootstrap>", line 488, in _call_with_frames_removed
"""
SYNTAX = MACHINERY + ('  File "ROOT/dags/orders.py", line 2\n    def x(:\n          ^\nSyntaxError: invalid syntax\n')
HELPER = MACHINERY + (
    '  File "ROOT/dags/orders.py", line 4, in <module>\n    import shop\n'
    '  File "ROOT/include/shop.py", line 7, in <module>\n    rates = load()\n'
    '  File "/opt/airflow/lib/python3.13/site-packages/money.py", line 3, in load\n    raise E(\n        "x")\n'
    "money.errors.RateError: no rate for EUR\nAsk the bank.\n"
)
CHAINED = (
    "Traceback (most recent call last):\n"
    '  File "ROOT/dags/orders.py", line 3, in <module>\n    x = Variable.get("x")\n'
    "airflow.sdk.exceptions.AirflowRuntimeError: VARIABLE_NOT_FOUND: {'message': 'Variable x not found'}\n\n"
    "During handling of the above exception, another exception occurred:\n\n"
    "Traceback (most recent call last):\n"
    '  File "ROOT/dags/orders.py", line 5, in <module>\n    raise RuntimeError("set x")\n'
    "RuntimeError: set x\n"
)
CYCLE = "AirflowDagCycleException: Cycle detected in Dag: orders. Faulty task: b"


class AirflowDagCycleException(Exception):  # noqa: N818 - Airflow's name
    """Told by its name."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with a DAG file that defines `orders` in its fourth line."""
    (tmp_path / "dags").mkdir()
    (tmp_path / "dags" / "orders.py").write_text("from airflow.sdk import DAG\n\n\nwith DAG('orders'):\n    pass\n")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "path", "line", "kind", "exception", "message"),
    [
        (SYNTAX, "dags/orders.py", 2, "syntax", "SyntaxError", "invalid syntax"),
        (HELPER, "include/shop.py", 7, "import", "RateError", "no rate for EUR"),
        (CHAINED, "dags/orders.py", 5, "import", "RuntimeError", "set x"),
        (CYCLE, "dags/orders.py", 4, "cycle", "AirflowDagCycleException", CYCLE.partition(": ")[2]),
        (
            MACHINERY + '  File "ROOT/dags/orders.py", line 3, in <module>\n    sys.exit()\nSystemExit\n',
            "dags/orders.py",
            3,
            "import",
            "SystemExit",
            "",
        ),
        (
            MACHINERY + '  File "ROOT/dags/orders.py", line 3, in <module>\n    time.sleep(99)\n'
            "airflow.sdk.exceptions.AirflowTaskTimeout: DagBag import timeout for x after 30.0s.\nPlease take a look\n",
            "dags/orders.py",
            3,
            "timeout",
            "AirflowTaskTimeout",
            "DagBag import timeout for x after 30.0s.",
        ),
    ],
)
def test_an_error_becomes_a_finding(
    import_check: Any, root: Path, text: str, path: str, line: int, kind: str, exception: str, message: str
) -> None:
    finding = import_check.describe(text.replace("ROOT", str(root)), root / "dags" / "orders.py", root)
    assert finding.pop("traceback")
    assert finding == {
        "path": path,
        "line": line,
        "dag_file": "dags/orders.py",
        "kind": kind,
        "exception": exception,
        "message": message,
        "advice": "",
    }


def test_the_traceback_begins_in_the_project_and_stays_short(import_check: Any, root: Path) -> None:
    text = HELPER.replace("ROOT", str(root))
    lines = import_check.describe(text, root / "dags" / "orders.py", root)["traceback"]
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1] == '  File "dags/orders.py", line 4, in <module>'
    assert lines[-1] == "Ask the bank."
    deep = text.replace("    rates = load()\n", "    rates = load()\n" + '  File "/x.py", line 1, in f\n    f()\n' * 50)
    lines = import_check.describe(deep, root / "dags" / "orders.py", root)["traceback"]
    assert len(lines) == 21
    assert "  ... 90 lines ..." in lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CHAINED, True),
        ("airflow.sdk.exceptions.AirflowNotFoundException: The conn_id `y` isn't defined", True),
        ("KeyError: 'Variable x does not exist.'", True),
        ("sqlalchemy.exc.OperationalError: (sqlite3.OperationalError) no such table: dag", True),
        (HELPER, False),
        ("KeyError: 'x'", False),
        (CYCLE, False),
    ],
)
def test_what_only_the_database_knows_is_told_apart(import_check: Any, text: str, expected: bool) -> None:
    assert import_check.needs_database(text) is expected


def test_logged_exceptions_tell_where_and_in_which_dag(import_check: Any, root: Path) -> None:
    # As Airflow 1.10 logs them: the same exception twice, and a cycle without the name of its DAG.
    raised = import_check._Raised()
    log = logging.Logger("airflow.models.dagbag.DagBag")
    log.addHandler(raised)
    file = root / "dags" / "orders.py"
    for text in ("import nosuchmodule", "raise AirflowDagCycleException('Cycle detected in DAG. Faulty task: b to a')"):
        try:
            exec(compile(text, str(file), "exec"), {"AirflowDagCycleException": AirflowDagCycleException})  # noqa: S102
        except Exception:
            log.exception("Failed to import: %s", file)
            log.exception("Failed again")
    first, second = [import_check.describe(text, file, root) for text in raised.texts(["orders"])]
    assert (first["path"], first["line"], first["kind"]) == ("dags/orders.py", 1, "import")
    assert (second["line"], second["kind"]) == (4, "cycle")
    assert second["message"] == "Cycle detected in DAG: orders. Faulty task: b to a"


def test_duplicates_name_every_place(import_check: Any, root: Path) -> None:
    orders, more = root / "dags" / "orders.py", root / "dags" / "more.py"
    more.write_text("from airflow.sdk import dag\n\n@dag\ndef orders():\n    pass\n\nfirst = make('other')\norders()\n")
    found = import_check.find_duplicates({orders: ["orders", "same", "same"], more: ["orders", "other"]}, root)
    assert found == [
        {
            "dag_id": "orders",
            "places": [{"path": "dags/more.py", "line": 4}, {"path": "dags/orders.py", "line": 4}],
        },
        {
            "dag_id": "same",
            "places": [{"path": "dags/orders.py", "line": None}, {"path": "dags/orders.py", "line": None}],
        },
    ]


def test_a_broken_file_has_no_definitions(import_check: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("def x(:\n")
    assert import_check.definition_lines(broken, "x") == []
    assert import_check.definition_lines(tmp_path / "gone.py", "x") == []


def test_processes_that_hang_or_crash_are_named_and_the_others_unharmed(tmp_path: Path) -> None:
    # The import itself needs Airflow; here it is replaced by running the file.
    for name, text in {
        "fine": "import json",
        "hangs": "while True:\n try: time.sleep(60)\n except BaseException: pass",
        "exits": "os._exit(3)",
        "leaves": "os._exit(0)",
        "killed": "os.kill(os.getpid(), 9)",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    driver = """
import json, os, sys, time
from pathlib import Path
from airflow_deployer_pod import import_check as module
def import_file(file, dags, parsing):
    exec(file.read_text(), {"os": os, "time": time})
    return {"dag_ids": [file.stem], "imports": [], "errors": [], "seconds": 0.0}
module.import_file = import_file
folder = Path(sys.argv[1])
results = module.import_files(sorted(folder.iterdir()), folder, None, 1.0, os.dup(2))
print(json.dumps({file.stem: [result["dag_ids"], result["errors"]] for file, result in results.items()}))
"""
    run = subprocess.run(
        [sys.executable, "-c", driver, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
        env=ENVIRONMENT,
    )
    crash = "Crash: the process that imported this file ended with"
    expected = {
        "exits": [[], [f"{crash} exit code 3"]],
        "fine": [["fine"], []],
        "hangs": [[], ["AirflowTaskTimeout: the import did not end within 1 s and could not be interrupted"]],
        "killed": [[], [f"{crash} signal SIGKILL"]],
        "leaves": [[], ["Crash: the file ended the process that imported it"]],
    }
    assert json.loads(run.stdout) == expected


def test_a_folder_that_is_not_there_is_no_check() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "airflow_deployer_pod.import_check", "/nowhere"],
        check=False,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert (run.returncode, run.stdout, run.stderr) == (1, "", "/nowhere is not a folder.\n")


def test_the_projects_own_imports_are_told_from_all_others(import_check: Any, tmp_path: Path) -> None:
    module = ModuleType("shop")
    module.__file__ = str(tmp_path / "include" / "shop.py")
    zipped = ModuleType("packed")
    zipped.__file__ = str(tmp_path / "dags" / "packed.zip" / "packed.py")
    this = ModuleType("unusual_prefix_orders")
    this.__file__ = str(tmp_path / "dags" / "orders.py")
    modules = {"test_shop": module, "test_packed": zipped, "test_orders": this}
    sys.modules.update(modules)
    try:
        found = import_check.imported_files(tmp_path, tmp_path / "dags" / "orders.py")
    finally:
        for name in modules:
            del sys.modules[name]
    assert found == ["dags/packed.zip", "include/shop.py"]


def test_a_request_has_three_parts(import_check: Any) -> None:
    request = import_check.Request.parse(b'{"root": "/x", "files": null, "known": {"a": "dags/a.py"}}\n')
    assert request == import_check.Request(Path("/x"), None, {"a": "dags/a.py"}, database=True)
    for line in (b"", b"[]", b'{"root": "/x"}'):
        with pytest.raises(ValueError, match=r"."):
            import_check.Request.parse(line)
