"""Curation: a pile of pictures becomes a manifest, is sorted, looked at, and handed to training.

Every node writes a manifest of its own into output/curation/NAME, so that a run can be looked at stage by stage, goes
on where it was stopped, and makes nothing twice.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from comfy_api.latest import io

from ..ernie_core.errors import ErnieError
from . import host
from .dataset import (
    ADVANCED,
    Dataset,
    caption_inputs,
    existing,
    find_path,
    fingerprint,
    make_options,
    missing_caption_inputs,
    on_progress,
    show,
)

CATEGORY = "ERNIE/curation"
ManifestType = io.Custom("ERNIE_MANIFEST")
ENGINES = ("here", "processes", "ray")
FILES = ("copy", "hard link")
ALSO = ("nothing", "WebDataset shards", "Parquet table", "JSONL table")


def manifest_input() -> io.Input:
    return ManifestType.Input("manifest", tooltip="From Curate Ingest (ERNIE) or any curation node.")


def manifest_output() -> io.Output:
    return ManifestType.Output(display_name="manifest", tooltip="The rows with what this stage adds.")


def report_output() -> io.Output:
    return io.String.Output(display_name="report", tooltip="Counts, and everything that went wrong.")


def engine_inputs() -> list[io.Input]:
    """Where a stage's rows are computed."""
    return [
        io.Combo.Input(
            "engine",
            options=list(ENGINES),
            default=ENGINES[0],
            tooltip="Who computes the rows. here: this process. processes: worker processes of this machine. ray: a "
            "Ray cluster (pip install ray). The result has the same bytes.",
            extra_dict=ADVANCED,
        ),
        io.Int.Input(
            "workers",
            default=0,
            min=0,
            max=1024,
            tooltip="Worker processes, 0 to 1024, for processes and ray. 0 = one per CPU.",
            extra_dict=ADVANCED,
        ),
        io.String.Input(
            "address",
            default="",
            tooltip="Address of a running Ray cluster, such as head:6379, for ray. Empty (neutral): one is started "
            "here.",
            extra_dict=ADVANCED,
        ),
    ]


