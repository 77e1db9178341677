"""What nodes need from outside, with plain files: the standalone twin of `nodes/host/`, same names, same signatures.

Models come from a folder cut like ComfyUI's (`diffusion_models/`, `text_encoders/`, `vae/`) or from official folders
in it; when no folder is given the pack's tiny model stands in for the released files. Noise, sigma mixing, noise masks
and picture names follow ComfyUI's rules, so that one seed is one picture in both.

MODEL here is a `Model`, CLIP a `TextModel`, VAE an `ernie_core.model.vae.VAE`; CONDITIONING and LATENT are ComfyUI's.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from ..ernie_core.config import BASE
from ..ernie_core.errors import ErnieError, Interrupted
from ..ernie_core.sampling.inputs import LATENT_CHANNELS, check_latent, check_text
from .progress import ProgressBar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..ernie_core.sampling.guidance import Denoise, GuidanceRun

logger = logging.getLogger(__name__)

TINY_FOLDER = Path(__file__).resolve().parents[1] / "tiny" / "ernie-image-tiny"
SEARCH_DEPTH = 3  # folders below the models folder in which official folders are looked for

# Released file names and, per kind, the sub-folders of an official folder that hold the same weights.
RELEASED: dict[str, tuple[str, ...]] = {
    "diffusion_models": ("ernie-image.safetensors", "ernie-image-turbo.safetensors"),
    "text_encoders": ("ministral-3-3b.safetensors", "ernie-image-prompt-enhancer.safetensors"),
    "vae": ("flux2-vae.safetensors",),
}
PARTS: dict[str, tuple[str, ...]] = {
    "diffusion_models": ("transformer",),
    "text_encoders": ("text_encoder", "pe"),
    "vae": ("vae",),
}


@dataclass(kw_only=True)
class Session:
    """Where this process reads and writes; set once by the command line."""

    models: Path | None = None
    """Folder with models; None = the tiny model."""
    output: Path = Path("out")
    input: Path = Path("input")
    label: str = ""
    """What the progress line says: the node that runs."""
    interrupted: bool = False
    saved: list[Path] = field(default_factory=list)
    shown: dict[str, str] = field(default_factory=dict)
    """Text that nodes showed, by node id."""
    on_studio: Callable[[Any], None] | None = None
    """Called with what makes a node's rows, before the node reads them; a worker takes it and leaves the graph."""
    make_rows: Callable[..., Any] | None = None
    """What makes rows in the place of the engine's `run_rows`: workers elsewhere. None = this process."""


session = Session()
_resident: WeakSet = WeakSet()  # modules on the accelerator


@dataclass(frozen=True, kw_only=True)
class Model:
    """MODEL: the transformer and the sampling shift that schedulers read."""

    dit: Any
    shift: float = BASE.shift
    loras: tuple[Any, ...] = ()
    """LoRAs in use, in the order in which they act."""
    skip: tuple[int, ...] = ()
    """Blocks that are left out."""
    guidance: tuple[Any, ...] = ()
    """Guidance rules, in the order in which they were added."""
    step_cache: Any = None
    """When evaluations may be left out, and the node that says how many were."""
    experts: tuple[Any, ...] = ()
    """Who denoises which noise levels; the model itself where nobody does."""
    expert_blend: float = 0.0
    inner: Any = None
    """How hard inpainting walks (`InnerIterations`); None = plain masking."""
    nag: Any = None
    """A negative prompt in the attention."""
    variety: Any = None
    """Noise in the prompt's features."""
    style: tuple[Any, ...] = ()
    """References' statistics, in the order in which they act."""
    tiles: Any = None
    """How large pictures are cut (`Tiles`); None = not at all."""


@dataclass(frozen=True, kw_only=True)
class TextModel:
    """CLIP: text encoder and tokenizer."""

    encoder: Any
    tokenizer: Any


@dataclass(frozen=True, kw_only=True)
class LoadedEnhancer:
    """ERNIE_ENHANCER: the language model and the file it came from."""

    enhancer: Any
    source: str

    @property
    def fingerprint(self) -> str:
        """Changes with the model file."""
        from ..ernie_core.enhancing.disk_cache import fingerprint

        return fingerprint(self.source)

    def enhance_variants(
        self,
        prompt: str,
        width: int,
        height: int,
        *,
        seeds: Sequence[int],
        on_token: Callable[[int, str], None],
        **settings: Any,
    ) -> list[str]:
        """Return the engine's answers; can be interrupted at each token."""

        def tell(row: int, text: str) -> None:
            throw_if_interrupted()
            on_token(row, text)

        model = _bring(self.enhancer)
        return model.enhance_variants(prompt, width, height, seeds=seeds, on_token=tell, **settings)


# ---------------------------------------------------------------------------------------------------- files


def host_version() -> tuple[int, ...] | None:
    """None: there is no ComfyUI here."""
    return None


def models_folder() -> Path:
    """Where a download goes."""
    return session.models or Path("models")


def output_folder() -> Path:
    session.output.mkdir(parents=True, exist_ok=True)
    return session.output.resolve()  # paths of saved files are absolute


def input_folder() -> Path:
    return session.input


