"""The programs that are measured and measured with: run as a user would run them, and namespaces of one's own."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_STOP_SECONDS = 4.0


class ProgramError(Exception):
    """A program that a measurement needs has failed; the message has the cause in its first line, then all it said."""


def run(
    command: Sequence[str],
    *,
    folder: Path | None = None,
    env: Mapping[str, str] | None = None,
    text: str = "",
) -> str:
    """Run a program to its end and return its standard output.

    Args:
        env: in place of this process' environment.
        text: its standard input.

    Raises:
        ProgramError: it did not end with 0.
    """
    done = subprocess.run(command, cwd=folder, env=env, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        name = " ".join((Path(command[0]).name, *command[1:]))
        raise failed(f"{name} ended with {done.returncode}", done.stderr or done.stdout)
    return done.stdout


def failed(what: str, said: str) -> ProgramError:
    """The error of a program that has said why: on a line that begins with `error`, or on its last one."""
    lines = said.strip().splitlines() or ["nothing was said"]
    cause = next((line for line in lines if line.lower().startswith("error")), lines[-1])
    return ProgramError("\n".join([f"{what}: {cause}", *lines]))


def timed(*command: str, folder: Path | None = None, env: Mapping[str, str] | None = None) -> float:
    """Seconds from a program's start to its end."""
    began = time.monotonic()
    run(command, folder=folder, env=env)
    return time.monotonic() - began


def deployer_command() -> str:
    """The `deployer` command that is installed beside this Python."""
    return str(Path(sys.executable).with_name("deployer"))


def local_context() -> str:
    """The kubeconfig context of the local cluster, which must run."""
    return str(json.loads(run([deployer_command(), "cluster", "status", "--output", "json"]))["context"])


class Kubectl:
    """`kubectl` on one context."""

    def __init__(self, context: str) -> None:
        self.context = context

    def command(self, *arguments: str, namespace: str | None = None) -> list[str]:
        """The command line."""
        where = ["--namespace", namespace] if namespace else []
        return ["kubectl", "--context", self.context, *where, *arguments]

    def __call__(self, *arguments: str, namespace: str | None = None, text: str = "") -> str:
        """Run it and return its standard output."""
        return run(self.command(*arguments, namespace=namespace), text=text)

    def get(self, what: str, namespace: str) -> Any:
        """An object, as JSON values."""
        return json.loads(self("get", what, "--output", "json", namespace=namespace))

    @contextlib.contextmanager
    def namespace(self) -> Iterator[str]:
        """The name of a namespace that does not exist yet; what is in it is removed at the end of the block."""
        name = f"bench-{secrets.token_hex(4)}"
        try:
            yield name
        finally:
            # A pod whose stop has begun keeps to its grace period, and the blog's bash uses it up: so the pods first.
            # Their containers end within the pause; a kubelet may take a minute more to let go of their volumes.
            self("delete", "statefulset", "--all", "--cascade=orphan", namespace=name)
            self("delete", "pod", "--all", "--grace-period=1", "--wait=false", namespace=name)
            time.sleep(_STOP_SECONDS)
            self("delete", "pod", "--all", "--grace-period=0", "--force", namespace=name)
            self("delete", "namespace", name, "--ignore-not-found", "--wait=false")


def environment(**variables: str) -> dict[str, str]:
    """This process' environment without settings of the deployer, and with `variables`."""
    return {key: value for key, value in os.environ.items() if not key.startswith("DEPLOYER_")} | variables


def is_there(program: str) -> bool:
    """Whether a program is on the PATH."""
    return shutil.which(program) is not None
