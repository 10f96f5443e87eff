"""What uv says where it finds no packages that fit together, read into what a person needs; pure parsing.

The forms are those of uv 0.13, which the images are built with: a line `error: ...`, its causes indented below as
`cause: ...`, and lines `hint: ...`. The resolver's cause is a chain of sentences: `Because A and B, we can conclude C.`
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

UV_VERSION = "0.13.9"
"""The uv that installs into the images."""

_REQUIREMENT = r"[A-Za-z0-9][A-Za-z0-9._-]*(?:\[[^\]]*\])?(?:(?:[=<>!~]=|===|[<>])[^\s;]*)?"
_NO_SOLUTION = "No solution found"
_CONTINUATION = " " * len("  cause: ")
# A constraint shows as a bare `name==version`; what the user asks for, as "you require ...".
_HELD_DIRECTLY = re.compile(
    rf"because you require (?P<wanted>{_REQUIREMENT}) and (?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s,]+), we can"
)
_HELD_BELOW = re.compile(
    rf"because (?P<asker>{_REQUIREMENT}) depends on (?P<wanted>one of: .+?|{_REQUIREMENT})"
    r" and (?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s,]+), we can"
)
_CONCLUSION = re.compile(r", we can conclude that .*")
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")
_MOST_SENTENCES = 3


@dataclass(frozen=True)
class Held:
    """A package that is held at one version, where another one is asked for.

    Attributes:
        name: the package.
        version: the one that it is held at.
        wanted: what is asked for, as in `cffi>=1.9,<2.0.0`; several are joined by "or".
        asker: the package that asks for it, or "" where the user does.
    """

    name: str
    version: str
    wanted: str
    asker: str = ""

    def __str__(self) -> str:
        return f"{self.asker} needs {self.wanted}" if self.asker else f"it asks for {self.wanted}"


@dataclass(frozen=True)
class Failure:
    """Why uv gave up.

    Attributes:
        reason: in one line, shortened, without a full stop.
        held: the package that stands in the way, where it is one that a constraint holds.
        missing: the requirement that no release fulfils, or a package that the index does not have, or "".
        unreachable: whether the index could not be reached.
        hints: what uv advises.
    """

    reason: str
    held: Held | None = None
    missing: str = ""
    unreachable: bool = False
    hints: tuple[str, ...] = ()


def parse_failure(lines: Iterable[str]) -> Failure | None:
    """Read what uv wrote to stderr, other programs' lines around it included; None where uv reported no error."""
    message, causes, hints = _parts(lines)
    if not message:
        return None
    if message.startswith(_NO_SOLUTION) and causes:
        chain = causes[0]
        return Failure(_shortened(chain), held=_held(chain), missing=_missing(chain), hints=tuple(hints))
    unreachable = next((text for text in (message, *causes) if text.startswith("Failed to fetch: ")), "")
    if unreachable:
        url = _USER_INFO.sub("", unreachable.removeprefix("Failed to fetch: ").strip("`"))
        return Failure(f"{url} cannot be fetched: {_without_number([message, *causes][-1])}", unreachable=True)
    reason = f"{message}: {causes[0]}" if causes else message
    return Failure(_USER_INFO.sub("", reason).rstrip("."), hints=tuple(hints))


def parse_yanked(lines: Iterable[str], requirement: str) -> str | None:
    """Why a release was yanked, as uv warns; "" where nobody said why, None where it was not."""
    for line in lines:
        found = re.match(r"warning: `(.+?)` is yanked(?: \(reason: \"(.*)\"\))?", line)
        if found and found[1] == requirement:
            return found[2] or ""
    return None


def _parts(lines: Iterable[str]) -> tuple[str, list[str], list[str]]:
    """The error, its causes and the hints, each in one line."""
    message, causes, hints = "", [], []
    part: list[str] | None = None
    for line in lines:
        text = line.strip()
        if line.startswith("error: ") and not message:
            message, part = text.removeprefix("error: "), None
        elif message and re.match(r"\s+cause: ", line):
            causes.append(text.removeprefix("cause: "))
            part = causes
        elif message and line.startswith("hint: "):
            hints.append(text.removeprefix("hint: "))
            part = None
        elif part is not None and line.startswith(_CONTINUATION):
            # Items of a list are indented further than the sentence that they belong to.
            item = line.startswith(f"{_CONTINUATION} ") and not part[-1].endswith(":")
            part[-1] += "" if not text.strip("^") else f" or {text}" if item else f" {text}"
        else:
            part = None
    return message, causes, hints


def _held(chain: str) -> Held | None:
    for sentence in _sentences(chain):
        found = _HELD_DIRECTLY.search(sentence)
        if found and re.split(r"[\[=<>!~]", found["wanted"])[0] == found["name"]:
            return Held(found["name"], found["version"], found["wanted"])
        found = _HELD_BELOW.search(sentence)
        if found and re.match(rf"(one of: )?{re.escape(found['name'])}(?![A-Za-z0-9._-])", found["wanted"]):
            return Held(found["name"], found["version"], found["wanted"].removeprefix("one of: "), found["asker"])
    return None


def _missing(chain: str) -> str:
    for pattern in (
        rf"there is no version of ({_REQUIREMENT})",
        rf"because ({_REQUIREMENT}) was not found in the (?:package registry|cache)",
        rf"because only {_REQUIREMENT} (?:is|are) available and you require ({_REQUIREMENT})",
    ):
        if found := re.search(pattern, chain, re.IGNORECASE):
            return found[1].rstrip(",")
    return ""


def _sentences(chain: str) -> list[str]:
    """The sentences of a chain, each beginning with "because"."""
    return [
        "because " + sentence for sentence in re.split(r"(?:^|\s)(?:And because|Because) ", chain) if sentence.strip()
    ]


def _shortened(chain: str) -> str:
    """The premises, without what follows from them; of a long chain the first and the last."""
    premises = [_CONCLUSION.sub("", sentence).removeprefix("because ").rstrip(". ") for sentence in _sentences(chain)]
    if len(premises) > _MOST_SENTENCES:
        premises = [premises[0], "…", premises[-1]]
    return "; ".join(premises)


def _without_number(cause: str) -> str:
    return re.sub(r" \(os error \d+\)$", "", cause)
