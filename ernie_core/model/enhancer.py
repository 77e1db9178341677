"""The prompt enhancer: a Ministral 3 language model that turns a short prompt into a long visual description.

Source: `pe/` of baidu/ERNIE-Image (config.json, chat_template.jinja) and
ErnieImagePipeline._enhance_prompt_with_pe (diffusers 0.42.1). Conventions that are easily got wrong: the
prompt travels as JSON, so quotes and backslashes in it are escaped; there is exactly one BOS; all 26 layers
and the final norm run, and logits use the embedding's weights. Logits pass through transformers' own
processors in the order of its `generate`; the draw is ours, from a CPU generator, so that a seed means the
same text on every device (up to rounding of the logits).

Shape letters: S tokens so far, D width, V vocabulary.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import MAX_TEXT_TOKENS
from ..errors import ErnieError
from .kv_cache import KeyValueCache
from .text_encoder import Decoder, TextStream, Tokenizer

logger = logging.getLogger(__name__)

CHAT_TEMPLATE = Path(__file__).with_name("pe_chat_template.jinja")  # pe_tokenizer/chat_template.jinja, unchanged


@functools.cache
def default_system_prompt() -> str:
    """The instruction in the official chat template."""
    found = re.search(r"\[SYSTEM_PROMPT\](.*?)\[/SYSTEM_PROMPT\]", CHAT_TEMPLATE.read_text(encoding="utf-8"), re.DOTALL)
    assert found, CHAT_TEMPLATE
    return found.group(1)


def render_prompt(prompt: str, width: int, height: int, *, system: str | None = None) -> str:
    """The text that the enhancer reads, as the official chat template renders it, BOS included.

    `width`, `height`: of the picture, in pixels. `system` None = the official instruction (in Chinese).
    """
    for name, px in (("width", width), ("height", height)):
        if px != int(px) or px < 1:
            raise ErnieError(f"{name} must be a whole number of pixels, 1 or more, got {px}.")
    user = json.dumps({"prompt": prompt, "width": int(width), "height": int(height)}, ensure_ascii=False)
    system = default_system_prompt() if system is None else system
    return f"<s>[SYSTEM_PROMPT]{system}[/SYSTEM_PROMPT][INST]{user}[/INST]"


def make_processors(
    *, temperature: float, top_p: float, top_k: int, min_p: float, repetition_penalty: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of (ids_1S, logits_1V) returning processed logits, in the order of transformers' `generate`.

    Temperature 0 (greedy) keeps the repetition penalty and leaves out the rest, as
    `generate(do_sample=False)` does.

    Raises:
        ErnieError: a value is out of its range.
    """
    from transformers.generation import logits_process as hf

    for name, value, ok, expected in (
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 (greedy) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1 (1 = off)"),
        ("top_k", top_k, top_k >= 0 and top_k == int(top_k), "a whole number, 0 (off) or more"),
        ("min_p", min_p, 0 <= min_p <= 1, "between 0 (off) and 1"),
        (
            "repetition_penalty",
            repetition_penalty,
            0 < repetition_penalty < float("inf"),
            "above 0 (1 = off)",
        ),
    ):
        if not ok:
            raise ErnieError(f"{name} must be {expected}, got {value}.")

    processors: Any = hf.LogitsProcessorList()
    if repetition_penalty != 1:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(float(repetition_penalty)))
    if temperature > 0:
        if temperature != 1:
            processors.append(hf.TemperatureLogitsWarper(float(temperature)))
        if top_k:
            processors.append(hf.TopKLogitsWarper(int(top_k)))
        if top_p < 1:
            processors.append(hf.TopPLogitsWarper(float(top_p)))
        if min_p:
            processors.append(hf.MinPLogitsWarper(float(min_p)))
    return processors


