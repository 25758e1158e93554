"""One server for all clients: the embedded model, really computed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.conftest import Running, free_port, launch


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    port = free_port()
    words = ["-m", "tenon.cli", "serve", "--dtype", "float32", "--port", str(port), "--served-name", "embedded"]
    running = launch(words, port, "embedded")
    yield running
    assert running.stop() == 0
    running.close()
