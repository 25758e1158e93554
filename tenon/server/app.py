"""The routes. Each is thin: read, check, hand on; every failure leaves through one handler in OpenAI's error shape."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tenon.base.clock import Clock
from tenon.base.errors import TenonError
from tenon.engine.params import SamplingParams
from tenon.server import anthropic, embeddings, estimate, responses_api, tokens
from tenon.server.admission import BodyRefused
from tenon.server.batches import Batches
from tenon.server.completions import Answer, Completions, draw_seed
from tenon.server.events import EXTRAS
from tenon.server.failures import Refusal, body_of, headers_of, status_of
from tenon.server.flights import Job, Origin, Trace
from tenon.server.keys import Caller, KeyRing
from tenon.server.limits import BodyTooLarge, Limits, error_body
from tenon.server.logs import log_answer
from tenon.server.metrics import CONTENT_TYPE
from tenon.server.protocol import ChatRequest, CompletionRequest, parse_chat, parse_completion
from tenon.server.responses import ChatFace, Head
from tenon.server.service import Service
from tenon.server.slo import heard
from tenon.server.storage_api import Json, StorageRoutes

PAGE: Final = Path(__file__).parent / "page"
SCRIPTS: Final = (
    "page.js",
    "dom.js",
    "settings.js",
    "answer.js",
    "tokens.js",
    "live.js",
    "ledger.js",
    "map.js",
    "trees.js",
)
PAGE_FILES: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    **{f"/{name}": (name, "text/javascript; charset=utf-8") for name in SCRIPTS},
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
PAGE_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
OPEN_PATHS: Final = frozenset({"/livez", "/readyz", "/health", *PAGE_FILES})
"""What needs no key: probes, and the page's files, which say nothing of anybody."""
LINGER_S: Final = 1.0
LOOPBACK_HOSTS: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_CHALLENGE: Final = {"www-authenticate": "Bearer"}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")


class Streamed(Response):
    """Server-sent events as they come. ``on_leave`` is called at once when the client goes."""

    def __init__(self, frames: AsyncIterator[bytes], on_leave: Callable[[], None]) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self._frames = frames
        self._on_leave = on_leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with _watching(receive, self._on_leave):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for frame in self._frames:
                if frame:
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _cancel(work: asyncio.Future[Response]) -> None:
    work.cancel()


@contextlib.asynccontextmanager
async def _watching(receive: Receive, on_leave: Callable[[], None]) -> AsyncIterator[None]:
    """While inside, a client that leaves is noticed at once; leaving by any error counts as that too."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        on_leave()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except BaseException:
        on_leave()
        raise
    finally:
        watcher.cancel()


class Whole(Protocol):
    """A request that the engine has got, in one API's words."""

    @property
    def job(self) -> Job: ...

    async def whole(self) -> Any: ...


class Told(Whole, Protocol):
    """One that may be told in pieces."""

    def stream(self) -> AsyncIterator[bytes]: ...


