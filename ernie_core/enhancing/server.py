"""Answers from the user's own server that speaks OpenAI's chat API (llama.cpp, vLLM, Ollama, LM Studio...).

`ServerEnhancer` asks it for detailed prompts, `curation.vision_language` about pictures.

Only the standard library; nothing is sent anywhere but to the address given, and only when texts are asked for. The
key comes from an environment variable and appears in no message, no cache and no file. Redirects are not followed: they
would carry the key to another address.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ErnieError

logger = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 4_000_000
POLL_S = 0.2  # how soon a cancel is noticed while the server thinks
NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}  # not in OpenAI's API: sent only where they act


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl) -> None:  # noqa: ARG002
        return None


class ServerRefused(ErnieError):
    """The server said no, or cannot be reached; `status` is its HTTP code, 0 where there was none."""

    def __init__(self, message: str, status: int = 0):
        super().__init__(message)
        self.status = status


@dataclass
class Ending:
    """How an answer ended; filled in while it is read."""

    reason: str | None = None
    """Why: "stop", "length" (cut at its limit of tokens), ...; None = the server did not say."""
    tokens_in: int | None = None
    tokens_out: int | None = None
    """What the server counted; None = it did not say."""


class ChatServer:
    """A server, the model on it, and the key's place."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str = "",
        timeout_s: float = 120.0,
        retries: int = 3,
        check: Callable[[], None] = lambda: None,
        sleep: Callable[[float], None] = time.sleep,
    ):
        """Sends nothing yet.

        Args:
            url: where the API begins, as http://127.0.0.1:8080/v1.
            model: the model's name on the server.
            key_variable: name of the environment variable that holds the key; "" = no key.
            timeout_s: how long the server may stay silent, in seconds.
            retries: how often it is asked again when it is busy (429), fails (5xx) or cannot be reached.
            check: called several times a second; what it raises ends the call.

        Raises:
            ErnieError: the address is none, holds a password, or the variable is not set.
        """
        parts = urllib.parse.urlsplit(url.strip())
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ErnieError(f"url must begin with http:// or https://, as http://127.0.0.1:8080/v1, got {url!r}.")
        if parts.username or parts.password:
            raise ErnieError(
                "url must not hold a user name or password: it is saved in workflows. Put the key into "
                "an environment variable and name that in key_variable."
            )
        if not model.strip():
            raise ErnieError("model is empty: give the name under which the server knows it.")
        if key_variable and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key_variable):
            raise ErnieError(
                "key_variable must be the name of an environment variable, such as OPENAI_API_KEY, and never the key."
            )
        if key_variable and not os.environ.get(key_variable):
            raise ErnieError(
                f"the environment variable {key_variable} is not set: set it before the start, or leave "
                "key_variable empty for a server without a key."
            )
        self.url = parts._replace(path=parts.path.rstrip("/") + "/chat/completions", query="", fragment="").geturl()
        self.model = model.strip()
        self.key_variable = key_variable
        self.timeout_s = timeout_s
        self.retries = retries
        self.check = check
        self.sleep = sleep

    @property
    def fingerprint(self) -> str:
        """Changes with the address and the model's name; what lies behind them is the server's."""
        return f"{self.url} {self.model}"

    def ask(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> tuple[str, Ending]:
        """The whole answer to a conversation, what the model thought to itself left out, and how it ended.

        `settings` go into the request as they are: max_tokens, temperature, seed, ...

        Raises:
            ServerRefused: it refuses or cannot be reached, also when asked again.
            ErnieError: it stays silent, or answers something else than chat.
        """
        ending = Ending()
        body = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}, "messages": messages}
        text = "".join(self._answer({**body, **settings}, ending))
        return _without_thoughts(text), ending

    def _answer(self, body: dict[str, Any], ending: Ending | None = None) -> Iterator[str]:
        """Pieces of one answer; asked again only while nothing of it has come."""
        for attempt in range(self.retries + 1):
            try:
                yield from _pieces(self._lines(body), ending or Ending())
                return
            except urllib.error.HTTPError as e:
                if (e.code != 429 and e.code < 500) or attempt == self.retries:
                    raise ServerRefused(
                        f"the server answered {e.code} {e.reason}: {self._excerpt(e)}", status=e.code
                    ) from None
                wait = _seconds(e.headers.get("Retry-After")) or 2.0**attempt
            except urllib.error.URLError as e:
                if attempt == self.retries:
                    raise ServerRefused(f"the server at {self.url} cannot be reached: {e.reason}.", status=0) from None
                wait = 2.0**attempt
            logger.warning("the server is busy or away: asked again in %g s", wait)
            self.wait(min(wait, 60.0))

    def wait(self, seconds: float) -> None:
        while seconds > 0:
            self.check()
            self.sleep(min(seconds, POLL_S))
            seconds -= POLL_S

    def _excerpt(self, error: urllib.error.HTTPError) -> str:
        try:
            text = error.read(2000).decode("utf-8", "replace")
        except OSError:
            return "no reason given"
        key = os.environ.get(self.key_variable, "") if self.key_variable else ""
        return " ".join((text.replace(key, "***") if key else text).split())[:300] or "no reason given"

    def _lines(self, body: dict[str, Any]) -> Iterator[str]:
        """Lines of the reply as they come; the connection is closed when the caller stops listening."""
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if self.key_variable:
            headers["Authorization"] = f"Bearer {os.environ.get(self.key_variable, '')}"
        request = urllib.request.Request(self.url, data=json.dumps(body).encode(), headers=headers, method="POST")
        opener = urllib.request.build_opener(_NoRedirect)
        arrived: queue.Queue[str | BaseException | None] = queue.Queue()
        stopped = threading.Event()

        def read() -> None:
            try:
                size = 0
                with opener.open(request, timeout=self.timeout_s) as response:
                    while not stopped.is_set() and (line := response.readline(MAX_ANSWER_BYTES)):
                        size += len(line)
                        if size > MAX_ANSWER_BYTES:
                            raise ErnieError(f"the server's answer is longer than {MAX_ANSWER_BYTES} bytes.")
                        arrived.put(line.decode("utf-8", "replace"))
                arrived.put(None)
            except (OSError, ValueError, http.client.HTTPException) as e:  # handed to the caller's thread
                arrived.put(e)

        threading.Thread(target=read, daemon=True).start()
        try:
            while True:
                self.check()
                try:
                    item = arrived.get(timeout=POLL_S)
                except queue.Empty:
                    continue
                if item is None:
                    return
                if isinstance(item, TimeoutError):
                    raise ErnieError(f"the server said nothing for {self.timeout_s:g} s.") from item
                if isinstance(item, urllib.error.URLError | ErnieError):
                    raise item
                if isinstance(item, BaseException):
                    raise ErnieError(f"the connection to the server broke: {type(item).__name__}: {item}") from item
                yield item
        finally:
            stopped.set()


