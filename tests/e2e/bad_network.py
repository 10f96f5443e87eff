"""A way to the API server that can be as bad as a network, for the commands of one project."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress


class Proxy:
    """Stands between `deployer` and the API server, and can be as bad as a network."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._connections: list[tuple[socket.socket, socket.socket]] = []
        self._asleep: set[socket.socket] = set()
        self.refusing = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break every connection, as an API server that ends."""
        for pair in list(self._connections):
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def sleep(self) -> None:
        """Swallow all that comes through the connections that are open, and say nothing, as after a laptop's sleep."""
        self._asleep |= {end for pair in self._connections for end in pair}

    def close(self) -> None:
        """Stop, with every thread and socket gone."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        deadline = time.monotonic() + 5
        while self._connections and time.monotonic() < deadline:
            self.cut()
            time.sleep(0.02)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self.refusing:
                    near.close()
                    continue
                threading.Thread(target=self._relay, args=(near,), daemon=True).start()

    def _relay(self, near: socket.socket) -> None:
        with near, socket.create_connection(self._target) as far:
            pair = (near, far)
            self._connections.append(pair)
            if self.refusing:
                self.cut()  # this one was on its way when the others were cut
            upward = threading.Thread(target=self._pump, args=pair, daemon=True)
            upward.start()
            self._pump(far, near)
            upward.join()
            self._connections.remove(pair)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if source not in self._asleep:
                    sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
