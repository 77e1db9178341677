"""The exceptions a user can meet. Messages say what was expected, what came, and what to do."""

from __future__ import annotations


class ErnieError(ValueError):
    """Something the person at the graph can put right."""


class CheckpointError(ErnieError):
    """A weight file is not what its place asks for: wrong kind, truncated, renamed, missing or extra keys."""


class Interrupted(Exception):
    """The user cancelled; what was finished until then is kept by whoever catches this."""
