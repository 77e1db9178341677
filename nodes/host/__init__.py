"""ComfyUI as host: the only folder that touches comfy.*, folder_paths, latent_preview and server.

The port that the nodes use, one file per subject; `standalone/host.py` offers the same functions without ComfyUI. Facts
about the host are from 0.12.1 and 0.33.0. Host modules are imported where they are used, so that these files can be
imported anywhere.
"""

from .batches import makes_rows_here, run_rows, take_studio
from .cache import set_step_cache
from .captioners import captioner_path, list_captioners
from .editing import sample_branches
from .experts import set_experts
from .files import (
    checkpoints_folder,
    input_folder,
    jobs_folder,
    list_loras,
    list_models,
    lora_path,
    loras_folder,
    model_path,
    models_folder,
    output_folder,
    picture_folders,
    user_folder,
)
from .guidance import add_guidance
from .inpainting import encode, set_inner_iterations
from .loras import apply_lora, lora_shapes
from .models import add_nag, make_model, num_blocks, set_shift, skip_blocks
from .pictures import save_png
from .previews import preview_images
from .regions import add_region
from .routes import serve, watch_queue
from .runtime import (
    block_output,
    device,
    host_version,
    is_interrupted,
    progress,
    show_text,
    throw_if_interrupted,
    unload_models,
)
from .sampling import empty_latent, make_sampler, sample
from .scorers import list_scorers, place_scorer, scorer_layers, scorer_path, tokenizer_folders
from .style import set_style
from .text import count_tokens, encode_prompt, make_clip, make_enhancer
from .tiles import set_tiles
from .vae import decode, make_vae
from .variety import set_variety