class ServerEnhancer(ChatServer):
    """Stands where a loaded enhancer does: same `enhance_variants`, same `fingerprint`."""

    def enhance_variants(
        self,
        prompt: str,
        width: int,
        height: int,
        *,
        seeds: Sequence[int],
        system: str | None = None,
        on_token: Callable[[int, str], None] | None = None,
        **settings: Any,
    ) -> list[str]:
        """Detailed prompts, one per seed, one after the other; the arguments of `Enhancer.enhance_variants`.

        Returns `prompt` itself, with a warning, where the model had nothing to say.

        Raises:
            ErnieError: the server refuses, cannot be reached, stays silent or answers something else than chat.
        """
        from ..model.enhancer import default_system_prompt

        user = json.dumps({"prompt": prompt, "width": int(width), "height": int(height)}, ensure_ascii=False)
        body = {
            "model": self.model,
            "stream": True,
            "messages": [
                {"role": "system", "content": default_system_prompt() if system is None else system},
                {"role": "user", "content": user},
            ],
            "max_tokens": settings["max_new_tokens"],
            **{name: settings[name] for name in ("temperature", "top_p")},
            **{name: settings[name] for name, off in NEUTRAL.items() if settings.get(name, off) != off},
        }
        texts: list[str] = []
        for row, seed in enumerate(seeds):
            text = ""
            for piece in self._answer(body | {"seed": seed % 2**31}):  # servers hold it in 32 bits
                text += piece
                if on_token is not None:
                    on_token(row, text)
            text = _without_thoughts(text)
            if not text:
                logger.warning("the enhancer answered nothing; the original prompt is used")
            texts.append(text or prompt)
        return texts


def _without_thoughts(text: str) -> str:
    return re.sub(r"^\s*<think>.*?</think>", "", text, flags=re.DOTALL).strip()


def _seconds(header: str | None) -> float:
    try:
        return max(float(header or 0), 0.0)
    except ValueError:  # a date
        return 0.0


def _pieces(lines: Iterator[str], ending: Ending) -> Iterator[str]:
    """Text pieces of a reply: server-sent events, or one JSON object from a server that does not stream."""
    whole: list[str] = []
    finished = False
    for line in lines:
        line = line.strip()
        if not line or line.startswith((":", "event:", "id:", "retry:")):
            continue
        if not line.startswith("data:"):
            whole.append(line)
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            finished = True
            break
        text = _content(data, "delta", ending)
        finished = finished or ending.reason is not None
        if text:
            yield text
    if whole:
        text = _content("\n".join(whole), "message", ending)
        finished = True
        if text:
            yield text
    if not finished:
        raise ErnieError("the server's answer ended before it was finished: ask again.")


def _content(data: str, part: str, ending: Ending) -> str:
    """Text of one event or reply; what it says of the end is noted in `ending`."""
    try:
        reply = json.loads(data)
        if reply.get("error"):
            raise ErnieError(f"the server reports: {str(reply['error'])[:300]}")
        usage = reply.get("usage") or {}
        ending.tokens_in = usage.get("prompt_tokens", ending.tokens_in)
        ending.tokens_out = usage.get("completion_tokens", ending.tokens_out)
        if not reply["choices"]:  # an event with usage figures only
            return ""
        choice = reply["choices"][0]
        text, reason = (choice.get(part) or {}).get("content") or "", choice.get("finish_reason")
        ending.reason = reason or ending.reason
        if not isinstance(text, str):
            raise TypeError("content is no text")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        if isinstance(e, ErnieError):
            raise
        raise ErnieError(f"the server's answer is not that of a chat API: {data[:200]!r}") from e
    if reason == "length":
        logger.warning("the server cut its answer at the limit of tokens")
    return text
