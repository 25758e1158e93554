"""Spans of requests for OpenTelemetry, sent by OTLP over HTTP; wants ``pip install 'tenon[otel]'``.

One span for each prompt that the engine was given, from its arrival to its end, below the span that the client's
``traceparent`` names, with the attributes of OpenTelemetry's conventions for generative AI. They tell lengths and
times, never a prompt or an output. A thread sends them; a collector that is slow or gone costs spans and
holds nobody up. What the environment says (``OTEL_SERVICE_NAME``, ``OTEL_TRACES_SAMPLER``,
``OTEL_EXPORTER_OTLP_HEADERS``, ...) holds.
"""

from __future__ import annotations

import os
from threading import Thread
from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tenon import __version__
from tenon.base.clock import Clock
from tenon.server.flights import Flight

LAST_WORDS_S: Final = 2.0
_OPERATIONS: Final = {"/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}
_FAILED: Final = frozenset({"error", "rejected"})


class Tracer:
    """Hears of each request that ends (``Service.on_end``). ``endpoint`` is the collector's URL for traces."""

    def __init__(self, endpoint: str, model: str, clock: Clock) -> None:
        self._model, self._clock = model, clock
        name = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "tenon"}
        self._provider = TracerProvider(resource=Resource.create(name), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("tenon", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, flight: Flight, reason: str, now_s: float) -> None:
        add = flight.add
        operation = _OPERATIONS.get(flight.trace.path, "chat")
        shift_s = self._clock.wall_s() - self._clock.now_s()

        def at(moment_s: float) -> int:
            return int((moment_s + shift_s) * 1e9)

        span = self._tracer.start_span(
            f"{operation} {self._model}", context=self._propagator.extract(flight.trace.parent), kind=SpanKind.SERVER,
            start_time=at(add.arrival_s),
            attributes={
                "gen_ai.operation.name": operation, "gen_ai.provider.name": "tenon",
                "gen_ai.request.model": self._model, "gen_ai.response.model": self._model,
                "gen_ai.response.id": add.request_id, "gen_ai.request.max_tokens": add.max_tokens,
                "gen_ai.request.choice.count": add.n, "gen_ai.request.temperature": add.temperature,
                "gen_ai.request.top_p": add.top_p, "gen_ai.usage.input_tokens": len(add.prompt),
                "gen_ai.usage.cache_read.input_tokens": flight.cached_tokens,
                "gen_ai.usage.output_tokens": flight.n_output,
                "gen_ai.response.finish_reasons": sorted(flight.reasons) or [reason],
                "tenon.engines_lost": flight.n_deaths,
            },
        )  # fmt: skip
        if flight.first_s is not None:
            span.add_event("first token", {"tenon.ttft_s": flight.first_s - add.arrival_s}, at(flight.first_s))
        if reason in _FAILED:
            span.set_status(Status(StatusCode.ERROR, reason))
        span.end(at(now_s))

    def close(self) -> None:
        """Send what is left, if it can be sent soon."""
        closing = Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        closing.start()
        closing.join(LAST_WORDS_S)
