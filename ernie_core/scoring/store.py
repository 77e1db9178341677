"""One SQLite file that several processes keep answers in: WAL, synchronous FULL, one connection per call.

What is committed is on the disk when the call returns. A file of a newer version of its tables is refused.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from ..errors import ErnieError


@contextlib.contextmanager
def open_store(path: Path | str, schema: str, *, version: int, what: str) -> Iterator[sqlite3.Connection]:
    """A connection to the file, made with `schema` where there is none, closed at the end.

    Args:
        schema: statements that end with semicolons.
        version: of the schema; a file keeps the one that it was made with.
        what: what the file holds, in the plural, for messages: "judgments".

    Raises:
        ErnieError: the file is damaged, is no store, is of a newer version, or cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        store = sqlite3.connect(path, timeout=30.0, isolation_level=None)
    except (OSError, sqlite3.Error) as e:
        raise ErnieError(
            f"{path} cannot be opened ({e}). Free some space, or see that the folder can be written."
        ) from e
    try:
        store.row_factory = sqlite3.Row
        store.execute("PRAGMA journal_mode=WAL")
        store.execute("PRAGMA synchronous=FULL")
        (found,) = store.execute("PRAGMA user_version").fetchone()
        if found == 0:
            _make(store, path, schema, version)
        elif found > version:
            raise ErnieError(f"{path} was written by a newer version ({found}); this one reads {version}.")
        yield store
    except sqlite3.Error as e:
        raise ErnieError(
            f"the {what} in {path} cannot be read or written ({e}). Free some space; if the file is damaged, put a "
            "copy in its place or move it away to begin anew."
        ) from e
    finally:
        store.close()


def _make(store: sqlite3.Connection, path: Path, schema: str, version: int) -> None:
    with writing(store):
        if store.execute("PRAGMA user_version").fetchone()[0]:
            return  # another process was faster
        if store.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise ErnieError(f"{path} is a database of something else; move it away.")
        for statement in filter(str.strip, schema.split(";")):
            store.execute(statement)
        store.execute(f"PRAGMA user_version={version}")


@contextlib.contextmanager
def writing(store: sqlite3.Connection) -> Iterator[None]:
    """One transaction that no other process writes beside; on the disk when it ends, or undone."""
    store.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        store.execute("ROLLBACK")
        raise
    store.execute("COMMIT")
