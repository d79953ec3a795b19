"""A client of any server with OpenAI's protocol, with nothing but Python's own library."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any, final

from moiety.errors import ServerError, UsageError
from moiety.fields import check_types, option, positive, require
from moiety.infer.options import SamplingOptions
from moiety.serve.options import KEY, is_loopback

__all__ = ["Client", "RemoteConversation", "RemoteOptions", "reach", "text_of"]

LONGEST_LINE = 4 * 2**20
LONGEST_REFUSAL = 64 * 1024
HINTS = {
    "401": f"give the server's key as {KEY} or --api-key",
    "403": f"give the server's key as {KEY} or --api-key",
    "404": "is it a server with OpenAI's routes, and is --model one of its names?",
}
ALWAYS = ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty")  # OpenAI knows no others


@dataclass(frozen=True, kw_only=True)
class RemoteOptions:
    """Which server is asked."""

    url: str = option("", help="ask a server, http://127.0.0.1:8000 for instance, instead of a model here")
    model: str = option("", help="the model's name at --url; empty is the first that the server has")
    api_key: str = option("", help=f"the server's key; better given as {KEY}, which nobody else can see")
    timeout_s: float = option(120.0, help="seconds without a word from --url after which it counts as gone")

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "timeout_s")
        require(bool(self.url) or not (self.model or self.api_key), "model and api_key are for a server: url")


@final
class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it could take the key to another host."""

    def redirect_request(self, *given: Any) -> None:
        """Nothing: the redirect becomes an error."""