class Routes:
    """The handlers over one service."""

    def __init__(self, service: Service, completions: Completions) -> None:
        self._service = service
        self._completions = completions

    @property
    def _limits(self) -> Limits:
        """As they are now: a reload changes them."""
        return self._service.limits

    async def completions(self, request: Request) -> Response:
        origin = self._origin(request)
        body = parse_completion(await self._body(request), self._limits)
        return await self._answer(request, body.stream, self._completions.complete(body, origin))

    async def chat(self, request: Request) -> Response:
        origin = self._origin(request)
        body = parse_chat(await self._body(request), self._limits)
        return await self._answer(request, body.stream, self._completions.chat(body, origin))

    async def messages(self, request: Request) -> Response:
        origin = self._origin(request)
        body = anthropic.parse_messages(await self._body(request), self._limits)
        return await self._answer(request, body.stream, self._message(body, origin))

    async def _message(self, body: anthropic.MessagesRequest, origin: Origin) -> anthropic.MessageAnswer:
        return anthropic.MessageAnswer(*(await self._conversed(body, "msg", origin))[:2])

    async def _conversed(
        self, body: anthropic.MessagesRequest | responses_api.ResponsesRequest, kind: str, origin: Origin
    ) -> tuple[Answer, Head, SamplingParams]:
        """A conversation of another API than chat, up to the engine's acceptance."""
        completions = self._completions
        text, head = completions.require_model(body.model), completions.head(kind, origin)
        params = body.params(text.generation.sampling(), draw_seed())
        face = ChatFace(head, text, logprobs=False)
        said, promise = body.said(text.dialect), completions.promised(body, origin)
        return await completions.converse(said, params, text, face, None, origin, promise), head, params

    async def responses(self, request: Request) -> Response:
        origin = self._origin(request)
        body = responses_api.parse_responses(await self._body(request), self._limits)
        return await self._answer(request, body.stream, self._response(body, origin))

    async def _response(self, body: responses_api.ResponsesRequest, origin: Origin) -> responses_api.ResponseAnswer:
        answer, head, params = await self._conversed(body, "resp", origin)
        return responses_api.ResponseAnswer(answer, head, body, params)

    async def estimate(self, request: Request) -> Response:
        origin = self._origin(request)
        body = estimate.parse_estimate(await self._body(request), self._limits)
        return await self._attended(request, self._estimated(body, origin))

    async def _estimated(self, body: ChatRequest | CompletionRequest, origin: Origin) -> Response:
        return Json(await self._completions.estimate(body, origin))

    async def embed(self, request: Request) -> Response:
        origin = self._origin(request)
        body = embeddings.parse_embeddings(await self._body(request), self._limits)
        return await self._attended(request, self._embedded(body, origin))

    async def _embedded(self, body: embeddings.EmbeddingRequest, origin: Origin) -> Response:
        text = self._completions.require_model(body.model)
        return await self._whole(await embeddings.embed(self._service, text, body, origin))

    async def count_tokens(self, request: Request) -> Response:
        _caller(request).take_request()
        body = anthropic.parse_count(await self._body(request), self._limits)
        text = self._completions.tokenizer(body.model)
        said = body.said(text.dialect)
        tools = said.calling.to_template() if said.calling is not None else None
        rendered = await text.render(said.messages, tools=tools, variables=said.variables)
        ids = await tokens.ids_of(text, rendered, special=False)
        return Json({"input_tokens": len(ids)})

    def _origin(self, request: Request) -> Origin:
        """Counts the request against its caller's quota. Raises ``Refusal``."""
        caller = _caller(request)
        caller.take_request()
        parent = {name: request.headers[name] for name in ("traceparent", "tracestate") if name in request.headers}
        trace = Trace(request.scope["path"], parent)
        return Origin(_request_id(request), self._service.clock.now_s(), caller, trace, heard(request.headers))

    async def _body(self, request: Request) -> bytes:
        return await self._service.admission.read(request)

    async def _answer(self, request: Request, streamed: bool | None, accepting: Awaitable[Told]) -> Response:
        """The answer in the form asked for."""
        return await self._attended(request, self._finish(streamed, accepting))

    async def _attended(self, request: Request, answering: Coroutine[Any, Any, Response]) -> Response:
        """What comes of it. A client that leaves while it waits is noticed in every phase."""
        work = asyncio.ensure_future(answering)
        async with _watching(request.receive, partial(_cancel, work)):
            await asyncio.wait({work})
        return Response(status_code=499) if work.cancelled() else work.result()  # 499: nobody is there to read it

    async def _finish(self, streamed: bool | None, accepting: Awaitable[Told]) -> Response:
        answer = await accepting
        if streamed:
            return Streamed(answer.stream(), answer.job.abort)
        return await self._whole(answer)

    async def _whole(self, answer: Whole) -> Response:
        try:
            return Json(await answer.whole())
        except asyncio.CancelledError:
            answer.job.abort()
            raise

    async def tokenize(self, request: Request) -> Response:
        _caller(request).take_request()
        body = tokens.parse_tokenize(await self._body(request), self._limits)
        text, ready = self._completions.tokenizer(body.model), self._service.ready
        return Json(await tokens.tokenize(text, body, ready.max_model_len if ready is not None else None))

    async def detokenize(self, request: Request) -> Response:
        _caller(request).take_request()
        body = tokens.parse_detokenize(await self._body(request))
        return Json(await tokens.detokenize(self._completions.tokenizer(body.model), body))

    async def tokenizer_info(self, request: Request) -> Response:
        return Json(tokens.tokenizer_info(self._completions.tokenizer(None)))

    async def models(self, request: Request) -> Response:
        return Json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._service.require_model(request.path_params["name"])
        return Json(self._model())

    def _model(self) -> dict[str, Any]:
        ready = self._service.ready
        return {
            "id": self._service.model,
            "object": "model",
            "created": self._service.created,
            "owned_by": "tenon",
            "max_model_len": ready.max_model_len if ready is not None else None,
            "vocab_size": ready.vocab_size if ready is not None else None,
        }

    async def livez(self, request: Request) -> Response:
        return Json({"status": "alive"})

    async def readyz(self, request: Request) -> Response:
        reason, phase = self._service.unready_because(), self._service.phase
        if reason is None:
            return Json({"status": "ready"})
        state = {"status": str(self._service.state), "reason": reason}
        return Json(
            state | {"phase": {"name": phase.name, "fraction": phase.fraction, "detail": phase.detail}}, status_code=503
        )

    async def metrics(self, request: Request) -> Response:
        _caller(request).require_watch()
        return Response(self._service.exposition(), headers={"content-type": CONTENT_TYPE})

    async def events(self, request: Request) -> Response:
        caller, hub = _caller(request), self._service.events
        caller.require_watch()
        subscription = hub.subscribe(_extras(request), caller.tenant)

        async def frames() -> AsyncIterator[bytes]:
            try:
                async for frame in subscription.frames():
                    yield frame
            finally:
                hub.unsubscribe(subscription)

        return Streamed(frames(), subscription.close)

    async def page(self, request: Request) -> Response:
        name, media_type = PAGE_FILES[request.url.path]
        content = await asyncio.to_thread((PAGE / name).read_bytes)
        return Response(content, headers=PAGE_HEADERS | {"content-type": media_type})

    async def failed(self, request: Request, error: Exception) -> Response:
        """Every failure's answer. A body that is still coming is read a little longer, so that the client, busy
        sending, gets to see why it was refused."""
        path: str = request.scope["path"]
        if isinstance(error, HTTPException):
            said = {404: f"there is nothing at {path}", 405: f"{request.method} is not allowed here"}
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
            content: Any = error_body(said.get(error.status_code, error.detail), code=code)
            status, headers = error.status_code, dict(error.headers or {})
        elif isinstance(error, TenonError):
            content, status, headers = _told(path, error), status_of(error), headers_of(error)
        else:
            content = error_body("the server failed on this request", kind="server_error", code="internal_error")
            status, headers = 500, {}
        self._service.metrics.refused.add(1, str(status))
        if isinstance(error, BodyTooLarge | BodyRefused):
            return _Lingering(content, status_code=status, headers=headers | {"connection": "close"})
        return Json(content, status_code=status, headers=headers)


