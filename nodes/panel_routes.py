"""What the page's panel (web/panel.js) asks this server: sessions, their questions and pictures, answers, undo.

A kind of session is a tournament or an evaluation; what it asks is said by its engine module, whose functions
`open_store`, `progress`, `upcoming`, `answer`, `undo` and `picture_path` have the same arguments for both.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..ernie_core.errors import ErnieError
from . import host

AHEAD = 4  # questions whose pictures the page fetches before they are asked
SIDES_PX = (64, 8192)  # longest side that the page may ask for
DEFAULT_SIDE_PX = 1600

Values = Mapping[str, Any]
Handler = Callable[[Values, Values, Values], Any]


@dataclass(frozen=True, kw_only=True)
class Sessions:
    """One kind of session, and the routes that every kind has; each handler gets (address, query, body)."""

    word: str
    """What one is called: "tournament"; the routes lie under /ernie/ and its plural."""
    engine_name: str
    """Its module in the engine, such as "scoring.judgments"; imported when somebody asks."""
    store_path: Callable[[], Path]
    list_all: str
    """Name of the engine's function that lists all sessions."""
    question: Callable[[Any], dict[str, Any]]
    """What the page may know of a question."""

    @property
    def engine(self) -> Any:
        return importlib.import_module(f"..ernie_core.{self.engine_name}", __package__)

    @contextlib.contextmanager
    def open(self) -> Iterator[Any]:
        """The store, for one request."""
        with self.engine.open_store(self.store_path()) as store:
            yield store

    def id(self, path: Values) -> int:
        return read_number(path["id"], f"the {self.word}")

    def state(self, store: Any, id_: int) -> dict[str, Any]:
        """What the page shows: where the session is, and the questions that come next."""
        waiting = self.engine.upcoming(store, id_, count=AHEAD)
        return {
            self.word: public(self.engine.progress(store, id_)),
            "questions": [self.question(question) for question in waiting],
        }

    def get_list(self, _path: Values, _query: Values, _body: Values) -> dict[str, Any]:
        with self.open() as store:
            return {f"{self.word}s": [public(state) for state in getattr(self.engine, self.list_all)(store)]}

    def get_state(self, path: Values, _query: Values, _body: Values) -> dict[str, Any]:
        with self.open() as store:
            return self.state(store, self.id(path))

    def post_answer(self, path: Values, _query: Values, body: Values) -> dict[str, Any]:
        id_, question = self.id(path), read_number(body.get("question"), "question")
        with self.open() as store:
            self.engine.answer(store, id_, question, body.get("answer"))
            return self.state(store, id_)

    def post_undo(self, path: Values, _query: Values, _body: Values) -> dict[str, Any]:
        id_ = self.id(path)
        with self.open() as store:
            undone = self.engine.undo(store, id_)
            return self.state(store, id_) | {"undone": undone}

    def get_picture(self, path: Values, query: Values, _body: Values) -> bytes:
        id_, number = self.id(path), read_number(path["number"], "the picture")
        with self.open() as store:
            file = self.engine.picture_path(store, id_, number)
        return show_picture(file, number, query)

    def routes(self) -> dict[str, Handler]:
        """Address -> handler."""
        root = f"/ernie/{self.word}s"
        return {
            f"GET {root}": self.get_list,
            f"GET {root}/{{id}}": self.get_state,
            f"GET {root}/{{id}}/pictures/{{number}}": self.get_picture,
            f"POST {root}/{{id}}/answer": self.post_answer,
            f"POST {root}/{{id}}/undo": self.post_undo,
        }


def serve(routes: Mapping[str, Handler]) -> None:
    """Offer routes, where there is a server."""
    from ..ernie_core.scoring.judgments import Stale, Unknown

    host.serve(routes, {Unknown: 404, Stale: 409})


def public(state: Any) -> dict[str, Any]:
    """What the page may know of a session."""
    return asdict(state) | {"complete": state.complete}


def read_number(value: Any, what: str) -> int:
    """A whole number from an address or a JSON value, as an id must be one."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 15:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**15:
        return value
    raise ErnieError(f"{what} must be a whole number, got {str(value)[:40]!r}.")


def show_picture(file: Path, number: int, query: Values) -> bytes:
    """A picture, decoded and encoded again: no file is handed out as it is.

    Raises:
        ErnieError: the query's side is no number of pixels that may be asked for.
        Unknown: the file lies elsewhere or is gone.
    """
    from ..ernie_core.scoring import judgments
    from ..ernie_core.training.pictures import load_image

    side = read_number(query.get("side", DEFAULT_SIDE_PX), "side")
    if not SIDES_PX[0] <= side <= SIDES_PX[1]:
        raise ErnieError(f"side must lie between {SIDES_PX[0]} and {SIDES_PX[1]} pixels, got {side}.")
    file = file.resolve()
    if not any(file.is_relative_to(root.resolve()) for root in host.picture_folders()):
        raise judgments.Unknown(f"picture {number} lies outside of the folders that may be shown.")
    if not file.is_file():
        raise judgments.Unknown(f"{file.name} is not there any more; skip it.")
    return encode(load_image(file).rgb_HWC, side)


def encode(rgb_HWC, side: int) -> bytes:
    """JPEG of at most `side` pixels on the longest side; never enlarged."""
    import io as data

    from PIL import Image

    image = Image.fromarray(rgb_HWC)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = data.BytesIO()
    image.save(out, "JPEG", quality=97, subsampling=0)
    return out.getvalue()
