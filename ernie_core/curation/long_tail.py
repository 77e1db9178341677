"""How pictures spread over categories: counts, head and tail, evenness, and a picture of it.

With p the categories' shares, over the categories that occur:

effective categories   exp(-sum p log p): how many equally frequent ones would be as diverse (Hill number of order 1)
Gini                   0 = all equally frequent, towards 1 = one has everything
head                   share of all pictures that lie in the largest tenth of the categories (rounded up)
tail                   categories with fewer than `few` pictures, and their share of all pictures
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..errors import ErnieError
from ..scoring.charts import Bar, draw_bars, draw_scatter, stack_pictures
from .manifest import Row
from .taxonomy import Taxonomy

FEW = 10
SHOWN = 12  # categories at each end


@dataclass(frozen=True, kw_only=True)
class LongTail:
    counts: dict[str, int]
    """Pictures per category, largest first."""
    without: int
    """Rows without a category."""
    unused: tuple[str, ...]
    """Leaves of the tree that no picture is in."""
    leaves: int
    """Of the tree; 0 = no tree was given."""
    few: int

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def effective(self) -> float:
        """Effective number of categories, 1..number of categories."""
        return math.exp(-sum(n / self.total * math.log(n / self.total) for n in self.counts.values()))

    @property
    def gini(self) -> float:
        values = np.sort(np.fromiter(self.counts.values(), dtype=np.float64))
        ranks = np.arange(1, len(values) + 1)
        return float((2 * ranks - len(values) - 1) @ values / (len(values) * values.sum()))

    @property
    def head(self) -> float:
        """Share of the pictures in the largest tenth of the categories."""
        return sum(list(self.counts.values())[: math.ceil(len(self.counts) / 10)]) / self.total

    @property
    def tail(self) -> tuple[int, float]:
        """(categories with fewer than `few` pictures, their share of the pictures)."""
        rare = [n for n in self.counts.values() if n < self.few]
        return len(rare), sum(rare) / self.total

    def describe(self) -> str:
        """The numbers as text.

        Without any category: one line that says so.
        """
        if not self.counts:
            return f"no picture has a category ({self.without} rows)"
        rare, share = self.tail
        largest, count = next(iter(self.counts.items()))
        lines = [
            f"{self.total} pictures in {len(self.counts)} categories, {self.without} without one",
            f"largest: {largest} with {count} ({count / self.total:.1%}); "
            f"the largest tenth holds {self.head:.1%} of all pictures",
            f"{rare} categories have fewer than {self.few} pictures, together {share:.1%}",
            f"effective categories {self.effective:.1f}, Gini {self.gini:.2f}",
        ]
        if self.leaves:
            named = ", ".join(self.unused[:5]) + (", ..." if len(self.unused) > 5 else "")
            lines.append(f"{len(self.unused)} of {self.leaves} leaves are unused" + (f": {named}" if named else ""))
        return "\n".join(lines)

    def draw(self) -> np.ndarray:
        """uint8 [H, W, 3]: counts over ranks in logarithms, and the largest and smallest categories as bars.

        Raises ErnieError: there are no categories.
        """
        if not self.counts:
            raise ErnieError("no picture has a category; run Curate Categories first.")
        ordered = list(self.counts.items())
        ranks = [(math.log10(i), math.log10(n)) for i, (_, n) in enumerate(ordered, start=1)]
        first, last = ordered[:SHOWN], ordered[SHOWN:][-SHOWN:]
        parts = [
            draw_scatter(
                {"categories": ranks},
                title=f"{self.total} pictures, {len(ordered)} categories (effective {self.effective:.1f})",
                x_label="log10 of the rank",
                y_label="log10 of the pictures",
                line=False,
                height=320,
            ),
            draw_bars([Bar(label=name, value=n) for name, n in first], title="Largest", label="pictures"),
        ]
        if last:
            parts.append(draw_bars([Bar(label=name, value=n) for name, n in last], title="Smallest", label="pictures"))
        return stack_pictures(parts)


def count_categories(rows: Iterable[Row], tree: Taxonomy | None = None, *, few: int = FEW) -> LongTail:
    """How the rows spread over categories; rows that a filter dropped do not count.

    Raises ErnieError: `few` is not positive.
    """
    if few < 1:
        raise ErnieError(f"few must be 1 or more, got {few}.")
    found = Counter(str(row.get("category") or "") for row in rows if row.get("kept") is not False)
    without = found.pop("", 0)
    counts = dict(sorted(found.items(), key=lambda entry: (-entry[1], entry[0])))
    leaves = [tree.paths[i] for i in tree.leaves] if tree is not None else []
    unused = tuple(path for path in leaves if path not in counts)
    return LongTail(counts=counts, without=without, unused=unused, leaves=len(leaves), few=few)
