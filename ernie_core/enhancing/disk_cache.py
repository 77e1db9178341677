"""Answers of earlier runs, one small file each."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .writing import Answer

logger = logging.getLogger(__name__)

MAX_FILES = 2000
"""About 8 MB; the longest unused go first."""


def fingerprint(source: Path | str) -> str:
    """Changes when the model file, or a file in the model folder, is another: names, sizes and times, no contents."""
    path = Path(source)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    seen = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return hashlib.sha256(json.dumps([str(path.absolute()), seen]).encode()).hexdigest()


class DiskCache:
    """Answers by enhancer and request. Whatever cannot be read or written costs a warning, never an answer."""

    def __init__(self, folder: Path, *, max_files: int = MAX_FILES):
        self.folder = folder
        self.max_files = max_files

    def _place(self, key: Mapping[str, Any]) -> Path:
        return self.folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:40]}.json"

    def get(self, key: Mapping[str, Any]) -> Answer | None:
        """The answer kept under `key`, or None; a damaged file is passed over with a warning."""
        path = self._place(key)
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            text, notes = entry["text"], entry["notes"]
            if not isinstance(text, str) or entry["key"] != json.loads(json.dumps(key)):
                raise ValueError("it holds something else")
            answer = Answer(text=text, notes=tuple(map(str, notes)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as e:
            logger.warning("the kept prompt %s cannot be read (%s): it is written anew", path, e)
            return None
        try:
            os.utime(path)
        except OSError:  # a folder that may only be read: its files are not the longest unused ones then
            logger.debug("cannot mark %s as used", path)
        return answer

    def put(self, key: Mapping[str, Any], answer: Answer) -> None:
        """Keep `answer`: whole or not at all."""
        path = self._place(key)
        partial = path.with_suffix(f".{os.getpid()}.part")
        entry = {"key": key, "text": answer.text, "notes": list(answer.notes)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("w", encoding="utf-8") as file:
                    json.dump(entry, file)  # ASCII: any half of an emoji survives
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            self._forget_oldest()
        except OSError as e:
            logger.warning("the enhanced prompt could not be kept in %s (%s): the next run writes it anew", path, e)

    def _forget_oldest(self) -> None:
        files = [entry for entry in os.scandir(self.folder) if entry.name.endswith(".json")]
        if len(files) > self.max_files:
            for entry in sorted(files, key=lambda entry: entry.stat().st_mtime)[: len(files) - self.max_files]:
                Path(entry.path).unlink(missing_ok=True)