def user_folder() -> Path:
    """Where people's judgments are kept."""
    return output_folder() / "user"


def picture_folders() -> list[Path]:
    """Folders whose pictures a tournament may use."""
    return [input_folder(), output_folder()]


def serve(routes: Mapping[str, Any], statuses: Mapping[type[Exception], int]) -> None:
    """Do nothing: there is no server here."""


def watch_queue(look: Callable[[dict], None]) -> None:
    """Do nothing: there is no queue here."""


def jobs_folder() -> Path:
    """Where training jobs are kept."""
    return output_folder() / "ernie_jobs"


def loras_folder() -> Path:
    """Where a finished LoRA goes."""
    return (session.models.resolve() if session.models else output_folder()) / "loras"


def list_loras() -> list[str]:
    """Return file names in the folder of LoRAs."""
    folder = loras_folder()
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.safetensors"))


def lora_path(name: str) -> Path:
    """Return the file behind a name from `list_loras`; ErnieError when there is none."""
    path = loras_folder() / name
    if not path.is_file():
        raise ErnieError(f"{name!r} expected in {loras_folder()}, it is not there; choose another.")
    return path


def take_studio(studio: Any) -> None:
    """Tell a worker what makes the rows of the node that is running."""
    if session.on_studio is not None:
        session.on_studio(studio)


def makes_rows_here() -> bool:
    """Whether this process makes the rows of batches and grids, and so needs their models."""
    return session.make_rows is None


def run_rows(rows: Sequence[Any], folder: Path, studio: Any) -> Any:
    """Return the engine's result of a batch or grid, made here or by workers elsewhere."""
    from ..ernie_core import batch

    if session.make_rows is None:
        return batch.run_rows(rows, folder, **studio.callbacks())
    result = session.make_rows(rows, folder, studio)
    session.saved += result.files
    return result


def preview_folder() -> Path:
    """Where PreviewImage writes: kept, unlike ComfyUI's temp folder, since nobody watches."""
    folder = output_folder() / "preview"
    folder.mkdir(exist_ok=True)
    return folder


def list_models(kind: str) -> list[str]:
    """Return file names below the folder of `kind`, then official folders that hold this kind (end with "/")."""
    _check_kind(kind)
    if session.models is None:
        return [*RELEASED[kind], f"{TINY_FOLDER.name}/"]
    folder = session.models / kind
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.safetensors")) if folder.is_dir() else []
    official = _official_folders(kind)
    inside = {part for path in official.values() for part in path.rglob("*.safetensors")}
    files = [name for name in files if folder / name not in inside]
    stand_ins = [name for name in RELEASED[kind] if name not in files and _stand_in(kind, name, official) is not None]
    return [*files, *stand_ins, *official]


def model_path(kind: str, name: str) -> Path:
    """Return the file or folder behind a name from `list_models`; ErnieError when there is none."""
    _check_kind(kind)
    if session.models is None:
        if name not in (*RELEASED[kind], f"{TINY_FOLDER.name}/"):
            raise ErnieError(
                f"one of {', '.join(list_models(kind))} expected, got {name!r}; "
                "give the folder of your models with --models."
            )
        if not TINY_FOLDER.is_dir():
            raise ErnieError(f"the tiny model expected in {TINY_FOLDER}, it is not there; give a folder with --models.")
        return TINY_FOLDER
    file = session.models / kind / name
    if file.exists():
        return file
    official = _official_folders(kind)
    found = official.get(name) or _stand_in(kind, name, official)
    if found is None:
        raise ErnieError(
            f"{name!r} expected in {session.models / kind}, it is not there; there are: "
            f"{', '.join(list_models(kind)) or 'no models'}. Put the file there or choose another with --set."
        )
    return found


def _check_kind(kind: str) -> None:
    assert kind in PARTS, f"kind is one of {tuple(PARTS)}, got {kind!r}"


def _official_folders(kind: str) -> dict[str, Path]:
    """Return shown name -> path of every official folder that holds weights of this kind."""
    root = session.models
    found: dict[str, Path] = {}
    for folder, children, files in os.walk(root):
        path = Path(folder)
        depth = len(path.relative_to(root).parts)
        is_official = "model_index.json" in files or any(
            (path / p / "config.json").is_file() for p in sum(PARTS.values(), ())
        )
        if is_official and any((path / part).is_dir() for part in PARTS[kind]):
            base = root / kind if path.is_relative_to(root / kind) else root
            found.setdefault(f"{path.relative_to(base).as_posix()}/", path)
        if is_official or depth >= SEARCH_DEPTH:
            children.clear()
    return dict(sorted(found.items()))


def _stand_in(kind: str, name: str, official: Mapping[str, Path]) -> Path | None:
    """Return the official folder that holds what a released file name means, so that workflow files run unchanged."""
    if name not in RELEASED[kind]:
        return None
    if kind != "diffusion_models":
        return next(iter(official.values()), None)
    wanted = Path(name).stem
    return next((p for p in official.values() if p.resolve().name.lower().replace("_", "-") == wanted), None)


