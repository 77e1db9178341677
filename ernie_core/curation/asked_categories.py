"""Categories by a vision-language model: at each branch it is asked which child fits best.

It gives no probabilities, so `confidence` stays None; the runner-up is its second choice where the ways part last.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence

from PIL import Image

from ..errors import ErnieError
from .answers import instructions, read_object
from .categories import Assignment
from .taxonomy import Taxonomy
from .vision_language import Question, Writer

MAX_CHILDREN = 200  # a longer list is not read with care
MAX_TOKENS = 256
TRIES = 3
RETRY_TEMPERATURE = 0.7


class LanguageCategoriser:
    """Sorts by asking `writer`, level by level; "none of them" ends the walk at a branch."""

    def __init__(self, writer: Writer, tree: Taxonomy):
        """Raises ErnieError: a branch has more children than can be asked about."""
        widest = max(range(-1, len(tree)), key=lambda place: len(tree.children(place)))
        if len(tree.children(widest)) > MAX_CHILDREN:
            name = tree.paths[widest] if widest >= 0 else "the first level"
            raise ErnieError(
                f"{name} has {len(tree.children(widest))} categories and a language model is asked about at most "
                f"{MAX_CHILDREN} at once: add a level, or take an image-text model."
            )
        self.writer = writer
        self.tree = tree

    def key(self) -> str:
        content = json.dumps(["asked", self.writer.key(), self.tree.key, instructions()["categorise"]])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def question(self, place: int) -> str:
        """What is asked at a branch; -1 = the first level."""
        names = [f"{i}. {self.tree.texts[child]}" for i, child in enumerate(self.tree.children(place), start=1)]
        return "\n".join([instructions()["categorise"], *names])

    def assign(self, pictures: Sequence[Image.Image]) -> list[Assignment | ErnieError]:
        places = [-1] * len(pictures)
        seconds = [-1] * len(pictures)
        errors: dict[int, ErnieError] = {}
        open_ = list(range(len(pictures)))
        while open_:
            chosen = self._ask(pictures, {i: places[i] for i in open_})
            below: list[int] = []
            for i, answer in chosen.items():
                if isinstance(answer, ErnieError):
                    errors[i] = answer
                    continue
                best, second = answer
                if second >= 0:
                    seconds[i] = second
                if best >= 0:
                    places[i] = best
                    if self.tree.children(best):
                        below.append(i)
            open_ = below
        return [errors.get(i) or self._assignment(places[i], seconds[i]) for i in range(len(pictures))]

    def _assignment(self, place: int, second: int) -> Assignment:
        return Assignment(
            category=self.tree.paths[place] if place >= 0 else "",
            confidence=None,
            runner_up=self.tree.paths[second] if second >= 0 else "",
        )

    def _ask(self, pictures: Sequence[Image.Image], at: dict[int, int]) -> dict[int, tuple[int, int] | ErnieError]:
        """Per picture (best child, second best child), -1 for none; or why there is no answer."""
        made: dict[int, tuple[int, int] | ErnieError] = {}
        waiting = list(at)
        for attempt in range(TRIES):
            if not waiting:
                break
            answers = self.writer.write(
                [Question(self.question(at[i]), pictures[i]) for i in waiting],
                seeds=[attempt] * len(waiting),
                temperature=RETRY_TEMPERATURE if attempt else 0.0,
                max_tokens=MAX_TOKENS,
            )
            for i, answer in zip(waiting, answers, strict=True):
                made[i] = answer if isinstance(answer, ErnieError) else self._read(answer, at[i])
            # what the writer itself gave up is not asked again
            waiting = [
                i
                for i, a in zip(waiting, answers, strict=True)
                if isinstance(a, str) and isinstance(made[i], ErnieError)
            ]
        return made

    def _read(self, answer: str, place: int) -> tuple[int, int] | ErnieError:
        children = self.tree.children(place)
        try:
            fields, _ = read_object(answer)
            numbers = [fields.get("best"), fields.get("second", 0)]
        except ErnieError:
            numbers = [int(n) for n in re.findall(r"\d+", answer)[:2]]
        chosen = [int(n) if str(n).strip().isdigit() else -1 for n in numbers]
        if not chosen or not 0 <= chosen[0] <= len(children):
            return ErnieError(
                f"a number from 0 to {len(children)} was asked for, got {' '.join(answer.split())[:80]!r}."
            )
        second = chosen[1] if len(chosen) > 1 and 0 < chosen[1] <= len(children) and chosen[1] != chosen[0] else 0
        return (children[chosen[0] - 1] if chosen[0] else -1), (children[second - 1] if second else -1)
