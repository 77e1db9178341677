"""Models that answer questions about pictures: a local folder, or the user's own server.

Local: transformers' AutoModelForImageTextToText with the folder's own chat template (Qwen-VL, InternVL in its -hf form,
SmolVLM, LLaVA, ...), never with code of the folder's own.

Server: OpenAI's chat API; the picture goes along as JPEG inside the request. What the server counts is written into a
ledger file, one line per question, which every worker appends to and reads: so limits hold over all workers, and over
restarts.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import inspect
import io
import json
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from ..enhancing.server import ChatServer, Ending, ServerRefused
from ..enhancing.writing import PRESETS
from ..errors import CheckpointError, ErnieError
from ..scoring.network import DTYPES, Place, require_transformers, stay
from .image_text import first_line, model_key

MAX_SIDE_PX = 1024
FATAL = (0, 401, 402, 403, 404, 405)  # HTTP: no other picture will fare better; 0 = cannot be reached
PRECISIONS = ("default", "bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Question:
    """A text, the picture that it is about, and an instruction that comes before."""

    text: str
    picture: Image.Image | None = None
    system: str = ""


class Writer(Protocol):
    """What answers; picklable, loads what it needs at the first question."""

    def key(self) -> str:
        """Changes with everything that decides its answers, but for what it is asked."""
        ...

    def write(
        self, questions: Sequence[Question], *, seeds: Sequence[int], temperature: float, max_tokens: int
    ) -> list[str | ErnieError]:
        """An answer for each, or the error that stands for it.

        Args:
            seeds: one per question; without effect at temperature 0, where the likeliest words are taken.
            max_tokens: the answer is cut there.

        Raises:
            ErnieError: no other question would fare better (a wrong key, no such model).
        """
        ...


def fit_picture(picture: Image.Image, max_side_px: int) -> Image.Image:
    """RGB, its longer side at most `max_side_px`."""
    picture = picture.convert("RGB")
    picture.thumbnail((max_side_px, max_side_px), Image.Resampling.LANCZOS)
    return picture


# --- local ------------------------------------------------------------------------------------------------------------


class LocalWriter:
    """A vision-language model in a local folder."""

    def __init__(
        self,
        folder: Path,
        *,
        precision: str = "default",
        device: str | None = None,
        max_side_px: int = MAX_SIDE_PX,
        place: Place = stay,
        check: Callable[[], None] = lambda: None,
    ):
        """Loads nothing yet.

        Args:
            precision: default = that of the file, bf16, fp16 or fp32.
            device: where it runs; None = where it lies, or as `place` says.
            max_side_px: larger pictures are scaled down; decides time and memory.
            place: the host's memory manager.
            check: called for every token; what it raises ends the call.

        Raises:
            ErnieError: an unknown precision, or a size below 28.
            CheckpointError: the folder holds no model.
        """
        if precision not in PRECISIONS:
            raise ErnieError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
        _check_side(max_side_px)
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} has no config.json; choose the whole folder of a vision-language model.")
        self.folder, self.precision, self.device = folder, precision, device
        self.max_side_px = max_side_px
        self._place, self._check = place, check
        self._key = model_key(folder, "fp32") + precision
        self._loaded: tuple[Any, Any, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_loaded": None, "_check": _nothing, "_place": stay}

    def key(self) -> str:
        return f"local {self._key} {self.max_side_px}"

    def write(
        self, questions: Sequence[Question], *, seeds: Sequence[int], temperature: float, max_tokens: int
    ) -> list[str | ErnieError]:
        if temperature <= 0:
            return [*self._generate(questions, 0, 0.0, max_tokens)]
        return [
            self._generate([question], seed, temperature, max_tokens)[0]
            for question, seed in zip(questions, seeds, strict=True)
        ]

    @torch.inference_mode()
    def _generate(self, questions: Sequence[Question], seed: int, temperature: float, most: int) -> list[str]:
        network, processor, bring = self._load()
        talks = [[{"role": "user", "content": self._content(question)}] for question in questions]
        options: dict[str, Any] = {"padding": True}
        if "processor_kwargs" in inspect.signature(processor.apply_chat_template).parameters:  # by version
            options = {"processor_kwargs": options}
        inputs = processor.apply_chat_template(
            talks, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
        )
        device = bring()
        given = {k: v.to(device, network.dtype) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}
        drawn = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed % 2**63)
            ids_BS = network.generate(**given, max_new_tokens=most, stopping_criteria=[self._stops], **drawn)
        return [
            text.strip()
            for text in processor.batch_decode(ids_BS[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        ]

    def _content(self, question: Question) -> list[dict[str, Any]]:
        # many of these models have no place for a system message
        text = {"type": "text", "text": "\n\n".join(filter(None, (question.system, question.text)))}
        if question.picture is None:
            return [text]
        return [{"type": "image", "image": fit_picture(question.picture, self.max_side_px)}, text]

    def _stops(self, ids_BS: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        self._check()
        return torch.zeros(len(ids_BS), dtype=torch.bool, device=ids_BS.device)

    def _load(self) -> tuple[Any, Any, Any]:
        if self._loaded is None:
            transformers = require_transformers()
            local: Any = {"local_files_only": True, "trust_remote_code": False}
            dtype = "auto" if self.precision == "default" else DTYPES[self.precision]
            try:
                network = transformers.AutoModelForImageTextToText.from_pretrained(
                    str(self.folder), dtype=dtype, **local
                )
                processor = transformers.AutoProcessor.from_pretrained(str(self.folder), **local)
            except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError) as e:
                raise CheckpointError(f"{self._kind()}: {first_line(e)}") from e
            if not getattr(processor, "chat_template", None):
                raise CheckpointError(f"{self.folder} has no chat template; choose an instruction-tuned model.")
            processor.tokenizer.padding_side = "left"  # answers begin where the questions end
            network.eval().requires_grad_(False)
            if self.device is not None:
                network = network.to(self.device)
            self._loaded = (network, processor, self._place(network))
        return self._loaded

    def _kind(self) -> str:
        try:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            config = {}
        if "auto_map" in config:
            return (
                f"{self.folder} ({config.get('model_type')}) brings code of its own, which is never run; take the form "
                "of this model that transformers knows (its name often ends with -hf)"
            )
        return f"{self.folder} cannot be loaded as a vision-language model (image-text-to-text)"


def _nothing() -> None:
    pass


def _check_side(max_side_px: int) -> None:
    if max_side_px < 28:
        raise ErnieError(f"max_side must be 28 pixels or more, got {max_side_px}.")


# --- limits -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a run may cost; 0 = no limit. None of it changes an answer."""

    max_requests: int = 0
    max_tokens: int = 0
    """Tokens read and written together, as the server counts them."""
    max_spend: float = 0.0
    """In the currency of the prices."""
    price_in: float = 0.0
    """Per million tokens that the server reads."""
    price_out: float = 0.0
    """Per million tokens that it writes."""
    per_minute: int = 0
    """Questions in any 60 seconds; more wait."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value < float("inf"):
                raise ErnieError(f"{name} must be 0 (no limit) or more, got {value}.")
        if self.max_spend and not (self.price_in or self.price_out):
            raise ErnieError("max_spend needs price_in or price_out, per million tokens; without them all is free.")


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What the lines of a ledger add up to."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    uncounted: int = 0
    """Answers whose tokens the server did not count."""

    def cost(self, limits: Limits) -> float:
        return (self.tokens_in * limits.price_in + self.tokens_out * limits.price_out) / 1e6


class LimitReached(ErnieError):
    """A question was not asked."""


class Ledger:
    """A file with a line per question asked and per answer; every line is one append, so that many may write it.

    A question that was asked and never answered (a kill) counts as a request. Only what was appended since the last
    look is read.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time):
        self.path = path
        self.clock = clock
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._read_to = 0
        self._spent = Spent()
        self._times: list[float] = []  # of questions in the last minute
        self._place: dict[str, int] = {}  # of questions just asked: how many were before

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "clock": self.clock}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def ask(self, limits: Limits) -> float:
        """Seconds to wait before the question may be asked, 0 = now; it is entered when it is 0.

        Raises LimitReached: none may be asked any more (which limit, and what to do).
        """
        with self._lock:
            self._catch_up()
            now = self.clock()
            self._times = sorted(t for t in self._times if now - 60 < t <= now)
            if limits.per_minute and len(self._times) >= limits.per_minute:
                return max(self._times[-limits.per_minute] + 60 - now, 0.01)
            spent = self._spent
            tokens, cost = spent.tokens_in + spent.tokens_out, spent.cost(limits)
            for name, value in (("max_requests", spent.requests), ("max_tokens", tokens), ("max_spend", cost)):
                most = getattr(limits, name)
                if most and value >= most:
                    raise self._reached(name, most)
            mine = uuid.uuid4().hex
            self._append({"asked": now, "id": mine})
            self._catch_up()  # several may have asked at once: those who stand first in the file do
            if limits.max_requests and self._place.pop(mine) >= limits.max_requests:
                self._append({"withdrawn": mine})
                raise self._reached("max_requests", limits.max_requests)
            self._place.clear()
            return 0.0

    def _reached(self, name: str, most: float) -> LimitReached:
        return LimitReached(
            f"not asked: {name} {most:g} is reached. Raise it and run again; what is done is kept. {self.path} has the "
            "count: delete it to begin anew."
        )

    def answered(self, ending: Ending) -> None:
        """Enter what an answer took."""
        with self._lock:
            self._append({"in": ending.tokens_in, "out": ending.tokens_out})

    def spent(self) -> Spent:
        """What all workers have spent by now."""
        with self._lock:
            self._catch_up()
            return self._spent

    def _append(self, entry: dict[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                file.write(json.dumps(entry).encode() + b"\n")
        except OSError as e:  # without it limits would not hold
            raise ErnieError(f"{self.path} cannot be written ({e.strerror or e}); free some space, run again.") from e

    def _catch_up(self) -> None:
        try:
            with self.path.open("rb") as file:
                file.seek(self._read_to)
                lines = file.read().split(b"\n")[:-1]  # behind the last one, a line that is being written
        except FileNotFoundError:
            return
        except OSError as e:
            raise ErnieError(f"{self.path} cannot be read or written ({e.strerror or e}).") from e
        self._read_to += sum(len(line) + 1 for line in lines)
        for line in lines:
            with contextlib.suppress(ValueError):  # the torn line of a kill
                self._count(json.loads(line))

    def _count(self, line: dict[str, Any]) -> None:
        spent = self._spent
        if "asked" in line:
            self._place[line["id"]] = spent.requests
            self._times.append(line["asked"])
            self._spent = replace(spent, requests=spent.requests + 1)
        elif "withdrawn" in line:
            self._spent = replace(spent, requests=spent.requests - 1)
        elif "in" in line:
            self._spent = replace(
                spent,
                tokens_in=spent.tokens_in + (line["in"] or 0),
                tokens_out=spent.tokens_out + (line["out"] or 0),
                uncounted=spent.uncounted + (line["in"] is None or line["out"] is None),
            )

    def describe(self, limits: Limits) -> str:
        """What was spent, as text."""
        spent = self.spent()
        text = f"{spent.requests} questions, {spent.tokens_in} tokens read and {spent.tokens_out} written"
        if limits.price_in or limits.price_out:
            text += f", {spent.cost(limits):.4g} spent"
        if spent.uncounted:
            text += f"; the server did not count the tokens of {spent.uncounted} answers, which no limit sees"
        return text


# --- server -----------------------------------------------------------------------------------------------------------


class ServerWriter:
    """A vision-language model behind OpenAI's chat API."""

    def __init__(
        self,
        server: ChatServer,
        *,
        limits: Limits | None = None,
        ledger: Path | None = None,
        concurrency: int = 4,
        max_side_px: int = MAX_SIDE_PX,
        quality: int = 90,
    ):
        """Sends nothing yet.

        Args:
            ledger: file that limits are counted in; None = none yet, see `counted_in`.
            concurrency: questions under way at once.
            max_side_px: larger pictures are scaled down before they are sent.
            quality: of the JPEG that is sent, 1..100.

        Raises:
            ErnieError: a value is out of its range.
        """
        if concurrency < 1:
            raise ErnieError(f"concurrency must be 1 or more, got {concurrency}.")
        _check_side(max_side_px)
        self.server = server
        self.limits = limits or Limits()
        self.ledger = Ledger(ledger) if ledger is not None else None
        self.concurrency = concurrency
        self.max_side_px = max_side_px
        self.quality = quality

    def __getstate__(self) -> dict[str, Any]:
        server = ChatServer(
            self.server.url.removesuffix("/chat/completions"),
            self.server.model,
            key_variable=self.server.key_variable,
            timeout_s=self.server.timeout_s,
            retries=self.server.retries,
            check=_nothing,
        )
        return {**vars(self), "server": server}

    def counted_in(self, ledger: Path) -> ServerWriter:
        """The same with its questions counted in `ledger`."""
        return ServerWriter(
            self.server,
            limits=self.limits,
            ledger=ledger,
            concurrency=self.concurrency,
            max_side_px=self.max_side_px,
            quality=self.quality,
        )

    def spent(self) -> str:
        """What was spent by now, as text."""
        assert self.ledger is not None
        return f"{self.ledger.describe(self.limits)} ({self.ledger.path})"

    def key(self) -> str:
        return f"server {self.server.fingerprint} {self.max_side_px} {self.quality}"

    def write(
        self, questions: Sequence[Question], *, seeds: Sequence[int], temperature: float, max_tokens: int
    ) -> list[str | ErnieError]:
        ask = functools.partial(self._ask, temperature=temperature, max_tokens=max_tokens)
        with ThreadPoolExecutor(min(self.concurrency, max(1, len(questions)))) as pool:
            return list(pool.map(ask, questions, seeds))

    def _ask(self, question: Question, seed: int, *, temperature: float, max_tokens: int) -> str | ErnieError:
        assert self.ledger is not None, "questions are counted: take `counted_in`"
        try:
            while wait := self.ledger.ask(self.limits):
                self.server.wait(wait)
            settings = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed % 2**31}
            said = [{"role": "system", "content": question.system}] if question.system else []
            said.append({"role": "user", "content": self._content(question)})
            text, ending = self.server.ask(said, **settings)
            self.ledger.answered(ending)
        except ServerRefused as e:
            if e.status in FATAL:
                raise
            return e
        except ErnieError as e:
            return e
        return text

    def _content(self, question: Question) -> Any:
        if question.picture is None:
            return question.text
        file = io.BytesIO()
        fit_picture(question.picture, self.max_side_px).save(file, "JPEG", quality=self.quality)
        url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question.text}]


class EnhancerWriter:
    """A loaded prompt enhancer, asked about texts only."""

    def __init__(self, enhancer: Any):
        """`enhancer`: what the ERNIE_ENHANCER socket carries."""
        self.enhancer = enhancer

    def key(self) -> str:
        return f"enhancer {self.enhancer.fingerprint}"

    def write(
        self, questions: Sequence[Question], *, seeds: Sequence[int], temperature: float, max_tokens: int
    ) -> list[str | ErnieError]:
        settings = PRESETS["diffusers"] | {"temperature": temperature, "max_new_tokens": max_tokens}
        return [
            self.enhancer.enhance_variants(q.text, 1024, 1024, seeds=[seed], system=q.system, **settings)[0]
            for q, seed in zip(questions, seeds, strict=True)
        ]


def question_seed(seed: int, row: str, attempt: int) -> int:
    """The seed of one try at one row: the same whatever else is asked."""
    return int.from_bytes(hashlib.sha256(f"{seed} {attempt} {row}".encode()).digest()[:7], "big")
