"""Node vocabulary: socket types with their Input and Output, Schema, ComfyNode, NodeOutput.

Conventions: inputs and outputs are described once as dataclasses and turned into the `(type, options)` pairs that
validation and the reading of workflow files use (`ComfyNode.INPUT_TYPES()`); the keys of the options are the ones the
web page knows (`forceInput`, `dynamicPrompts`, ...), and options that were not given are left out.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from enum import Enum
from typing import Any, ClassVar

_PAGE_NAMES = {
    "raw_link": "rawLink",
    "widget_type": "widgetType",
    "force_input": "forceInput",
    "dynamic_prompts": "dynamicPrompts",
    "display_mode": "display",
}


class FolderType(str, Enum):
    """Where a file lives on the host."""

    input = "input"
    output = "output"
    temp = "temp"


class UploadType(str, Enum):
    """What a combo with an upload button takes."""

    image = "image_upload"
    audio = "audio_upload"
    video = "video_upload"
    model = "file_upload"


class NumberDisplay(str, Enum):
    """How a number widget is drawn."""

    number = "number"
    slider = "slider"


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


@dataclass
class Input:
    """One input of a node; without a widget unless a subclass gives it one."""

    Parent: ClassVar[type | None] = None

    id: str
    display_name: str | None = None
    _: KW_ONLY
    optional: bool = False
    tooltip: str | None = None
    lazy: bool | None = None
    extra_dict: dict | None = None
    raw_link: bool | None = None
    advanced: bool | None = None

    @property
    def io_type(self) -> str:
        return self.Parent.io_type

    def get_io_type(self) -> str:
        """Return the type a link must have, as the page shows it."""
        return self.io_type

    def as_dict(self) -> dict[str, Any]:
        """Return the options as the page gets them."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("id", "extra_dict", "optional")}
        options = {_PAGE_NAMES.get(k, k): _plain(v) for k, v in given.items() if v is not None}
        return options | {k: v for k, v in (self.extra_dict or {}).items() if v is not None}


@dataclass
class WidgetInput(Input):
    """An input with a widget, unless `force_input` makes it a mere socket."""

    _: KW_ONLY
    default: Any = None
    socketless: bool | None = None
    widget_type: str | None = None
    force_input: bool | None = None

    def get_io_type(self) -> str:
        return self.widget_type or self.io_type


@dataclass
class Output:
    """One output of a node."""

    Parent: ClassVar[type | None] = None

    id: str | None = None
    display_name: str | None = None
    _: KW_ONLY
    tooltip: str | None = None
    is_output_list: bool = False

    @property
    def io_type(self) -> str:
        return self.Parent.io_type


class ComfyType:
    """A socket type. Subclassing binds its own Input and Output classes to it."""

    Type = Any
    io_type = "*"
    Input: type = Input
    Output: type = Output

    def __init_subclass__(cls, *, io_type: str | None = None) -> None:
        if io_type is not None:
            cls.io_type = io_type
        for slot in ("Input", "Output"):
            bound = type(slot, (getattr(cls, slot),), {"Parent": cls, "__qualname__": f"{cls.__name__}.{slot}"})
            setattr(cls, slot, bound)


ComfyTypeIO = ComfyTypeI = ComfyType


def Custom(io_type: str) -> type[ComfyType]:
    """Return a socket type of its own name, for things the host has no word for."""

    class CustomType(ComfyType, io_type=io_type):
        pass

    return CustomType


class Boolean(ComfyType, io_type="BOOLEAN"):
    @dataclass
    class Input(WidgetInput):
        _: KW_ONLY
        label_on: str | None = None
        label_off: str | None = None
        widget_type: None = field(default=None, init=False)


class Int(ComfyType, io_type="INT"):
    @dataclass
    class Input(WidgetInput):
        _: KW_ONLY
        min: int | None = None
        max: int | None = None
        step: int | None = None
        control_after_generate: bool | None = None
        display_mode: NumberDisplay | None = None
        widget_type: None = field(default=None, init=False)


class Float(ComfyType, io_type="FLOAT"):
    @dataclass
    class Input(WidgetInput):
        _: KW_ONLY
        min: float | None = None
        max: float | None = None
        step: float | None = None
        round: float | None = None
        display_mode: NumberDisplay | None = None
        widget_type: None = field(default=None, init=False)