@final
class Client:
    """A server.

    Args:
        options: Which.
        key: What it wants to see; empty sends none.

    Raises:
        UsageError: an address or a key that cannot be one.
    """

    def __init__(self, options: RemoteOptions, key: str = "") -> None:
        parts = _parts(options.url)
        if not (key.isascii() and key.isprintable()):
            raise UsageError(
                "the key has characters that no key has", hint="was it copied with its line end?"
            )
        path = parts.path.rstrip("/")
        self.url = f"{parts.scheme}://{parts.netloc}{path}" + ("" if path.endswith("/v1") else "/v1")
        self._headers = {"content-type": "application/json", "user-agent": "moiety"}
        if key:
            self._headers["authorization"] = f"Bearer {key}"
        direct = [urllib.request.ProxyHandler({})] if is_loopback(parts.hostname or "") else []
        self._opener, self._timeout_s = urllib.request.build_opener(_Stay, *direct), options.timeout_s

    def models(self) -> list[str]:
        """Names of the models that it has.

        Raises:
            ServerError: it cannot be reached, refuses, or answers something else.
        """
        with self._open("/models", None) as response:
            try:
                named = _object(response.read(LONGEST_LINE)).get("data")
            except (OSError, HTTPException) as error:
                raise self._broken(error) from error
        if not isinstance(named, list) or not named or not all(isinstance(one, dict) for one in named):
            raise ServerError(f"{self.url} names no model", kind="broken", hint=HINTS["404"])
        return [str(one.get("id")) for one in named]

    def stream(self, route: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The pieces of a streamed answer as they come.

        Args:
            route: "/completions" or "/chat/completions".
            body: The request.

        Raises:
            ServerError: it cannot be reached, refuses, or breaks off.
        """
        with self._open(route, {**body, "stream": True}) as response:
            kind, is_whole = response.headers.get_content_type(), False
            if kind != "text/event-stream":
                raise ServerError(f"{self.url}{route} answers with {kind}, not with a stream", kind="broken")
            while True:
                try:
                    line = response.readline(LONGEST_LINE)
                except (OSError, HTTPException) as error:
                    raise self._broken(error) from error
                name, _, value = line.partition(b":")
                if name == b"data" and value.strip() != b"[DONE]":
                    piece = _object(value)
                    if "error" in piece:
                        raise ServerError(f"the answer broke off: {_said(piece)}", kind="broken")
                    is_whole = is_whole or any(one.get("finish_reason") for one in _choices(piece))
                    yield piece
                elif name == b"data":
                    return
                elif not line:
                    break
        if not is_whole:
            raise ServerError("the answer broke off before its end", kind="broken")

    def _open(self, route: str, body: Mapping[str, Any] | None) -> HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + route, data, self._headers)
        try:
            response = self._opener.open(request, timeout=self._timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(error) from None
        except (OSError, HTTPException) as error:
            raise self._broken(error) from error
        assert isinstance(response, HTTPResponse), response
        return response

    def _broken(self, error: Exception) -> ServerError:
        why = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(why, TimeoutError):
            return ServerError(
                f"{self.url} said nothing for {self._timeout_s:g} s",
                kind="timeout",
                hint="--timeout-s waits longer",
            )
        said = str(why) or type(why).__name__
        return ServerError(
            f"{self.url} cannot be asked: {said}", kind="connection", hint="is the server running?"
        )


def reach(options: RemoteOptions) -> tuple[Client, str]:
    """A server and the name of a model there; the key is the option's or the environment's.

    Raises:
        UsageError: an address or a key that cannot be one.
        ServerError: it was asked for its models, and cannot be reached or refuses.
    """
    client = Client(options, options.api_key or os.environ.get(KEY, ""))
    return client, options.model or client.models()[0]


def _parts(url: str) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        parts, is_address = urllib.parse.urlsplit(""), False
    if not is_address or parts.username or parts.query or parts.fragment or not url.isprintable():
        raise UsageError(f"url is {url!r}", hint="write it as http://127.0.0.1:8000")
    return parts


def _refusal(error: urllib.error.HTTPError) -> ServerError:
    """What a status other than 200 means."""
    kind = str(error.code)
    try:
        body = json.loads(error.read(LONGEST_REFUSAL))
    except (OSError, HTTPException, ValueError):
        body = None
    found = body if isinstance(body, dict) else {}
    hint, after = HINTS.get(kind), error.headers.get("retry-after", "")
    if kind in ("429", "503"):
        hint = f"come again in {after} s" if after.isdigit() else "come again later"
    if 300 <= error.code < 400:
        hint = "redirects are not followed, because they could take the key along: give the right --url"
    inner = found.get("error")
    code = inner.get("code") if isinstance(inner, dict) else None
    said = f"the server refuses ({kind}): {_said(found) or error.reason}"
    return ServerError(said, kind=kind, code=str(code or ""), hint=hint)


def _said(body: Mapping[str, Any]) -> str:
    """The words of an error, whatever its shape, fit for a terminal."""
    inner = body.get("error", body)
    words = inner.get("message", inner.get("detail", "")) if isinstance(inner, dict) else inner
    return "".join(one if one.isprintable() else " " for one in str(words)[:500])


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ServerError("the server sent something that is not a JSON object", kind="broken")
    return value


def _choices(piece: Mapping[str, Any]) -> list[dict[str, Any]]:
    choices = piece.get("choices")
    return [one for one in choices if isinstance(one, dict)] if isinstance(choices, list) else []


def text_of(piece: Mapping[str, Any]) -> str:
    """The text of a piece of an answer, of chat or of a completion; often none."""
    text = ""
    for choice in _choices(piece):
        delta = choice.get("delta")
        said = delta.get("content") if isinstance(delta, dict) else choice.get("text")
        text += said if isinstance(said, str) else ""
    return text


@final
class RemoteConversation:
    """What `infer.conversation.Conversation` is, with a model on a server.

    When the server says that there is no room for all that was said, the oldest is forgotten.

    Args:
        client: The server.
        model: The model's name there.
        system: What the model is told first.
        max_tokens: Most tokens in an answer.
        sampling: What to draw from; what OpenAI does not know is sent where it changes something.
    """

    has_format = True

    def __init__(
        self, client: Client, model: str, *, system: str, max_tokens: int, sampling: SamplingOptions
    ) -> None:
        usual = SamplingOptions()
        given = {name: getattr(sampling, name) for name in vars(usual)}
        sent = {
            name: value for name, value in given.items() if name in ALWAYS or value != getattr(usual, name)
        }
        self._client, self._body = client, {"model": model, "max_tokens": max_tokens, **sent}
        self._head = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []

    def answer(self, line: str) -> Iterator[str]:
        """The answer to a line, in pieces as they come; it is remembered once it was taken whole.

        Raises:
            ServerError: there is none, or not a whole one; nothing is remembered.
        """
        asked, said = {"role": "user", "content": line}, ""
        while True:
            body = {**self._body, "messages": [*self._head, *self._turns, asked]}
            try:
                for piece in self._client.stream("/chat/completions", body):
                    said += (text := text_of(piece))
                    yield text
                break
            except ServerError as error:
                if error.code != "context_length_exceeded" or not self._turns or said:
                    raise
                del self._turns[:2]
        self._turns += [asked, {"role": "assistant", "content": said}]
