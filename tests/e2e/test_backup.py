"""Backup and restore with 100,000 task instances: to another deployment and PostgreSQL, and through every fault."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from airflow_deployer import backup_file
from airflow_deployer.cluster import Cluster
from tests.e2e import airflow_runs
from tests.e2e.conftest import Project, eventually, new_project, through_proxy
from tests.e2e.database import locked, sql, waits_for_a_lock

pytestmark = pytest.mark.e2e

PASSWORD = "pässword ''of'' the % warehouse"

# Rows of a real run, many times over; whatever columns this Airflow has, they go along. No foreign keys are checked,
# which are right, and would take most of the time.
HISTORY = """
SET session_replication_role = replica;
INSERT INTO dag_run SELECT (jsonb_populate_record(r, jsonb_build_object('id', nextval('dag_run_id_seq'), 'run_id',
'history-' || n, 'logical_date', r.run_after - n * interval '1 hour', 'conf', jsonb_build_object('number', n)))).*
FROM dag_run r, generate_series(1, 1000) n WHERE run_id = 'real';
INSERT INTO task_instance SELECT (jsonb_populate_record(t, jsonb_build_object('id', gen_random_uuid(), 'run_id',
'history-' || n, 'map_index', m, 'hostname', md5(n || ' ' || m)))).*
FROM task_instance t, generate_series(1, 1000) n, generate_series(0, 99) m
WHERE run_id = 'real' AND task_id = 'first';
"""
TASKS = 100_000

# What nobody writes to while nothing runs; counted in another way than the product does.
CONTENT = "SELECT count(*), md5(string_agg(md5(t::text), '' ORDER BY md5(t::text))) FROM TABLE t"
STILL_TABLES = ("alembic_version", "dag_run", "task_instance", "task_map", "xcom", "slot_pool", "log_template")


def content(project: Project) -> dict[str, str]:
    """Rows and a checksum of the tables that stand still."""
    return {table: sql(project, CONTENT.replace("TABLE", table)) for table in STILL_TABLES}


def databases(project: Project) -> list[str]:
    """The databases that are not Postgres' own."""
    names = sql(project, "SELECT datname FROM pg_database WHERE NOT datistemplate ORDER BY 1").splitlines()
    return [name for name in names if name != "postgres"]


def healthy(project: Project) -> bool:
    """Whether Airflow is, as a user would ask."""
    return project.deployer("status").code == 0


@dataclass
class Deployments:
    """Two deployments, and a backup of the first."""

    source: Project
    target: Project
    file: Path
    report: dict[str, Any]
    before: dict[str, str]


@pytest.fixture(scope="module")
def deployments(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Deployments]:
    """A deployment with a long history on PostgreSQL 15, its backup, and an empty one on PostgreSQL 17."""
    with ExitStack() as stack:
        source, target = (
            stack.enter_context(new_project(cluster, tmp_path_factory.mktemp(name), request.node))
            for name in ("source", "target")
        )
        source.write("deployer.toml", '[images]\npostgres = "postgres:15"\n')
        source.up()
        api = source.api()
        airflow_runs.trigger(api, "dummy", "real")
        assert airflow_runs.wait(api, "dummy", "real") == "success"
        connection = {"connection_id": "warehouse", "conn_type": "postgres", "login": "me", "password": PASSWORD}
        api.request("POST", "/api/v2/connections", body=connection | {"extra": '{"sslmode": "on"}'}, doing="connect")
        api.request("POST", "/api/v2/variables", body={"key": "colour", "value": "blue"}, doing="set a variable")
        sql(source, HISTORY)
        before = content(source)
        file = source.folder / "history.backup"
        result = source.deployer("backup", file.name, "--output", "json")
        assert result.code == 0, result
        # Its processor is wanted elsewhere.
        assert source.deployer("down").code == 0
        target.up()
        yield Deployments(source, target, file, result.json, before)


def changed(deployments: Deployments, path: Path, **fields: Any) -> Path:
    """A whole and valid backup like the real one, but for fields of its manifest."""
    with backup_file.opened(deployments.file) as backup, backup_file.writing(path, force=True) as writer:
        for chunk in backup.dump():
            writer.write(chunk)
        writer.finish(msgspec.structs.replace(backup.manifest, **fields), backup.secrets)
    return path


def test_the_backup(deployments: Deployments) -> None:
    report, file = deployments.report, deployments.file
    assert file.stat().st_mode & 0o777 == 0o600
    assert deployments.before["task_instance"].split("|")[0] == str(TASKS + 2)
    assert report["rows"] > TASKS
    assert report["bytes"] == file.stat().st_size
    subprocess.run(["tar", "xf", file], cwd=file.parent, check=True)
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=file.parent, check=True)
    manifest = json.loads((file.parent / "manifest.json").read_text())
    assert manifest["tables"]["public.task_instance"]["rows"] == TASKS + 2
    assert manifest["postgres"].startswith("15.")
    keys = json.loads((file.parent / "secrets.json").read_text())
    assert keys == {"fernet-key": deployments.source.secret("fernet-key")}
    again = deployments.source.deployer("backup", file.name)
    assert again.code == 1, again
    assert "not deployed" in again.stderr
    print(
        f"\nbackup: database {report['database_bytes'] / 1e6:.1f} MB, {report['rows']:,} rows, "
        f"file {report['bytes'] / 1e6:.1f} MB in {report['seconds']:.1f} s"
    )