class _Lingering(Json):
    """Sends the whole answer, then reads and drops what still comes for a moment: closing a socket with unread data
    would reset it, and the client might lose the answer."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                    continue
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Doorman:
    """Before any route: gives each request its id, finds out whose it is, and keeps other web sites out.

    Where there are keys, whatever is not in ``OPEN_PATHS`` wants one, be it a route or not.

    A page that the user happens to visit must not reach a loopback server through the browser: an ``Origin`` must be
    the server's own, and, bound to loopback, ``Host`` must name loopback (against DNS rebinding).
    """

    def __init__(self, app: ASGIApp, *, loopback_only: bool, keys: KeyRing | None, clock: Clock) -> None:
        self._app, self._clock = app, clock
        self._loopback_only = loopback_only
        self._anybody, self._keys = Caller(None, clock), keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        scope["request_id"] = request_id
        scope["caller"] = self._anybody
        status, began_s = 0, self._clock.now_s()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._answer(scope, headers, receive, send_with_id)
        finally:
            key, duration_s = scope["caller"].key, self._clock.now_s() - began_s
            log_answer(scope["method"], scope["path"], status, duration_s, request_id, key.name if key else None)

    async def _answer(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        refusal = self._refusal(headers)
        if refusal is None and self._keys is not None and scope["path"] not in OPEN_PATHS:
            try:
                scope["caller"] = self._keys.caller(headers)
            except Refusal as error:
                refusal = error
        if refusal is None:
            await self._app(scope, receive, send)
            return
        status = status_of(refusal)
        answer = Json(_told(scope["path"], refusal), status_code=status, headers=_CHALLENGE if status == 401 else {})
        await answer(scope, receive, send)

    def _refusal(self, headers: Headers) -> Refusal | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._loopback_only and _host_name(host) not in LOOPBACK_HOSTS:
            return Refusal(f"this server answers on loopback only, not as {host!r}", status=403, code="wrong_host")
        if origin is not None and origin.partition("://")[2] != host:
            return Refusal(f"requests from pages of {origin!r} are not taken", status=403, code="wrong_origin")
        return None


def _host_name(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _request_id(request: Request) -> str:
    """The client's id, made unique: a client may repeat itself, the engine's ids may not."""
    return f"{request.scope['request_id']}-{secrets.token_hex(4)}"


def _told(path: str, error: TenonError) -> Any:
    """A failure in the shape of the API that was asked."""
    return anthropic.error_json(error) if path.startswith(anthropic.PATH) else body_of(error)


def _caller(request: Request) -> Caller:
    caller: Caller = request.scope["caller"]
    return caller


def _extras(request: Request) -> frozenset[str]:
    """What a reader of events asks for besides the usual. Raises ``Refusal`` for what there is not."""
    for name, value in request.query_params.multi_items():
        if name not in EXTRAS or value not in ("0", "1"):
            known = ", ".join(sorted(EXTRAS))
            raise Refusal(
                f"events can be asked for {known}, each 0 or 1; not for {name}={value}", status=400, param=name
            )
    return frozenset(name for name, value in request.query_params.items() if value == "1")


def build_app(
    service: Service,
    completions: Completions,
    *,
    loopback_only: bool,
    keys: KeyRing | None = None,
    batches: Batches | None = None,
    no_store: str = "it has no folder for them",
) -> Starlette:
    """The ASGI application. ``keys``: who may use it; anybody without. ``batches``: what is stored, and why not."""
    routes = Routes(service, completions)
    get, post = ["GET"], ["POST"]
    handlers = {HTTPException: routes.failed, TenonError: routes.failed, Exception: routes.failed}
    batched = [
        Route("/v1/completions", routes.completions, methods=post),
        Route("/v1/chat/completions", routes.chat, methods=post),
        Route(responses_api.PATH, routes.responses, methods=post),
        Route("/v1/embeddings", routes.embed, methods=post),
    ]
    if batches is not None:
        batches.attach(Starlette(routes=batched, exception_handlers=handlers))
    return Starlette(
        routes=[
            Route("/v1/models", routes.models, methods=get),
            Route("/v1/models/{name:path}", routes.model, methods=get),
            *batched,
            *StorageRoutes(batches, service.admission, no_store).routes(),
            Route(anthropic.PATH, routes.messages, methods=post),
            Route(anthropic.COUNT_PATH, routes.count_tokens, methods=post),
            Route(estimate.PATH, routes.estimate, methods=post),
            Route("/tokenize", routes.tokenize, methods=post),
            Route("/detokenize", routes.detokenize, methods=post),
            Route("/tokenizer_info", routes.tokenizer_info, methods=get),
            Route("/livez", routes.livez, methods=get),
            Route("/health", routes.livez, methods=get),
            Route("/readyz", routes.readyz, methods=get),
            Route("/metrics", routes.metrics, methods=get),
            Route("/events", routes.events, methods=get),
            *(Route(path, routes.page, methods=get) for path in PAGE_FILES),
        ],
        middleware=[Middleware(Doorman, loopback_only=loopback_only, keys=keys, clock=service.clock)],
        exception_handlers=handlers,
    )
