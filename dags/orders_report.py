"""A day's orders of twelve shops, counted, reconciled and summed up: the shape of a real pipeline, without its data.

What it shows: one task per shop (mapped), a task that fails on its first try, results handed over from task to task,
and a task of about a minute that reports how far it is. Everything follows from the parameters, so the result can be
computed without Airflow: `expected_report(seed, slow_seconds)` is it, and the last task returns the same dictionary.
It runs on Airflow 2 and 3; 1.10 has no mapped tasks.
"""

from __future__ import annotations

import hashlib
import logging
import time
from datetime import datetime, timedelta
from typing import Any

try:
    from airflow.sdk import Param, dag, get_current_context, task
except ImportError:
    from airflow.decorators import dag, task
    from airflow.models.param import Param
    from airflow.operators.python import get_current_context

SHOPS = [f"shop-{number:02d}" for number in range(1, 13)]
ORDERS_PER_SHOP = 200
FLAKY_SHOP = "shop-07"

log = logging.getLogger(__name__)


def orders_of(shop: str, seed: int) -> list[int]:
    """The amounts of one shop's orders in cents, the same for the same seed."""
    amounts = []
    for number in range(ORDERS_PER_SHOP):
        digest = hashlib.sha256(f"{seed}/{shop}/{number}".encode()).digest()
        amounts.append(100 + int.from_bytes(digest[:2], "big"))
    return amounts


def summary_of(shop: str, seed: int) -> dict[str, Any]:
    """One shop's share of the report."""
    amounts = orders_of(shop, seed)
    return {"shop": shop, "orders": len(amounts), "cents": sum(amounts), "largest": max(amounts)}


def report_of(summaries: list[dict[str, Any]], checked_steps: int) -> dict[str, Any]:
    """Sum up all shops; the order of `summaries` makes no difference."""
    best = max(summaries, key=lambda summary: (summary["cents"], summary["shop"]))
    return {
        "shops": len(summaries),
        "orders": sum(summary["orders"] for summary in summaries),
        "cents": sum(summary["cents"] for summary in summaries),
        "largest": max(summary["largest"] for summary in summaries),
        "best_shop": best["shop"],
        "checked_steps": checked_steps,
    }


def expected_report(seed: int = 1, slow_seconds: int = 60) -> dict[str, Any]:
    """What a run with these parameters must return."""
    return report_of([summary_of(shop, seed) for shop in SHOPS], slow_seconds)


@dag(
    schedule=None,
    start_date=datetime(2026, 1, 1),
    catchup=False,
    tags=["example"],
    default_args={"retries": 2, "retry_delay": timedelta(seconds=2)},
    params={
        "seed": Param(1, type="integer", description="Which day's orders: another seed, other amounts."),
        "slow_seconds": Param(60, type="integer", minimum=0, description="How long the reconciliation takes."),
    },
    doc_md=__doc__,
)
def orders_report() -> None:
    @task
    def list_shops() -> list[str]:
        """Where the fan-out begins: the list decides how many tasks there are."""
        return SHOPS

    @task
    def summarize(shop: str) -> dict[str, Any]:
        """Count one shop's orders; the export of one of them is only complete on the second attempt."""
        context = get_current_context()
        attempt = context["ti"].try_number
        if shop == FLAKY_SHOP and attempt == 1:
            raise RuntimeError(f"The export of {shop} is not complete yet (attempt {attempt}).")
        summary = summary_of(shop, context["params"]["seed"])
        log.info("%s: %d orders, %d cents", shop, summary["orders"], summary["cents"])
        return summary

    @task(retries=0)
    def reconcile(summaries: list[dict[str, Any]]) -> int:
        """Go through the books once more, a step a second. It has no retries: an interruption must not cost it one."""
        steps = int(get_current_context()["params"]["slow_seconds"])
        for step in range(1, steps + 1):
            time.sleep(1)
            log.info("Reconciling %d shops: step %d of %d", len(summaries), step, steps)
        return steps

    @task
    def publish(summaries: list[dict[str, Any]], checked_steps: int) -> dict[str, Any]:
        """Sum up, and hand the report out as this task's result."""
        report = report_of(summaries, checked_steps)
        log.info("Report: %s", report)
        return report

    summaries = summarize.expand(shop=list_shops())
    publish(summaries, reconcile(summaries))


orders_report()
