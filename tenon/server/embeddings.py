"""``/v1/embeddings``: one vector for each text, of any decoder that is served."""

from __future__ import annotations

import array
import base64
import sys
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from tenon.base.errors import ContextTooLong, RequestError
from tenon.engine.embed import wanted
from tenon.engine.messages import Add
from tenon.server.flights import Job, Origin
from tenon.server.limits import Limits
from tenon.server.model_text import ModelText
from tenon.server.protocol import check_prompts, convert, json_object, prompts_of
from tenon.server.service import Service
from tenon.server.tokens import ids_of


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``input``: a text, several texts, token ids, or several lists of token ids."""

    model: str
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None


def parse_embeddings(body: bytes, limits: Limits) -> EmbeddingRequest:
    """Raises ``RequestError`` naming the field."""
    raw = json_object(body)
    check_prompts(raw, "input", limits)
    return convert(raw, EmbeddingRequest)


@dataclass(frozen=True)
class Embeddings:
    """Texts that the engine has got."""

    job: Job
    model: str
    base64: bool

    async def whole(self) -> dict[str, Any]:
        """The answer, once every vector is there. Raises what the request failed with."""
        while await self.job.batch():
            continue
        flights = self.job.flights
        n = sum(len(flight.add.prompt) for flight in flights)
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": self._told(flight.vector)}
                for i, flight in enumerate(flights)
            ],
            "model": self.model,
            "usage": {"prompt_tokens": n, "total_tokens": n},
        }

    def _told(self, vector: bytes) -> str | list[float]:
        return base64.b64encode(vector).decode() if self.base64 else floats(vector)


def floats(vector: bytes) -> list[float]:
    """Of an ``Embedded``."""
    found = array.array("f", vector)
    if sys.byteorder == "big":
        found.byteswap()
    return found.tolist()


async def embed(service: Service, text: ModelText, request: EmbeddingRequest, origin: Origin) -> Embeddings:
    """The request with the engine, not yet answered. Raises ``RequestError``."""
    asked = wanted(text.embedding, request.dimensions)
    ready = service.require_ready()
    prompts = prompts_of(request.input, "input")
    adds = []
    for i, given in enumerate(prompts):
        try:
            most = ready.max_model_len
            ids = await ids_of(text, given, special=True, most=most) if isinstance(given, str) else given
            _check(ids, i, ready.vocab_size, most)
        except ContextTooLong as error:
            error.param = "input"  # it names chat's field otherwise
            raise
        adds.append(
            Add(
                f"{origin.request_id}/{i}", tuple(ids), 0, 0, tenant=origin.caller.tenant, arrival_s=origin.arrival_s,
                embed=asked,
            )
        )  # fmt: skip
    _check_work(adds, service.limits)
    job = service.submit(adds, origin.caller, origin.trace)
    return Embeddings(job, service.model, request.encoding_format == "base64")


def _check(ids: list[int], i: int, vocab_size: int, max_model_len: int) -> None:
    """Raises ``RequestError`` for ids or lengths that no model state fits."""
    if not ids:
        raise RequestError(
            f"input {i} has no tokens; it must have at least one", param="input", code="invalid_value"
        )  # fmt: skip
    bad = next((token for token in ids if not 0 <= token < vocab_size), None)
    if bad is not None:
        said = f"input {i}: token id {bad} is outside the vocabulary of {vocab_size}"
        raise RequestError(said, param="input", code="invalid_value")
    if len(ids) > max_model_len:
        raise ContextTooLong(len(ids), 0, max_model_len)


def _check_work(adds: list[Add], limits: Limits) -> None:
    if len(adds) > limits.max_sequences:
        said = f"input has {len(adds)} entries; the limit is {limits.max_sequences}"
        raise RequestError(said, param="input", code="too_much_work")
    n = sum(len(add.prompt) for add in adds)
    if n > limits.max_work:
        said = f"input has {n} tokens; the limit is {limits.max_work}"
        raise RequestError(said, param="input", code="too_much_work")