class ErnieCurateIngest(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieCurateIngest",
            display_name="Curate Ingest (ERNIE)",
            category=CATEGORY,
            description="Decodes, measures and hashes every picture of folders, shards or tables into a manifest.",
            inputs=[
                io.String.Input(
                    "paths",
                    multiline=True,
                    default="",
                    tooltip="What to read, one per line: folders (with captions, kohya's or with metadata tables), "
                    ".tar shards, tables (.jsonl, .csv, .json, .parquet), dataset files of other trainers. Relative "
                    "paths start in ComfyUI's input folder.",
                ),
                io.String.Input(
                    "name", default="pile", tooltip="Folder in output/curation for the manifests of this run."
                ),
                *engine_inputs(),
            ],
            outputs=[manifest_output(), report_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, paths: str | None = "", **others) -> str:
        """Changes with the files. What is linked comes as None."""
        return "".join(fingerprint(find_path(path)) for path in (paths or "").splitlines() if path.strip())

    @classmethod
    def execute(cls, paths, name, engine, workers, address) -> io.NodeOutput:
        from ..ernie_core.batch import run_folder
        from ..ernie_core.curation.ingest import ingest
        from ..ernie_core.curation.manifest import Manifest, step_name

        sources = [existing(path) for path in paths.splitlines() if path.strip()] or [existing(paths)]
        folder = run_folder(host.output_folder() / "curation", name)
        target = folder / step_name(1, "ingest", *(str(source) for source in sources))
        summary = ingest(sources, target, on_progress=on_progress(), **place(engine, workers, address))
        return io.NodeOutput(Manifest(target), show(cls.hidden.unique_id, describe(summary, target)))


class ErnieCurateFilter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieCurateFilter",
            display_name="Curate Filter (ERNIE)",
            category=CATEGORY,
            description="Takes out what is too small, too long or there twice; the rows stay and say why.",
            inputs=[
                manifest_input(),
                io.Int.Input(
                    "min_side",
                    default=256,
                    min=0,
                    max=16384,
                    tooltip="Least pixels of the shorter side, 0 to 16384. 0 (neutral) = any.",
                ),
                io.Int.Input(
                    "max_side",
                    default=0,
                    min=0,
                    max=65536,
                    tooltip="Most pixels of the longer side, 0 to 65536. 0 (neutral) = any.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "max_aspect",
                    default=3.0,
                    min=0.0,
                    max=100.0,
                    step=0.25,
                    tooltip="Largest ratio of the sides, 1 to 100. 0 (neutral) = any.",
                ),
                io.Boolean.Input(
                    "same_file",
                    default=True,
                    tooltip="On: of files with the same bytes one is kept. Off (neutral): all are.",
                ),
                io.Int.Input(
                    "near_bits",
                    default=6,
                    min=-1,
                    max=15,
                    tooltip="Pictures whose perceptual hashes differ in no more of 128 bits count as one, -1 to 15; "
                    "the largest is kept. 6 finds rescaled and recompressed copies; -1 (neutral) = not looked for.",
                ),
            ],
            outputs=[manifest_output(), report_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, manifest, min_side, max_side, max_aspect, same_file, near_bits) -> io.NodeOutput:
        from ..ernie_core.curation.filters import Filters, filter_rows
        from ..ernie_core.curation.manifest import Manifest

        filters = Filters(
            min_side=min_side, max_side=max_side, max_aspect=max_aspect, exact=same_file, near_bits=near_bits
        )
        target = manifest.next("filter", json.dumps(asdict(filters)))
        found = filter_rows(manifest, target, filters, on_progress=on_progress())
        return io.NodeOutput(Manifest(target), show(cls.hidden.unique_id, describe(found, target)))


class ErnieCurationReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieCurationReport",
            display_name="Curation Report (ERNIE)",
            category=CATEGORY,
            description="Shows what a manifest holds: counts per stage, failures by row, what was dropped, pictures.",
            is_output_node=True,
            inputs=[
                manifest_input(),
                io.Int.Input(
                    "pictures",
                    default=24,
                    min=1,
                    max=200,
                    tooltip="Pictures on each contact sheet, 1 to 200: kept ones, and those that filters dropped.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="Kept pictures, and below them dropped ones with why."),
                io.String.Output(display_name="report", tooltip="All counts, and the first rows that failed."),
                io.String.Output(
                    display_name="folder", tooltip="Where report.md, problems.jsonl (all rows) and the sheets are."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, manifest, pictures) -> io.NodeOutput:
        from ..ernie_core.curation.report import look_over, write_report
        from .training import to_image

        found = look_over(manifest, shown=pictures, on_progress=on_progress())
        folder = manifest.next("report", str(pictures)).with_suffix("")
        write_report(found, folder)
        text = show(cls.hidden.unique_id, found.text)
        return io.NodeOutput(to_image(found.sheet()), text, str(folder))


class ErnieCurateExport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieCurateExport",
            display_name="Curate Export (ERNIE)",
            category=CATEGORY,
            description="Writes what was kept as a folder that any trainer reads, and hands it to Train as a dataset.",
            is_output_node=True,
            inputs=[
                manifest_input(),
                io.String.Input(
                    "styles",
                    default="",
                    tooltip="Caption styles to write, between commas, such as long, short. Empty (neutral): all.",
                ),
                io.Combo.Input(
                    "files",
                    options=list(FILES),
                    default=FILES[0],
                    tooltip="copy: pictures are copied byte for byte. hard link: they share the disk space of the "
                    "originals where the file system can; what is edited in place then changes in both.",
                    extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "also",
                    options=list(ALSO),
                    default=ALSO[0],
                    tooltip="What is written besides the folder: WebDataset shards (.tar) with captions and all "
                    "columns, or the rows as one Parquet or JSONL table. nothing (neutral): only the folder.",
                    extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "shard_size",
                    default=1024,
                    min=1,
                    max=1_048_576,
                    tooltip="Largest size of a shard in MB (1048576 bytes), 1 to 1048576.",
                    extra_dict=ADVANCED,
                ),
                *caption_inputs(),
                *missing_caption_inputs(),
            ],
            outputs=[
                Dataset.Output(display_name="dataset", tooltip="The pictures, for Train and Preflight."),
                io.String.Output(display_name="folder", tooltip="Where it is; Dataset Folder (ERNIE) reads it."),
                io.String.Output(display_name="report", tooltip="Counts, and what was left out, with the reasons."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, manifest, styles, files, also, shard_size, **captions) -> io.NodeOutput:
        from ..ernie_core.curation.export import export_folder, read_export

        options = make_options(**captions)
        chosen = [style.strip() for style in styles.split(",") if style.strip()]
        folder = manifest.next("export", json.dumps(chosen)).with_suffix("")
        progress = on_progress()
        found = export_folder(manifest, folder, styles=chosen, link=files == FILES[1], on_progress=progress)
        more = export_besides(also, manifest, folder, chosen, shard_size, progress)
        dataset = read_export(folder, options)
        text = "\n".join([str(found), *more, dataset.report()])
        return io.NodeOutput(dataset, str(folder), show(cls.hidden.unique_id, text))


def place(engine: str, workers: int, address: str) -> dict:
    """Where a stage runs, as keyword arguments of the engine's `run_stage`."""
    if engine != "ray" and address.strip():
        raise ErnieError(f"address {address.strip()!r} is for engine ray, not {engine}: take ray, or leave it empty.")
    return {"engine": engine, "workers": workers if engine != "here" else 0, "address": address.strip()}


def describe(summary: object, target: Path) -> str:
    """A stage's summary, and where its manifest is."""
    return f"{summary}\n{target}"


def export_besides(also: str, manifest, folder: Path, styles: list[str], shard_mb: int, progress) -> list[str]:
    """Lines on what is written besides the folder."""
    from ..ernie_core.curation.export import export_shards, export_table

    if also == ALSO[0]:
        return []
    if also == ALSO[1]:
        shards = folder / "shards"
        return [str(export_shards(manifest, shards, styles=styles, shard_bytes=shard_mb << 20, on_progress=progress))]
    suffix = ".parquet" if also == ALSO[2] else ".jsonl"
    return [str(export_table(manifest, folder / f"table{suffix}", styles=styles))]