class String(ComfyType, io_type="STRING"):
    @dataclass
    class Input(WidgetInput):
        _: KW_ONLY
        multiline: bool = False
        placeholder: str | None = None
        dynamic_prompts: bool | None = None
        widget_type: None = field(default=None, init=False)


@dataclass
class _ComboBase:
    id: str
    options: Any = None  # before display_name when given by position, as on the host
    display_name: str | None = None


class Combo(ComfyType, io_type="COMBO"):
    @dataclass
    class Input(WidgetInput, _ComboBase):
        _: KW_ONLY
        control_after_generate: bool | None = None
        upload: UploadType | None = None
        image_folder: FolderType | None = None
        remote: Any = None
        widget_type: None = field(default=None, init=False)
        force_input: None = field(default=None, init=False)

        def __post_init__(self) -> None:
            if isinstance(self.options, type) and issubclass(self.options, Enum):
                self.options = [member.value for member in self.options]
            self.options = None if self.options is None else list(self.options)
            self.default = _plain(self.default)

        def as_dict(self) -> dict[str, Any]:
            options = super().as_dict() | {"multiselect": False}
            upload = options.pop("upload", None)
            return options | ({upload: True} if upload else {})

    @dataclass
    class Output(Output):
        _: KW_ONLY
        options: list[str] | None = None


def _socket(name: str, io_type: str) -> type[ComfyType]:
    return type(ComfyType)(name, (ComfyType,), {"__module__": __name__}, io_type=io_type)


Model = _socket("Model", "MODEL")
Clip = _socket("Clip", "CLIP")
Vae = _socket("Vae", "VAE")
Conditioning = _socket("Conditioning", "CONDITIONING")
Latent = _socket("Latent", "LATENT")
Image = _socket("Image", "IMAGE")
Mask = _socket("Mask", "MASK")
Sigmas = _socket("Sigmas", "SIGMAS")
Sampler = _socket("Sampler", "SAMPLER")
Noise = _socket("Noise", "NOISE")
Guider = _socket("Guider", "GUIDER")
ControlNet = _socket("ControlNet", "CONTROL_NET")
ClipVision = _socket("ClipVision", "CLIP_VISION")
ClipVisionOutput = _socket("ClipVisionOutput", "CLIP_VISION_OUTPUT")
StyleModel = _socket("StyleModel", "STYLE_MODEL")
UpscaleModel = _socket("UpscaleModel", "UPSCALE_MODEL")
ModelPatch = _socket("ModelPatch", "MODEL_PATCH")
LoraModel = _socket("LoraModel", "LORA_MODEL")
LossMap = _socket("LossMap", "LOSS_MAP")
Hooks = _socket("Hooks", "HOOKS")
LatentOperation = _socket("LatentOperation", "LATENT_OPERATION")
Audio = _socket("Audio", "AUDIO")
Video = _socket("Video", "VIDEO")
AnyType = _socket("AnyType", "*")


class MultiType(ComfyType, io_type="COMFY_MULTITYPED_V3"):
    """An input that takes several types; given an Input in place of the id it keeps that input's widget."""

    @dataclass
    class Input(Input):
        id: Any
        display_name: str | None = None
        _: KW_ONLY
        types: list[type[ComfyType]] = field(default_factory=list)

        def __post_init__(self) -> None:
            self._widget = self.id if isinstance(self.id, Input) else None
            if self._widget is not None:
                self.id = self._widget.id
                self.optional = self.optional or self._widget.optional
                self.lazy = self.lazy if self._widget.lazy is None else self._widget.lazy

        def get_io_type(self) -> str:
            names = [] if self._widget is None else [self._widget.get_io_type()]
            return ",".join(dict.fromkeys(names + [t.io_type for t in self.types]))

        def as_dict(self) -> dict[str, Any]:
            options = super().as_dict()
            options.pop("types", None)
            if self._widget is None:
                return options
            return self._widget.as_dict() | {"widgetType": self._widget.get_io_type()} | options


@dataclass
class _TemplateBase:
    id: str
    template: Any = None  # before display_name when given by position, as on the host
    display_name: str | None = None


