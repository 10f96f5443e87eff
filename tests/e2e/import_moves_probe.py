"""Asks the Airflow that it runs in how every spelling of `import_moves` fares: `python - SERIES` in a base image.

Prints a JSON object: spelling to `+`, `d` or `-`, or `q` for what Airflow would have from a package that is not there.
Each is tried in a process of its own, since Airflow warns once only.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from datetime import datetime
from typing import Any

os.environ.update(
    AIRFLOW_HOME="/tmp/airflow",
    AIRFLOW__CORE__LOAD_EXAMPLES="False",
    AIRFLOW__CORE__SQL_ALCHEMY_CONN="sqlite://",
    AIRFLOW__DATABASE__SQL_ALCHEMY_CONN="sqlite://",
    AIRFLOW__CORE__UNIT_TEST_MODE="False",
)

from airflow_deployer_pod.import_moves import THINGS, replacement

ARGUMENTS: dict[str, Any] = {
    "schedule_interval": "@daily",
    "schedule": "@daily",
    "concurrency": 3,
    "max_active_tasks": 3,
    "sla_miss_callback": print,
    "default_view": "graph",
    "orientation": "LR",
    "fail_stop": False,
    "fail_fast": False,
    "provide_context": True,
    "task_concurrency": 2,
    "max_active_tis_per_dag": 2,
    "execution_date": "{{ ds }}",
    "logical_date": "{{ ds }}",
}
REQUIRED: dict[str, dict[str, Any]] = {
    "PythonOperator": {"python_callable": print},
    "BranchPythonOperator": {"python_callable": print},
    "ShortCircuitOperator": {"python_callable": print},
    "BashOperator": {"bash_command": "true"},
    "TriggerDagRunOperator": {"trigger_dag_id": "other"},
}
# What warns when it is called, and not when it is imported.
CALLS: dict[str, tuple[Any, ...]] = {
    "airflow.operators.python.task": (lambda: None,),
    "airflow.utils.dates.days_ago": (1,),
    "airflow.utils.decorators.apply_defaults": (lambda: None,),
    "airflow.utils.helpers.chain": (),
    "airflow.utils.helpers.cross_downstream": ([], []),
}
# What Airflow 1.10 says of an argument that it does not know, instead of refusing it.
UNKNOWN_ARGUMENT = "Invalid arguments were passed"


def named(name: str) -> Any:
    """What a dotted name stands for.

    Raises:
        ImportError: nothing.
    """
    module, _, last = name.rpartition(".")
    found = importlib.import_module(module)
    try:
        return getattr(found, last)
    except AttributeError:
        return importlib.import_module(name)


def operator(last: str) -> Any:
    """The class of that name, as this series spells it."""
    for thing in THINGS:
        found = replacement(thing, series)
        if found and found.text.endswith(f".{last}"):
            return named(found.text)
    raise LookupError(last)


def build(kind: str, argument: str) -> None:
    """Make a DAG, or an operator in one, with an argument."""
    value = ARGUMENTS.get(argument)
    if argument == "timetable":
        value = named("airflow.timetables.simple.NullTimetable")()
    if argument == "sla":
        value = datetime(2026, 1, 2) - datetime(2026, 1, 1)
    if kind == "DAG":
        named("airflow.DAG")("probe", start_date=datetime(2026, 1, 1), **{argument: value})
        return
    with named("airflow.DAG")("probe", start_date=datetime(2026, 1, 1)):
        last = "BashOperator" if kind == "Operator" else kind
        made = operator(last)(task_id="probe", **REQUIRED[last], **{argument: value})
    made.template_fields  # noqa: B018 - it was made


def context_keys() -> dict[str, str]:
    """The keys of a task's context."""
    if series == "3":
        context = named("airflow.sdk.definitions.context.Context")
        return dict.fromkeys(context.__annotations__, "+")
    if series == "2":
        context = named("airflow.utils.context.Context")
        known = named("airflow.utils.context.KNOWN_CONTEXT_KEYS")
        return {key: "d" if key in context._DEPRECATION_REPLACEMENTS else "+" for key in known}
    source = inspect.getsource(named("airflow.models.TaskInstance").get_template_context)
    return dict.fromkeys(source.split("'"), "+")


def attempt(text: str) -> str:
    """How one spelling fares."""
    if text.startswith("{{"):
        return context_keys().get(text.strip("{} "), "-")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if text.endswith("=)"):
                kind, argument = text[:-2].split("(")
                build(kind, argument)
            elif text.endswith(".*"):
                importlib.import_module(text[:-2])
            else:
                found = named(text)
                if inspect.isclass(found) and "class is deprecated" in inspect.getsource(found):
                    return "d"
                if text in CALLS:
                    found(*CALLS[text])
        except (ImportError, TypeError) as error:
            print(text, repr(error), file=sys.stderr)
            return "q" if "while trying to import" in str(error) else "-"
        except Exception as error:
            # Airflow's own for an argument that it does not know.
            if text.endswith("=)"):
                print(text, repr(error), file=sys.stderr)
                return "-"
            raise
    messages = [str(each.message) for each in caught]
    if any(UNKNOWN_ARGUMENT in message for message in messages):
        return "-"
    about = [
        "This function is deprecated",
        "This decorator is deprecated",
        text,
        text.rpartition(".")[0],
        text.rpartition(".")[2],
        text.rpartition("(")[2][:-2],
    ]
    about += ["SLA feature"] if "sla" in text else []
    kinds = ("Deprecat", "RemovedInAirflow", "FutureWarning", "UserWarning")
    for each in caught:
        told = f"{each.category.__name__}: {each.message}"
        of_the_module = each.filename == importlib.__file__ and "deprecated" in told
        if of_the_module or (any(kind in told for kind in kinds) and any(part and part in told for part in about)):
            print(text, told, file=sys.stderr)
            return "d"
    return "+"


def apart(action: Callable[[str], str], text: str) -> str:
    """The result of an action in a process of its own."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, action(text).encode())
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as output:
        result = output.read()
    os.waitpid(pid, 0)
    return result


if __name__ == "__main__":
    series = sys.argv[1]
    # Once, and not in each process: it takes a second, and would have the warnings go into its log.
    importlib.import_module("airflow.models")
    logging.captureWarnings(False)
    logging.disable(logging.CRITICAL)
    texts = {spelling.text for thing in THINGS for spelling in thing if not spelling.text.startswith("=")}
    print(json.dumps({text: apart(attempt, text) for text in sorted(texts)}))
