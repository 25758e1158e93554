"""Trees of guesses as events: by tenant, for they hold what was said, with the texts of their tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from tenon.engine.messages import Trees
from tenon.server.events import EventHub

DIGITS: Final = 4
"""Of a probability."""


def publish_trees(events: EventHub, message: Trees, token_text: Callable[[int], str]) -> None:
    """To those who ask for them, each those of its own tenant."""
    tenants: dict[str, list[dict[str, Any]]] = {}
    for tree in message.trees:
        told = msgspec.structs.asdict(tree)
        # What another engine took over has a name of its own there: that of the request, and what follows a tilde.
        told["request_id"] = tree.request_id.partition("~")[0]
        told["probabilities"] = [round(p, DIGITS) for p in tree.probabilities]
        tenants.setdefault(told.pop("tenant"), []).append(told)
    for tenant, trees in tenants.items():
        ids = {token for tree in trees for token in (tree["root"], *tree["tokens"], tree["next"])}
        texts = {str(token): token_text(token) for token in sorted(ids)}
        events.publish_extra("trees", tenant, trees=trees, texts=texts, dropped=message.dropped)
