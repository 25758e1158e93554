"""The shapes of what clients get, without a server."""

from __future__ import annotations

import json

from tenon.server.responses import sse


def test_an_event_is_one_line_by_any_reading() -> None:
    text = "".join(map(chr, range(0x300))) + "\u2028 \u2029 \u3000 \U0001f600"
    event = sse({"text": text}).decode()
    first, *rest = event.splitlines()
    assert rest == [""]
    assert json.loads(first.removeprefix("data: ")) == {"text": text}
