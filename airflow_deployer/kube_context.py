"""Which kubeconfig context a run talks to, and whether it looks like a cluster on one's own machine.

The context is chosen once and pinned: everything later in the run, the port-forward included, names it.
Contexts are those of a kubeconfig file (https://kubernetes.io/docs/concepts/configuration/organize-cluster-access-kubeconfig/).
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airflow_deployer.errors import ClusterError, ConfigurationError

NATIVE_CONTEXT = "airflow-native"

# The names that the local distributions give their contexts. A loopback address proves nothing: tunnels to
# production listen there too.
_LOCAL_NAMES = re.compile(
    r"^(kind-.+|k3d-.+|minikube|docker-desktop|docker-for-desktop|rancher-desktop|orbstack|colima(-.+)?|"
    + re.escape(NATIVE_CONTEXT)
    + r")$"
)


@dataclass(frozen=True)
class KubeContext:
    """A context that exists in the kubeconfig: its name, cluster, namespace (None: not set) and the files read."""

    name: str
    cluster: str
    namespace: str | None
    kubeconfig: str

    @property
    def looks_local(self) -> bool:
        """True when the name is one that a local distribution gives."""
        return looks_local(self.name)


def looks_local(context: str) -> bool:
    """Tell whether a context's name is one that kind, k3d, minikube and their like give, or our own cluster's."""
    return _LOCAL_NAMES.match(context) is not None


def kubeconfig_paths() -> str:
    """Return the kubeconfig file list as kubectl reads it: `$KUBECONFIG`, else `~/.kube/config`."""
    return os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")


def resolve(wanted: str | None) -> KubeContext:
    """Find the context to use: the one named, else the kubeconfig's current one.

    Raises:
        ClusterError: there is no kubeconfig, or it cannot be read.
        ConfigurationError: the named context does not exist, or none is named and none is current.
    """
    import yaml

    paths = kubeconfig_paths()
    files = [Path(part).expanduser() for part in paths.split(os.pathsep) if part]
    existing = [file for file in files if file.is_file()]
    if not existing:
        raise ClusterError(
            f"Cannot find a cluster: there is no kubeconfig at {paths}.",
            hint="deployer cluster up   makes a local cluster, or point KUBECONFIG at your own",
        )
    contexts: dict[str, dict[str, Any]] = {}
    current: str | None = None
    for file in existing:
        try:
            document = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ClusterError(
                f"Cannot read the kubeconfig {file}: {_one_line(error)}.", hint=f"mend or move away {file}"
            ) from error
        if not isinstance(document, dict):
            raise ClusterError(
                f"Cannot read the kubeconfig {file}: it is not a YAML mapping.", hint=f"mend or move away {file}"
            )
        # The first file that sets a value wins, as in kubectl.
        current = current or document.get("current-context") or None
        for entry in document.get("contexts") or []:
            contexts.setdefault(entry["name"], entry.get("context") or {})
    if wanted is None and current is None:
        raise ConfigurationError(
            f"No context is chosen: {paths} has no current-context.",
            hint=_choose_hint(contexts),
        )
    name = wanted or str(current)
    if name not in contexts:
        near = difflib.get_close_matches(name, contexts, n=1)
        suggestion = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigurationError(
            f"The context {name!r} does not exist in {paths}.{suggestion}", hint=_choose_hint(contexts)
        )
    context = contexts[name]
    return KubeContext(
        name=name,
        cluster=str(context.get("cluster", "")),
        namespace=context.get("namespace") or None,
        kubeconfig=paths,
    )


def guard(context: KubeContext, *, on_purpose: bool) -> None:
    """Refuse a context that does not look local unless the user named it.

    Raises:
        ConfigurationError: the context looks remote and was only the kubeconfig's current one.
    """
    if context.looks_local or on_purpose:
        return
    raise ConfigurationError(
        f"Refusing to touch the cluster of context {context.name!r}: it does not look like a local cluster, "
        "and it was not named on purpose.",
        hint=f"add --context {context.name}, or context = {context.name!r} to deployer.toml, if it is the one you mean",
    )


def _choose_hint(contexts: dict[str, dict[str, Any]]) -> str:
    if not contexts:
        return "deployer cluster up   makes a local cluster with a context of its own"
    return "choose one with --context: " + ", ".join(sorted(contexts))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
