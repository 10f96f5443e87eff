"""What uv 0.13.9 wrote, taken from its real output, and what is made of it."""

from __future__ import annotations

import pytest

from airflow_deployer.base_context import base_image_folder
from airflow_deployer.resolver import UV_VERSION, Failure, Held, parse_failure, parse_yanked

NO_SOLUTION = "Using Python 3.13.0 environment at: /opt/airflow\nerror: No solution found when resolving dependencies\n"


def parse(causes: str) -> Failure:
    failure = parse_failure((NO_SOLUTION + causes).splitlines())
    assert failure is not None
    return failure


def test_the_images_install_with_the_uv_whose_words_these_are() -> None:
    assert f"uv=={UV_VERSION}" in (base_image_folder() / "Dockerfile").read_text()


@pytest.mark.parametrize(
    ("causes", "held"),
    [
        (
            "  cause: Because you require pendulum>=2.1,<3.dev0 and pendulum==3.3.0, we can conclude that your "
            "requirements are unsatisfiable.",
            Held("pendulum", "3.3.0", "pendulum>=2.1,<3.dev0"),
        ),
        (
            "  cause: Because you require apache-airflow[google]==3.0.0 and apache-airflow==3.3.2, we "
            "can conclude that "
            "your requirements are unsatisfiable.",
            Held("apache-airflow", "3.3.2", "apache-airflow[google]==3.0.0"),
        ),
        (
            "  cause: Because dbt-core==1.5.0 depends on cffi>=1.9,<2.0.0 and cffi==2.1.1, we can conclude that "
            "dbt-core==1.5.0 cannot be used.\n"
            "         And because you require dbt-core==1.5.0, we can conclude that your requirements "
            "are unsatisfiable.",
            Held("cffi", "2.1.1", "cffi>=1.9,<2.0.0", "dbt-core==1.5.0"),
        ),
        (
            "  cause: Because apache-airflow-providers-google==10.0.0 depends on one of:\n"
            "             protobuf>=3.12.0,<3.18.dev0\n"
            "             protobuf>=3.20.dev0,<=3.20.0\n"
            "         and protobuf==7.36.2, we can conclude that apache-airflow-providers-google==10.0.0 cannot be "
            "used.\n"
            "         And because you require apache-airflow-providers-google==10.0.0, we can conclude that your "
            "requirements are unsatisfiable.",
            Held(
                "protobuf",
                "7.36.2",
                "protobuf>=3.12.0,<3.18.dev0 or protobuf>=3.20.dev0,<=3.20.0",
                "apache-airflow-providers-google==10.0.0",
            ),
        ),
    ],
    ids=["asked for", "with an extra", "below", "one of several"],
)
def test_a_package_that_a_constraint_holds(causes: str, held: Held) -> None:
    assert parse(causes).held == held


@pytest.mark.parametrize(
    ("causes", "missing"),
    [
        (
            "  cause: Because there is no version of cowsay==99 and you require cowsay==99, we can "
            "conclude that your "
            "requirements are unsatisfiable.",
            "cowsay==99",
        ),
        (
            "  cause: Because only numpy<=2.5.5 is available and you require numpy>=3, we can conclude that your "
            "requirements are unsatisfiable.",
            "numpy>=3",
        ),
        (
            "  cause: Because no-such-package-zzz-1 was not found in the package registry and you require "
            "no-such-package-zzz-1, we can conclude that your requirements are unsatisfiable.",
            "no-such-package-zzz-1",
        ),
    ],
)
def test_what_no_release_fulfils(causes: str, missing: str) -> None:
    failure = parse(causes)
    assert failure.missing == missing
    assert failure.held is None


def test_two_wishes_that_exclude_each_other() -> None:
    failure = parse(
        "  cause: Because pandas==2.3.3 depends on numpy>=1.26.0 and you require pandas==2.3.3, we "
        "can conclude that you "
        "require numpy>=1.26.0.\n"
        "         And because you require numpy==1.24, we can conclude that your requirements are unsatisfiable."
    )
    assert failure == Failure(
        "pandas==2.3.3 depends on numpy>=1.26.0 and you require pandas==2.3.3; you require numpy==1.24"
    )