def test_into_another_deployment_and_a_later_postgres(deployments: Deployments) -> None:
    target = deployments.target
    own_key, password = target.secret("fernet-key"), target.secret("admin-password")
    assert own_key != deployments.source.secret("fernet-key")

    refused = target.deployer("restore", str(deployments.file))
    assert refused.code == 2, refused
    assert "add --yes" in refused.stderr

    began = time.monotonic()
    result = target.deployer("restore", str(deployments.file), "--yes", "--output", "json")
    seconds = time.monotonic() - began
    assert result.code == 0, result
    assert healthy(target)
    assert content(target) == deployments.before
    assert databases(target) == ["airflow"]
    assert (target.secret("fernet-key"), target.secret("admin-password")) == (own_key, password)
    # Read by Airflow itself, with the key of this deployment.
    connection = json.loads(target.shell("airflow connections get warehouse -o json 2>/dev/null"))[0]
    assert (connection["password"], connection["login"]) == (PASSWORD, "me")
    assert connection["extra_dejson"] == {"sslmode": "on"}
    api = target.api()
    assert api.request("GET", "/api/v2/variables/colour", doing="read the variable")["value"] == "blue"
    assert airflow_runs.state(api, "dummy", "history-500") == "success"
    # And it goes on from there.
    airflow_runs.trigger(api, "dummy", "next")
    assert airflow_runs.wait(api, "dummy", "next") == "success"
    steps = result.json["seconds"]
    rate = deployments.report["bytes"] / 1e6 / steps["load"]
    print(f"\nrestore: {seconds:.1f} s in all ({rate:.1f} MB/s of dump while loading), {steps}")


