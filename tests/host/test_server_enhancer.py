"""Enhancer on a Server in a running ComfyUI, against a small chat server on this machine."""

import asyncio
import contextlib
import json
import struct
import threading
import time

import pytest
from chat_server import GOOD, event, running_chat_server
from comfyui_server import TEST_KEY, TEST_KEY_VARIABLE, HostError
from host_graph import Graph

pytestmark = pytest.mark.host

TEXT_FRAME = 3  # the host's number for a text that a node shows while it runs


def enhanced_graph(url, *, send=True, key_variable="", enabled=True, steps=3, **widgets):
    """A picture of a prompt that the server writes out, and the texts shown; node "enhance" asks."""
    graph = Graph()
    source = graph.add(
        "ErnieServerEnhancer",
        **{"send_prompts": send, "url": url, "model": "fake", "key_variable": key_variable},
        **{"timeout": 60, "retries": 0},
    )
    node = graph.add(
        "ErnieEnhancePrompt",
        **{"prompt": 'a red star with "STAR"', "enabled": enabled, "enhancer": source, "width": 64, "height": 64},
        **{"temperature": 0.6, "top_p": 0.95, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
        **{"seed": 3, "max_new_tokens": 64, "preset": "custom", "cache": False, "retries": 0} | widgets,
    )
    graph.prompt[graph.positive[0]]["inputs"]["prompt"] = node
    image = graph.add("VAEDecode", samples=graph.ernie_sampler(steps=steps), vae=graph.vae)
    graph.add("SaveImage", images=image, filename_prefix="test/server")
    graph.shown = graph.add("PreviewAny", source=node)[0]
    graph.enhance = node[0]
    return graph


@contextlib.contextmanager
def heard_texts(server):
    """[(seconds, node, text)] of everything that nodes show while they run, as an open page gets it."""
    import aiohttp

    heard, ready, done = [], threading.Event(), threading.Event()

    async def listen():
        address = server.url.replace("http", "ws") + "/ws?clientId=listener"
        async with aiohttp.ClientSession() as session, session.ws_connect(address) as socket:
            ready.set()
            while not done.is_set():
                with contextlib.suppress(asyncio.TimeoutError):
                    message = await socket.receive(timeout=0.2)
                    if message.type is aiohttp.WSMsgType.BINARY:
                        kind, length = struct.unpack(">II", message.data[:8])
                        if kind == TEXT_FRAME:
                            node, text = message.data[8 : 8 + length], message.data[8 + length :]
                            heard.append((time.monotonic(), node.decode(), text.decode()))
                    elif message.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR):
                        return

    thread = threading.Thread(target=lambda: asyncio.run(listen()), daemon=True)
    thread.start()
    assert ready.wait(20)
    yield heard
    done.set()
    thread.join(10)


def test_the_answer_is_shown_as_it_comes_and_keeps_what_is_quoted(server):
    with running_chat_server((200, {}, GOOD, 0.5)) as (url, requests), heard_texts(server) as heard:
        graph = enhanced_graph(url)
        finished = server.run(graph.prompt, page={"nodes": []})
        time.sleep(0.5)
    (asked,) = requests
    assert asked[0] == "/v1/chat/completions"
    assert asked[2]["stream"] is True
    (text,) = finished.outputs[graph.shown]["text"]
    assert text.startswith("A red cat \u732b")
    assert '"STAR"' in text
    shown = [(when, text) for when, node, text in heard if node == graph.enhance]
    first, whole = (next(when for when, text in shown if text == t) for t in ("A red ", "A red cat \u732b"))
    assert whole - first > 0.5, "the first words were shown before the others had come"
    (file,) = finished.files()
    info = server.picture(file).info
    assert "A red cat" in info["ernie_enhanced"]


def test_a_cancel_while_the_answer_comes_ends_the_run_and_the_connection(server):
    slow = [event(f"word{i} ") for i in range(600)]
    with running_chat_server((200, {}, slow, 0.1), (200, {}, GOOD, 0)) as (url, requests), heard_texts(server) as heard:
        graph = enhanced_graph(url)
        running = server.queue(graph.prompt)
        server.wait_until(lambda: any("word3" in text for _, _, text in heard), "some words are shown")
        start = time.monotonic()
        server.interrupt()
        assert server.wait(running, timeout_s=30).status == "interrupted"
        assert time.monotonic() - start < 10, "60 s of words were still to come"
        server.wait_until(lambda: requests[-1] == "gone", "the connection is closed", timeout_s=30)
        server.wait_until(server.is_idle, "the queue is free")
        finished = server.run(graph.prompt)
    assert finished.outputs[graph.shown]["text"][0].startswith("A red cat")
    assert len(requests) == 3


def test_nothing_is_sent_unless_it_is_allowed_and_wanted(server):
    with running_chat_server((200, {}, GOOD, 0)) as (url, requests):
        with pytest.raises(HostError, match="would send prompts to another program: switch send_prompts on"):
            server.run(enhanced_graph(url, send=False).prompt)
        off = enhanced_graph(url, send=False, enabled=False)
        finished = server.run(off.prompt)
        assert finished.outputs[off.shown]["text"] == ['a red star with "STAR"']
        finished = server.run(enhanced_graph(url, enabled=False).prompt)
        assert requests == []
        server.run(enhanced_graph(url).prompt)
        assert len(requests) == 1, "the counter counts"


def test_the_key_goes_to_the_server_and_nowhere_else(server):
    with running_chat_server((200, {}, GOOD, 0), (401, {}, [f"bad key {TEST_KEY}"], 0)) as (url, requests):
        graph = enhanced_graph(url, key_variable=TEST_KEY_VARIABLE, cache=True)
        running = server.queue(graph.prompt, page={"nodes": [], "prompt": graph.prompt})
        (file,) = server.wait(running).files()
        assert requests[0][1]["Authorization"] == f"Bearer {TEST_KEY}"
        again = enhanced_graph(url, key_variable=TEST_KEY_VARIABLE, seed=4)
        with pytest.raises(HostError, match=r"answered 401 .*bad key \*\*\*"):
            server.run(again.prompt, page={"nodes": []})
    picture = server.fetch(file)
    assert TEST_KEY_VARIABLE.encode() in picture, "the workflow names the variable"
    assert TEST_KEY.encode() not in picture
    assert TEST_KEY.encode() not in server.get("/history")
    assert TEST_KEY not in server.log_text()
    written = [path for name in ("user", "output", "temp") for path in (server.base / name).rglob("*")]
    assert [p.name for p in written if p.is_file() and TEST_KEY.encode() in p.read_bytes()] == []
    assert any("enhanced" in path.parts for path in written), "the answer was kept on the disk"


def test_pictures_of_runs_that_reuse_the_text_hold_both_prompts(server):
    """Runs that wait in the queue while the text is written, and a later one; the server is asked once."""
    with running_chat_server((200, {}, GOOD, 0.5)) as (url, requests):
        graphs = [enhanced_graph(url, steps=steps) for steps in (2, 3, 4)]
        running = [server.queue(graph.prompt, page={"nodes": []}) for graph in graphs]
        finished = [server.wait(number) for number in running]
        finished.append(server.run(enhanced_graph(url, steps=5).prompt, page={"nodes": []}))
        server.run(enhanced_graph(url, enabled=False).prompt, page={"nodes": []})
    assert len(requests) == 1
    pictures = [file for one in finished for file in one.files()]
    assert len(pictures) == 4
    for file in pictures:
        (note,) = json.loads(server.picture(file).info["ernie_enhanced"])
        assert note["original"] == 'a red star with "STAR"'
        assert note["enhanced"][0].startswith("A red cat")
