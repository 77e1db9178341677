"""Models that answer about pictures: local folders of three families, a server, and what a run may cost."""

import base64
import contextlib
import io
import json
import pickle
import threading

import pytest
import torch
from chat_server import event, running_chat_server
from ernie_pack.ernie_core.curation.vision_language import (
    Ledger,
    LimitReached,
    Limits,
    LocalWriter,
    Question,
    ServerWriter,
    fit_picture,
    question_seed,
)
from ernie_pack.ernie_core.enhancing.server import ChatServer, Ending, ServerRefused
from ernie_pack.ernie_core.errors import CheckpointError, ErnieError, Interrupted
from PIL import Image
from tiny_image_text import VLM_KINDS, write_vlm_folder

QUESTIONS = [Question("what?", Image.new("RGB", (60, 40), "red")), Question("name it now", Image.new("RGB", (28, 40)))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(kind): a small random model, made once."""
    made = {}

    def find(kind):
        if kind != "llava":
            pytest.importorskip("torchvision", reason=f"transformers' processor of {kind} needs torchvision")
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("vlm") / kind
            write_vlm_folder(made[kind], kind)
        return made[kind]

    return find


# --- local ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(VLM_KINDS))
def test_a_local_model_writes_what_transformers_own_generate_does(folder, kind):
    import transformers

    path = folder(kind)
    model = transformers.AutoModelForImageTextToText.from_pretrained(str(path))
    processor = transformers.AutoProcessor.from_pretrained(str(path))
    expected = []
    for question in QUESTIONS:
        content = [{"type": "image", "image": question.picture}, {"type": "text", "text": question.text}]
        given = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            ids = model.generate(**given, max_new_tokens=8, do_sample=False)
        expected.append(processor.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    writer = LocalWriter(path)
    together = writer.write(QUESTIONS, seeds=[0, 0], temperature=0, max_tokens=8)
    assert together == expected
    assert len(set(expected)) == 2
    assert [writer.write([q], seeds=[9], temperature=0, max_tokens=8)[0] for q in QUESTIONS] == expected


def test_drawn_words_follow_the_seed_and_nothing_else(folder):
    writer = LocalWriter(folder("llava"))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = writer.write(QUESTIONS, seeds=[3, 4], temperature=1.5, max_tokens=8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert writer.write(QUESTIONS[1:], seeds=[4], temperature=1.5, max_tokens=8) == first[1:]
    assert writer.write(QUESTIONS[1:], seeds=[5], temperature=1.5, max_tokens=8) != first[1:]


def test_large_pictures_are_scaled_down_first(folder):
    path = folder("llava")
    big = Question("what?", Image.effect_noise((400, 200), 90).convert("RGB"))
    small = Question("what?", fit_picture(big.picture, 40))
    assert (small.picture.size, big.picture.size) == ((40, 20), (400, 200))
    options = {"seeds": [0], "temperature": 0, "max_tokens": 12}
    limited = LocalWriter(path, max_side_px=40).write([big], **options)
    assert limited == LocalWriter(path).write([small], **options)
    assert LocalWriter(path, max_side_px=40).key() != LocalWriter(path).key()


def test_an_interrupt_ends_it_at_the_next_word(folder):
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        LocalWriter(folder("llava"), check=check).write(QUESTIONS[:1], seeds=[0], temperature=0, max_tokens=50)


def test_it_travels_to_a_worker_without_its_model(folder):
    writer = LocalWriter(folder("llava"), check=lambda: None)
    answer = writer.write(QUESTIONS, seeds=[0, 0], temperature=0, max_tokens=4)
    again = pickle.loads(pickle.dumps(writer))
    assert again._loaded is None
    assert again.key() == writer.key()
    assert again.write(QUESTIONS, seeds=[0, 0], temperature=0, max_tokens=4) == answer


def test_folders_of_other_kinds_are_named(folder, tmp_path):
    with pytest.raises(CheckpointError, match="whole folder of a vision-language model"):
        LocalWriter(tmp_path)
    path = tmp_path / "code"
    write_vlm_folder(path, "llava")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    own = {"model_type": "internvl_chat", "auto_map": {"AutoModel": "modeling.Model"}}
    (path / "config.json").write_text(json.dumps(config | own), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"internvl_chat\) brings code of its own, which is never run"):
        LocalWriter(path).write(QUESTIONS, seeds=[0, 0], temperature=0, max_tokens=4)
    with pytest.raises(ErnieError, match="precision must be one of default, bf16"):
        LocalWriter(folder("llava"), precision="int8")
    with pytest.raises(ErnieError, match="28 pixels or more, got 8"):
        LocalWriter(folder("llava"), max_side_px=8)


# --- server -----------------------------------------------------------------------------------------------------------

ENDED = [event("a "), event("fox"), event(None, finish_reason="stop")]
USED = "data: " + json.dumps({"choices": [], "usage": {"prompt_tokens": 700, "completion_tokens": 30}}) + "\n\n"
GOOD = (200, {}, [*ENDED, USED, "data: [DONE]\n\n"], 0)


@pytest.fixture
def serve():
    with contextlib.ExitStack() as servers:
        yield lambda *replies: servers.enter_context(running_chat_server(*replies))


def writer_for(url, tmp_path, *, limits=None, concurrency=1, retries=0, **options):
    server = ChatServer(url, "vlm", retries=retries, timeout_s=5.0, sleep=lambda _: None)
    return ServerWriter(server, limits=limits, ledger=tmp_path / "spent.jsonl", concurrency=concurrency, **options)


def ask(writer, count=1):
    return writer.write([QUESTIONS[0]] * count, seeds=list(range(count)), temperature=0.3, max_tokens=50)


def test_the_picture_goes_along_as_jpeg_and_tokens_are_counted(serve, tmp_path):
    url, requests = serve(GOOD)
    assert ask(writer_for(url, tmp_path, max_side_px=30)) == ["a fox"]
    body = requests[0][2]
    picture, text = body["messages"][0]["content"]
    head, data = picture["image_url"]["url"].split(",")
    sent = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (head, sent.format, sent.size) == ("data:image/jpeg;base64", "JPEG", (30, 20))
    assert text == {"type": "text", "text": "what?"}
    assert (body["max_tokens"], body["temperature"], body["seed"], body["model"]) == (50, 0.3, 0, "vlm")
    spent = Ledger(tmp_path / "spent.jsonl").spent()
    assert (spent.requests, spent.tokens_in, spent.tokens_out, spent.uncounted) == (1, 700, 30, 0)


def test_what_the_server_does_not_count_is_said(serve, tmp_path):
    url, _ = serve((200, {}, ENDED, 0))
    writer = writer_for(url, tmp_path)
    ask(writer)
    assert "did not count the tokens of 1 answers" in writer.spent()


def test_one_bad_answer_is_its_own_and_a_wrong_key_ends_it_all(serve, tmp_path):
    url, _ = serve((400, {}, ["too large"], 0), GOOD)
    first, second = ask(writer_for(url, tmp_path), 2)
    assert isinstance(first, ErnieError)
    assert "answered 400" in str(first)
    assert second == "a fox"
    url, _ = serve((401, {}, ["who?"], 0))
    with pytest.raises(ServerRefused, match="answered 401"):
        ask(writer_for(url, tmp_path), 2)
    with pytest.raises(ServerRefused, match="cannot be reached"):
        ask(writer_for("http://127.0.0.1:9/v1", tmp_path))


def test_questions_run_side_by_side_and_keep_their_order(serve, tmp_path):
    url, requests = serve((200, {}, ENDED, 0.05))
    assert ask(writer_for(url, tmp_path, concurrency=4), 8) == ["a fox"] * 8
    assert sorted(body["seed"] for _, _, body in requests) == list(range(8))


@pytest.mark.parametrize(
    ("limits", "asked"),
    [
        (Limits(max_requests=3), 3),
        (Limits(max_tokens=1000), 2),
        (Limits(max_spend=0.0016, price_in=1.0, price_out=4.0), 2),
    ],
    ids=["requests", "tokens", "spend"],
)
def test_a_limit_ends_the_questions_and_holds_after_a_restart(serve, tmp_path, limits, asked):
    url, requests = serve(GOOD)
    answers = ask(writer_for(url, tmp_path, limits=limits), 5)
    assert answers[:asked] == ["a fox"] * asked
    assert all(isinstance(a, LimitReached) for a in answers[asked:])
    again = pickle.loads(pickle.dumps(writer_for(url, tmp_path, limits=limits)))
    assert isinstance(ask(again)[0], LimitReached)
    assert len(requests) == asked
    with pytest.raises(LimitReached, match=r"not asked: max_.* is reached. Raise it and run again"):
        raise ask(again)[0]


def test_many_workers_never_ask_more_than_the_limit(tmp_path):
    ledgers = [Ledger(tmp_path / "l.jsonl") for _ in range(4)]
    asked = []

    def work(ledger):
        for _ in range(20):
            with contextlib.suppress(LimitReached):
                ledger.ask(Limits(max_requests=17))
                asked.append(1)

    threads = [threading.Thread(target=work, args=(ledger,)) for ledger in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) <= 17
    assert Ledger(tmp_path / "l.jsonl").spent().requests == len(asked)
    assert len(asked) >= 14  # those who asked at the same moment may step back together


def test_no_minute_has_more_questions_than_allowed(tmp_path):
    now = [0.0]
    ledger = Ledger(tmp_path / "l.jsonl", clock=lambda: now[0])
    times = []
    while len(times) < 10:
        wait = ledger.ask(Limits(per_minute=3))
        if wait:
            now[0] += wait
        else:
            times.append(now[0])
            now[0] += 5
    assert all(sum(t - 60 < u <= t for u in times) <= 3 for t in times)
    assert times[-1] < 200  # and no longer than needed


def test_a_torn_line_is_passed_over_and_a_full_disk_is_said(tmp_path):
    path = tmp_path / "l.jsonl"
    ledger = Ledger(path)
    ledger.ask(Limits())
    with path.open("ab") as file:
        file.write(b'{"asked": 1.0, "id"\n')
    ledger.answered(Ending(tokens_in=1, tokens_out=2))
    assert (ledger.spent().requests, ledger.spent().tokens_out) == (1, 2)
    with pytest.raises(ErnieError, match="cannot be read or written"):
        Ledger(tmp_path).ask(Limits())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": -1}, "max_tokens must be 0"),
        ({"max_spend": float("nan")}, "max_spend must be 0"),
        ({"max_spend": 1.0}, "needs price_in or price_out"),
    ],
    ids=["negative", "nan", "no price"],
)
def test_a_limit_that_cannot_be_is_named(options, message):
    with pytest.raises(ErnieError, match=message):
        Limits(**options)


def test_the_seed_of_a_row_is_its_own():
    seeds = {question_seed(seed, row, attempt) for seed in (0, 1) for row in "ab" for attempt in (0, 1)}
    assert len(seeds) == 8
    assert question_seed(0, "a", 0) == question_seed(0, "a", 0)
