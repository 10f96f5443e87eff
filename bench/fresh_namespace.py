"""Measures a fresh namespace to all components healthy, ours against the blog's manifest, interleaved in one run.

Both use the same images, which are on the node before the clock starts; initdb and migration are included. Ours is
`deployer up --no-port-forward`, from the command's start to its end; the blog's is `kubectl apply`, then Airflow's own
health asked ten times a second until metadatabase, scheduler, DAG processor and triggerer are healthy. Afterwards the
memory of ours at rest is read: the proportional set size of every process of the pod (`/proc/PID/smaps_rollup`).

    python bench/fresh_namespace.py [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from airflow_deployer import kube_context
from airflow_deployer.airflow_api import AirflowApi
from airflow_deployer.cluster import NAMESPACE, POD, STATEFUL_SET, Cluster
from airflow_deployer.errors import AirflowError, ForwardError
from airflow_deployer.port_forward import Target, forwarded

ROOT = Path(__file__).resolve().parents[1]
BUDGET_SECONDS = 20.0
REST_SECONDS = 60.0


def main() -> int:
    """Run all rounds, print the table, and return 1 when the budget is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    context = _deployer("cluster", "status", "--output", "json")["context"]
    cluster = Cluster(kube_context.resolve(context))
    images = _warm_up(cluster)
    figures: dict[str, list[float]] = {"deployer up": [], "the blog's manifest": []}
    memory: list[float] = []
    for number in range(arguments.rounds):
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
        figures["deployer up"].append(_ours(cluster, memory if number == 0 else None))
        figures["the blog's manifest"].append(_blog(cluster, images))
    medians = {name: statistics.median(values) for name, values in figures.items()}
    ratio = medians["the blog's manifest"] / medians["deployer up"]
    print(f"{'fresh namespace to healthy':<28}{'min':>8}{'median':>8}{'max':>8}")
    for name, values in figures.items():
        print(f"{name:<28}{min(values):>7.1f}s{medians[name]:>7.1f}s{max(values):>7.1f}s")
    print(f"ratio {ratio:.2f}, budget {BUDGET_SECONDS:.0f} s; memory of the pod at rest {memory[0]:.0f} MB (PSS)")
    if arguments.json:
        document = {"machine": _machine(), "seconds": figures, "ratio": ratio, "memory_mb": memory[0]}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0 if medians["deployer up"] <= BUDGET_SECONDS else 1


def _warm_up(cluster: Cluster) -> dict[str, str]:
    """Have the images built, pushed and on the node; return their names."""
    namespace = _namespace()
    try:
        _up(cluster, namespace)
        found = cluster.get(STATEFUL_SET, namespace, "airflow") or {}
        return {item["name"]: item["image"] for item in found["spec"]["template"]["spec"]["containers"]}
    finally:
        _remove(cluster, namespace)


def _ours(cluster: Cluster, memory: list[float] | None) -> float:
    namespace = _namespace()
    try:
        began = time.monotonic()
        _up(cluster, namespace)
        seconds = time.monotonic() - began
        if memory is not None:
            time.sleep(REST_SECONDS)
            memory.append(_pss(cluster, namespace))
        return seconds
    finally:
        _remove(cluster, namespace)


def _blog(cluster: Cluster, images: dict[str, str]) -> float:
    namespace = _namespace()
    text = (ROOT / "bench" / "blog.yaml").read_text(encoding="utf-8")
    for name, value in {**images, "jwt": secrets.token_hex(32)}.items():
        text = text.replace("{{" + name + "}}", value)
    kubectl = ["kubectl", "--context", cluster.context.name]
    target = Target(cluster.context.name, namespace, "airflow", 8080, cluster.context.kubeconfig)
    try:
        began = time.monotonic()
        subprocess.run([*kubectl, "create", "namespace", namespace], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(
            [*kubectl, "-n", namespace, "apply", "-f", "-"],
            input=text,
            text=True,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        with forwarded(target) as port:
            while not _healthy(port):
                if time.monotonic() - began > 300:
                    raise SystemExit("the blog's manifest did not become healthy within 300 s")
                time.sleep(0.1)
        return time.monotonic() - began
    finally:
        _remove(cluster, namespace)


def _healthy(port: int) -> bool:
    try:
        components = AirflowApi(f"http://127.0.0.1:{port}").health()
    except (AirflowError, ForwardError):
        return False
    return all(component.status == "healthy" for component in components.values())


def _up(cluster: Cluster, namespace: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        shutil.copytree(ROOT / "dags", project / "dags")
        _deployer(
            "up",
            "--no-port-forward",
            "--output",
            "json",
            "-n",
            namespace,
            "--context",
            cluster.context.name,
            cwd=project,
        )


def _deployer(*arguments: str, cwd: Path = ROOT) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "airflow_deployer", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"deployer {' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def _pss(cluster: Cluster, namespace: str) -> float:
    """Megabytes of every process of the pod; needs root on the node itself, as on the native cluster."""
    pod = cluster.get(POD, namespace, "airflow-0") or {}
    uid = pod["metadata"]["uid"]
    total = 0
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if (
                uid not in (folder / "cgroup").read_text()
                and uid.replace("-", "_") not in (folder / "cgroup").read_text()
            ):
                continue
            for line in (folder / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
        except OSError:
            continue
    return total / 1024


def _namespace() -> str:
    return f"bench-{secrets.token_hex(4)}"


def _remove(cluster: Cluster, namespace: str) -> None:
    cluster.delete(NAMESPACE, None, namespace)
    while cluster.get(NAMESPACE, None, namespace) is not None:
        time.sleep(0.5)


def _machine() -> str:
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
