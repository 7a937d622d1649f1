"""The routes: OpenAI's, vLLM's beside them, and what operators ask for.

Everything that a client can do wrong ends as an `ApiError`; the service is asked to work only for
what has passed every check.
"""

import asyncio
import importlib.metadata
import time
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from . import log, protocol
from .answers import Answer, Chat, Completion
from .config import ServerConfig
from .errors import ApiError, bad_request
from .exchange import ClientGone, EventStream, Merged, read_body, while_connected
from .gate import Gate
from .metrics import CONTENT_TYPE, Metrics, Watch
from .request import Draining, EngineStatus, QueueFull
from .translation import Job, Translator

if TYPE_CHECKING:
    from .service import Service

LOADING_SECONDS = 5
"""When to try again while the server is loading or draining."""


class Api:
    """The HTTP side of one server; the service may come later."""

    def __init__(self, config: ServerConfig):
        """Before `attach`, whatever needs the service answers 503."""
        self.config = config
        self.service: Service | None = None
        engines = config.data_parallel_size
        self.metrics = Metrics(config.model_names[0], self._statuses, engines)
        self._translator: Translator | None = None
        self._running = 0
        self._created = int(time.time())

    def attach(self, service: "Service", defaults: Mapping[str, float]) -> None:
        """The service is there (warm or not); `defaults` are the model's sampling defaults."""
        config = self.config
        self._translator = Translator(
            service, defaults=defaults, timeout=config.request_timeout, seed=config.seed
        )
        self.service = service

    def app(self) -> Gate:
        """The ASGI application."""
        get, post = ["GET"], ["POST"]
        routes = [
            Route("/v1/chat/completions", self.chat, methods=post),
            Route("/v1/completions", self.completions, methods=post),
            Route("/v1/models", self.models, methods=get),
            Route("/v1/models/{name:path}", self.model, methods=get),
            Route("/tokenize", self.tokenize, methods=post),
            Route("/detokenize", self.detokenize, methods=post),
            Route("/reset_prefix_cache", self.reset_prefix_cache, methods=post),
            Route("/health", self.health, methods=get),
            Route("/ping", self.health, methods=[*get, *post]),
            Route("/version", self.version, methods=get),
            Route("/load", self.load, methods=get),
            Route("/metrics", self.prometheus, methods=get),
        ]
        handlers: Any = {
            ApiError: lambda request, error: error.response(),
            ClientGone: lambda request, error: Response(status_code=499),
            HTTPException: _no_route,
            Exception: lambda request, error: ApiError(500, "internal server error").response(),
        }
        inner = Starlette(routes=routes, exception_handlers=handlers)
        inner.router.redirect_slashes = False
        return Gate(inner, self.config, self.metrics, {route.path for route in routes})

    # ---- generation ----------------------------------------------------------------------------

    async def chat(self, request: HttpRequest) -> Response:
        """POST /v1/chat/completions."""
        return await self._generate(request, protocol.ChatBody, Chat)

    async def completions(self, request: HttpRequest) -> Response:
        """POST /v1/completions."""
        return await self._generate(request, protocol.CompletionBody, Completion)

    async def _generate(self, request: HttpRequest, kind: Any, form: type[Answer]) -> Response:
        service, translator = self._ready()
        content = await self._body(request)

        def job() -> Job:
            body, ignored = self._read(kind, content)
            return translator.job(body, ignored, request.state.request_id)

        # Beside the event loop: long texts take long to tokenize.
        work = await asyncio.to_thread(job)
        answer = form(work, self.config.model_names[0], service.tokenizer)
        try:
            streams = service.submit(work.requests)
        except QueueFull as error:
            message = "the queue is full: try again later"
            raise ApiError(429, message, code="queue_full", retry_after=error.retry_after) from None
        except Draining:
            raise self._not_ready() from None
        except ValueError as error:
            raise bad_request(str(error)) from None
        deltas = Merged(streams)
        watches = [Watch(self.metrics, stream.engine) for stream in streams]
        chunks = self._chunks(answer, deltas, watches, request.state.facts)
        if work.body.stream:
            return EventStream(self._events(answer, chunks), deltas, self.config.stream_timeout)
        async with deltas:
            await while_connected(request.receive, _exhaust(chunks))
        return JSONResponse(answer.whole())

    async def _chunks(
        self, answer: Answer, deltas: Merged, watches: list[Watch], facts: dict[str, Any]
    ) -> AsyncGenerator[dict[str, Any] | None, None]:
        """Feeds the answer, and the metrics; yields the chunk of each delta."""
        self._running += 1
        try:
            async for index, delta in deltas:
                watches[index].delta(delta)
                yield answer.add(index, delta)
        finally:
            self._running -= 1
            for watch in watches:
                watch.left()
            usage = answer.usage()
            facts["prompt_tokens"] = usage["prompt_tokens"]
            facts["new_tokens"] = usage["completion_tokens"]
            facts["finish"] = ",".join(str(choice.finish_reason) for choice in answer.choices)

    async def _events(
        self, answer: Answer, chunks: AsyncGenerator[dict[str, Any] | None, None]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a stream; one that fails midway says so in its last event."""
        options = answer.job.body.stream_options
        usage = self.config.enable_force_include_usage or bool(options and options.include_usage)
        continuous = bool(options and options.continuous_usage_stats)
        try:
            async for chunk in chunks:
                if chunk is not None:
                    if usage or continuous:
                        chunk["usage"] = answer.usage() if continuous else None
                    yield chunk
            if usage:
                yield answer.usage_chunk()
        except ApiError as error:
            yield error.body()
        except Exception:
            log.logger.exception("a stream failed")
            yield ApiError(500, "internal server error").body()
        finally:
            await chunks.aclose()

    # ---- tokens --------------------------------------------------------------------------------

    async def tokenize(self, request: HttpRequest) -> Response:
        """POST /tokenize."""
        service, translator = self._ready()
        content = await self._body(request)

        def tokens() -> dict[str, Any]:
            body, _ = self._read(protocol.TokenizeBody, content)
            ids = translator.prompts.tokens(body)
            texts = [service.tokenizer.decode([i]) for i in ids] if body.return_token_strs else None
            count, limit = len(ids), service.max_model_len
            return {"count": count, "max_model_len": limit, "tokens": ids, "token_strs": texts}

        return JSONResponse(await asyncio.to_thread(tokens))

    async def detokenize(self, request: HttpRequest) -> Response:
        """POST /detokenize."""
        _, translator = self._ready()
        content = await self._body(request)

        def text() -> dict[str, Any]:
            body, _ = self._read(protocol.DetokenizeBody, content)
            return {"prompt": translator.prompts.text(body)}

        return JSONResponse(await asyncio.to_thread(text))

    # ---- the server ----------------------------------------------------------------------------

    async def models(self, request: HttpRequest) -> Response:
        """GET /v1/models."""
        data = [self._card(name) for name in self.config.model_names]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: HttpRequest) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["name"]
        self._check_model(name)
        return JSONResponse(self._card(name))

    async def health(self, request: HttpRequest) -> Response:
        """GET /health, /ping: 200 when requests are taken."""
        self._ready()
        return Response()

    async def version(self, request: HttpRequest) -> Response:
        """GET /version."""
        return JSONResponse({"version": importlib.metadata.version("jax-eagle")})

    async def load(self, request: HttpRequest) -> Response:
        """GET /load: requests being answered."""
        return JSONResponse({"server_load": self._running})

    async def prometheus(self, request: HttpRequest) -> Response:
        """GET /metrics."""
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def reset_prefix_cache(self, request: HttpRequest) -> Response:
        """POST /reset_prefix_cache."""
        service, _ = self._ready()
        service.forget_prefixes()
        return Response()

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "jax-eagle",
            "root": self.config.model,
            "parent": None,
            "max_model_len": self.service.max_model_len if self.service else None,
        }

    def _statuses(self) -> list[EngineStatus]:
        return self.service.statuses() if self.service else []

    def _ready(self) -> "tuple[Service, Translator]":
        if self.service is None or self._translator is None or not self.service.ready:
            raise self._not_ready()
        return self.service, self._translator

    def _not_ready(self) -> ApiError:
        message = "the server is loading its model, or shutting down: try again later"
        return ApiError(503, message, code="not_ready", retry_after=LOADING_SECONDS)

    async def _body(self, request: HttpRequest) -> bytes:
        limit, seconds = self.config.max_request_body_size, self.config.stream_timeout
        return await read_body(request, limit, seconds)

    def _read(self, kind: Any, content: bytes) -> tuple[Any, list[str]]:
        ignore = self.config.ignore_unknown_fields
        body, ignored = protocol.read(kind, content, ignore_unknown=ignore)
        if body.model is not None:
            self._check_model(body.model)
        return body, ignored

    def _check_model(self, name: str) -> None:
        known = self.config.model_names
        if name not in known:
            message = f"model {name[:200]!r} is not served here, expected {' or '.join(known)}"
            raise ApiError(404, message, param="model", code="model_not_found")


async def _exhaust(chunks: AsyncGenerator[Any, None]) -> None:
    try:
        async for _ in chunks:
            pass
    finally:
        await chunks.aclose()


async def _no_route(request: HttpRequest, error: Exception) -> Response:
    """404 and 405 of the router."""
    status = getattr(error, "status_code", 404)
    known = "see GET /v1/models, POST /v1/chat/completions, POST /v1/completions"
    message = f"{request.method} {request.url.path[:200]}: no such route; {known}"
    response = ApiError(status if status in (404, 405) else 400, message).response()
    response.headers.update(getattr(error, "headers", None) or {})
    return response