def save_png(
    image_HWC: Tensor,
    path: Path,
    *,
    prompt: Any = None,
    extra_pnginfo: Mapping[str, Any] | None = None,
    entries: Mapping[str, str] | None = None,
) -> None:
    """Write a picture in [0, 1] with `prompt` and `workflow` inside, so that it can be dragged into ComfyUI.

    The file appears under its name only when it is complete; ErnieError when the disk is full or cannot be written to.
    """
    import numpy as np
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    pixels = np.clip(255.0 * image_HWC.float().cpu().numpy(), 0, 255).astype(np.uint8)
    info = PngInfo()
    if prompt is not None:
        info.add_text("prompt", json.dumps(prompt))
    for name, value in (extra_pnginfo or {}).items():
        info.add_text(name, json.dumps(value))
    for name, text in (entries or {}).items():
        info.add_text(name, text)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            Image.fromarray(pixels).save(file, format="PNG", pnginfo=info, compress_level=4)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
    except OSError as e:
        raise ErnieError(
            f"{path} could not be written ({e.strerror or e}). Free some space or choose another folder."
        ) from e
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    session.saved.append(path)


def preview_images(images_BHWC: Tensor) -> list[dict[str, str]]:
    """Write pictures in [0, 1] into the preview folder; {filename, subfolder, type} of each, as ComfyUI names them."""
    paths = save_images(images_BHWC, folder=preview_folder(), prefix="compare", prompt=None, extra_pnginfo=None)
    return [{"filename": path.name, "subfolder": "", "type": "temp"} for path in paths]


