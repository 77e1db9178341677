"""A manifest and a sampling plan become a dataset that Train draws from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ..batch import Problem
from ..errors import ErnieError
from ..training.items import Dataset, DatasetOptions, Findings, Item, fill_captions
from .draws import OnProgress, read_pool
from .manifest import Row, read_rows, split_source
from .sampling import Pool, Sampling, row_shares
from .texts import row_captions

MOST_ROWS = 500_000
"""Train holds every picture's captions and sizes in memory; more than this is for a loop of one's own over `Draws`."""


def read_planned(
    manifest: Path | str,
    sampling: Sampling,
    options: DatasetOptions | None = None,
    *,
    depth: int = 0,
    on_progress: OnProgress | None = None,
) -> tuple[Dataset, Pool]:
    """The pictures of a manifest with the draws that the plan gives them, and the pool that it was made for.

    Captions are those of `captions` (style -> text) and the one found beside the picture (`caption`, of the style
    "caption"); `options.styles` says how often which is drawn. An epoch is as many draws as there are pictures.

    Args:
        manifest: with `source`, `width`, `height` and `id` (the ingest stage), `category` and `score`.
        options: captions, resolutions and the rest, as for every dataset.
        depth: how many parts of a category's path count; 0 = all of them.

    Raises:
        ErnieError: nothing can be drawn; there are more than 500,000 rows; pictures lie inside tar shards or were not
            ingested; a caption is missing and `options` do not say what to do about it.
    """
    manifest, options = Path(manifest).expanduser(), options or DatasetOptions()
    pool, _ = read_pool(manifest, depth=depth, on_progress=on_progress)
    if len(pool) > MOST_ROWS:
        raise ErnieError(
            f"{manifest.name} has {len(pool)} pictures; Train takes {MOST_ROWS} at most. Filter the manifest, or draw "
            "from it in a loop of your own (ernie_core.curation.draws)."
        )
    draws = len(pool) * row_shares(pool, sampling)
    names = np.repeat(np.arange(len(pool.names)), pool.counts)
    of_row = {row: (draws[i], pool.names[names[i]]) for i, row in enumerate(pool.order.tolist())}
    found = Findings()
    for number, row in enumerate(read_rows(manifest)):
        if number in of_row:
            expected, category = of_row[number]
            found.items.append(replace(_item_of(row, manifest), draws=float(expected), concept=category))
    found.problems = [Problem(label=f"{count} rows", reason=f"left out: {why}") for why, count in pool.left_out]
    items = fill_captions(found.items, found, options)
    styles = {style for style, weight in options.styles if weight > 0}
    lacking = sum(not styles & {c.style for c in item.captions} for item in items) if styles else 0
    if lacking:
        found.problem(f"{lacking} of {len(items)} pictures", "have no caption of the styles asked for; they use theirs")
    return Dataset(items=tuple(items), options=options, problems=tuple(found.problems), notes=tuple(found.notes)), pool


def _item_of(row: Row, manifest: Path) -> Item:
    source = row.get("source")
    where = f"{manifest.name}: {source or 'a row without source'}"
    if not isinstance(source, str) or not source:
        raise ErnieError(f"{where} names no picture.")
    if split_source(source)[1]:
        raise ErnieError(f"{where} lies inside a shard. Export the manifest to a folder first: Train reads files.")
    width, height = row.get("width"), row.get("height")
    if not isinstance(width, int) or not isinstance(height, int) or not row.get("id"):
        raise ErnieError(f"{where} has no size or no id. Run the ingest stage over the pictures first.")
    return Item(
        image=Path(source), captions=tuple(row_captions(row)), width=width, height=height, sha256=str(row["id"])
    )
