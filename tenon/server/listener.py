"""The listening socket, which never lets clients take the descriptors that the server itself needs.

Descriptors are given out lowest first: a connection whose number is close to the process's limit says that there are
hardly any left. It is told 503 and closed; connections that are there already go on.
"""

from __future__ import annotations

import contextlib
import errno
import resource
import socket
from http import HTTPStatus
from typing import Any, Final

import msgspec

from tenon.server.limits import error_body

RESERVED: Final = 32
"""Descriptors kept for what serving takes: an engine's socket and pipes, template workers, files of the page."""
_BUSY = HTTPStatus.SERVICE_UNAVAILABLE
_BODY = msgspec.json.encode(
    error_body("too many connections; try again later", kind="server_error", code="too_many_connections")
)
_REFUSAL: Final = (
    f"HTTP/1.1 {_BUSY.value} {_BUSY.phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(_BODY)}\r\n"
    "retry-after: 1\r\nconnection: close\r\n\r\n"
).encode("ascii") + _BODY


class Listener(socket.socket):
    """A listening socket for asyncio, which accepts until ``BlockingIOError`` ends its turn."""

    _ends_turn = False

    def accept(self) -> tuple[socket.socket, Any]:
        """Raises ``BlockingIOError`` where nobody waits, and after a refusal: others get their turn first.

        Without a descriptor left asyncio pauses, but only after it has tried, and logged, as often as its backlog is
        long: one failure a turn is enough.
        """
        if self._ends_turn:
            self._ends_turn = False
            raise BlockingIOError(errno.EAGAIN, "the turn is over")
        try:
            connection, address = super().accept()
        except OSError as error:
            self._ends_turn = error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
            raise
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit == resource.RLIM_INFINITY or connection.fileno() < limit - RESERVED:
            return connection, address
        _refuse(connection)
        raise BlockingIOError(errno.EAGAIN, "a connection was refused")


def _refuse(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):  # whoever left already need not be told
        connection.setblocking(False)
        connection.send(_REFUSAL)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1 << 16)  # what lies unread at the close would reset it, and take the answer along