class MatchType(ComfyType, io_type="COMFY_MATCHTYPE_V3"):
    """Inputs and outputs that share whatever type is linked first."""

    class Template:
        def __init__(self, template_id: str, allowed_types: Any = AnyType) -> None:
            self.template_id = template_id
            self.allowed_types = list(allowed_types) if isinstance(allowed_types, Iterable) else [allowed_types]

        def as_dict(self) -> dict[str, str]:
            allowed = ",".join(t.io_type for t in self.allowed_types)
            return {"template_id": self.template_id, "allowed_types": allowed}

    @dataclass
    class Input(Input, _TemplateBase):
        def as_dict(self) -> dict[str, Any]:
            return super().as_dict() | {"template": self.template.as_dict()}

    @dataclass
    class Output(Output):
        _: KW_ONLY
        template: Any = None


class Hidden(str, Enum):
    """What a node may ask for besides its inputs."""

    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"
    extra_pnginfo = "EXTRA_PNGINFO"
    dynprompt = "DYNPROMPT"
    auth_token_comfy_org = "AUTH_TOKEN_COMFY_ORG"
    api_key_comfy_org = "API_KEY_COMFY_ORG"


class HiddenHolder:
    """`cls.hidden` while a node runs; what was not asked for is None."""

    def __init__(self, values: Mapping[str, Any] | None) -> None:
        for member in Hidden:
            setattr(self, member.name, (values or {}).get(member.value))

    def __getattr__(self, key: str) -> None:
        return None


@dataclass
class Schema:
    """What a node is called, takes and gives."""

    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    hidden: list[Hidden] = field(default_factory=list)
    description: str = ""
    search_aliases: list[str] = field(default_factory=list)
    is_input_list: bool = False
    is_output_node: bool = False
    is_deprecated: bool = False
    is_experimental: bool = False
    is_dev_only: bool = False
    is_api_node: bool = False
    price_badge: Any = None
    not_idempotent: bool = False
    enable_expand: bool = False
    accept_all_inputs: bool = False

    def validate(self) -> None:
        """Raise ValueError when two inputs, or two outputs, share an id."""
        for what, items in (("Input", self.inputs), ("Output", self.outputs)):
            twice = [name for name, count in Counter(item.id for item in items).items() if count > 1]
            if twice:
                raise ValueError(f"{what} ids must be unique, but {twice} are not.")

    def finalize(self) -> None:
        """Name unnamed outputs; give output nodes the prompt and the workflow."""
        self.inputs, self.outputs, self.hidden = (list(x or []) for x in (self.inputs, self.outputs, self.hidden))
        if self.is_output_node:
            self.hidden += [h for h in (Hidden.prompt, Hidden.extra_pnginfo) if h not in self.hidden]
        named = (o if o.id is not None else replace(o, id=f"_{i}_{o.io_type}_") for i, o in enumerate(self.outputs))
        self.outputs = list(named)


class NodeOutput:
    """What `execute` returns: output values by position, and what the page should show."""

    def __init__(self, *args: Any, ui: Any = None, expand: dict | None = None, block_execution: str | None = None):
        self.args = args
        self.ui = ui
        self.expand = expand
        self.block_execution = block_execution

    @property
    def result(self) -> tuple | None:
        return self.args or None

    def __getitem__(self, index: int) -> Any:
        return self.args[index]


class _FromSchema:
    """A class attribute that is computed from the node's schema."""

    def __init__(self, read: Any) -> None:
        self.read = read

    def __get__(self, _instance: Any, owner: type[ComfyNode]) -> Any:
        return self.read(owner.GET_SCHEMA())


class _Function:
    """The name of the method the executor calls."""

    def __get__(self, _instance: Any, owner: type[ComfyNode]) -> str:
        is_async = inspect.iscoroutinefunction(owner.execute)
        return "EXECUTE_NORMALIZED_ASYNC" if is_async else "EXECUTE_NORMALIZED"


class _NodeMeta(type):
    """Refuses attributes on the class a running node sees: state does not survive a run on the host either."""

    def __setattr__(cls, name: str, value: Any) -> None:
        if cls.__dict__.get("_locked"):
            raise AttributeError(f"cannot set {name!r} on {cls.__name__} while it runs; keep state at module level.")
        super().__setattr__(name, value)