def save_images(
    images: Any, *, folder: Path, prefix: str, prompt: Any, extra_pnginfo: Mapping[str, Any] | None
) -> list[Path]:
    """Write a batch as `prefix_00001_.png` and on, never over an existing file; returns the paths.

    `prefix` may hold a sub-folder and ComfyUI's %year% %month% %day% %hour% %minute% %second% %width% %height%
    %batch_num% and %date:yyyy-MM-dd%.
    """
    height, width = images[0].shape[:2]
    target = (folder / _fill_name(prefix, width, height)).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise ErnieError(
            f"a name inside the output folder expected, got {prefix!r}; leave out '..' and absolute paths."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    taken = re.compile(re.escape(target.name) + r"_(\d+)_")
    numbers = [int(m.group(1)) for p in target.parent.iterdir() if (m := taken.match(p.name))]
    paths = []
    for i, image in enumerate(images):
        name = f"{target.name.replace('%batch_num%', str(i))}_{max(numbers, default=0) + 1 + i:05}_.png"
        paths.append(target.parent / name)
        save_png(image, paths[-1], prompt=prompt, extra_pnginfo=extra_pnginfo)
    return paths


def _fill_name(prefix: str, width: int, height: int) -> str:
    now = time.localtime()
    words = {
        "%year%": "%Y",
        "%month%": "%m",
        "%day%": "%d",
        "%hour%": "%H",
        "%minute%": "%M",
        "%second%": "%S",
    }
    for word, code in words.items():
        prefix = prefix.replace(word, time.strftime(code, now))
    codes = {"yyyy": "%Y", "yy": "%y", "MM": "%m", "dd": "%d", "hh": "%H", "mm": "%M", "ss": "%S"}

    def date(found: re.Match) -> str:
        return re.sub("yyyy|yy|MM|dd|hh|mm|ss", lambda m: time.strftime(codes[m.group()], now), found.group(1))

    prefix = re.sub(r"%date:([^%]*)%", date, prefix)
    return prefix.replace("%width%", str(width)).replace("%height%", str(height))


# ---------------------------------------------------------------------------------------------------- telling


def progress(total: int) -> ProgressBar:
    return ProgressBar(session.label, total)


def throw_if_interrupted() -> None:
    if session.interrupted:
        raise Interrupted("stopped by the user")


def is_interrupted() -> bool:
    """Say whether the user asked to stop."""
    return session.interrupted


def block_output() -> Any:
    """Return what keeps the nodes behind an output from running."""
    from .graph import Blocked

    return Blocked(None)


def unload_models() -> None:
    """Give the accelerator's memory back, for another process to use."""
    import torch

    for module in list(_resident):
        module.to("cpu")
        _resident.discard(module)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def show_text(node_id: str | None, text: str) -> None:
    """Keep what a node shows; the command line prints the last version when the node is done."""
    session.shown[str(node_id)] = text
    if sys.stderr.isatty():
        tail = " ".join(text.split())[-60:]
        sys.stderr.write(f"\r\x1b[K{session.label}: {tail}")
        sys.stderr.flush()


# ---------------------------------------------------------------------------------------------------- models


def device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(weight_dtype: str = "default") -> torch.dtype:
    """Return the dtype of weights and activations: by default bf16 on CUDA, fp32 on the CPU."""
    import torch

    dtypes = {
        "default": torch.bfloat16 if device().type == "cuda" else torch.float32,
        "bf16": torch.bfloat16,
        "fp32": torch.float32,
    }
    if weight_dtype not in dtypes:
        raise ErnieError(
            f"weight_dtype {' or '.join(dtypes)} expected without ComfyUI, got {weight_dtype!r}; "
            "set weight_dtype=default."
        )
    return dtypes[weight_dtype]


def _bring(module: Any) -> Any:
    """Return `module` on the device; the others leave it when it would not fit beside them."""
    import torch

    where = device()
    if where.type == "cpu" or module in _resident:
        return module
    needed = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if 1.2 * needed + 4 * 2**30 > free:  # 4 GiB: activations of a 2-megapixel step or decode
        for other in list(_resident):
            other.to("cpu")
            _resident.discard(other)
        torch.cuda.empty_cache()
    _resident.add(module)
    return module.to(where)


def _too_large(module: Any) -> bool:
    """Whether the device could not hold `module` with 2 GiB to compute in, were it empty."""
    import torch

    where = device()
    if where.type == "cpu":
        return False
    needed = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    return needed + 2 * 2**30 > torch.cuda.mem_get_info(where)[1]


def make_model(component: Any, *, weight_dtype: str = "default") -> Model:
    from ..ernie_core.weights.checkpoint import build_transformer

    return Model(dit=build_transformer(component, dtype=compute_dtype(weight_dtype), device="cpu").eval())


def make_clip(component: Any, *, rope: str = "yarn") -> TextModel:
    from ..ernie_core.weights.checkpoint import build_text_encoder

    encoder, tokenizer = build_text_encoder(component, dtype=compute_dtype(), device="cpu", rope=rope)
    return TextModel(encoder=encoder.eval(), tokenizer=tokenizer)


def make_vae(component: Any, *, weight_dtype: str = "default") -> Any:
    from ..ernie_core.weights.checkpoint import build_vae

    return build_vae(component, dtype=compute_dtype(weight_dtype), device="cpu").eval()


def make_enhancer(component: Any) -> LoadedEnhancer:
    from ..ernie_core.weights.checkpoint import build_enhancer

    enhancer = build_enhancer(component, dtype=compute_dtype(), device="cpu").eval()
    return LoadedEnhancer(enhancer=enhancer, source=str(component.source))


def encode_prompt(clip: TextModel, text: str) -> list:
    """Return CONDITIONING of one prompt at its true length."""
    hidden_TD = _bring(clip.encoder).encode_ids([clip.tokenizer.encode(text)])[0]
    return [[hidden_TD[None].cpu(), {"pooled_output": None}]]


def count_tokens(clip: TextModel, text: str) -> int:
    """Return how many tokens `text` has, also beyond what the encoder reads."""
    return len(clip.tokenizer.encode(text, max_tokens=None))


def set_shift(model: Model, shift: float) -> Model:
    """Return a model with this sampling shift; the same object when it has it already."""
    return model if model.shift == shift else replace(model, shift=shift)


def num_blocks(model: Model) -> int:
    """Return how many transformer blocks a MODEL has."""
    return len(model.dit.layers)


def skip_blocks(model: Model, blocks: Sequence[int]) -> Model:
    """Return a model whose blocks of these numbers hand on what they get."""
    return replace(model, skip=tuple(sorted({*model.skip, *blocks})))


# ---------------------------------------------------------------------------------------------------- guidance


def add_guidance(model: Model, rules: Sequence[Any]) -> Model:
    """Return a model that samples under these guidance rules too, or `model` itself where none changes anything."""
    from ..ernie_core.sampling.guidance import check_blocks, without_neutral

    added = without_neutral(rules)
    check_blocks(added, num_blocks(model))
    return replace(model, guidance=(*model.guidance, *added)) if added else model


# ---------------------------------------------------------------------------------------------------- step cache


def set_step_cache(model: Model, cache: Any, *, node_id: str | None = None) -> Model:
    """Return a model that leaves evaluations out by a `StepCache`, or `model` itself where none can be left out."""
    if cache.is_neutral:
        return model
    if model.step_cache is not None:
        logger.warning("The Step Cache (ERNIE) before this one is not used: one model has one. Remove one of the two.")
    return replace(model, step_cache=(cache, node_id))


@contextmanager
def _step_cache_run(model: Model) -> Iterator[Any]:
    """Give one run's cache, or None; says at the end, interrupted or not, how much was left out."""
    if model.step_cache is None:
        yield None
        return
    from ..ernie_core.sampling.cache import StepCacheRun

    cache, node_id = model.step_cache
    run = StepCacheRun.of(cache, model.dit.config)
    try:
        yield run
    finally:
        logger.info("Step Cache (ERNIE): %s.", run.report())
        show_text(node_id, run.report())


def add_nag(model: Model, negative: list, **settings: float) -> Model:
    """Return a model with a negative prompt in its attention, or `model` itself at neutral settings."""
    from ..ernie_core.sampling.nag import nag_from

    nag = nag_from(negative, model.dit.config.text_in_dim, **settings)
    if nag.is_neutral:
        return model
    if model.nag is not None:
        logger.warning("This model had a negative prompt in its attention already: only the last one acts.")
    return replace(model, nag=nag)


def set_variety(model: Model, variety: Any) -> Model:
    """Return a model that paints under a noisy prompt while the noise level is high; `model` itself at strength 0."""
    if variety.is_neutral:
        return model
    if model.variety is not None:
        logger.warning(
            "The Seed Variety (ERNIE) before this one is not used: one model has one. Remove one of the two."
        )
    return replace(model, variety=variety)


def set_style(model: Model, style: Any) -> Model:
    """Return a model whose clean estimate is moved by `style` too; `model` itself where it never acts."""
    return model if style.is_neutral else replace(model, style=(*model.style, style))


# ---------------------------------------------------------------------------------------------------- LoRA


def checkpoints_folder() -> Path:
    """Where a merged transformer goes."""
    return (session.models.resolve() if session.models else output_folder()) / "diffusion_models"


def lora_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Return {module path: weight shape}."""
    from ..ernie_core.weights.lora import module_shapes

    return module_shapes(model.dit)


def apply_lora(
    model: Model,
    lora: Any,
    strengths: Mapping[str, float],
    *,
    start: float = 1.0,
    end: float = 0.0,
    blend: float = 0.0,
) -> Model:
    """Return a model with a LoRA, or `model` itself where that changes nothing; its weights are shared.

    `strengths` are per module, without those at 0; it acts from noise level `start` down to `end`, with a ramp of width
    `blend` across each edge. ErnieError when the levels run upwards or the LoRA changes a bias that the model does not
    have.
    """
    from ..ernie_core.weights.lora_edit import check_biases
    from ..ernie_core.weights.lora_hooks import LoraUse

    use = LoraUse(lora=lora, strengths=dict(strengths), start=start, end=end, blend=blend)
    if not strengths or start == end:
        return model
    check_biases(lora, strengths, dict(model.dit.named_parameters()))
    return replace(model, loras=(*model.loras, use))


def _with_loras(denoise: Denoise, dit: Any, loras: tuple[Any, ...]) -> Denoise:
    """Let LoRAs act on every call."""
    import torch

    from ..ernie_core.weights.lora_hooks import LoraStack

    if not loras:
        return denoise
    stack = _bring(LoraStack(loras))
    ratios: dict[Any, Tensor] = {}

    def call(x: Tensor, sigma: float) -> Tensor:
        with stack.applied(dit, torch.tensor([float(sigma)]), ratios):
            return denoise(x, sigma)

    return call


# ---------------------------------------------------------------------------------------------------- experts


def set_experts(model: Model, experts: Sequence[Any], *, blend: float = 0.0) -> Model:
    """Return a model whose noise levels are denoised by `experts`, models and guidance strengths; LoRAs are applied."""
    if model.experts:
        raise ErnieError("the model has experts already: put all of them into one chain of Expert (ERNIE) nodes.")
    if all(e.model is None and e.cfg is None for e in experts):
        return model
    for expert in experts:
        if expert.model is not None and expert.model.style:
            logger.warning(
                "The style statistics on the model of the expert for noise levels %g to %g are not used: put them on "
                "the mixture, where they act on all experts.",
                expert.band.start,
                expert.band.end,
            )
    return replace(model, experts=tuple(experts), expert_blend=blend)


# ---------------------------------------------------------------------------------------------------- scorers

SCORER_FOLDERS = ("scorers", "aesthetic", "clip_vision")
CAPTIONER_FOLDERS = ("captioners", "LLM", "VLM")


def list_scorers() -> list[str]:
    """Return weight files and model folders that may be scorers, with the name of their place in front."""
    from ..ernie_core.scoring.files import list_weights

    if session.models is None:
        return []
    return [f"{place}/{name}" for place in SCORER_FOLDERS for name in list_weights(session.models / place)]


def scorer_path(name: str) -> Path:
    """Return the file or folder behind a name from `list_scorers`; ErnieError when there is none."""
    if session.models is None or not (session.models / name).exists() or name.partition("/")[0] not in SCORER_FOLDERS:
        raise ErnieError(f"{name!r} expected in {session.models or '--models'}, it is not there; choose another.")
    return session.models / name


def list_captioners() -> list[str]:
    """Return model folders that may describe pictures, with the name of their place in front."""
    from ..ernie_core.scoring.files import list_weights

    if session.models is None:
        return []
    found = ((place, name) for place in CAPTIONER_FOLDERS for name in list_weights(session.models / place))
    return [f"{place}/{name}" for place, name in found if name.endswith("/")]


def captioner_path(name: str) -> Path:
    """Return the folder behind a name from `list_captioners`; ErnieError when there is none."""
    if session.models is None or name.partition("/")[0] not in CAPTIONER_FOLDERS:
        raise ErnieError(f"{name!r} expected in {session.models or '--models'}, it is not there; choose another.")
    return session.models / name


def tokenizer_folders() -> list[Path]:
    """Where CLIP's tokenizer may lie besides a scorer's own folder."""
    return [] if session.models is None else [session.models / "scorers" / "tokenizer"]


def scorer_layers() -> Any:
    """None: torch's own layers."""
    return None


def place_scorer(network: Any) -> Callable[[], torch.device]:
    """Return what brings a network to the device, its layers one by one where it is too large, and says which."""
    streamed = []

    def bring() -> torch.device:
        throw_if_interrupted()
        if not streamed and network not in _resident and _too_large(network):
            from ..ernie_core.scoring.streaming import stream_layers

            streamed.append(stream_layers(network, device()))
        if not streamed:
            _bring(network)
        return device()

    return bring


# ---------------------------------------------------------------------------------------------------- pictures


def empty_latent(width: int, height: int, batch_size: int) -> dict[str, Any]:
    """Return LATENT of zeros; ErnieError unless both sides are multiples of 16."""
    import torch

    from ..ernie_core.sampling.latents import latent_size

    return {"samples": torch.zeros(batch_size, LATENT_CHANNELS, *latent_size(width, height))}


def prepare_noise(latent: Mapping[str, Any], seed: int) -> Tensor:
    """Return noise of the latent's shape by ComfyUI's rule: one CPU generator, the whole batch in one draw.

    With `batch_index` in the latent, picture i gets the batch_index[i]-th draw of one picture.
    """
    import torch

    samples = latent["samples"]
    generator = torch.Generator("cpu").manual_seed(seed)
    indices = latent.get("batch_index")
    if indices is None:
        return torch.randn(samples.shape, generator=generator)
    draws = [torch.randn(1, *samples.shape[1:], generator=generator) for _ in range(max(indices) + 1)]
    return torch.cat([draws[i] for i in indices])


def sample(
    model: Model,
    *,
    positive: list,
    negative: list | None,
    latent: Mapping[str, Any],
    sigmas: Tensor,
    cfg: float,
    seed: int,
    sampler: Any = None,
) -> dict[str, Any]:
    """Return LATENT after a sampler's steps along `sigmas` (None: Euler), from noise mixed into `latent` at the first.

    `sampler`: an engine `Sampler`.
    """
    noise = prepare_noise(latent, seed)
    samples, _ = sample_from_noise(
        model,
        positive=positive,
        negative=negative,
        latent=latent,
        sigmas=sigmas,
        cfg=cfg,
        noise=noise,
        sampler=sampler,
        seed=seed,
    )
    return _with_samples(latent, samples)


def make_sampler(sampler: Any) -> Any:
    """Return SAMPLER: here the engine's own."""
    return sampler


def _with_samples(latent: Mapping[str, Any], samples: Tensor) -> dict[str, Any]:
    return {**latent, "samples": samples}


def sample_from_noise(
    model: Model,
    *,
    positive: list,
    negative: list | None,
    latent: Mapping[str, Any],
    sigmas: Tensor,
    cfg: float,
    noise: Tensor,
    sampler: Any = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return (final samples, the last step's clean estimate), both fp32 on the CPU."""
    import torch

    from ..ernie_core.sampling.guidance import GuidanceRun
    from ..ernie_core.sampling.latents import mix_noise, step_noise
    from ..ernie_core.sampling.samplers import Sampler
    from ..ernie_core.sampling.variety import VarietyRun

    start = _check_latent(latent).float()
    if len(sigmas) < 2:  # denoise 0
        return start, start
    if negative is None and cfg != 1:
        raise ErnieError(f"a negative prompt expected at cfg {cfg:g}, none came; connect one, or set cfg to 1.")
    for name, conditioning in (("positive", positive), ("negative", negative)):
        if conditioning is not None:
            _check_conditioning(model.dit.config.text_in_dim, name, conditioning)
    where = device()
    start, noise = start.to(where), noise.to(where)
    batch, size = start.shape[0], (start.shape[2], start.shape[3])
    guidance = GuidanceRun(model.guidance, sigmas)
    cached = ExitStack()
    run = cached.enter_context(_step_cache_run(model))
    varied = None if model.variety is None else VarietyRun(model.variety, noise)
    denoise = _denoise_of(model, positive, negative, batch, size, cfg, guidance, run, varied)
    if latent.get("noise_mask") is not None:
        denoise = _masked(denoise, latent["noise_mask"], start, noise, model.inner)
    sampler = sampler or Sampler()
    draw_noise = step_noise([(seed, place) for place in latent.get("batch_index") or range(batch)])
    bar = progress(sampler.calls(sigmas))
    last = start

    def on_step(call: int, _calls: int, _x: Tensor, x0: Tensor) -> None:
        nonlocal last
        last = x0
        bar.update_absolute(call + 1)
        throw_if_interrupted()

    with cached, torch.inference_mode():
        x = mix_noise(start, noise, float(sigmas[0]))
        x = sampler(denoise, x, sigmas, draw_noise=draw_noise, on_step=on_step)
    return x.cpu().clone(), last.cpu().clone()


def sample_branches(
    model: Model,
    *,
    branches: Mapping[str, tuple[list, list | None, float]],
    latent: Mapping[str, Any],
    sigmas: Tensor,
    run: Callable[..., Tensor],
    steps: int,
) -> dict[str, Any]:
    """Return LATENT that `run` makes of a picture with the model under several prompts.

    `branches` are {name: (positive, negative, cfg)}. `run` is called as run({name: denoise}, x0_BCHW, on_step=,
    mask_BCHW=None or a mask) and calls on_step `steps` times.
    """
    import torch

    from ..ernie_core.sampling.guidance import GuidanceRun
    from ..ernie_core.sampling.masks import fit_mask

    start = _check_latent(latent).float()
    if len(sigmas) < 2:  # strength 0
        return _with_samples(latent, start)
    start = start.to(device())
    batch, size = start.shape[0], (start.shape[2], start.shape[3])
    for branch, (positive, negative, _) in branches.items():
        for name, conditioning in (("prompt", positive), ("negative", negative)):
            if conditioning is not None:
                _check_conditioning(model.dit.config.text_in_dim, f"{branch} {name}", conditioning)
    mask = latent.get("noise_mask")
    bar = progress(steps)

    def on_step(step: int, steps: int, _x: Tensor, _x0: Tensor) -> None:
        bar.update_absolute(step + 1, steps)
        throw_if_interrupted()

    with torch.inference_mode(), _step_cache_run(model) as cache:
        # Guidance and the cache, which knows prompts by their lists, remember what they saw: each branch has its own.
        own = {b: (p[:], None if n is None else n[:], cfg) for b, (p, n, cfg) in branches.items()}
        denoise = {
            branch: _denoise_of(model, positive, negative, batch, size, cfg, GuidanceRun(model.guidance, sigmas), cache)
            for branch, (positive, negative, cfg) in own.items()
        }
        x = run(denoise, start, on_step=on_step, mask_BCHW=None if mask is None else fit_mask(mask, start))
    return _with_samples(latent, x.cpu().clone())


def add_region(conditioning: list, region: list, mask: Tensor, strength: float) -> list:
    """Return CONDITIONING with one region more; see the engine's `add_region`."""
    from ..ernie_core.sampling import regions

    return regions.add_region(conditioning, region, mask, strength)


def _denoise_of(
    model: Model,
    positive: list,
    negative: list | None,
    batch: int,
    size: tuple[int, int],
    cfg: float,
    run: GuidanceRun,
    cache: Any = None,
    varied: Any = None,
) -> Denoise:
    """Return what a MODEL does to a latent of `batch` pictures: its experts, LoRAs and left-out blocks included.

    Guidance is that of `run`, the step cache, a `StepCacheRun` or None, is `cache`, and the prompt's features are those
    of `varied`, a `VarietyRun` or None, whoever is asked.
    """
    from ..ernie_core.sampling.experts import mix
    from ..ernie_core.sampling.guidance import with_guidance
    from ..ernie_core.sampling.style import with_style

    if not model.experts:
        dit = _bring(model.dit)

        def make_cond(*without: int) -> Denoise:
            nag, tiles = model.nag, model.tiles
            return _make_denoise(dit, (*model.skip, *without), positive, batch, size, cache, nag, varied, tiles=tiles)

        denoise = with_guidance(
            make_cond(),
            None
            if negative is None or cfg == 1
            else _make_denoise(dit, model.skip, negative, batch, size, cache, tiles=model.tiles),
            cfg,
            run,
            without=lambda blocks: make_cond(*blocks),
        )
        return with_style(_with_loras(denoise, dit, model.loras), model.style)

    base = replace(model, experts=(), expert_blend=0.0)
    places = {id(e.model): i for i, e in enumerate(model.experts) if e.model is not None}

    @functools.cache
    def denoise_of(index: int, cfg: float) -> Denoise:
        if negative is None and cfg != 1:
            raise ErnieError(f"a negative prompt expected for the expert at cfg {cfg:g}, none came; connect one.")
        chosen = base if index < 0 else replace(model.experts[index].model, style=model.style)
        return _denoise_of(chosen, positive, negative, batch, size, cfg, run, cache, varied)

    def denoise_by(chosen: Model | None, cfg: float) -> Denoise:
        return denoise_of(places.get(id(chosen), -1), cfg)

    return mix(denoise_by, model.experts, cfg=cfg, blend=model.expert_blend)


def _check_latent(latent: Mapping[str, Any]) -> Tensor:
    """Return the samples; ErnieError when they are another model's or not finite."""
    check_latent(latent["samples"])
    return latent["samples"]


def _check_conditioning(width: int, name: str, conditioning: list) -> None:
    if len(conditioning) != 1:
        raise ErnieError(
            f"one conditioning expected as {name} without ComfyUI, {len(conditioning)} came; run this in ComfyUI."
        )
    check_text(name, conditioning[0][0], width)


def _make_denoise(
    dit: Any,
    skip: tuple[int, ...],
    conditioning: list,
    batch: int,
    size: tuple[int, int],
    cache: Any = None,
    nag: Any = None,
    varied: Any = None,
    tiles: Any = None,
) -> Denoise:
    """Return denoise(x, sigma) under one prompt; a conditioning batch repeats to the latent's batch, as on the host."""
    from ..ernie_core.sampling.regions import REGIONS_KEY
    from ..ernie_core.sampling.tiles import with_tiles

    boxes = [] if tiles is None else tiles.boxes(*size)
    if len(boxes) < 2:
        return _make_whole_denoise(dit, skip, conditioning, batch, size, cache, nag, varied, id(conditioning))
    text, extras = conditioning[0]
    regions = extras.get(REGIONS_KEY)

    def denoise_of(number: int, box: Any) -> Denoise:
        within = {} if regions is None else {REGIONS_KEY: regions.within(box, *size)}
        prompt, key = [[text, {**extras, **within}]], (id(conditioning), number)
        denoise = _make_whole_denoise(dit, skip, prompt, batch, (box.height, box.width), cache, nag, varied, key)

        def one_tile(x: Tensor, sigma: float) -> Tensor:
            throw_if_interrupted()
            return denoise(x, sigma)

        return one_tile

    return with_tiles(denoise_of, boxes)


def _make_whole_denoise(
    dit: Any,
    skip: tuple[int, ...],
    conditioning: list,
    batch: int,
    size: tuple[int, int],
    cache: Any,
    nag: Any,
    varied: Any,
    asked: Any,
) -> Denoise:
    """Return denoise(x, sigma) that makes one call; `asked` is by what a step cache knows the prompt and the tile."""
    from ..ernie_core.model.dit import call_block
    from ..ernie_core.pipeline import make_denoise
    from ..ernie_core.sampling.regions import REGIONS_KEY
    from ..ernie_core.sampling.variety import with_variety

    def run_kept(index: int, block: Any, x: Tensor, *inputs: Any) -> Tensor:
        return x if index in skip else call_block(index, block, x, *inputs)

    text_BTD, extras = conditioning[0]
    regions = extras.get(REGIONS_KEY)

    def make(text_BTD: Tensor, run_block: Any) -> Denoise:
        texts = [text_BTD[i % len(text_BTD)] for i in range(batch)]
        return make_denoise(dit, texts, *size, run_block=run_block, nag=nag, regions=regions)

    def follow(run_block: Any) -> Denoise:
        if varied is None:
            return make(text_BTD, run_block)
        return with_variety(lambda text_BTD: make(text_BTD, run_block), text_BTD, varied)

    run_block = run_kept if skip else call_block
    if cache is None:
        return follow(run_block)
    now = run_block

    def cached_block(index: int, block: Any, *inputs: Any) -> Tensor:
        return now(index, block, *inputs)

    denoise = follow(cached_block)

    def cached(x: Tensor, sigma: float) -> Tensor:
        nonlocal now
        # A negative prompt in the attention brings tokens of its own, in its range.
        key = (id(dit), dit.active_loras, asked, skip, nag is not None and nag.acts_at(sigma))
        now = cache.run_block(key, sigma, run_block)
        return denoise(x, sigma)

    return cached


def _masked(denoise: Denoise, mask: Tensor, start: Tensor, noise: Tensor, inner: Any) -> Denoise:
    """Hold what lies outside a noise mask, plainly or with inner iterations."""
    from ..ernie_core.sampling.langevin import with_inner_iterations
    from ..ernie_core.sampling.masks import fit_mask, hold_outside

    mask = fit_mask(mask, start)
    masked = hold_outside(denoise, mask, start, noise)
    if inner is None:
        return masked
    return with_inner_iterations(denoise, masked, mask_B1HW=mask, start_BCHW=start, how=inner)


def set_inner_iterations(model: Model, how: Any) -> Model:
    """Return a model that inpaints with these inner iterations in place of earlier ones; `model` where they are none.

    They act where the latent has a noise mask.
    """
    return model if how.is_neutral else replace(model, inner=how)


def set_tiles(model: Model, tiles: Any) -> Model:
    """Return a model that denoises pictures larger than a tile in tiles, in place of earlier ones."""
    return replace(model, tiles=tiles)


def decode(vae: Any, latent: Mapping[str, Any]) -> Tensor:
    """Return IMAGE [B, H, W, 3] in [0, 1]; one picture at a time."""
    return _decode_each(latent, _bring(vae).decode_fitting, vae)


def decode_tiled(vae: Any, latent: Mapping[str, Any], *, tile_px: int, overlap_px: int) -> Tensor:
    """`decode` in tiles; can be interrupted between them."""

    def on_tile(done: int, total: int) -> None:
        bar.update_absolute(done, total)
        throw_if_interrupted()

    bar = progress(1)
    vae = _bring(vae)
    return _decode_each(
        latent, lambda z: vae.decode_tiled(z, tile_px=tile_px, overlap_px=overlap_px, on_tile=on_tile), vae
    )


def _decode_each(latent: Mapping[str, Any], run: Callable[[Tensor], Tensor], vae: Any) -> Tensor:
    import torch

    weight = next(vae.parameters())
    pictures = []
    with torch.inference_mode():
        for one in _check_latent(latent).split(1):
            throw_if_interrupted()
            image_BCHW = run(one.to(weight))
            pictures.append((image_BCHW.float().cpu() / 2 + 0.5).clamp(0, 1).movedim(1, -1).clone())
    return torch.cat(pictures)


def encode(vae: Any, image_BHWC: Tensor) -> dict[str, Any]:
    """Return LATENT of pictures in [0, 1]; sides are cropped to multiples of 16 around the middle, as on the host."""
    import torch

    height, width = (side // 16 * 16 for side in image_BHWC.shape[1:3])
    top, left = (image_BHWC.shape[1] - height) // 2, (image_BHWC.shape[2] - width) // 2
    image_BHWC = image_BHWC[:, top : top + height, left : left + width, :3]
    vae = _bring(vae)
    weight = next(vae.parameters())
    with torch.inference_mode():
        parts = [vae.encode((one.movedim(-1, 1) * 2 - 1).to(weight)).float().cpu() for one in image_BHWC.split(1)]
    return {"samples": torch.cat(parts).clone()}
