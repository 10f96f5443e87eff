"""The words for a requirements.txt that does not fit: package, versions, and what to do."""

from __future__ import annotations

import pytest

from airflow_deployer.project_requirements import make_error

LOCKED = {"apache-airflow": "3.3.2", "pendulum": "3.3.0", "cffi": "2.1.1"}
END = ", we can conclude that your requirements are unsatisfiable."


@pytest.mark.parametrize(
    ("cause", "message", "hint"),
    [
        (
            f"Because you require pendulum<3 and pendulum==3.3.0{END}",
            "it asks for pendulum<3, and Airflow 3.3.2 is locked with pendulum 3.3.0.",
            "Ask for a version of pendulum that 3.3.0 is one of",
        ),
        (
            f"Because you require apache-airflow==3.0.0 and apache-airflow==3.3.2{END}",
            "it asks for apache-airflow==3.0.0, and Airflow 3.3.2 is locked with apache-airflow 3.3.2.",
            "Leave apache-airflow out of requirements.txt: `airflow.version`",
        ),
        (
            "Because dbt-core==1.5.0 depends on cffi>=1.9,<2.0.0 and cffi==2.1.1, we can conclude that dbt-core==1.5.0 "
            "cannot be used.",
            "dbt-core==1.5.0 needs cffi>=1.9,<2.0.0, and Airflow 3.3.2 is locked with cffi 2.1.1.",
            "Ask for a version of dbt-core that works with cffi 2.1.1, or give it an environment of its own",
        ),
        (
            # The user's own two lines; Airflow has nothing to do with cowsay.
            f"Because you require cowsay==5 and cowsay==6{END}",
            "you require cowsay==5 and cowsay==6.",
            "Correct requirements.txt",
        ),
        (
            f"Because there is no version of cowsay==99 and you require cowsay==99{END}",
            "the package index has no cowsay==99.",
            "Correct it in requirements.txt",
        ),
    ],
)
def test_the_resolvers_reason(cause: str, message: str, hint: str) -> None:
    log = ["Step 4/4 : RUN uv", "error: No solution found when resolving dependencies", f"  cause: {cause}"]
    error = make_error(log, "3.3.2", LOCKED)
    assert error.message == f"Cannot install the packages of requirements.txt: {message}"
    assert error.hint.startswith(hint)
    assert error.details == ()


def test_with_a_ready_made_base_image_the_constraint_is_taken_at_its_word() -> None:
    log = [
        "error: No solution found when resolving dependencies",
        f"  cause: Because you require pendulum<3 and pendulum==3.3.0{END}",
    ]
    assert "is locked with pendulum 3.3.0" in make_error(log, "3.3.2", {}).message


def test_the_file_is_named_as_the_user_knows_it() -> None:
    error = make_error(["error: Couldn't parse requirement in `/tmp/requirements.txt` at position 0"], "3.3.2", LOCKED)
    assert "`requirements.txt` at position 0" in error.message
    assert "/tmp" not in error.message


def test_what_is_not_the_resolvers_shows_the_end_of_the_log() -> None:
    error = make_error([f"line {number}" for number in range(30)], "3.3.2", LOCKED)
    assert error.details == tuple(f"line {number}" for number in range(15, 30))
