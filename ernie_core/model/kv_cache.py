"""Keys and values of a decoder's past tokens, in memory that is taken once.

Stands where transformers' DynamicCache does, which joins old and new with torch.cat: a copy of the whole past in every
layer for every token. Here a token writes its own row and attention reads a view.

Shape letters: B rows (answers written side by side), H key/value heads, T new tokens, S tokens so far, K head dim.
"""

from __future__ import annotations

from torch import Tensor


class KeyValueCache:
    """Room for `max_tokens` tokens per row and layer; a layer's memory is taken when it first writes."""

    def __init__(self, max_tokens: int):
        self.max_tokens = max_tokens
        self._keys: list[Tensor] = []  # per layer, [B, H, max_tokens, K]
        self._values: list[Tensor] = []
        self._lengths: list[int] = []

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens held; the name that transformers' caches have."""
        return self._lengths[layer] if layer < len(self._lengths) else 0

    def update(self, k_BHTK: Tensor, v_BHTK: Tensor, layer: int, *_) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values; returns views [B, H, S, K] of all of them."""
        if layer == len(self._keys):
            B, H, _, K = k_BHTK.shape
            self._keys.append(k_BHTK.new_empty(B, H, self.max_tokens, K))
            self._values.append(v_BHTK.new_empty(B, H, self.max_tokens, K))
            self._lengths.append(0)
        start, end = self._lengths[layer], self._lengths[layer] + k_BHTK.shape[2]
        assert end <= self.max_tokens, (end, self.max_tokens)
        self._keys[layer][:, :, start:end] = k_BHTK
        self._values[layer][:, :, start:end] = v_BHTK
        self._lengths[layer] = end
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

    def cut(self, length: int) -> None:
        """Forget every token after the first `length`."""
        assert all(length <= held for held in self._lengths), (length, self._lengths)
        self._lengths = [length] * len(self._lengths)

    def repeat(self, rows: int) -> KeyValueCache:
        """A new cache of `rows` rows, each with what this one's only row holds."""
        new = KeyValueCache(self.max_tokens)
        for old, wide in ((self._keys, new._keys), (self._values, new._values)):
            for past, length in zip(old, self._lengths, strict=True):
                wide.append(past.new_empty(rows, *past.shape[1:]))
                wide[-1][:, :, :length] = past[:, :, :length]
        new._lengths = list(self._lengths)
        return new
