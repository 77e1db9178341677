"""Who may import whom, and what no file may contain; read from the source, nothing is imported."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE, NODES, STANDALONE = (ROOT / name for name in ("ernie_core", "nodes", "standalone"))

HOST_MODULES = {
    *("comfy", "comfy_api", "comfy_api_nodes", "comfy_execution", "comfy_extras", "comfyui_version", "execution"),
    *("folder_paths", "latent_preview", "node_helpers", "nodes", "server"),
}
CORE_MAY_IMPORT = {"torch", "numpy", "safetensors", "einops", "PIL"}  # at module level, besides the standard library
HEAVY = {"torch", "transformers", "numpy", "diffusers", "xformers", "safetensors", "einops", "PIL"}

# Inside the engine imports point downwards only: a file may import files of earlier levels, or of its own.
LEVELS = [
    {"errors"},
    {"file_lock", "ray_cluster"},
    {"config", "wildcards", "lettering"},
    {"sampling.inputs", "sampling.schedule", "sampling.latents", "sampling.guidance"},
    {"model.rope", "model.attention", "model.kv_cache", "sampling.calibration"},
    {"sampling.experts", "sampling.masks", "sampling.langevin", "sampling.tiles"},
    {"sampling.inpaint"},
    {
        "model.dit",
        "model.vae",
        "model.text_encoder",
        "model.enhancer",
        "sampling.samplers",
        "sampling.flow_edit",
        "sampling.regions",
        "sampling.cache",
        "sampling.nag",
        "sampling.variety",
        "sampling.style",
    },
    {
        "weights.layouts",
        "weights.quantise",
        "weights.four_bit",
        "weights.checkpoint",
        "weights.download",
        "weights.lora",
    },
    {"weights.lora_hooks", "weights.lora_edit", "weights.inventory"},
    {"adviser_rules"},
    {"adviser"},
    {"batch", "pipeline", "enhancing.quotes"},
    {"enhancing.writing", "layout_prompt"},
    {"enhancing.disk_cache", "enhancing.server"},
    {"grid", "runs"},
    {"training.captions", "training.pictures", "training.teachers"},
    {"training.items", "training.teacher_chart"},
    {"curation.manifest", "curation.sampling"},
    {"curation.texts"},
    {"curation.draws", "curation.mix"},
    {"curation.dataset"},
    {"curation.workers"},
    {"curation.engines"},
    {"training.adapters", "training.blocks", "training.objectives", "training.dataset"},
    {"curation.sources"},
    {"curation.ingest", "curation.filters"},
    {"curation.export"},
    {"training.pairs", "training.prompts", "training.distillation"},
    {"training.buckets"},
    {"training.base", "training.caching", "training.recipe", "training.optimisers"},
    {"training.trajectories"},
    {"training.state", "training.previews", "training.preflight", "training.world"},
    {"training.feed", "training.export", "training.learner"},
    {"training.losses"},
    {"training.distil"},
    {"training.trainer", "training.job"},
    {"training.probe"},
    {"scoring.scorer", "scoring.builtin", "scoring.metrics", "scoring.charts", "scoring.longtext", "scoring.geneval"},
    {"scoring.tables"},
    {"scoring.network", "scoring.streaming", "scoring.store"},
    {"scoring.ernie_aes", "scoring.clip_based", "scoring.blip_based", "scoring.tournament"},
    {"scoring.judgments", "scoring.pairs", "scoring.loading", "scoring.benchmark"},
    {"scoring.files", "scoring.best_of", "scoring.report", "scoring.win_rate"},
    {"curation.taxonomy", "curation.image_text", "curation.long_tail"},
    {"curation.categories", "curation.answers", "curation.vision_language"},
    {"curation.builtin_labels", "curation.asked_categories", "curation.own_labels", "curation.captions"},
    {"curation.styles", "curation.scores"},
    {"curation.label_commands"},
    {"evaluation.distances", "evaluation.prompt_sets"},
    {"evaluation.features"},
    {"evaluation.verdicts"},
    {"evaluation.rates", "evaluation.verdict_store"},
    {"evaluation.report"},
    {"evaluation.commands"},
    {"curation.report"},
    {"curation.commands"},
    {"cli"},
]


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[tuple[int, str]]:
    """(dots, module) per import of a file; `from . import x` counts as module x."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.level, node.module
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, alias.name) for alias in node.names)