class ComfyNode(metaclass=_NodeMeta):
    """Base of all nodes: `define_schema` and `execute`, both class methods."""

    hidden: HiddenHolder | None = None

    @classmethod
    def define_schema(cls) -> Schema:
        raise NotImplementedError(f"{cls.__name__} has no define_schema.")

    @classmethod
    def execute(cls, **kwargs: Any) -> NodeOutput:
        raise NotImplementedError(f"{cls.__name__} has no execute.")

    @classmethod
    def validate_inputs(cls, **kwargs: Any) -> bool | str:
        raise NotImplementedError

    @classmethod
    def fingerprint_inputs(cls, **kwargs: Any) -> Any:
        raise NotImplementedError

    @classmethod
    def check_lazy_status(cls, **kwargs: Any) -> list[str]:
        """Return the names of inputs that must be computed before `execute`; by default all."""
        return [name for name, value in kwargs.items() if value is None]

    @classmethod
    def GET_BASE_CLASS(cls) -> type:
        return ComfyNode

    @classmethod
    def GET_SCHEMA(cls) -> Schema:
        """Return the schema, defined anew (lists of files change), completed and checked."""
        schema = cls.define_schema()
        schema.finalize()
        schema.validate()
        return schema

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple]]:
        """Return {"required": {id: (type, options)}, "optional": {...}}."""
        schema = cls.GET_SCHEMA()
        table: dict[str, dict[str, tuple]] = {"required": {}}
        for item in schema.inputs:
            group = table.setdefault("optional" if item.optional else "required", {})
            group[item.id] = (item.get_io_type(), item.as_dict())
        if schema.hidden:
            table["hidden"] = {h.name: (h.value,) for h in schema.hidden}
        return table

    @classmethod
    def PREPARE_CLASS_CLONE(cls, v3_data: Mapping[str, Any] | None) -> type[ComfyNode]:
        """Return a locked subclass whose `hidden` holds what this run knows."""
        hidden = HiddenHolder(v3_data["hidden_inputs"] if v3_data else None)
        return _NodeMeta(cls.__name__, (cls,), {"hidden": hidden, "_locked": True, "__module__": cls.__module__})

    @classmethod
    def EXECUTE_NORMALIZED(cls, *args: Any, **kwargs: Any) -> NodeOutput:
        """Run `execute` and return a NodeOutput whatever shape its answer has."""
        return cls._normalise(cls.execute(*args, **kwargs))

    @classmethod
    async def EXECUTE_NORMALIZED_ASYNC(cls, *args: Any, **kwargs: Any) -> NodeOutput:
        return cls._normalise(await cls.execute(*args, **kwargs))

    @classmethod
    def _normalise(cls, answer: Any) -> NodeOutput:
        if answer is None:
            return NodeOutput()
        if isinstance(answer, NodeOutput):
            return answer
        if isinstance(answer, tuple):
            return NodeOutput(*answer)
        if isinstance(answer, dict):
            return NodeOutput(*answer.get("result", ()), ui=answer.get("ui"), expand=answer.get("expand"))
        raise TypeError(f"{cls.__name__}.execute must return a NodeOutput, a tuple or a dict, got {type(answer)}.")

    FUNCTION = _Function()
    SCHEMA = _FromSchema(lambda s: s)
    DESCRIPTION = _FromSchema(lambda s: s.description)
    CATEGORY = _FromSchema(lambda s: s.category)
    OUTPUT_NODE = _FromSchema(lambda s: s.is_output_node)
    INPUT_IS_LIST = _FromSchema(lambda s: s.is_input_list)
    OUTPUT_IS_LIST = _FromSchema(lambda s: [o.is_output_list for o in s.outputs])
    RETURN_TYPES = _FromSchema(lambda s: [o.io_type for o in s.outputs])
    RETURN_NAMES = _FromSchema(lambda s: [o.display_name or o.io_type for o in s.outputs])
    ACCEPT_ALL_INPUTS = _FromSchema(lambda s: s.accept_all_inputs)
