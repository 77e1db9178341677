"""Routes that this server offers to its own pages, and to no other page."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

from ...ernie_core.errors import ErnieError

MAX_BODY_BYTES = 65_536


Values = Mapping[str, Any]


def serve(
    routes: Mapping[str, Callable[[Values, Values, Values], Values | bytes]], statuses: Mapping[type[Exception], int]
) -> None:
    """Offer routes such as "GET /ernie/things/{id}"; nothing happens where no server runs.

    Each is called with (what stands for the names in braces, the query, the JSON object of a POST), in a thread of its
    own, for this server's own pages only: a page elsewhere gets 403. A mapping is answered as JSON, bytes as a JPEG;
    an ErnieError becomes {"error": text} with its status in `statuses`, else 400.
    """
    try:
        from server import PromptServer
    except ImportError:  # a program that loads packs without the host's server
        return
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    for route, handle in routes.items():
        method, path = route.split(" ")
        server.routes.route(method, path)(_make_handler(method, handle, statuses))


def watch_queue(look: Callable[[dict[str, Any]], None]) -> None:
    """Call `look` with each request before it is queued ("prompt", "extra_data"; not checked yet); it may add notes.

    Nothing happens where no server runs.
    """
    try:
        from server import PromptServer
    except ImportError:  # a program that loads packs without the host's server
        return
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return

    def pass_on(request: dict[str, Any]) -> dict[str, Any]:
        if isinstance(request, dict):
            look(request)
        return request

    server.add_on_prompt_handler(pass_on)


def _make_handler(method: str, handle: Callable, statuses: Mapping[type[Exception], int]) -> Callable:
    import asyncio

    from aiohttp import web

    def refuse(status: int, text: str) -> web.Response:
        return web.json_response({"error": text}, status=status)

    async def answer(request: web.Request) -> web.Response:
        if not is_same_origin(request.headers):
            return refuse(403, "only pages of this ComfyUI may ask this")
        body: Any = {}
        if method == "POST":
            if request.content_type != "application/json":
                return refuse(415, "the body must be application/json")
            if (request.content_length or 0) > MAX_BODY_BYTES:
                return refuse(413, f"the body must have at most {MAX_BODY_BYTES} bytes")
            data = bytearray()
            async for chunk in request.content.iter_chunked(MAX_BODY_BYTES):
                data += chunk
                if len(data) > MAX_BODY_BYTES:
                    return refuse(413, f"the body must have at most {MAX_BODY_BYTES} bytes")
            try:
                body = json.loads(data or b"{}")
            except (ValueError, RecursionError):
                return refuse(400, "the body is not JSON")
            if not isinstance(body, dict):
                return refuse(400, "the body must be a JSON object")
        try:
            found = await asyncio.to_thread(handle, request.match_info, request.query, body)
        except ErnieError as e:
            return refuse(next((n for kind, n in statuses.items() if isinstance(e, kind)), 400), str(e))
        if isinstance(found, bytes):
            headers = {"Cache-Control": "private, max-age=600", "X-Content-Type-Options": "nosniff"}
            return web.Response(body=found, content_type="image/jpeg", headers=headers)
        return web.json_response(found, headers={"Cache-Control": "no-store"})

    return answer


def is_same_origin(headers: Mapping[str, str]) -> bool:
    """Whether a request comes from a page of this server, or from no page at all.

    Browsers send Sec-Fetch-Site where they trust the connection, and Origin with every POST; Referer is the last word
    where both are missing. A program that sends none of them is no page.
    """
    if headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
        return False
    host = headers.get("Host", "").lower()
    for name in ("Origin", "Referer"):
        if headers.get(name):
            try:
                came_from = urllib.parse.urlsplit(headers[name]).netloc.lower()
            except ValueError:
                return False
            if not host or came_from != host:
                return False
    return True
