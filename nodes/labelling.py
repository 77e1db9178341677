"""Labelling a manifest: categories, captions, prompt styles and scores, and the models that are asked."""

from __future__ import annotations

from comfy_api.latest import io

from ..ernie_core.errors import ErnieError
from . import host
from .curation import CATEGORY, manifest_input, manifest_output, report_output
from .dataset import ADVANCED, existing, on_progress, show
from .loading import Enhancer
from .scoring import Scorer, batch_size_input

Captioner = io.Custom("ERNIE_CAPTIONER")

PIXELS = "built-in labels"
PRECISIONS = ("default", "bf16", "fp16", "fp32")
TYPES = ("fp32", "bf16", "fp16")
METHODS = ("names", "leaves")
FORMS = ("structured", "plain")
CUSTOM = "custom"
PRESETS = (CUSTOM, "even", "mostly detailed", "as it is")
TEMPLATE = "a picture of {name}"
NOT_ASKED = {"retries": 2}  # neutral where nothing is asked
MAX_SEED = 2**63 - 1


def picture_output() -> io.Output:
    return io.Image.Output(display_name="picture", tooltip="The report, drawn.")


def captioner_input(tooltip: str) -> io.Input:
    return Captioner.Input("captioner", optional=True, tooltip=tooltip)


def max_side_input() -> io.Int.Input:
    return io.Int.Input(
        "max_side",
        default=1024,
        min=28,
        max=8192,
        tooltip="Larger pictures are scaled down to this side before the model sees them, 28 to 8192 pixels.",
    )


def writing_inputs(*, temperature: float, max_tokens: int) -> list[io.Input]:
    """How a language model writes, and how often it is asked again."""
    return [
        io.Float.Input(
            "temperature",
            default=temperature,
            min=0.0,
            max=2.0,
            step=0.05,
            tooltip="How freely words are chosen, 0 to 2; tries after the first take 0.6 or more. 0 (neutral) = the "
            "likeliest words.",
            extra_dict=ADVANCED,
        ),
        io.Int.Input(
            "max_tokens",
            default=max_tokens,
            min=1,
            max=8192,
            tooltip="Longest answer, 1 to 8192 tokens; it is cut there, and asked for again.",
            extra_dict=ADVANCED,
        ),
        io.Int.Input(
            "retries",
            default=2,
            min=0,
            max=10,
            tooltip="How often an answer that cannot be taken is asked for again, 0 to 10. 0 = never (neutral).",
            extra_dict=ADVANCED,
        ),
        io.Int.Input(
            "draw_seed",  # the page would draw another one after each run if it were called seed
            default=0,
            min=0,
            max=MAX_SEED,
            tooltip="Of everything that is drawn. Each picture has draws of its own, so that order and number of "
            "pictures change nothing.",
        ),
    ]


class ErnieLoadCaptioner(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieLoadCaptioner",
            display_name="Load Captioner (ERNIE)",
            category=CATEGORY,
            description="Loads a vision-language model that describes and sorts pictures.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=host.list_captioners(),
                    tooltip="Folder from models/captioners, models/LLM or models/VLM in transformers' form: Qwen-VL, "
                    "InternVL (-hf), SmolVLM, LLaVA. Code in the folder is never run.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default=PRECISIONS[0],
                    tooltip="Type of the weights. default: as the files are.",
                ),
                max_side_input(),
            ],
            outputs=[Captioner.Output(display_name="captioner", tooltip="For Curate Captions, Categories and Styles.")],
        )

    @classmethod
    def execute(cls, model_name, precision, max_side) -> io.NodeOutput:
        from ..ernie_core.curation.vision_language import LocalWriter

        return io.NodeOutput(
            LocalWriter(
                host.captioner_path(model_name),
                precision=precision,
                max_side_px=max_side,
                place=host.place_scorer,
                check=host.throw_if_interrupted,
            )
        )


