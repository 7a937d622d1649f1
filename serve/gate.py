"""What every HTTP request passes: its id, the key, the log line, the last catch of errors."""

import hmac
import re
import secrets
import time
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import log
from .config import ServerConfig
from .errors import ApiError
from .metrics import Metrics

GUARDED = ("/v1", "/tokenize", "/detokenize", "/reset_prefix_cache")
"""Paths that need a key, if there is one; probes and scrapers have none."""
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE")
ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class Gate:
    """ASGI middleware around all routes."""

    def __init__(
        self, app: ASGIApp, config: ServerConfig, metrics: Metrics, paths: Collection[str]
    ):
        """`app` holds the routes; `paths` have metrics of their own."""
        self._app, self._config, self._metrics, self._paths = app, config, metrics, paths
        self._keys = [key.encode() for key in config.api_key]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one HTTP request."""
        headers, begin = Headers(scope=scope), time.perf_counter()
        given = headers.get("x-request-id", "")
        name = given if ID.fullmatch(given) else secrets.token_hex(16)
        facts: dict[str, Any] = {}
        scope["state"] = {**scope.get("state", {}), "request_id": name, "facts": facts}
        token = log.request_id.set(name)
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._config.enable_request_id_headers:
                    MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        try:
            if self._is_allowed(scope["path"], headers):
                await self._app(scope, receive, answer)
            else:
                message = "the API key is missing or wrong: send Authorization: Bearer KEY"
                error = ApiError(401, message, code="invalid_api_key")
                await error.response()(scope, receive, answer)
        except Exception:  # the client has its 500 already
            log.logger.exception("a request failed")
        finally:
            self._note(scope, status, time.perf_counter() - begin, facts)
            log.request_id.reset(token)

    def _is_allowed(self, path: str, headers: Headers) -> bool:
        guarded = any(path == root or path.startswith(root + "/") for root in GUARDED)
        if not self._keys or not guarded:
            return True
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode()
        # All keys are compared, so that the time tells nothing about which of them came close.
        same = [hmac.compare_digest(given, known) for known in self._keys]
        return kind.lower() == "bearer" and any(same)

    def _note(self, scope: Scope, status: int, seconds: float, facts: dict[str, Any]) -> None:
        method = scope["method"] if scope["method"] in METHODS else "other"
        path = scope["path"]
        self._metrics.answered(method, path if path in self._paths else "other", status)
        if path not in self._config.disable_access_log_for_endpoints:
            client = scope.get("client")
            log.event(
                f"{method} {path[:200]}",
                status=status,
                seconds=round(seconds, 4),
                client=client[0] if client else None,
                **facts,
            )
