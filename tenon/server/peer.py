"""Who is on the other end of a Unix socket."""

from __future__ import annotations

import os
import socket
import struct

from tenon.base.errors import ProtocolError

_UCRED = struct.Struct("3i")


def require_same_user(sock: socket.socket) -> int:
    """The peer's process id. Raises ``ProtocolError`` where the peer runs as another user."""
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid != os.getuid():
        raise ProtocolError(
            f"process {pid} of user {uid} connected to the engine's socket; only user {os.getuid()} may"
        )
    return int(pid)