class ErnieServerCaptioner(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieServerCaptioner",
            display_name="Captioner on a Server (ERNIE)",
            category=CATEGORY,
            description="Lets a vision-language model on your own OpenAI-compatible server describe and sort pictures.",
            inputs=[
                io.Boolean.Input(
                    "send_pictures",
                    default=False,
                    tooltip="On: pictures and captions are sent to the address below. Off (neutral): nothing is ever "
                    "sent, and the run stops with a message.",
                ),
                io.String.Input(
                    "url",
                    default="http://127.0.0.1:8080/v1",
                    tooltip="Where the server's chat API begins, without chat/completions: llama.cpp, vLLM, Ollama, "
                    "LM Studio or a paid service.",
                ),
                io.String.Input("model", default="default", tooltip="Name under which the server knows the model."),
                io.String.Input(
                    "key_variable",
                    default="",
                    tooltip="Name of the environment variable that holds the key, such as OPENAI_API_KEY; never the "
                    "key itself. Empty (neutral) = no key.",
                ),
                max_side_input(),
                io.Int.Input("concurrency", default=4, min=1, max=64, tooltip="Questions under way at once, 1 to 64."),
                io.Int.Input(
                    "max_requests",
                    default=0,
                    min=0,
                    max=10_000_000,
                    tooltip="Most questions of a run, 0 to 10000000; it ends cleanly there, and a restart goes on "
                    "counting. 0 (neutral) = no limit.",
                ),
                io.Int.Input(
                    "max_tokens",
                    default=0,
                    min=0,
                    max=2_000_000_000,
                    tooltip="Most tokens of a run, read and written, as the server counts them, 0 to 2000000000. "
                    "0 (neutral) = no limit.",
                ),
                io.Float.Input(
                    "max_spend",
                    default=0.0,
                    min=0.0,
                    max=1_000_000.0,
                    step=0.01,
                    tooltip="Most money of a run by the prices below, 0 to 1000000. 0 (neutral) = no limit.",
                ),
                io.Float.Input(
                    "price_in",
                    default=0.0,
                    min=0.0,
                    max=10_000.0,
                    step=0.01,
                    tooltip="Price per million tokens that the server reads, 0 to 10000. 0 (neutral) = free.",
                ),
                io.Float.Input(
                    "price_out",
                    default=0.0,
                    min=0.0,
                    max=10_000.0,
                    step=0.01,
                    tooltip="Price per million tokens that it writes, 0 to 10000. 0 (neutral) = free.",
                ),
                io.Int.Input(
                    "per_minute",
                    default=0,
                    min=0,
                    max=100_000,
                    tooltip="Most questions in any 60 seconds, 0 to 100000; more wait. 0 (neutral) = no limit.",
                ),
                io.Int.Input(
                    "timeout",
                    default=120,
                    min=1,
                    max=3600,
                    tooltip="How long the server may stay silent, 1 to 3600 seconds.",
                    extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "retries",
                    default=3,
                    min=0,
                    max=10,
                    tooltip="How often a busy, failing or missing server is asked again, 0 to 10. 0 = never (neutral).",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[Captioner.Output(display_name="captioner", tooltip="For Curate Captions, Categories and Styles.")],
        )

    @classmethod
    def execute(
        cls, send_pictures, url, model, key_variable, max_side, concurrency, timeout, retries, **limits
    ) -> io.NodeOutput:
        from ..ernie_core.curation.vision_language import Limits, ServerWriter
        from ..ernie_core.enhancing.server import ChatServer

        if not send_pictures:
            raise ErnieError(
                "Captioner on a Server would send pictures to another program: switch send_pictures on to allow it."
            )
        check = host.throw_if_interrupted
        server = ChatServer(url, model, key_variable=key_variable, timeout_s=timeout, retries=retries, check=check)
        return io.NodeOutput(
            ServerWriter(server, limits=Limits(**limits), concurrency=concurrency, max_side_px=max_side)
        )


class ErnieCurateCategories(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieCurateCategories",
            display_name="Curate Categories (ERNIE)",
            category=CATEGORY,
            description="Sorts every picture into a tree of categories, how surely, and shows the long tail.",
            inputs=[
                manifest_input(),
                io.Combo.Input(
                    "model_name",
                    options=[PIXELS, *host.list_scorers()],
                    default=PIXELS,
                    tooltip="CLIP, SigLIP or SigLIP 2 from models/clip_vision or models/scorers. built-in labels: only "
                    "what the pixels show, such as graphic/blue; unused with a captioner.",
                ),
                io.String.Input(
                    "taxonomy",
                    multiline=True,
                    default="",
                    tooltip="The tree: a file (.txt or .json, relative to ComfyUI's input folder), or the tree itself, "
                    "one category per line, children indented. Empty: the tree of 506 that comes along.",
                ),
                io.String.Input(
                    "template",
                    multiline=True,
                    default=TEMPLATE,
                    tooltip="Sentence that the image-text model compares, with name, parent or path in braces; "
                    "several lines are averaged.",
                    extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=METHODS[0],
                    tooltip="names: softmax among siblings, by the names of the branches too. leaves: softmax over all "
                    "leaves, a branch is the sum of its own.",
                    extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "beam",
                    default=0,
                    min=0,
                    max=10_000,
                    tooltip="Places that the walk down the tree keeps per level, 0 to 10000. 0 (neutral) = all: the "
                    "best leaf of all.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "min_confidence",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="A picture that is less sure of its leaf gets the nearest branch that is this sure, 0 to "
                    "1. 0 (neutral) = always a leaf.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(TYPES),
                    default=TYPES[0],
                    tooltip="Type of the image-text model's weights.",
                    extra_dict=ADVANCED,
                ),
                batch_size_input(),
                captioner_input("A vision-language model that is asked, in place of model_name."),
            ],
            outputs=[manifest_output(), report_output(), picture_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, taxonomy: str | None = "", **others) -> list:
        """Changes with the tree's file. What is linked comes as None."""
        return tree_stamp(taxonomy or "")

    @classmethod
    def execute(
        cls, manifest, model_name, taxonomy, min_confidence, precision, batch_size, captioner=None, **walk
    ) -> io.NodeOutput:
        from ..ernie_core.curation.categories import Categories
        from ..ernie_core.curation.long_tail import count_categories

        tree = read_tree(taxonomy) if captioner is not None or model_name != PIXELS else None
        walk |= {"min_confidence": min_confidence, "precision": precision}
        check_labeller(model_name, taxonomy, captioner, walk)
        chosen = make_categoriser(model_name, tree, captioner, manifest, **walk)
        made, text = run(Categories(chosen, batch_size=batch_size), manifest)
        tail = count_categories(made.rows(), tree)
        report = "\n".join([text, tail.describe(), *spent(chosen)])
        return io.NodeOutput(made, show(cls.hidden.unique_id, report), draw(tail))


class ErnieCurateCaptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieCurateCaptions",
            display_name="Curate Captions (ERNIE)",
            category=CATEGORY,
            description="Describes every picture: structured, visible text verbatim, in several lengths.",
            inputs=[
                manifest_input(),
                io.String.Input(
                    "lengths",
                    default="long, medium, short, tags, prompt",
                    tooltip="Which captions to write, between commas: long (80 to 200 words), medium (30 to 60), short "
                    "(up to 15), tags, prompt (what a user would type).",
                ),
                io.Combo.Input(
                    "form",
                    options=list(FORMS),
                    default=FORMS[0],
                    tooltip="structured: one question, answered as JSON with all fields. plain: one paragraph, for "
                    "models that write no JSON; gives the long caption only.",
                ),
                io.String.Input(
                    "language",
                    default="English",
                    tooltip="Language of the captions. Visible text keeps its own.",
                ),
                io.Boolean.Input(
                    "hints",
                    default=False,
                    tooltip="On: the model is told the caption found beside the picture and its category. Off "
                    "(neutral): it sees the picture only.",
                ),
                io.String.Input(
                    "instruction",
                    multiline=True,
                    default="",
                    tooltip="Sentences added to the question, such as what to call a person. Empty (neutral): none.",
                ),
                *writing_inputs(temperature=0.0, max_tokens=1024),
                io.Int.Input(
                    "batch_size",
                    default=4,
                    min=1,
                    max=256,
                    tooltip="Pictures that the model sees at once, 1 to 256: speed against memory.",
                ),
                captioner_input("What describes. Not connected: only what the pixels show is said."),
            ],
            outputs=[manifest_output(), report_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, manifest, lengths, form, draw_seed, batch_size, captioner=None, **asked) -> io.NodeOutput:
        from ..ernie_core.curation.captions import Captions, report

        wanted = ["long"] if form == "plain" else [part.strip() for part in lengths.split(",") if part.strip()]
        chosen = make_captioner(captioner, manifest, lengths=wanted, form=form, seed=draw_seed, **asked)
        made, text = run(Captions(chosen, batch_size=batch_size), manifest)
        lines = [text, report(made.rows()), *spent(chosen)]
        return io.NodeOutput(made, show(cls.hidden.unique_id, "\n".join(lines)))


class ErnieCurateCaptionStyles(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieCurateCaptionStyles",
            display_name="Curate Caption Styles (ERNIE)",
            category=CATEGORY,
            description="Rewrites captions into the ways people write prompts, in shares that you choose.",
            inputs=[
                manifest_input(),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=PRESETS[1],
                    tooltip="Shares of the styles. custom: as written below. even: a quarter each. mostly detailed: "
                    "half detailed. as it is (neutral): captions stay.",
                ),
                io.String.Input(
                    "shares",
                    default="keyword 1, natural 1, instruction 1, detailed 1",
                    tooltip="For preset custom: keyword, natural, instruction, detailed or original, each with its "
                    "weight, between commas.",
                ),
                io.Boolean.Input(
                    "every",
                    default=False,
                    tooltip="On: every style with a share is written for each picture, for mixing while training. Off "
                    "(neutral): only the drawn one.",
                ),
                *writing_inputs(temperature=0.6, max_tokens=512),
                Enhancer.Input(
                    "enhancer",
                    optional=True,
                    tooltip="Prompt enhancer that rewrites. Neither this nor a captioner: rules do, without a model.",
                ),
                captioner_input("Language model that rewrites, in place of the enhancer."),
            ],
            outputs=[manifest_output(), report_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, manifest, preset, shares, every, draw_seed, enhancer=None, captioner=None, **writing
    ) -> io.NodeOutput:
        from ..ernie_core.curation.styles import PRESETS as KNOWN
        from ..ernie_core.curation.styles import Styles, report
        from ..ernie_core.training.captions import read_styles

        wanted = dict(read_styles(shares)) if preset == CUSTOM else KNOWN[preset]
        rewriter = make_rewriter(enhancer, captioner, manifest, seed=draw_seed, **writing)
        stage = Styles(rewriter, wanted, every=every, seed=draw_seed, batch_size=8 if enhancer or captioner else 64)
        made, text = run(stage, manifest)
        lines = [text, report(made.rows(), wanted), *spent(rewriter)]
        return io.NodeOutput(made, show(cls.hidden.unique_id, "\n".join(lines)))


class ErnieCurateScores(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieCurateScores",
            display_name="Curate Scores (ERNIE)",
            category=CATEGORY,
            description="Gives every picture of a manifest a score, and shows the scores by category.",
            inputs=[
                manifest_input(),
                Scorer.Input("scorer", tooltip="From Load Scorer; one that reads prompts gets the fullest caption."),
                io.String.Input(
                    "column",
                    default="score",
                    tooltip="Column for the score: letters, digits and _. Take another name for a second scorer; "
                    "score is the one that Curate Sampling Plan reads.",
                ),
                batch_size_input(),
            ],
            outputs=[manifest_output(), report_output(), picture_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, manifest, scorer, column, batch_size) -> io.NodeOutput:
        from ..ernie_core.curation.scores import ScorePictures, tabulate

        made, text = run(ScorePictures(scorer, column=column.strip(), batch_size=batch_size), manifest)
        table = tabulate(made.rows(), column.strip())
        return io.NodeOutput(made, show(cls.hidden.unique_id, f"{text}\n{table.describe()}"), draw(table))


# --- what several of them do ------------------------------------------------------------------------------------------


def run(stage, manifest):
    """(the manifest that `stage` made of `manifest`, its summary and path as text)."""
    from ..ernie_core.curation.engines import run_stage
    from ..ernie_core.curation.manifest import Manifest

    target = manifest.next(stage.name, stage.key())
    summary = run_stage(stage, manifest, target, on_progress=on_progress())
    return Manifest(target), f"{summary}\n{target}"


def draw(found):
    """A report's picture as an IMAGE; one white pixel square where there is nothing to draw."""
    import torch

    from .training import to_image

    try:
        return to_image(found.draw())
    except ErnieError:
        return torch.ones(1, 64, 64, 3)


def tree_stamp(taxonomy: str) -> list:
    """What changes when the file of a tree does."""
    path = taxonomy.strip()
    if not path or "\n" in path:
        return [taxonomy]
    try:
        stat = existing(path).stat()
    except ErnieError:
        return [taxonomy]
    return [taxonomy, stat.st_size, stat.st_mtime_ns]


def read_tree(taxonomy: str):
    """The tree in a file, the tree that is written out, or the one that comes along."""
    from ..ernie_core.curation.taxonomy import STARTER, load_taxonomy, parse_taxonomy

    if "\n" in taxonomy.strip():
        return parse_taxonomy(taxonomy.strip("\n"), "taxonomy")
    return load_taxonomy(existing(taxonomy) if taxonomy.strip() else STARTER)


def check_labeller(model_name: str, taxonomy: str, captioner, walk: dict) -> None:
    """Refuse what would be ignored."""
    if captioner is not None or model_name == PIXELS:
        neutral = {"template": TEMPLATE, "method": METHODS[0], "beam": 0, "min_confidence": 0.0, "precision": TYPES[0]}
        refuse_changes(walk, neutral, "choose an image-text model for it")
    if captioner is not None and model_name != PIXELS:
        raise ErnieError(f"either a captioner or model_name sorts, got both: set model_name to {PIXELS}.")
    if captioner is None and model_name == PIXELS and taxonomy.strip():
        raise ErnieError(f"{PIXELS} have categories of their own: choose a model, or leave taxonomy empty.")


def refuse_changes(given: dict, neutral: dict, what_to_do: str) -> None:
    """Raise where a setting that nothing reads was moved off its default."""
    changed = [f"{name} {given[name]!r}" for name, value in neutral.items() if given[name] != value]
    if changed:
        raise ErnieError(f"{', '.join(changed)} would not be read: {what_to_do}, or set the default again.")


def make_categoriser(model_name: str, tree, captioner, manifest, *, template: str, **walk):
    """What sorts: the captioner, an image-text model, or measures of the pixels."""
    from ..ernie_core.curation.asked_categories import LanguageCategoriser
    from ..ernie_core.curation.builtin_labels import BuiltinCategoriser
    from ..ernie_core.curation.categories import ImageTextCategoriser

    if captioner is not None:
        return LanguageCategoriser(counted(captioner, manifest, "categories"), tree)
    if model_name == PIXELS:
        return BuiltinCategoriser()
    return ImageTextCategoriser(
        host.scorer_path(model_name),
        tree,
        cache=host.user_folder() / "text_features",
        templates=template.splitlines(),
        tokenizer_folders=host.tokenizer_folders(),
        place=host.place_scorer,
        **walk,
    )


def make_captioner(captioner, manifest, *, lengths: list[str], **asked):
    """What describes: the captioner, or measures of the pixels."""
    from ..ernie_core.curation.builtin_labels import BuiltinCaptioner
    from ..ernie_core.curation.captions import LanguageCaptioner

    if captioner is not None:
        return LanguageCaptioner(counted(captioner, manifest, "captions"), lengths=lengths, **asked)
    neutral = {"form": FORMS[0], "language": "English", "hints": False, "instruction": "", **NOT_ASKED}
    refuse_changes(asked, neutral | {"temperature": 0.0, "max_tokens": 1024}, "connect a captioner")
    return BuiltinCaptioner(lengths)


def make_rewriter(enhancer, captioner, manifest, *, seed: int, **writing):
    """What rewrites: the captioner, the enhancer, or rules."""
    from ..ernie_core.curation.styles import LanguageRewriter, RuleRewriter
    from ..ernie_core.curation.vision_language import EnhancerWriter

    if enhancer is not None and captioner is not None:
        raise ErnieError("either an enhancer or a captioner rewrites, got both; disconnect one.")
    if captioner is not None:
        return LanguageRewriter(counted(captioner, manifest, "styles"), seed=seed, **writing)
    if enhancer is not None:
        return LanguageRewriter(EnhancerWriter(enhancer), seed=seed, **writing)
    refuse_changes(writing, {"temperature": 0.6, "max_tokens": 512, **NOT_ASKED}, "connect a captioner or an enhancer")
    return RuleRewriter(seed)


def counted(captioner, manifest, stage: str):
    """A captioner on a server with its questions counted beside the manifest; any other as it is."""
    if not hasattr(captioner, "counted_in"):
        return captioner
    return captioner.counted_in(manifest.path.with_name(f"{manifest.path.stem}.{stage}.spent.jsonl"))


def spent(chosen) -> list[str]:
    """A line on what a server counted, if one was asked."""
    writer = getattr(chosen, "writer", None)
    return [] if writer is None or not hasattr(writer, "spent") else [writer.spent()]