def target(path: Path, dots: int, module: str) -> str:
    """A relative import as a dotted path from the repository root."""
    package = path.relative_to(ROOT).parts[:-1]
    return ".".join([*package[: len(package) - dots + 1], module])


def test_the_engine_knows_nothing_of_the_host_or_the_nodes():
    offenders = [
        (path.name, module)
        for path in files(CORE)
        for dots, module in imports(path)
        if (not dots and module.split(".")[0] in HOST_MODULES)
        or (dots and target(path, dots, module).split(".")[0] != "ernie_core")
    ]
    assert not offenders


def test_the_engine_imports_only_its_required_packages_at_the_top():
    import sys

    allowed = CORE_MAY_IMPORT | sys.stdlib_module_names
    offenders = [
        (path.name, module)
        for path in files(CORE)
        for dots, module in imports(path, top_level_only=True)
        if not dots and module.split(".")[0] not in allowed
    ]
    assert not offenders


def test_imports_inside_the_engine_point_downwards():
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    offenders = []
    for path in files(CORE):
        name = ".".join(path.relative_to(CORE).with_suffix("").parts)
        if path.name == "__init__.py":
            continue
        assert name in level, f"{name} needs a level in the table above"
        for dots, module in imports(path):
            if dots:
                other = target(path, dots, module).removeprefix("ernie_core.")
                if other in level and level[other] > level[name]:
                    offenders.append((name, other))
    assert not offenders


def test_only_the_host_port_touches_host_internals():
    offenders = [
        (path.name, module)
        for path in files(NODES)
        if path.parent != NODES / "host"
        for dots, module in imports(path)
        if not dots and module.split(".")[0] in HOST_MODULES - {"comfy_api"}
    ]
    assert not offenders


def test_nodes_use_the_versioned_api_and_never_the_standalone_host():
    offenders = []
    for path in files(NODES):
        for dots, module in imports(path):
            if not dots and module.split(".")[0] == "comfy_api" and not module.startswith("comfy_api.latest"):
                offenders.append((path.name, module))
            if dots and target(path, dots, module).split(".")[0] not in ("nodes", "ernie_core"):
                offenders.append((path.name, module))
    assert not offenders


def test_nothing_heavy_is_imported_before_a_node_runs():
    light = [ROOT / "__init__.py", *(p for p in files(NODES) if p.parent != NODES / "host")]
    offenders = [
        (path.name, module)
        for path in light
        for dots, module in imports(path, top_level_only=True)
        if not dots and module.split(".")[0] in HEAVY
    ]
    assert not offenders


def test_the_version_is_said_once():
    code = (CORE / "__init__.py").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = code.split('VERSION = "')[1].split('"')[0]
    assert f'\nversion = "{version}"\n' in project


def test_no_bare_except_and_no_print():
    offenders = []
    for folder in (CORE, NODES):
        for path in files(folder):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ExceptHandler) and node.type is None:
                    offenders.append((path.name, node.lineno, "except:"))
                is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
                if is_print and path.name != "cli.py":
                    offenders.append((path.name, node.lineno, "print"))
    assert not offenders


def test_python_files_are_readable_in_any_code_page():
    offenders = []
    for path in [*(p for name in ("tests", "tiny", "bench") for p in files(ROOT / name)), *files(CORE), *files(NODES)]:
        try:
            path.read_text(encoding="utf-8").encode("cp1252")
        except UnicodeEncodeError as e:
            offenders.append((path.name, e.object[e.start : e.end]))
    assert not offenders


def test_a_node_is_a_schema_and_a_short_execute():
    offenders = []
    for path in files(NODES):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name == "execute":
                length = node.end_lineno - node.lineno + 1
                if length > 25 or any(isinstance(n, ast.For | ast.While) for n in ast.walk(node)):
                    offenders.append((path.name, node.lineno, length))
    assert not offenders
