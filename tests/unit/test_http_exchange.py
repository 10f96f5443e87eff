"""When a connection is known to be between two requests, and that it never is where that is not certain."""

from __future__ import annotations

import pytest

from airflow_deployer.http_exchange import HttpExchange, can_be_repeated

REQUEST = b"GET /api HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n1F\r\n" + b"x" * 31 + b"\r\n0\r\n\r\n"


def exchange(*parts: tuple[str, bytes]) -> HttpExchange:
    made = HttpExchange()
    for way, data in parts:
        made.sent(data) if way == ">" else made.received(memoryview(data))
    return made


def test_a_new_connection_is_between_requests() -> None:
    assert HttpExchange().is_between_requests


@pytest.mark.parametrize("answer", [ANSWER, CHUNKED])
@pytest.mark.parametrize("step", [1, 2, 3, 7, 40, 1000])
def test_it_is_between_requests_again_with_the_last_byte_of_the_answer(answer: bytes, step: int) -> None:
    made = exchange((">", REQUEST))
    for index in range(0, len(answer), step):
        assert not made.is_between_requests
        made.received(memoryview(answer)[index : index + step])
    assert made.is_between_requests
    made.sent(REQUEST)
    assert not made.is_between_requests


def test_a_request_may_come_in_parts() -> None:
    made = HttpExchange()
    for index in range(len(REQUEST)):
        assert not made.can_be_repeated or index
        made.sent(REQUEST[index : index + 1])
        if index >= len(b"HEAD "):
            assert made.can_be_repeated
    made.received(memoryview(ANSWER))
    assert made.is_between_requests


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (REQUEST, b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n"),
        (REQUEST, b"HTTP/1.1 204 No Content\r\n\r\n"),
        (REQUEST, b"HTTP/1.1 404 Not Found\r\nCONTENT-LENGTH:  0\r\n\r\n"),
        (REQUEST.replace(b"GET", b"HEAD"), b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"),
    ],
)
def test_answers_without_a_body_are_complete_with_their_head(request_: bytes, answer: bytes) -> None:
    assert exchange((">", request_), ("<", answer)).is_between_requests


@pytest.mark.parametrize(
    "request_",
    [
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nconnection : keep-alive, Close\r\n\r\n",
        b"GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 5\r\n\r\n",
        b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: y\n Content-Length: 5\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: y\r\n Content-Length: 5\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: y\nContent-Length: 5\r\n\r\n",
        REQUEST + REQUEST,
        REQUEST + b"x",
        b"hello",
        b"\x16\x03\x01",
    ],
)
def test_a_request_that_may_be_followed_by_more_makes_it_opaque(request_: bytes) -> None:
    assert not exchange((">", request_), ("<", ANSWER)).is_between_requests


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello",
        CHUNKED[:-1],
        CHUNKED + b"x",
        CHUNKED.replace(b"0\r\n\r\n", b"0\r\nTrailer: x\r\n\r\n"),
        CHUNKED.replace(b"5\r\n", b"5;extension=1\r\n"),
        CHUNKED.replace(b"5\r\n", b"hello" * 20),
        CHUNKED.replace(b": chunked", b": gzip, chunked"),
        CHUNKED.replace(b"Transfer", b"Content-Length: 5\r\nTransfer"),
        CHUNKED.replace(b"Transfer", b"Transfer-Encoding: gzip\r\nTransfer"),
        b"HTTP/1.1 200 OK\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        ANSWER + b"x",
        ANSWER[:-1],
        b"something else\r\n\r\n",
    ],
)
def test_an_answer_whose_end_is_not_certain_makes_it_opaque(answer: bytes) -> None:
    assert not exchange((">", REQUEST), ("<", answer)).is_between_requests


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", ANSWER),
        (b"GET / HTTP/1.1\r\nconnection : keep-alive, Close\r\n\r\n", CHUNKED),
        (REQUEST, b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"),
        (REQUEST, b"HTTP/1.1 304 Not Modified\r\nConnection: close\r\n\r\n"),
    ],
)
def test_it_is_done_with_the_last_byte_of_what_is_said_to_be_the_last_answer(request_: bytes, answer: bytes) -> None:
    assert exchange((">", request_), ("<", answer)).is_done
    assert not exchange((">", request_), ("<", answer)).is_between_requests
    assert not exchange((">", request_), ("<", answer[:-1])).is_done
    assert not exchange((">", request_), ("<", answer), (">", b"x")).is_done


def test_an_answer_that_ends_with_the_connection_is_never_done() -> None:
    made = exchange((">", REQUEST), ("<", b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello"))
    assert not made.is_done


def test_it_stays_opaque() -> None:
    made = exchange(
        (">", b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n"), ("<", ANSWER), (">", REQUEST), ("<", ANSWER)
    )
    assert not made.is_between_requests
    assert not made.can_be_repeated


def test_an_answer_that_nobody_asked_for_makes_it_opaque() -> None:
    assert not exchange(("<", ANSWER)).is_between_requests
    assert not exchange((">", REQUEST), ("<", ANSWER), ("<", ANSWER)).is_between_requests
    assert not exchange((">", REQUEST), (">", REQUEST), ("<", ANSWER)).is_between_requests


def test_only_safe_requests_without_a_body_may_be_repeated() -> None:
    assert can_be_repeated(REQUEST)
    assert can_be_repeated(REQUEST[:-2])
    assert can_be_repeated(b"GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    assert can_be_repeated(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert not can_be_repeated(b"")
    assert not can_be_repeated(b"DELETE / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert not can_be_repeated(REQUEST + REQUEST)
    assert not can_be_repeated(REQUEST[:-2].ljust(100_000, b"x"))
