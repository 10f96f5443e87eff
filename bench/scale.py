"""Rows: what an edit costs as the project grows; it must cost what has changed, not what is there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from bench.measure import QUICK_ROUNDS, SLOW_ROUNDS, Group, Row, Side
from bench.programs import Kubectl, ProgramError, local_context
from bench.project import Project, project

MOST_TIMES = 2.0
SMALLEST = "10-files"


@contextlib.contextmanager
def _sized(*, files: int, megabytes: int) -> Iterator[Project]:
    """A deployed project, all of its DAGs parsed."""
    kubectl = Kubectl(local_context())
    with project(kubectl, files=files, megabytes=megabytes) as made:
        # Thousands of files take longer than anyone has to wait who has none.
        made.configure('[timeouts]\nimport_check = "15m"\n')
        with contextlib.suppress(ProgramError):
            # Its own wait for the first parse may be too short; what it deployed stays.
            made.up()
        kubectl.get("pod/airflow-0", made.namespace)
        made.database.wait(
            f"SELECT 1 FROM dag WHERE NOT is_stale HAVING count(*) >= {files}",  # noqa: S608 - a number
            seconds=900,
            what=f"all of {files} DAGs parsed",
        )
        made.up()
        yield made


def _up(sized: Project) -> contextlib.AbstractContextManager[Sequence[Side]]:
    return contextlib.nullcontext((Side("deployer up", sized.up_with_edit, SLOW_ROUNDS),))


@contextlib.contextmanager
def _dev(sized: Project) -> Iterator[Sequence[Side]]:
    with sized.dev():
        yield (Side("deployer dev", sized.save_to_parsed, QUICK_ROUNDS),)


def _group(name: str, *, files: int, megabytes: int) -> Group[Project]:
    def grows_from(command: str) -> tuple[str, float] | None:
        return None if name == SMALLEST else (f"{command}-{SMALLEST}", MOST_TIMES)

    what = f"{files:,} DAG files, {megabytes} MB in include/"
    return Group(
        lambda: _sized(files=files, megabytes=megabytes),
        (
            Row(f"up-{name}", f"deployer up with one edit, {what}", "s", _up, grows_from=grows_from("up")),
            Row(f"dev-{name}", f"deployer dev, saved to parsed, {what}", "s", _dev, grows_from=grows_from("dev")),
        ),
    )


GROUPS = (
    _group(SMALLEST, files=10, megabytes=1),
    _group("300-files", files=300, megabytes=1),
    _group("2000-files", files=2000, megabytes=1),
    _group("200-mb", files=10, megabytes=200),
)
