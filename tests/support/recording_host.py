"""A stand-in for `nodes.host` that writes down what reaches it: same names, no models, tiny tensors."""

from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image


class RecordingHost:
    """Every call is appended to `calls` as (name, values); tensors are written down as lists."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.calls: list[tuple] = []

    def _note(self, name, *values):
        self.calls.append((name, *(_plain(v) for v in values)))

    def host_version(self):
        return None

    def take_studio(self, studio):
        pass

    def makes_rows_here(self):
        return True

    def run_rows(self, rows, folder, studio):
        from ernie_pack.ernie_core import batch

        return batch.run_rows(rows, folder, **studio.callbacks())

    def list_models(self, kind):
        return {"vae": ["v1.safetensors", "v2.safetensors"]}.get(kind, ["a.safetensors", "b.safetensors", "official/"])

    def model_path(self, kind, name):
        self._note("model_path", kind, name)
        return self.folder / kind / name

    def models_folder(self):
        return self.folder / "models"

    def output_folder(self):
        return self.folder / "output"

    def input_folder(self):
        return self.folder / "input"

    def user_folder(self):
        return self.folder / "user"

    def picture_folders(self):
        return [self.input_folder(), self.output_folder()]

    def serve(self, routes, statuses):
        self._note("serve", *routes)

    def watch_queue(self, look):
        self._note("watch_queue", look)

    def jobs_folder(self):
        return self.output_folder() / "ernie_jobs"

    def loras_folder(self):
        return self.folder / "loras"

    def list_loras(self):
        return ["first.safetensors", "second.safetensors"]

    def lora_path(self, name):
        return self.loras_folder() / name

    def list_scorers(self):
        return ["scorers/head.pth", "clip_vision/clip/"]

    def scorer_path(self, name):
        return self.folder / "models" / name

    def tokenizer_folders(self):
        return []

    def list_captioners(self):
        return ["VLM/vlm/"]

    def captioner_path(self, name):
        return self.folder / name

    def scorer_layers(self):
        return None

    def place_scorer(self, network):
        self._note("place_scorer", type(network).__name__)
        return lambda: torch.device("cpu")

    def num_blocks(self, model):
        return 36

    def skip_blocks(self, model, blocks):
        self._note("skip_blocks", model, tuple(blocks))
        return model

    def set_step_cache(self, model, cache, *, node_id=None):
        self._note("set_step_cache", model, cache)
        return model

    def set_tiles(self, model, tiles):
        self._note("set_tiles", model, tiles)
        return model

    def add_nag(self, model, negative, **settings):
        self._note("add_nag", model, negative, sorted(settings.items()))
        return model

    def set_variety(self, model, variety):
        self._note("set_variety", model, variety)
        return model

    def set_style(self, model, style):
        self._note("set_style", model, style)
        return model

    def add_guidance(self, model, rules):
        self._note("add_guidance", model, tuple(rules))
        return model

    def unload_models(self):
        self._note("unload_models")

    def checkpoints_folder(self):
        return self.folder / "diffusion_models"

    def device(self):
        return torch.device("cpu")

    def make_model(self, component, *, weight_dtype):
        self._note("make_model", component, weight_dtype)
        return "MODEL"

    def make_clip(self, component, *, rope):
        self._note("make_clip", component, rope)
        return "CLIP"

    def make_vae(self, component, *, weight_dtype):
        self._note("make_vae", component, weight_dtype)
        return "VAE"

    def make_enhancer(self, component):
        self._note("make_enhancer", component)
        return RecordingEnhancer(self)

    def encode_prompt(self, clip, text):
        self._note("encode_prompt", clip, text)
        return [[text, {}]]

    def count_tokens(self, clip, text):
        self._note("count_tokens", clip, text)
        return len(text.split())

    def set_shift(self, model, shift):
        self._note("set_shift", model, shift)
        return model

    def sample(self, model, *, positive, negative, latent, sigmas, cfg, seed, **sampler):
        shape = latent["samples"].shape
        self._note("sample", model, positive, negative, shape, sigmas, cfg, seed, *sampler.values())
        return latent

    def make_sampler(self, sampler):
        self._note("make_sampler", sampler)
        return "SAMPLER"

    def add_region(self, conditioning, region, mask, strength):
        self._note("add_region", conditioning, region, mask, strength)
        return conditioning

    def sample_branches(self, model, *, branches, latent, sigmas, run, steps):
        self._note("sample_branches", model, branches, latent["samples"].shape, sigmas, run, steps)
        return latent

    def empty_latent(self, width, height, batch_size):
        self._note("empty_latent", width, height, batch_size)
        return {"samples": torch.zeros(batch_size, 1, height // 16, width // 16)}

    def encode(self, vae, image_BHWC):
        self._note("encode", vae, image_BHWC)
        batch, rows, columns = image_BHWC.shape[:3]
        return {"samples": torch.zeros(batch, 1, rows // 16, columns // 16)}

    def set_inner_iterations(self, model, how):
        self._note("set_inner_iterations", model, how)
        return model

    def decode(self, vae, latent):
        rows, columns = latent["samples"].shape[2:]
        return torch.zeros(1, rows, columns, 3)

    def save_png(self, image_HWC, path, *, prompt, extra_pnginfo, entries):
        self._note("save_png", path.parent.name, entries)
        Image.fromarray((image_HWC * 255).byte().numpy()).save(path)

    def preview_images(self, images_BHWC):
        self._note("preview_images", images_BHWC)
        return [{"filename": f"{i}.png", "subfolder": "", "type": "temp"} for i in range(len(images_BHWC))]

    def progress(self, total):
        return SimpleNamespace(update_absolute=lambda value, total=None, preview=None: None)

    def is_interrupted(self):
        return False

    def block_output(self):
        return "BLOCKED"

    def throw_if_interrupted(self):
        pass

    def show_text(self, node_id, text):
        pass


class RecordingEnhancer:
    fingerprint = "enhancer.safetensors"

    def __init__(self, host: RecordingHost):
        self.host = host

    def enhance_variants(self, prompt, width, height, *, seeds, on_token, **settings):
        self.host._note("enhance", prompt, width, height, list(seeds), sorted(settings.items()))
        on_token(0, "a detailed")
        return [f"a detailed {prompt}".replace("LOST", "...") for _ in seeds]


def _plain(value):
    return value.tolist() if isinstance(value, torch.Tensor) else value
