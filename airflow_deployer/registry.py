"""Image references, and what a registry answers over HTTP: is it there, may we push, which digest has a tag."""

from __future__ import annotations

import re
from dataclasses import dataclass

DOCKER_HUB = "docker.io"

# distribution/reference: the grammar of image references.
_HOST_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_HOST = re.compile(rf"(?:{_HOST_LABEL}(?:\.{_HOST_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[\w][\w.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,}")


def is_registry_host(text: str) -> bool:
    """Whether `text` is `host` or `host:port` as it may stand in front of an image's name."""
    return _HOST.fullmatch(text) is not None


def is_repository(text: str) -> bool:
    """Whether `text` is a repository without a registry in front of it."""
    return _REPOSITORY.fullmatch(text) is not None


@dataclass(frozen=True)
class Reference:
    """A fully written image reference: `host/repository[:tag][@digest]`."""

    host: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a reference as Docker does: `postgres:17` is `docker.io/library/postgres:17`.

        Raises:
            ValueError: `text` is not an image reference.
        """
        rest, _, digest = text.partition("@")
        if ("@" in text) and not _DIGEST.fullmatch(digest):
            raise ValueError(f'"{text}" is not an image: its digest is not one')
        first, slash, remainder = rest.partition("/")
        # Docker's rule: without a dot, a port or `localhost`, the first component is part of the name.
        if slash and ("." in first or ":" in first or first == "localhost" or first != first.lower()):
            host, name = first, remainder
        else:
            host, name = DOCKER_HUB, rest
        name, colon, tag = name.partition(":")
        if host in ("index.docker.io", DOCKER_HUB):
            host = DOCKER_HUB
            name = name if "/" in name else f"library/{name}"
        if not is_registry_host(host) or not is_repository(name) or (colon and not _TAG.fullmatch(tag)):
            raise ValueError(f'"{text}" is not an image such as "postgres:17" or "localhost:5000/team/airflow:1.0"')
        return cls(host, name, tag or None, digest or None)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.host}/{self.repository}{tag}{digest}"