def draw_token(scores_1V: Tensor, generator: torch.Generator) -> int:
    """One token id from softmax(scores): the cumulative sum inverted at one uniform number of `generator`.

    On the CPU in fp64, so that rounding on other devices hardly ever changes the token.
    """
    cumulative_V = scores_1V.float().softmax(dim=-1)[0].to("cpu").double().cumsum(dim=0)
    point = torch.rand((), generator=generator) * cumulative_V[-1]
    return int(torch.searchsorted(cumulative_V, point, right=True).clamp(max=len(cumulative_V) - 1))


class Enhancer(Decoder):
    """The whole language model and its tokenizer. Beside TextEncoder's keys there is `norm.weight`."""

    def __init__(
        self,
        config: Mapping[str, Any],
        tokenizer: Tokenizer,
        *,
        ops: Any = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        """`config`: of `pe/config.json`; `ops`, `dtype`, `device`: as in TextEncoder. The output is tied."""
        num_layers = int(config.get("num_hidden_layers") or 0)
        super().__init__(config, num_layers=num_layers, ops=ops, dtype=dtype, device=device, final_norm=True)
        self.tokenizer = tokenizer
        self.max_context = int(config.get("max_position_embeddings") or 262144)  # tokens, prompt and answer
        eos = config.get("eos_token_id")
        self.eos_ids = frozenset([tokenizer.eos_id] if eos is None else [eos] if isinstance(eos, int) else eos)

    def output_weight(self, like: Tensor) -> Tensor:
        """The embedding's weight [V, D] on the device and in the dtype of `like`; read once per answer.

        A host that streams weights overrides this with its own way to fetch one.
        """
        return self.embed_tokens.weight.to(device=like.device, dtype=like.dtype)

    def enhance(self, prompt: str, width: int, height: int, *, seed: int = 0, **settings: Any) -> str:
        """A long description for `prompt`: `enhance_variants` with one seed; `on_token` gets only the text so far."""
        on_token = settings.pop("on_token", None)
        tell = None if on_token is None else lambda _, text: on_token(text)
        return self.enhance_variants(prompt, width, height, seeds=[seed], on_token=tell, **settings)[0]

    def enhance_variants(
        self, prompt: str, width: int, height: int, *, seeds: Sequence[int], system: str | None = None, **settings: Any
    ) -> list[str]:
        """Long descriptions for `prompt`, one per seed, ready to be encoded in its place; the prompt is read once.

        Args:
            prompt: what the user wrote; "" lets the model invent a picture.
            width, height: of the picture to come, in pixels; the model is told.
            seeds: one seed, one text, whatever the others are.
            system: another instruction instead of the official one.
            settings: of `write_ids`.

        Returns:
            The descriptions, or `prompt` itself, with a warning, where the model had nothing to say.

        Raises:
            ErnieError: a value is out of its range, or the prompt is longer than the model's context.
        """
        ids = self.tokenizer.encode(render_prompt(prompt, width, height, system=system), max_tokens=None)
        return [self._as_text(answer, prompt) for answer in self.write_ids(ids, seeds=seeds, **settings)]

    def _as_text(self, answer: list[int], prompt: str) -> str:
        text = self.tokenizer.decode(answer).strip()
        if not text:
            logger.warning("the enhancer answered nothing; the original prompt is used")
            return prompt
        return text

    @torch.inference_mode()
    def write_ids(
        self,
        ids: list[int],
        *,
        seeds: Sequence[int],
        temperature: float = 0.6,
        top_p: float = 0.95,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        max_new_tokens: int = MAX_TEXT_TOKENS,
        on_token: Callable[[int, str], None] | None = None,
        device: torch.device | str | None = None,
        at_once: int | None = None,
    ) -> list[list[int]]:
        """The tokens that follow `ids`, one answer per seed, without the one that ends it.

        Args:
            seeds: of each answer's draws; without effect at temperature 0.
            temperature: 0 = always the likeliest token; 0.6 is official, as is top_p 0.95.
            top_p, top_k, min_p, repetition_penalty: 1, 0, 0 and 1 are off.
            max_new_tokens: an answer is cut there, with a warning.
            on_token: called with (which answer, its text so far) after each token; what it raises ends the call.
            device: where to run; None = where the embedding lies.
            at_once: answers written side by side; None = 1 on the CPU, where a product of 4 rows takes three times
                as long as that of 1 and one by one a seed's text is the same bit for bit, else 4.

        Raises:
            ErnieError: a value is out of its range, or the prompt is longer than the model's context.
        """
        process = make_processors(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        if max_new_tokens < 1:
            raise ErnieError(f"max_new_tokens must be 1 or more, got {max_new_tokens}.")
        if len(ids) >= self.max_context:
            raise ErnieError(
                f"the prompt with its instructions has {len(ids)} tokens; the enhancer holds "
                f"{self.max_context} with its answer; leave out {len(ids) - self.max_context + 1} or more."
            )
        limit = min(max_new_tokens, self.max_context - len(ids))
        place = torch.device(self.embed_tokens.weight.device if device is None else device)
        at_once = at_once or (1 if place.type == "cpu" else 4)

        prefix = KeyValueCache(len(ids) + limit)
        hidden_1D = self.norm(self.run_layers(torch.tensor([ids], device=place), prefix)[:, -1])
        weight_VD = self.output_weight(hidden_1D)
        logits_1V = F.linear(hidden_1D, weight_VD)
        answers = list[list[int]]()
        for first in range(0, len(seeds), at_once):
            chosen = seeds[first : first + at_once]
            prefix.cut(len(ids))
            answers += self._write(
                ids,
                prefix if len(chosen) == 1 else prefix.repeat(len(chosen)),
                logits_1V.expand(len(chosen), -1),
                weight_VD,
                limit=limit,
                generators=[torch.Generator("cpu").manual_seed(seed) for seed in chosen],
                choose=functools.partial(_choose, process, greedy=temperature == 0),
                on_token=None if on_token is None else functools.partial(_shifted, on_token, first),
            )
        return answers

    def _write(
        self,
        ids: list[int],
        cache: KeyValueCache,
        logits_BV: Tensor,
        weight_VD: Tensor,
        *,
        limit: int,
        generators: list[torch.Generator],
        choose: Callable[[Tensor, Tensor, torch.Generator], int],
        on_token: Callable[[int, str], None] | None,
    ) -> list[list[int]]:
        """Answers of at most `limit` tokens after `ids`, which `cache` holds and `logits_BV` follow."""
        rows = range(len(generators))
        ids_BS = torch.zeros((len(rows), len(ids) + limit), dtype=torch.long, device=logits_BV.device)
        ids_BS[:, : len(ids)] = torch.tensor(ids, device=ids_BS.device)
        answers: list[list[int]] = [[] for _ in rows]
        streams = [TextStream(self.tokenizer) for _ in rows]
        writing = set(rows)
        for length in range(len(ids), len(ids) + limit):
            for row in sorted(writing):
                token = choose(ids_BS[row : row + 1, :length], logits_BV[row : row + 1].float(), generators[row])
                if token in self.eos_ids:
                    writing.discard(row)
                    continue
                answers[row].append(token)
                ids_BS[row, length] = token
                if on_token is not None:
                    on_token(row, streams[row].push(token))
            if not writing or length + 1 == len(ids) + limit:
                break
            hidden_BD = self.norm(self.run_layers(ids_BS[:, length : length + 1], cache)[:, -1])
            logits_BV = F.linear(hidden_BD, weight_VD)
        for _ in writing:
            logger.warning("the enhanced prompt was cut at %d tokens before the model had finished", limit)
        return answers


def _choose(
    process: Callable[[Tensor, Tensor], Tensor],
    ids_1S: Tensor,
    logits_1V: Tensor,
    generator: torch.Generator,
    *,
    greedy: bool,
) -> int:
    scores_1V = process(ids_1S, logits_1V)
    return int(scores_1V.argmax()) if greedy else draw_token(scores_1V, generator)


def _shifted(on_token: Callable[[int, str], None], first: int, row: int, text: str) -> None:
    on_token(first + row, text)
