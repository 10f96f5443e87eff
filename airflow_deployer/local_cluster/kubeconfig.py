"""The user's kubeconfig: our context is merged into it and taken out again, everything else in it stays.

Only the named cluster, user and context are ever touched. The file is replaced as a whole, so no reader sees half of
it, keeps its owner (`sudo deployer` writes to the home of whoever called it) and gets mode 0600.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from airflow_deployer.errors import LocalClusterError

_LISTS = ("clusters", "users", "contexts")


class _Loader(yaml.SafeLoader):
    """YAML without timestamps: client-go reads them as text, and a date written back would look different."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@dataclass(frozen=True)
class Entry:
    """A cluster, its user and the context of both, all under one name.

    Args:
        name: of the context, the cluster and the user.
        cluster: the cluster's fields (`server`, `certificate-authority-data`).
        user: the user's fields (`client-certificate-data`, `client-key-data`).
    """

    name: str
    cluster: Mapping[str, str]
    user: Mapping[str, str]

    def items(self) -> dict[str, dict[str, Any]]:
        """The entry of each of the file's lists."""
        return {
            "clusters": {"name": self.name, "cluster": dict(self.cluster)},
            "users": {"name": self.name, "user": dict(self.user)},
            "contexts": {"name": self.name, "context": {"cluster": self.name, "user": self.name}},
        }


def _without(items: Any, name: str) -> list[Any]:
    return [item for item in items or [] if not (isinstance(item, dict) and item.get("name") == name)]


def merge(document: Mapping[str, Any], entry: Entry) -> dict[str, Any]:
    """A kubeconfig with the entry in it. `current-context` is set only where there is none: where the user's commands
    go is the user's choice.
    """
    merged = copy.deepcopy(dict(document))
    merged.setdefault("apiVersion", "v1")
    merged.setdefault("kind", "Config")
    for name, item in entry.items().items():
        items = list(merged.get(name) or [])
        places = [i for i, old in enumerate(items) if isinstance(old, dict) and old.get("name") == entry.name]
        if name == "contexts" and places and isinstance(items[places[0]].get("context"), dict):
            # A namespace that the user has chosen for the context stays.
            item = {"name": entry.name, "context": {**items[places[0]]["context"], **item["context"]}}
        if places:
            items[places[0]] = item
        else:
            items.append(item)
        merged[name] = items
    if not merged.get("current-context"):
        merged["current-context"] = entry.name
    return merged


def remove(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A kubeconfig without what is called `name`; `current-context` is emptied only if it was this one."""
    left = copy.deepcopy(dict(document))
    for key in _LISTS:
        if key in left:
            left[key] = _without(left[key], name)
    if left.get("current-context") == name:
        left["current-context"] = ""
    return left


def paths(environ: Mapping[str, str]) -> list[Path]:
    """The user's kubeconfig files: those of KUBECONFIG, otherwise `~/.kube/config`."""
    named = [Path(part) for part in environ.get("KUBECONFIG", "").split(os.pathsep) if part]
    return named or [Path("~/.kube/config").expanduser()]


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise LocalClusterError(f"reading the kubeconfig {path} failed: {error.strerror}") from error
    try:
        # A loader derived from SafeLoader: no objects are made.
        document = yaml.load(text, Loader=_Loader)  # noqa: S506
    except yaml.YAMLError as error:
        raise LocalClusterError(
            f"reading the kubeconfig {path} failed: it is not YAML",
            hint=f"Repair or move {path}, then run this again.",
            details=str(error).splitlines(),
        ) from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise LocalClusterError(
            f"reading the kubeconfig {path} failed: it holds no mapping", hint=f"Repair or move {path}."
        )
    return document


def _write(path: Path, document: Mapping[str, Any]) -> None:
    target = path.resolve()
    try:
        if not target.parent.exists():
            target.parent.mkdir(parents=True, mode=0o700)
            home = target.parent.parent.stat()
            os.chown(target.parent, home.st_uid, home.st_gid)
        owner = target.stat() if target.exists() else target.parent.stat()
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                yaml.safe_dump(dict(document), stream, sort_keys=False, default_flow_style=False)
            if os.geteuid() == 0:
                os.chown(temporary, owner.st_uid, owner.st_gid)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise LocalClusterError(f"writing the kubeconfig {target} failed: {error.strerror}") from error


def _has(document: Mapping[str, Any], name: str) -> bool:
    items = [item for key in _LISTS for item in document.get(key) or []]
    return any(isinstance(item, dict) and item.get("name") == name for item in items)


def ensure_context(entry: Entry, environ: Mapping[str, str]) -> Path:
    """Have the entry in the user's kubeconfig; returns the file. A file that is right already is not written.

    Of several files it is the one that has the context already, else the first that exists, else the first.

    Raises:
        LocalClusterError: the file cannot be read, understood or written.
    """
    files = paths(environ)
    documents = {path: _read(path) for path in files}
    holding = [path for path in files if _has(documents[path], entry.name)]
    existing = [path for path in files if path.exists()]
    path = (holding or existing or files)[0]
    # Which context is the current one is decided by the first file that names one.
    chosen = next((d["current-context"] for d in documents.values() if d.get("current-context")), None)
    merged = merge(documents[path], entry)
    if chosen and not documents[path].get("current-context"):
        del merged["current-context"]
    if merged != documents[path] or path.stat().st_mode & 0o077:
        _write(path, merged)
    return path


def remove_context(name: str, environ: Mapping[str, str]) -> None:
    """Take the context, its cluster and its user out of the user's kubeconfig files.

    Raises:
        LocalClusterError: a file cannot be read, understood or written.
    """
    for path in paths(environ):
        document = _read(path)
        if _has(document, name) or document.get("current-context") == name:
            _write(path, remove(document, name))
