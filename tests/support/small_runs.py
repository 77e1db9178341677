"""Makes an API-format workflow small enough for a test: few pixels, few steps, few words."""

from __future__ import annotations

import copy
import math
from pathlib import Path

from broken_images import BROKEN
from PIL import Image
from rated_images import draw_rated, write_rows
from small_data import write_pairs, write_pictures

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))

SIDES = ("width", "height")
MARGINS = ("left", "top", "right", "bottom")
EVALUATED = ("color", "counting")  # of the sixteen categories of the example set
MAX_WORDS = 12  # tokens that an enhancer with random weights writes; it never ends by itself


def shrink(prompt: dict, *, side_px: int, steps: int) -> dict:
    """A copy of an API-format workflow that draws `side_px` x `side_px` pictures in at most `steps` steps."""
    small = copy.deepcopy(prompt)
    final_px, scales = (
        side_px,
        [n["inputs"]["scale"] for n in small.values() if n["class_type"] == "ErnieUpscaleLatent"],
    )
    side_px = round(side_px / math.prod(scales))
    for node in small.values():
        inputs = node["inputs"]
        if node["class_type"] == "PrimitiveInt" and (node.get("_meta") or {}).get("title", "").lower() in SIDES:
            inputs["value"] = side_px
        for side in SIDES:
            if isinstance(inputs.get(side), int):
                inputs[side] = side_px
        if node["class_type"] == "ErnieEmptyLatent":
            inputs["size"] = "custom"
        if str(inputs.get("preset", "")).startswith("Base"):
            inputs["preset"] = "custom"
        if "steps" in inputs and inputs.get("preset", "custom") == "custom":
            inputs["steps"] = min(steps, inputs["steps"])
        if "max_new_tokens" in inputs:
            inputs["max_new_tokens"] = MAX_WORDS
        if node["class_type"] == "ErnieRecipeDistil":
            inputs |= {"fake_warmup": 1, "fake_updates": 1, "trajectory_steps": min(1, inputs["trajectory_steps"])}
        if node["class_type"] in ("ErnieRecipe", "ErnieRecipeDPO", "ErnieRecipeDistil"):
            inputs |= {"rank": 2, "resolution": str(side_px), "precision": "fp32", "save_every": steps}
            inputs |= {"sample_width": side_px, "sample_height": side_px, "sample_every": 0}
            if node["class_type"] != "ErnieRecipeDistil":  # which samples on the student's grid
                inputs["settings"] = f"[samples]\nbase_steps = {steps}"
        if node["class_type"] == "ErnieCurateFilter":
            inputs["min_side"] = 0  # the pictures to learn from are smaller still
        if node["class_type"] == "ErnieChoosePairs":
            inputs["source"] = "scorer"  # nobody is there to answer the tournament
        if node["class_type"] == "ErnieInpaintPrepare":
            inputs |= {m: side_px for m in MARGINS if inputs[m]} | {"size": side_px}
        if node["class_type"] == "ErnieTiledSampling":
            inputs |= {"tile": final_px // 2, "overlap": final_px // 4}
        if node["class_type"] == "ErniePromptSet":
            inputs["categories"] = ", ".join(EVALUATED)
        if node["class_type"] == "ErnieTrain":
            inputs["process"] = "this one"  # the worker's start alone takes longer than such a run
    return small


def write_inputs(folder: Path, *, side_px: int = 128) -> None:
    """What people put into the input folder for our workflows, in miniature; pictures to change have `side_px`."""
    write_masked_picture(folder / "example.png", side_px)
    write_pictures(folder / "ernie_train", count=3)
    write_pairs(folder / "ernie_pairs", count=2)
    write_pictures(folder / "ernie_scores" / "a", count=3, captions=False)
    write_pictures(folder / "ernie_scores" / "b", count=2, captions=False)
    write_pictures(folder / "ernie_tournament", count=6, captions=False)
    write_pictures(folder / "ernie_pile" / "3_square", count=4)
    write_pictures(folder / "ernie_pile" / "again", count=2, captions=False)
    for name in ("empty.png", "text.jpg", "cut.png"):
        (folder / "ernie_pile" / name).write_bytes(BROKEN[name])
    write_rows(folder / "ernie_ratings" / "ratings.csv", draw_rated(folder / "ernie_ratings", count=12))


def write_masked_picture(path: Path, side_px: int) -> None:
    """A drawn scene whose object is transparent: that is how a mask comes out of LoadImage."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGBA", (side_px, side_px), (140, 200, 240, 255))
    third = side_px // 3
    picture.paste((212, 32, 44, 0), (third, third, 2 * third, 2 * third))
    picture.save(path)


def saved_pictures(prompt: dict) -> int:
    """How many pictures a run of one of our workflows writes into the output folder."""
    count = sum(node["class_type"] == "SaveImage" for node in prompt.values())
    for node in prompt.values():
        if node["class_type"] == "ErniePromptSet":
            count += len(EVALUATED) * node["inputs"]["per_category"] * node["inputs"]["seeds_per_prompt"]
    makers = ("ErnieBatchFromPrompts", "ErnieBestOfN")
    for node in prompt.values():
        if node["class_type"] == "ErnieXYGrid":
            values = [node["inputs"][f"{letter}_values"] for letter in "xyz"]
            count += math.prod(len(text.split(",")) for text in values if text)
        if node["class_type"] == "ErnieEnhancePrompt":
            count *= node["inputs"].get("variants", 1)
        if node["class_type"] == "ErnieEmptyLatent":
            count *= node["inputs"]["batch_size"]
    return count + sum(made_by(prompt, n) for n, node in prompt.items() if node["class_type"] in makers)


def made_by(prompt: dict, node_id: str) -> int:
    """How many pictures a batch makes: of its prompts, or as many as the batch whose folder is its source."""
    inputs = prompt[node_id]["inputs"]
    if isinstance(inputs["source"], list):
        return made_by(prompt, inputs["source"][0])
    prompts = sum(bool(line.strip()) and not line.startswith("#") for line in inputs["source"].splitlines())
    return prompts * inputs.get("keep", 1) * inputs.get("variations", 1)
