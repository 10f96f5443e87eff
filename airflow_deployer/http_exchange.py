"""Reads along with an HTTP/1.1 connection to know when it could serve another client, and when it has served its last.

Only what is certain counts: GET and HEAD without a body, answered with a length or in chunks (RFC 9112, sections 6, 7
and 9). Everything else makes the connection opaque for good, which costs nothing but its reuse.
"""

from __future__ import annotations

import enum
import re

_HEAD_LIMIT = 64 * 1024
_REQUEST = re.compile(rb"(GET|HEAD) [^ \r\n]+ HTTP/1\.1\r\n")
_STATUS = re.compile(rb"HTTP/1\.1 ([2-5][0-9][0-9])[ \r]")
# A body, or the wish for one; a folded line could hide either.
_REQUEST_BODY = re.compile(rb"\r\n(?:(?:content-length|transfer-encoding|expect)[ \t]*:|[ \t])", re.IGNORECASE)
_LAST = re.compile(rb"\r\n(?:connection[ \t]*:[^\r]*(?:close|upgrade)|upgrade[ \t]*:)", re.IGNORECASE)
_ENCODED = re.compile(rb"\r\n(?:transfer-encoding[ \t]*:|[ \t])", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked[ \t]*(?=\r\n)", re.IGNORECASE)
_ANY_LENGTH = re.compile(rb"\r\ncontent-length[ \t]*:", re.IGNORECASE)
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,15})[ \t]*(?=\r\n)", re.IGNORECASE)
_NO_BODY = (204, 304)
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,12})\r\n")
_LAST_CHUNK = re.compile(rb"0{1,12}\r\n\r\n")
_CHUNK_LINE_LIMIT = 32


class _State(enum.Enum):
    BETWEEN = enum.auto()
    REQUEST = enum.auto()
    ANSWER = enum.auto()
    BODY = enum.auto()
    CHUNK = enum.auto()
    CHUNK_LINE = enum.auto()
    DONE = enum.auto()
    OPAQUE = enum.auto()


class HttpExchange:
    """What is known of one connection from the bytes that went each way."""

    def __init__(self) -> None:
        self._state = _State.BETWEEN
        self._head = b""
        self._is_head_request = False
        self._is_last = False
        self._remaining = 0

    @property
    def is_between_requests(self) -> bool:
        """Whether every request was answered in full and the server expects another."""
        return self._state is _State.BETWEEN

    @property
    def is_done(self) -> bool:
        """Whether every request was answered in full and one side has said that there will be no other."""
        return self._state is _State.DONE

    @property
    def can_be_repeated(self) -> bool:
        """Whether one safe request (RFC 9110, section 9.2.1), or the beginning of one, is all that is unanswered."""
        return self._state in (_State.REQUEST, _State.ANSWER)

    def sent(self, data: bytes) -> None:
        """Take note of bytes from the client."""
        if not data or self._state is _State.OPAQUE:
            return
        if self._state not in (_State.BETWEEN, _State.REQUEST):
            self._state = _State.OPAQUE
            return
        self._state = _State.REQUEST
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            other = len(self._head) >= len(b"HEAD ") and not self._head.startswith((b"GET ", b"HEAD "))
            if other or len(self._head) > _HEAD_LIMIT:
                self._state = _State.OPAQUE
            return
        head, self._head = self._head, b""
        request = _REQUEST.match(head)
        whole = end + 4 == len(head) and head.count(b"\n") == head.count(b"\r\n")
        if request is None or not whole or _REQUEST_BODY.search(head):
            self._state = _State.OPAQUE
            return
        self._is_head_request = request[1] == b"HEAD"
        self._is_last = _LAST.search(head) is not None
        self._state = _State.ANSWER

    def received(self, data: memoryview) -> None:
        """Take note of bytes from the server."""
        if self._state is _State.BODY:
            self._count(len(data))
        elif self._state in (_State.CHUNK, _State.CHUNK_LINE):
            self._read_chunks(data)
        elif self._state is _State.ANSWER:
            self._read_answer(bytes(data))
        else:
            self._state = _State.OPAQUE

    def _read_answer(self, data: bytes) -> None:
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            if len(self._head) > _HEAD_LIMIT:
                self._state = _State.OPAQUE
            return
        head, body = self._head[: end + 2], self._head[end + 4 :]
        self._head = b""
        self._state = _State.OPAQUE
        status = _STATUS.match(head)
        if status is None:
            return
        self._is_last = self._is_last or _LAST.search(head) is not None
        lengths = _LENGTH.findall(head)
        if self._is_head_request or int(status[1]) in _NO_BODY:
            self._remaining = 0
        elif len(_ENCODED.findall(head)) == len(_CHUNKED.findall(head)) == 1 and not _ANY_LENGTH.search(head):
            self._state = _State.CHUNK_LINE
            self._read_chunks(memoryview(body))
            return
        elif len(lengths) == len(_ANY_LENGTH.findall(head)) == 1 and not _ENCODED.search(head):
            self._remaining = int(lengths[0])
        else:
            return
        self._count(len(body))

    def _read_chunks(self, data: memoryview) -> None:
        """Step over chunks without extensions and trailers (RFC 9112, section 7.1); whatever else makes it opaque."""
        while data:
            if self._state is _State.CHUNK:
                step = min(self._remaining, len(data))
                self._remaining -= step
                data = data[step:]
                if self._remaining == 0:
                    self._state = _State.CHUNK_LINE
                continue
            known = len(self._head)
            self._head += bytes(data[: _CHUNK_LINE_LIMIT - known])
            if last := _LAST_CHUNK.match(self._head):
                whole = last.end() == len(self._head) == known + len(data)
                self._head = b""
                self._state = self._end() if whole else _State.OPAQUE
                return
            line = _CHUNK_LINE.match(self._head)
            if line is None or int(line[1], 16) == 0:
                if len(self._head) == _CHUNK_LINE_LIMIT:
                    self._state = _State.OPAQUE
                return
            data = data[line.end() - known :]
            self._head = b""
            # The end of the line after the chunk counts as part of it.
            self._remaining = int(line[1], 16) + len(b"\r\n")
            self._state = _State.CHUNK

    def _count(self, length: int) -> None:
        self._remaining -= length
        if self._remaining > 0:
            self._state = _State.BODY
        else:
            self._state = self._end() if self._remaining == 0 else _State.OPAQUE

    def _end(self) -> _State:
        return _State.DONE if self._is_last else _State.BETWEEN


def can_be_repeated(data: bytes) -> bool:
    """Whether these bytes of a new connection are one safe request, or the beginning of one."""
    exchange = HttpExchange()
    exchange.sent(data)
    return exchange.can_be_repeated
