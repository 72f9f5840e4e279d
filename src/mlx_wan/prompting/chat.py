"""A language model behind an OpenAI-compatible HTTP server, through the standard library."""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_wan.errors import UserError, WanError

TIMEOUT = 60.0  # seconds for one answer
WAITS = (1.0, 3.0)  # seconds before the second and the third try
LARGEST_ANSWER = 2**20  # bytes
_TRY_AGAIN = (408, 409, 429)  # and everything from 500


@dataclass(frozen=True)
class Service:
    """Where a kind of server is, and which environment variables say so.

    Attributes:
        keys: variables that may hold the key, the first that is set counts.
        base: variable that holds the address, and the address without it.
        model, picture_model: names to ask for by default; None if there is no telling.
    """

    keys: tuple[str, ...]
    base: tuple[str, str]
    model: str | None = None
    picture_model: str | None = None


SERVICES = {
    # The official code's variables. Its address ends in /api/v1; the OpenAI-compatible one of the same host is beside.
    "dashscope": Service(
        ("DASH_API_KEY", "DASHSCOPE_API_KEY"),
        ("DASH_API_URL", "https://dashscope.aliyuncs.com/compatible-mode/v1"),
        "qwen-plus",
        "qwen-vl-max",
    ),
    "openai": Service(("OPENAI_API_KEY",), ("OPENAI_BASE_URL", "https://api.openai.com/v1")),
}


@dataclass(frozen=True)
class Server:
    """An address and a key, which appears in no message and no repr."""

    url: str
    key: str | None
    model: str

    def __repr__(self) -> str:
        return f"Server({self.url!r}, model={self.model!r})"


def server(method: str, model: str | None, with_picture: bool, environ: Mapping[str, str] | None = None) -> Server:
    """The server that the environment speaks of. Raises UserError if the key, address or model's name is missing."""
    environ = os.environ if environ is None else environ
    service = SERVICES[method]
    variable, usual = service.base
    url = (environ.get(variable) or usual).rstrip("/")
    if method == "dashscope" and url.endswith("/api/v1"):
        url = url.removesuffix("/api/v1") + "/compatible-mode/v1"
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{variable} is {url}; it must start with http:// or https://")
    key = next((environ[name] for name in service.keys if environ.get(name)), None)
    if key is None and url == usual:
        raise UserError(
            f"--prompt_extend_method {method}: put your key into the environment variable {service.keys[0]}"
        )
    if key is not None and not (key.isascii() and key.isprintable()):
        raise UserError(f"{service.keys[0]}: holds characters that no key has; set it again")
    model = model or (service.picture_model if with_picture else service.model)
    if model is None:
        raise UserError(f"--prompt_extend_method {method}: say which model with --prompt_extend_model")
    return Server(url, key, model)


def ask(where: Server, messages: list[dict[str, Any]], timeout: float = TIMEOUT) -> str:
    """The server's answer to a conversation. Tries three times where trying again may help.

    Raises WanError, which never holds the key, if no answer can be had.
    """
    headers = {"Content-Type": "application/json", "User-Agent": "mlx-wan"}
    if where.key is not None:
        headers["Authorization"] = f"Bearer {where.key}"
    body = json.dumps({"model": where.model, "messages": messages}).encode()
    request = urllib.request.Request(f"{where.url}/chat/completions", body, headers)
    problem = ""
    for wait in (0.0, *WAITS):
        time.sleep(wait)
        try:
            with _OPENER.open(request, timeout=timeout) as answer:
                return _content(_read(answer, time.monotonic() + timeout))
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code} {error.reason}{_details(error)}"
            if error.code not in _TRY_AGAIN and error.code < 500:
                break
        except (OSError, http.client.HTTPException) as error:  # no connection, or cut off, or too slow
            problem = str(getattr(error, "reason", None) or error or type(error).__name__)
    words = problem if where.key is None else problem.replace(where.key, "***")
    raise WanError(f"{where.url}: {words}")


def _read(answer: Any, until: float) -> bytes:
    """All of it, or one byte more than may be; TimeoutError at a server that never stops sending a little."""
    data = b""
    while len(data) <= LARGEST_ANSWER and (more := answer.read1(LARGEST_ANSWER)):
        data += more
        if time.monotonic() > until:
            raise TimeoutError("timed out")
    if answer.length and len(data) <= LARGEST_ANSWER:
        raise http.client.IncompleteRead(data, answer.length)
    return data


def _content(data: bytes) -> str:
    if len(data) > LARGEST_ANSWER:
        raise WanError("the server's answer is too long")
    try:
        content = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise WanError("the server's answer is not that of a chat completion") from None
    if not isinstance(content, str):
        raise WanError("the server's answer has no text")
    return content


def _details(error: urllib.error.HTTPError) -> str:
    """What the server says is wrong, shortened."""
    try:
        details = json.loads(error.read(LARGEST_ANSWER))["error"]["message"]
    except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException):
        return ""
    return f": {' '.join(str(details).split())[:200]}"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would send the key along to wherever a redirect leads."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)
