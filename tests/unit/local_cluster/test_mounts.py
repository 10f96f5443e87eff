"""Finding our mounts in the kernel's table."""

from __future__ import annotations

from pathlib import Path

from airflow_deployer.local_cluster.native.mounts import mount_points

MOUNTINFO = """\
22 1 254:0 / / rw - ext4 /dev/vda rw
30 22 0:30 / /run/native/a rw - overlay overlay rw
31 30 0:31 / /run/native/a/deep rw - tmpfs tmpfs rw
32 22 0:32 / /run/native-other rw - tmpfs tmpfs rw
33 22 0:33 / /run/native/with\\040blank rw - tmpfs tmpfs rw
34 22 0:34 / /run/native rw - tmpfs tmpfs rw
"""


def test_mount_points_below_a_directory_latest_first() -> None:
    assert mount_points(MOUNTINFO, Path("/run/native")) == [
        Path("/run/native"),
        Path("/run/native/with blank"),
        Path("/run/native/a/deep"),
        Path("/run/native/a"),
    ]
    assert mount_points(MOUNTINFO, Path("/nowhere")) == []
