"""The user's own server as enhancer, against a small one on this machine that answers as told."""

import contextlib
import json
import time

import pytest
from chat_server import GOOD, event, running_chat_server
from ernie_pack.ernie_core.enhancing.server import ServerEnhancer
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.ernie_core.model.enhancer import default_system_prompt

SETTINGS = {
    **{"temperature": 0.6, "top_p": 0.95, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "max_new_tokens": 99},
}


@pytest.fixture
def serve():
    """serve(*replies) -> (url, requests): each reply is (status, headers, pieces of the body, pause before each)."""
    with contextlib.ExitStack() as servers:
        yield lambda *replies: servers.enter_context(running_chat_server(*replies))


def ask(url, *, seeds=(5,), system=None, settings=SETTINGS, on_token=None, **options):
    options = {"sleep": lambda _: None, "timeout_s": 5.0} | options
    return ServerEnhancer(url, "qwen", **options).enhance_variants(
        'a "cat"', 64, 48, seeds=seeds, system=system, on_token=on_token, **settings
    )


def test_the_text_comes_in_pieces_and_the_question_is_the_official_one(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    url, requests = serve((200, {}, GOOD, 0))
    seen = []
    assert ask(url, on_token=lambda row, text: seen.append((row, text)), key_variable="MY_KEY") == ["A red cat \u732b"]
    assert seen == [(0, "A red "), (0, "A red cat \u732b")]
    path, headers, body = requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer sk-secret"
    assert body["messages"][0] == {"role": "system", "content": default_system_prompt()}
    assert json.loads(body["messages"][1]["content"]) == {"prompt": 'a "cat"', "width": 64, "height": 48}
    assert (body["model"], body["seed"], body["max_tokens"], body["stream"]) == ("qwen", 5, 99, True)
    assert not {"top_k", "min_p", "repetition_penalty"} & body.keys()


def test_every_setting_reaches_the_server(serve):
    url, requests = serve((200, {}, GOOD, 0))
    own = SETTINGS | {"top_k": 64, "min_p": 0.05, "repetition_penalty": 1.05, "temperature": 0.1, "top_p": 0.5}
    ask(url, settings=own, system="Write.", seeds=[1, 2**64 - 1])
    bodies = [body for _, _, body in requests]
    assert [b["seed"] for b in bodies] == [1, 2**31 - 1]
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        assert bodies[0][name] == own[name]
    assert bodies[0]["messages"][0]["content"] == "Write."
    assert "Authorization" not in requests[0][1]


def test_a_server_that_does_not_stream_is_understood(serve):
    reply = json.dumps({"choices": [{"message": {"content": "<think>hm</think> whole"}, "finish_reason": "stop"}]})
    url, _ = serve((200, {"Content-Type": "application/json"}, [reply], 0))
    assert ask(url) == ["whole"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(serve, status):
    url, requests = serve((status, {"Retry-After": "1"}, ["busy"], 0), (200, {}, GOOD, 0))
    waited = []
    assert ask(url, sleep=waited.append) == ["A red cat \u732b"]
    assert len(requests) == 2
    assert sum(waited) == pytest.approx(1.0)


def test_a_refusal_is_told_at_once_and_without_the_key(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    url, requests = serve((401, {}, ["bad key sk-secret"], 0))
    with pytest.raises(ErnieError, match=r"answered 401 .*: bad key \*\*\*"):
        ask(url, key_variable="MY_KEY")
    assert len(requests) == 1


def test_the_key_follows_no_redirect(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    other, strangers = serve((200, {}, GOOD, 0))
    url, _ = serve((307, {"Location": other}, [], 0))
    with pytest.raises(ErnieError, match="answered 307"):
        ask(url, key_variable="MY_KEY")
    assert strangers == []


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (["data: {nonsense\n\n"], "not that of a chat API"),
        (["<html>Welcome</html>"], "not that of a chat API"),
        (["data: []\n\n"], "not that of a chat API"),
        (['data: {"choices": [{"delta": {"content": 3}}]}\n\n'], "not that of a chat API"),
        (['data: {"error": {"message": "out of memory"}}\n\n'], "the server reports: .*out of memory"),
        ([event("half")], "ended before it was finished"),
        ([], "ended before it was finished"),
    ],
)
def test_a_malformed_reply_is_an_error_that_shows_it(serve, pieces, words):
    url, requests = serve((200, {}, pieces, 0))
    with pytest.raises(ErnieError, match=words):
        ask(url)
    assert len(requests) == 1


def test_an_empty_answer_gives_the_prompt_back(serve, caplog):
    url, _ = serve((200, {}, ["data: [DONE]\n\n"], 0))
    assert ask(url) == ['a "cat"']
    assert "original prompt is used" in caplog.text


def test_a_silent_server_is_given_up(serve):
    url, _ = serve((200, {}, GOOD, 1.5))
    with pytest.raises(ErnieError, match=r"said nothing for 0.3 s"):
        ask(url, timeout_s=0.3)


def test_nobody_at_the_address(serve):
    with pytest.raises(ErnieError, match="cannot be reached"):
        ask("http://127.0.0.1:9/v1", retries=1)


def test_a_cancel_is_noticed_while_the_server_thinks(serve):
    url, _ = serve((200, {}, GOOD, 30))
    count = iter(range(100))

    def check():
        if next(count) > 2:
            raise Interrupted

    start = time.monotonic()
    with pytest.raises(Interrupted):
        ask(url, check=check)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "localhost:8080"}, "must begin with http"),
        ({"url": "file:///etc/passwd"}, "must begin with http"),
        ({"url": "https://me:pw@host/v1"}, "must not hold a user name or password"),
        ({"model": " "}, "model is empty"),
        ({"key_variable": "sk-abc"}, "must be the name of an environment variable"),
        ({"key_variable": "ERNIE_NO_SUCH_KEY"}, "ERNIE_NO_SUCH_KEY is not set"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sent(options, words):
    with pytest.raises(ErnieError, match=words) as error:
        ServerEnhancer(**{"url": "http://127.0.0.1:8080/v1", "model": "qwen", **options})
    assert "pw" not in str(error.value).replace("password", "")
    assert "sk-abc" not in str(error.value)