def test_of_a_long_chain_the_first_and_the_last_premise_are_kept() -> None:
    failure = parse(
        "  cause: Because sqlalchemy-redshift>=0.8.6,<=0.8.14 depends on sqlalchemy>=0.9.2,<2.0.0 and "
        "apache-airflow-core==3.3.2 depends on sqlalchemy==2.1.9, we can conclude that "
        "apache-airflow-core==3.3.2 and "
        "sqlalchemy-redshift>=0.8.6,<=0.8.14 are incompatible.\n"
        "         And because apache-airflow==3.3.2 depends on apache-airflow-core==3.3.2, we can conclude that "
        "apache-airflow==3.3.2 and sqlalchemy-redshift>=0.8.6,<=0.8.14 are incompatible.\n"
        "         And because apache-airflow-providers-amazon==3.0.0 depends on "
        "sqlalchemy-redshift>=0.8.6,<0.9.dev0 and "
        "airflow-dbt>=0.4.0 depends on apache-airflow==3.3.2, we can conclude that airflow-dbt>=0.4.0 and "
        "apache-airflow-providers-amazon==3.0.0 are incompatible.\n"
        "         And because you require airflow-dbt==0.4.0 and "
        "apache-airflow-providers-amazon==3.0.0, we can conclude "
        "that your requirements are unsatisfiable."
    )
    assert failure.held is None
    assert failure.reason == (
        "sqlalchemy-redshift>=0.8.6,<=0.8.14 depends on sqlalchemy>=0.9.2,<2.0.0 and "
        "apache-airflow-core==3.3.2 depends "
        "on sqlalchemy==2.1.9; …; you require airflow-dbt==0.4.0 and apache-airflow-providers-amazon==3.0.0"
    )


def test_a_release_for_other_pythons_comes_with_uvs_hint() -> None:
    failure = parse(
        "  cause: Because tensorflow==1.0.0 has no wheels with a matching Python ABI tag (e.g., "
        "`cp313`) and you require "
        "tensorflow==1.0, we can conclude that your requirements are unsatisfiable.\n\n"
        "hint: You require CPython 3.13 (`cp313`), but we only found wheels for `tensorflow` "
        "(v1.0.0) with the following "
        "Python ABI tags: `cp27m`, `cp36m`\n"
    )
    assert failure.reason.startswith("tensorflow==1.0.0 has no wheels with a matching Python ABI tag")
    assert [hint.partition(",")[0] for hint in failure.hints] == ["You require CPython 3.13 (`cp313`)"]


def test_an_index_that_cannot_be_reached_is_named_without_its_password() -> None:
    failure = parse_failure(
        [
            "error: Request failed after 3 retries in 8.3s",
            "  cause: Failed to fetch: http://team:secret@127.0.0.1:9/simple/cowsay/",
            "  cause: error sending request for url (http://team:secret@127.0.0.1:9/simple/cowsay/)",
            "  cause: client error (Connect)",
            "  cause: tcp connect error",
            "  cause: Connection refused (os error 111)",
        ]
    )
    reason = "http://127.0.0.1:9/simple/cowsay/ cannot be fetched: Connection refused"
    assert failure == Failure(reason, unreachable=True)


def test_a_line_that_is_no_requirement() -> None:
    failure = parse_failure(
        [
            "error: Couldn't parse requirement in `requirements.txt` at position 0",
            '  cause: no such comparison operator "=", must be one of ~= == != <= >= < > ===',
            "         pandas = 2",
            "                ^^^",
        ]
    )
    assert failure == Failure(
        "Couldn't parse requirement in `requirements.txt` at position 0: "
        'no such comparison operator "=", must be one of ~= == != <= >= < > === pandas = 2'
    )


def test_other_output_is_no_failure() -> None:
    assert parse_failure(["Step 3/7 : RUN pip", "ERROR: pip's own word", "Resolved 7 packages in 187ms"]) is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            'warning: `apache-airflow==3.1.4` is yanked (reason: "The wrong RC was mistakenly released!")',
            "The wrong RC was mistakenly released!",
        ),
        ("warning: `apache-airflow==3.1.4` is yanked", ""),
        ('warning: `apache-airflow==3.1.0` is yanked (reason: "another one")', None),
        ("Resolved 1 package in 52ms", None),
    ],
)
def test_yanked_releases(line: str, reason: str | None) -> None:
    assert parse_yanked(["Resolved 1 package in 52ms", line], "apache-airflow==3.1.4") == reason