def test_refused_before_anything_is_touched(deployments: Deployments, tmp_path: Path) -> None:
    target = deployments.target
    uid, restarts = _life(target)
    mark = _oid_in_use(target)
    whole = deployments.file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x10
    files = {
        "cut.backup": (whole[: len(whole) // 2], "it is cut off"),
        "flipped.backup": (bytes(flipped), "dump.pgdump is not what SHA256SUMS says"),
        "foreign.backup": (b"PK\3\4" + os.urandom(5000), "no file that deployer backup made"),
        "empty.backup": (b"", "no file that deployer backup made"),
    }
    for name, (data, cause) in files.items():
        (tmp_path / name).write_bytes(data)
        _refused(target, tmp_path / name, cause)
    _refused(target, tmp_path / "missing.backup", "No such file")
    file = tmp_path / "valid.backup"
    later = changed(deployments, file, airflow="3.99.0", alembic_revisions=("f00f00f00f00",))
    _refused(target, later, "deploy Airflow 3.99.0 first")
    _refused(target, changed(deployments, file, postgres="99.1"), 'images.postgres = "postgres:99"')
    _refused(target, changed(deployments, file, database_bytes=1 << 50), "There is no space")
    assert _oid_in_use(target) == mark
    assert databases(target) == ["airflow"]
    assert _life(target) == (uid, restarts)
    assert healthy(target)


def test_a_step_that_fails_changes_nothing(deployments: Deployments, tmp_path: Path) -> None:
    target = deployments.target
    oid = _oid_in_use(target)
    # Another row than the dump has: what was restored is compared.
    with backup_file.opened(deployments.file) as backup:
        tables = dict(backup.manifest.tables)
    tables["public.dag_run"] = backup_file.Table(1002, "4711")
    _refused(target, changed(deployments, tmp_path / "other.backup", tables=tables), "public.dag_run")
    assert databases(target) == ["airflow"]

    # The server may write no file above 20 MB for a while: it fails in the middle of the load as on a full disk.
    try:
        _limit(target, "20000000")
        result = _refused(target, deployments.file, "File too large")
    finally:
        _limit(target, "unlimited")
    assert "pg_restore failed" in result
    assert _oid_in_use(target) == oid
    assert databases(target) == ["airflow"]
    assert healthy(target)


@pytest.mark.parametrize("after", ["Check", "Load", "Stored secrets", "Switch"])
def test_killed_after(deployments: Deployments, after: str) -> None:
    target = deployments.target
    running = target.start("restore", str(deployments.file), "--yes")
    _wait_for_line(running, f"✓ {after}")
    running.send_signal(signal.SIGKILL)
    running.communicate()
    left = {name.rpartition("_")[0] if "restore" in name else name[:14] for name in databases(target)} - {"airflow"}
    if after != "Check":  # then it may have begun to load, or not
        assert left == {"airflow_before" if after == "Switch" else "airflow_restore"}
    eventually(lambda: healthy(target), seconds=60, what=f"Airflow after a kill after {after}")


def test_what_killed_restores_left_is_dropped(deployments: Deployments) -> None:
    target = deployments.target
    assert len(databases(target)) > 1
    result = target.deployer("restore", str(deployments.file), "--yes")
    assert result.code == 0, result
    assert databases(target) == ["airflow"]
    assert content(target) == deployments.before
    assert healthy(target)


@pytest.mark.parametrize("after", ["Load", "Switch"])
def test_the_api_server_goes_away_after(deployments: Deployments, tmp_path: Path, after: str) -> None:
    target = deployments.target
    oid = _oid_in_use(target)
    with through_proxy(target, tmp_path) as proxy:
        running = target.start("restore", str(deployments.file), "--yes")
        _wait_for_line(running, f"✓ {after}")
        proxy.refusing = True
        proxy.cut()
        time.sleep(5)
        proxy.refusing = False
        _, errors = running.communicate(timeout=120)
    assert "Traceback" not in errors, errors
    # What has become of Airflow cannot be told for a while, and is waited for: the restore ends well.
    assert running.returncode == (0 if after == "Switch" else 1), errors
    kept = _oid_in_use(target) == oid
    assert kept is (after != "Switch"), errors
    eventually(lambda: healthy(target), seconds=60, what=f"Airflow after the API server went away after {after}")


@pytest.mark.parametrize("carried_out", [True, False])
def test_the_api_server_goes_away_while_the_databases_change(
    deployments: Deployments, tmp_path: Path, carried_out: bool
) -> None:
    """Airflow is stopped, and nobody can tell whether what was sent will be carried out: either way it is undone."""
    target = deployments.target
    oid = _oid_in_use(target)
    row = "SELECT FROM pg_database WHERE datname = 'airflow' FOR UPDATE"
    with through_proxy(target, tmp_path) as proxy:
        with locked(target, f"CREATE TEMP TABLE held AS {row}", database="postgres"):
            running = target.start("restore", str(deployments.file), "--yes")
            eventually(lambda: waits_for_a_lock(target, "RENAME TO"), seconds=60, what="the change waits")
            proxy.refusing = True
            proxy.cut()
            if not carried_out:
                proxy.refusing = False
                eventually(lambda: not waits_for_a_lock(target, "RENAME TO"), seconds=60, what="the change is ended")
        if carried_out:
            eventually(lambda: oid != _oid_in_use(target), seconds=10, what="the change is carried out all the same")
            proxy.refusing = False
        _, errors = running.communicate(timeout=120)
    assert "Traceback" not in errors, errors
    assert running.returncode == 1, errors
    assert ("The restore was undone" in errors) is carried_out, errors
    assert _oid_in_use(target) == oid, errors
    eventually(lambda: healthy(target), seconds=60, what="Airflow after the API server went away")


def test_ctrl_c_leaves_everything_as_it_was(deployments: Deployments) -> None:
    target = deployments.target
    left = databases(target)
    running = target.start("restore", str(deployments.file), "--yes")
    _wait_for_line(running, "✓ Load")
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "Traceback" not in errors, errors
    assert set(databases(target)) <= set(left)
    assert healthy(target)


def test_an_airflow_that_cannot_start_is_undone(deployments: Deployments, tmp_path: Path) -> None:
    target = deployments.target
    known = json.loads(target.shell("cat /opt/airflow-deployer/schema.json"))
    older = next(revision for revision in known["revisions"] if revision not in known["heads"])
    # A schema that is not what its revision says: every migration of it fails.
    stamp = "UPDATE alembic_version SET version_num = '{}'"
    sql(target, stamp.format(older))
    file = tmp_path / "wrong.backup"
    assert target.deployer("backup", str(file)).code == 0
    sql(target, stamp.format(known["heads"][0]))
    oid = _oid_in_use(target)

    _refused(target, file, "The restore was undone, and the database of before is in use again")
    assert _oid_in_use(target) == oid
    assert databases(target) == ["airflow"]
    assert content(target) == deployments.before
    eventually(lambda: healthy(target), seconds=120, what="Airflow with the database of before")


def _refused(project: Project, file: Path, cause: str) -> str:
    result = project.deployer("restore", str(file), "--yes")
    assert result.code == 1, result
    assert cause in result.stderr, result
    assert "Traceback" not in result.stderr, result
    return result.stderr


def _oid_in_use(project: Project) -> str:
    return sql(project, "SELECT oid FROM pg_database WHERE datname = 'airflow'", database="postgres")


def _life(project: Project) -> tuple[str, int]:
    pod = project.pod()
    return pod["metadata"]["uid"], sum(status["restartCount"] for status in pod["status"]["containerStatuses"])


def _limit(project: Project, size: str) -> None:
    subprocess.run(
        [
            *("kubectl", "--context", project.cluster.context.name, "-n", project.names.namespace),
            *("exec", project.names.pod, "-c", "postgres", "--", "prlimit", "--pid", "1", f"--fsize={size}:"),
        ],
        check=True,
        timeout=30,
    )


def _wait_for_line(running: subprocess.Popen[str], begin: str) -> None:
    assert running.stderr is not None
    seen = []
    for line in running.stderr:
        seen.append(line)
        if line.startswith(begin):
            return
    pytest.fail(f"{begin!r} did not come: {seen}")
