"""A server is ready when it can answer: engine and tokenizer, whichever comes first."""

from __future__ import annotations

import pytest

from tenon.base.clock import SYSTEM
from tenon.engine import messages as m
from tenon.server.events import EventHub
from tenon.server.limits import Limits
from tenon.server.service import Refusal, Service

READY = m.Ready("tiny", 4096, 256, (), 100, 16, 1 << 20, {})


def loading() -> Service:
    limits = Limits()
    service = Service(model="tiny", limits=limits, clock=SYSTEM, events=EventHub(SYSTEM, bound=limits.queued_events))
    assert service.unready_because() is not None
    return service


def test_an_engine_without_a_tokenizer_is_not_ready() -> None:
    service = loading()
    service.receive(READY)
    assert service.unready_because() == "loading: tokenizer"
    assert not service.settled.is_set()
    with pytest.raises(Refusal, match="loading: tokenizer") as refused:
        service.require_ready()
    assert refused.value.status == 503
    service.text_loaded()
    assert service.unready_because() is None
    assert service.settled.is_set()
    assert service.require_ready() == READY


def test_a_tokenizer_without_an_engine_is_not_ready() -> None:
    service = loading()
    service.text_loaded()
    assert service.unready_because() is not None
    assert not service.settled.is_set()
    service.receive(READY)
    assert service.unready_because() is None


def test_what_drains_before_it_is_ready_stays_so() -> None:
    service = loading()
    service.drain()
    service.receive(READY)
    service.text_loaded()
    assert service.settled.is_set()
    assert service.unready_because() == "shutting down"
