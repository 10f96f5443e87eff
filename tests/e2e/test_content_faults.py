"""What can go wrong while DAG content goes into the running pod; whatever it is, the old content stays live."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import subprocess
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from airflow_deployer.api_streams import ApiServer, UnavailableError
from airflow_deployer.cluster import POD
from airflow_deployer.config import Project as Paths
from airflow_deployer.content import ProjectContent, read_project
from airflow_deployer.content_sync import AGENT, ContentChannel
from airflow_deployer.errors import SyncError
from tests.e2e.conftest import Project, eventually
from tests.e2e.test_hot_deploy import identity, status

pytestmark = pytest.mark.e2e

T = TypeVar("T")

HANGS = "from airflow.sdk import DAG\n\nwhile True:\n    pass\n"
READS_A_VARIABLE = (
    "from airflow.sdk import DAG, Variable\n\ndag = DAG('needs', schedule=None, tags=[Variable.get('team')])\n"
)


def content(project: Project) -> ProjectContent:
    return read_project(project.folder, Paths())


def with_channel(project: Project, work: Callable[[ContentChannel], Awaitable[T]]) -> T:
    """Run `work` on a channel to the pod."""

    async def run() -> T:
        api = ApiServer(project.cluster.context.name, project.cluster.context.kubeconfig)
        channel = ContentChannel(api, project.names)
        await api.load()
        await channel.connect()
        try:
            return await work(channel)
        finally:
            await channel.close()
            await api.close()
            await asyncio.sleep(0.01)

    return asyncio.run(run())


def test_a_sync_that_is_cut_off_leaves_the_old_content(project: Project) -> None:
    deployed = project.up()["content_id"]
    before = identity(project)
    (project.folder / "include").mkdir()
    (project.folder / "include/large.bin").write_bytes(os.urandom(3_000_000))
    wanted = content(project)

    # The exec breaks off in the list of files, amid the bytes, after the last byte, and after the import check.
    request = b'{"op": "stage", "content_id": "'
    for sent in (4 + len(request) // 2, 4 + len(request)):

        async def cut(channel: ContentChannel, sent: int = sent) -> None:
            await channel._running.write(((5000).to_bytes(4, "big") + request)[:sent])

        with_channel(project, cut)
        assert status(project)["live_content_id"] == deployed

    async def staged(channel: ContentChannel) -> None:
        await channel.stage(wanted)

    async def checked(channel: ContentChannel) -> None:
        await channel.stage(wanted)
        await channel.check()

    async def half(channel: ContentChannel) -> None:
        original = channel._send_file

        async def break_off(file: object) -> None:
            await channel._send(b"x" * 1000)
            raise UnavailableError("cut")

        channel._send_file = break_off  # type: ignore[method-assign]
        with pytest.raises(UnavailableError):
            await channel.stage(wanted)
        channel._send_file = original  # type: ignore[method-assign]

    for work in (half, staged, checked):
        with_channel(project, work)
        assert status(project)["live_content_id"] == deployed
    leftovers = eventually(
        lambda: project.shell("ls -A /home/airflow/content/staging | wc -l").strip() == "0",
        seconds=20,
        what="nothing is left in staging",
    )
    assert leftovers

    # A file that changes, shrinks or goes away after it was read is found by its digest.
    large = project.folder / "include/large.bin"
    for change in (
        lambda: large.write_bytes(os.urandom(3_000_000)),
        lambda: large.write_bytes(b"short"),
        large.unlink,
    ):
        large.write_bytes(os.urandom(3_000_000))
        read = content(project)
        change()

        async def changed(channel: ContentChannel, read: ProjectContent = read) -> None:
            with pytest.raises(SyncError) as caught:
                await channel.sync(read)
            assert caught.value.kind == "invalid"
            assert (await channel.state()).live == deployed

        with_channel(project, changed)
    assert identity(project) == before

    large.write_bytes(b"at last")
    result = project.deployer("sync", "--output", "json")
    assert result.code == 0, result
    assert status(project)["live_content_id"] == result.json["content_id"] == content(project).content_id


def test_a_pod_that_goes_away_under_the_sync(project: Project) -> None:
    project.up()
    project.write("dags/hello.py", "from airflow.sdk import DAG\n\ndag = DAG('hello', schedule=None)\n")
    wanted = content(project)
    uid = identity(project)[0]

    async def replaced(channel: ContentChannel) -> None:
        await channel.stage(wanted)
        project.cluster.delete(POD, project.names.namespace, project.names.pod, uid=uid, grace_seconds=0)
        with pytest.raises(UnavailableError):
            for _ in range(100):
                # The database may go before the agent does, and then the agent says so.
                with contextlib.suppress(SyncError):
                    await channel.check()
                await asyncio.sleep(0.2)

    with_channel(project, replaced)
    result = project.deployer("sync")
    assert result.code == 1, result
    assert "Cannot sync" in result.stderr
    assert "Traceback" not in result.stderr
    project.wait_for_new_pod(uid)
    result = project.deployer("sync", "--output", "json")
    assert result.code == 0, result
    assert "hello" in {dag.dag_id for dag in project.api().dags()}


def test_a_file_that_hangs_is_named_and_the_next_one_goes_through(project: Project) -> None:
    project.write("deployer.toml", "[airflow.settings.core]\ndagbag_import_timeout = 3\n")
    deployed = project.up()["content_id"]
    project.write("dags/hangs.py", HANGS)
    result = project.deployer("sync", timeout=90)
    assert result.code == 1, result
    assert "dags/hangs.py" in result.stderr
    assert "imeout" in result.stderr
    assert status(project)["live_content_id"] == deployed

    project.write("dags/hangs.py", "from airflow.sdk import DAG\n\ndag = DAG('hangs', schedule=None)\n")
    result = project.deployer("sync")
    assert result.code == 0, result
    assert "hangs" in {dag.dag_id for dag in project.api().dags()}


def test_a_variable_at_import_is_looked_up_in_the_deployment(project: Project) -> None:
    deployed = project.up()["content_id"]
    project.write("dags/needs.py", READS_A_VARIABLE)
    result = project.deployer("sync")
    assert result.code == 1, result
    assert "dags/needs.py" in result.stderr
    assert "team" in result.stderr
    assert status(project)["live_content_id"] == deployed

    body = {"key": "team", "value": "blue"}
    project.api().request("POST", "/api/v2/variables", body=body, doing="make the variable")
    result = project.deployer("sync")
    assert result.code == 0, result
    assert "needs" in {dag.dag_id for dag in project.api().dags()}


def test_names_with_spaces_unicode_and_newlines(project: Project) -> None:
    project.up()
    project.write(
        "dags/of the day/täglich\nzwei.py", "from airflow.sdk import DAG\n\ndag = DAG('daily', schedule=None)\n"
    )
    project.write("include/a b/ünïcode.sql", "select 1")
    result = project.deployer("sync")
    assert result.code == 0, result
    assert "daily" in {dag.dag_id for dag in project.api().dags()}


class PipeExec:
    """The agent of the image in a container of its own, in place of the one that an exec in the pod starts."""

    def __init__(self, image: str, *options: str) -> None:
        # The folders that the supervisor makes before anything else.
        script = f"cd /home/airflow/content && mkdir versions manifests staging && exec {shlex.join(AGENT)}"
        self._process = subprocess.Popen(
            ["docker", "run", "--rm", "-i", "--network", "none", *options, image, "bash", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    async def write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.flush()

    async def read_exactly(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if len(data) < size:
            raise UnavailableError("the agent ended")
        return data

    async def close(self) -> None:
        self._process.communicate(timeout=30)


def test_a_full_volume(project: Project) -> None:
    """A real file system of 2 MB that is full, under the real agent."""
    image = project.up()["image"]
    (project.folder / "include").mkdir()
    (project.folder / "include/large.bin").write_bytes(os.urandom(3_000_000))
    wanted = content(project)

    async def run() -> None:
        channel = ContentChannel(ApiServer(project.cluster.context.name, None), project.names)
        channel._exec = PipeExec(image, "--tmpfs", "/home/airflow/content:size=2m,uid=50000,gid=50000")  # type: ignore[assignment]
        with pytest.raises(SyncError) as caught:
            await channel.stage(wanted)
        assert caught.value.kind == "no_space"
        assert "storage.size" in caught.value.hint
        state = await channel.state()
        assert state.live == ""
        await channel.close()
        await channel._api.close()

    asyncio.run(run())
