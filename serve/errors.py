"""Errors as OpenAI's clients know them: {"error": {"message", "type", "param", "code"}}.

Every refusal names what was given, what was expected and what to do; nothing of the program's
inside (a stack trace, a path) is ever in one.
"""

import json
from typing import Any

from starlette.responses import Response

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
"""Error types by status."""


class ApiError(Exception):
    """A refusal with its HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ):
        """`param` names the field at fault; `retry_after` is in seconds."""
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The error object."""
        return {
            "error": {
                "message": str(self),
                "type": KINDS[self.status],
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """The whole answer; ASCII, since a message may quote what is no valid text."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, round(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        content = json.dumps(self.body())
        return Response(content, self.status, headers, media_type="application/json")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the field `param` cannot be used as given."""
    return ApiError(400, message, param=param, code=code)
