"""Starting, finding and ending processes, with real ones."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from airflow_deployer.errors import LocalClusterError
from airflow_deployer.local_cluster.native.layout import Layout
from airflow_deployer.local_cluster.native.processes import (
    ProcessRecord,
    ProcessSpec,
    ProcessTable,
    boot_id,
    end,
    is_first_in_container,
    is_running,
    parse_start_time,
    root_is_overlay_in,
    start_time,
)

SLEEP = ProcessSpec("sleeper", ("/bin/sleep", "300"))


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 5
    while start_time(pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert start_time(pid) is None


def test_start_time_of_a_program_with_parentheses_and_blanks_in_its_name() -> None:
    rest = "S 1 " + " ".join(str(number) for number in range(100, 140))
    assert parse_start_time(f"42 (a ) (b) c) {rest}") == int(rest.split()[19])


def test_a_zombie_does_not_run() -> None:
    assert parse_start_time("42 (sleep) Z 1 " + " ".join(["0"] * 40)) is None


def test_a_process_is_started_once_detached_and_ended(layout: Layout) -> None:
    table = ProcessTable(layout)
    assert table.ensure(SLEEP) is True
    pid = table.pid("sleeper")
    assert pid is not None
    assert os.getsid(pid) == pid
    table.wait("sleeper", lambda: Path(f"/proc/{pid}/comm").read_text() == "sleep\n", timeout=5)
    assert Path(f"/proc/{pid}/cwd").resolve() == Path("/")
    assert abs(table.started("sleeper") - time.time()) < 5
    assert table.ensure(SLEEP) is False
    assert table.pid("sleeper") == pid
    table.stop("sleeper")
    wait_until_gone(pid)
    assert table.record("sleeper") is None


def test_one_that_was_killed_is_started_again(layout: Layout) -> None:
    table = ProcessTable(layout)
    table.ensure(SLEEP)
    killed = table.pid("sleeper")
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    wait_until_gone(killed)
    assert table.pid("sleeper") is None
    assert table.ensure(SLEEP) is True
    assert table.pid("sleeper") not in (None, killed)


def test_other_arguments_or_another_input_file_replace_it(layout: Layout, tmp_path: Path) -> None:
    table = ProcessTable(layout)
    configuration = tmp_path / "configuration"
    configuration.write_text("a")
    spec = dataclasses.replace(SLEEP, inputs=(configuration,))
    table.ensure(spec)
    first = table.pid("sleeper")
    configuration.write_text("b")
    assert table.ensure(spec) is True
    second = table.pid("sleeper")
    assert table.ensure(dataclasses.replace(spec, argv=("/bin/sleep", "301"))) is True
    assert len({first, second, table.pid("sleeper")}) == 3
    assert first is not None
    wait_until_gone(first)


def test_a_pid_that_belongs_to_somebody_else_by_now_is_left_alone(layout: Layout) -> None:
    table = ProcessTable(layout)
    with subprocess.Popen(["/bin/sleep", "300"]) as stranger:
        try:
            started = start_time(stranger.pid)
            assert started is not None
            for record in (
                ProcessRecord(stranger.pid, started - 1, boot_id(), "x"),
                ProcessRecord(stranger.pid, started, "another boot", "x"),
            ):
                assert not is_running(record)
                (layout.processes / "sleeper.json").write_text(json.dumps(dataclasses.asdict(record)))
                assert table.pid("sleeper") is None
                table.stop("sleeper")
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_a_process_whose_record_is_lost_is_replaced_not_doubled(layout: Layout) -> None:
    table = ProcessTable(layout)
    table.ensure(SLEEP)
    lost = table.pid("sleeper")
    assert lost is not None
    # Until then it is `env`, and amid the step from one to the other a process has no environment to read.
    table.wait("sleeper", lambda: Path(f"/proc/{lost}/comm").read_text() == "sleep\n", timeout=5)
    (layout.processes / "sleeper.json").unlink()
    assert table.marked("sleeper") == [lost]
    table.ensure(SLEEP)
    wait_until_gone(lost)
    deadline = time.monotonic() + 5
    while (marked := table.marked("sleeper")) == [] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert marked == [table.pid("sleeper")]


def test_another_clusters_processes_are_not_ours(layout: Layout, tmp_path: Path) -> None:
    other = Layout(state=tmp_path / "other", run=tmp_path / "other-run")
    other.ensure_directories()
    table = ProcessTable(other)
    table.ensure(SLEEP)
    assert ProcessTable(layout).marked() == []
    table.stop("sleeper")


def test_a_damaged_record_counts_as_none(layout: Layout) -> None:
    for text in ("", "{", "[]", '{"pid": 1}'):
        (layout.processes / "sleeper.json").write_text(text)
        assert ProcessTable(layout).pid("sleeper") is None


def test_one_that_ignores_sigterm_is_killed(layout: Layout) -> None:
    table = ProcessTable(layout)
    table.ensure(ProcessSpec("stubborn", ("/bin/sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done")))
    table.wait("stubborn", lambda: table.last_lines("stubborn") == ["up"], timeout=5)
    pid = table.pid("stubborn")
    assert pid is not None
    end([pid], grace=0.2)
    wait_until_gone(pid)


def test_one_that_ends_at_once_is_reported_with_its_last_words(layout: Layout) -> None:
    table = ProcessTable(layout)
    table.ensure(ProcessSpec("broken", ("/bin/sh", "-c", "echo port is taken; exit 1")))
    with pytest.raises(LocalClusterError, match="starting broken failed: it ended at once") as caught:
        table.wait("broken", lambda: False, timeout=5)
    assert caught.value.details == ("port is taken",)


def test_one_that_ends_while_what_it_needs_is_not_up_yet_is_started_again(layout: Layout, tmp_path: Path) -> None:
    lives = tmp_path / "lives"
    script = f"echo life >> {lives}; test $(wc -l < {lives}) -gt 2 || exit 1; exec sleep 300"
    table = ProcessTable(layout)

    def ready() -> bool:
        return lives.exists() and len(lives.read_text().splitlines()) > 2

    table.start_until_ready(ProcessSpec("early", ("/bin/sh", "-c", script)), ready, timeout=30, restarting_for=30)
    assert table.pid("early") is not None
    assert len(lives.read_text().splitlines()) == 3


def test_one_that_always_ends_is_given_up_with_its_last_words(layout: Layout) -> None:
    spec = ProcessSpec("broken", ("/bin/sh", "-c", "echo wrong flag; exit 1"))
    with pytest.raises(LocalClusterError, match="ended at once") as caught:
        ProcessTable(layout).start_until_ready(spec, lambda: False, timeout=30, restarting_for=2)
    assert set(caught.value.details) == {"wrong flag"}
    assert len(caught.value.details) > 1


def test_waiting_has_a_deadline(layout: Layout) -> None:
    table = ProcessTable(layout)
    table.ensure(SLEEP)
    with pytest.raises(LocalClusterError, match="starting sleeper failed: it is not ready after 0 s") as caught:
        table.wait("sleeper", lambda: False, timeout=0)
    assert "sleeper.log" in caught.value.hint
    with pytest.raises(LocalClusterError) as caught:
        table.wait("sleeper", lambda: False, timeout=0, hint="Make a new one.")
    assert caught.value.hint == "Make a new one."


def test_a_container_is_known_by_its_root_file_system() -> None:
    host = "22 1 254:0 / / rw - ext4 /dev/vda rw\n"
    mounted = (
        "90 22 0:50 / /run/x/rootfs rw - overlay overlay rw,lowerdir=/s/1/fs,upperdir=/var/state/s/2/fs,workdir=/w"
    )
    container = mounted.replace("/run/x/rootfs", "/")
    assert root_is_overlay_in(container, Path("/var/state"))
    assert not root_is_overlay_in(container, Path("/var/sta"))
    assert not root_is_overlay_in(host + mounted, Path("/var/state"))
    assert not root_is_overlay_in("", Path("/var/state"))


def test_the_first_process_of_a_container_is_known_by_its_inner_pid() -> None:
    assert is_first_in_container("Name:\tsleep\nNSpid:\t4711\t1\n")
    assert is_first_in_container("NSpid:\t4711\t12\t1\n")
    assert not is_first_in_container("NSpid:\t4711\t7\n")
    assert not is_first_in_container("NSpid:\t1\n")
    assert not is_first_in_container("")
