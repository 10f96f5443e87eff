"""Tilt and Skaffold, where they are on the PATH: each deploys the blog's manifest and copies saved DAG files.

Configuration as in https://docs.tilt.dev/api.html and https://skaffold.dev/docs/filesync/.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.airflow_account import save_at_any_moment, wait_healthy
from bench.blog import Images, blog
from bench.programs import Kubectl, environment, is_there
from bench.project import EDITED

_TILTFILE = """analytics_settings(False)
allow_k8s_contexts('{context}')
docker_build('{image}', '.', live_update=[sync('dags', '/home/airflow/dags')])
k8s_yaml('airflow.yaml')
"""
_SKAFFOLD = """apiVersion: skaffold/v4beta1
kind: Config
build:
  local: {{push: true}}
  artifacts:
    - image: {image}
      sync:
        manual: [{{src: "dags/*.py", dest: /home/airflow}}]
manifests:
  rawYaml: [airflow.yaml]
deploy:
  kubectl: {{}}
"""


@dataclass(frozen=True)
class Rival:
    """A program that watches a folder.

    Attributes:
        arguments: what it is called with; the context and the namespace follow.
        options: how it calls these two.
        file: the name of its configuration.
        configuration: that file's text, with places for `context` and `image`.
    """

    name: str
    arguments: tuple[str, ...]
    options: tuple[str, str]
    file: str
    configuration: str

    def is_there(self) -> bool:
        """Whether it can be measured."""
        return is_there(self.arguments[0])

    @contextlib.contextmanager
    def saved_to_parsed(self, kubectl: Kubectl, images: Images) -> Iterator[Callable[[], float]]:
        """Run it; yield what measures the seconds from a saved edit until Airflow has parsed it."""
        with blog(kubectl, images) as made:
            image = made.image.rpartition(":")[0]
            text = self.configuration.format(context=kubectl.context, image=image)
            (made.folder / self.file).write_text(text, encoding="utf-8")
            (made.folder / "airflow.yaml").write_text(made.manifest().replace(made.image, image), encoding="utf-8")
            kubectl("create", "namespace", made.namespace)
            context, namespace = self.options
            process = subprocess.Popen(
                [*self.arguments, context, kubectl.context, namespace, made.namespace],
                cwd=made.folder,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                wait_healthy(kubectl, made.namespace, images.profile, since=time.time())

                def measure() -> float:
                    save_at_any_moment()
                    began = time.monotonic()
                    made.database.wait_parsed(EDITED, made.edit(), seconds=60)
                    return time.monotonic() - began

                yield measure
            finally:
                process.send_signal(signal.SIGINT)
                process.wait()


RIVALS = (
    Rival("Tilt", ("tilt", "up", "--stream", "--port", "0"), ("--context", "--namespace"), "Tiltfile", _TILTFILE),
    Rival(
        "Skaffold",
        ("skaffold", "dev", "--cleanup=false"),
        ("--kube-context", "--namespace"),
        "skaffold.yaml",
        _SKAFFOLD,
    ),
)
