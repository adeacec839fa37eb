"""Causal language models whose decoder layers differ in width, as gradprune writes them.

This file is saved beside the weights of a pruned checkpoint and needs only torch and transformers:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

AutoConfig and AutoModel work in the same way. For every causal LM of transformers this module has the classes
`PrunedXConfig`, `PrunedXModel` and `PrunedXForCausalLM`, which extend transformers' `X...` and are created on first
use. The same holds for vision-language models, which AutoModelForImageTextToText loads, too: the layers of the decoder
differ in width, and the model's `text_config` says how.

`config.json` uses transformers' `per_layer_config`, which maps a layer's index to the values that differ from the
model's global ones: `num_key_value_heads`; `num_attention_heads` (if left out, `num_key_value_heads` times the model's
ratio); the MLP's `intermediate_size`, under the architecture's own name for it; the experts' `moe_intermediate_size`,
if they have a width of their own, and their number; and `skip`, the names of the removed blocks ("attention", "mlp"),
which leave the residual stream unchanged.
"""

import copy
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

PLACES: dict[str, tuple[str, ...]] = {
    "attention": ("self_attn", "self_attention", "attention", "attn"),
    "mlp": ("mlp", "feed_forward", "ffn", "mlp_block"),
}
"""For each kind of block, the names of the decoder layer's attribute that may hold it."""
OUTPUTS: dict[str, tuple[str, ...]] = {
    "attention": ("o_proj", "out_proj", "dense", "c_proj"),
    "mlp": ("down_proj", "c_proj", "fc2", "fc_out", "w2", "dense_4h_to_h"),
}
"""For each kind of block, the names that its output projection may have."""
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
WIDTHS = ("intermediate_size", "ffn_hidden_size", "n_inner")
"""Configurations' names for an MLP's number of channels; if one has none, `per_layer_config` uses the first name."""
EXPERT_WIDTHS = ("moe_intermediate_size", *WIDTHS)
"""Configurations' names for the number of channels of each expert; the first one present counts."""
SHARED_WIDTHS = (
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_intermediate_size",
)
"""Configurations' names for the shared experts' number of channels; without one, it is a multiple of a routed one's."""
EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
"""Configurations' names for the number of routed experts; the first one present counts."""

CLASSES_BY_AUTO: dict[str, Any] = {
    "AutoModelForImageTextToText": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
"""For each auto class of transformers, its classes of models that predict tokens, by `model_type`. A vision-language
model is represented by the class of the whole model, not by that of its decoder."""

# A layer's norms: before attention, after attention, before the MLP, after the MLP. A norm is removed with its block.
# If the blocks share a norm, or a layer's norms match none of these rows, they stay.
_NORMS: tuple[tuple[str | None, str | None, str | None, str | None], ...] = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("attention_layernorm", None, "feedforward_layernorm", None),
    ("ln_1", None, "ln_2", None),
    ("operator_norm", None, "ffn_norm", None),
    ("ln_attn", None, "ln_mlp", None),
    ("input_layernorm", None, "pre_ff_layernorm", None),
    ("input_layernorm", None, "pre_feedforward_layernorm", None),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    ("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm"),
)


_OF = "_of_"


class PerLayerHeads:
    """Mixin for a stock `...Config` class that adds the number of query heads to each layer of `per_layer_config`.

    Stock classes check the global number of query heads, but transformers refuses to return it if layers differ in it.
    So the checks run on a copy of the configuration that has only the global values.
    """

    def __post_init__(self, per_layer_config: Any = None, **kwargs: Any) -> None:
        """Initialise the stock configuration and set `per_layer_config`: {layer index: {name: value}}."""
        super().__post_init__(**kwargs)
        if per_layer_config:
            self.per_layer_config = {
                index: with_query_heads(self, overrides) for index, overrides in per_layer_config.items()
            }

    def validate(self) -> None:
        """Run the stock class's checks on the global values."""
        dense = homogeneous(self)
        dense.__class__ = stock_class(type(self))
        if hasattr(dense, "validate"):
            dense.validate()


class DroppedAttention(nn.Module):
    """Stands in for a removed attention block: adds nothing to the residual stream.

    It still caches one head, which is never read, because a cache asks its first layers how many tokens it holds.
    """

    def __init__(self, head_dim: int, layer_idx: int, adds_itself: bool = False) -> None:
        """head_dim: width of the cached head; layer_idx: index in the cache; adds_itself: see `adds_residual`."""
        super().__init__()
        self.head_dim = head_dim
        self.layer_idx = layer_idx
        self.adds_itself = adds_itself

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        cache: Any = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        cache_position: Any = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Return the result of `nothing_added` for hidden_states, [B, T, H], and no attention weights.

        The cache is called `past_key_values` in older transformers releases and `layer_past` in some architectures.
        """
        cache = next((given for given in (cache, past_key_values, layer_past) if given is not None), None)
        if cache is not None:
            # Keys are ones, because older static caches count the tokens whose key is not zero.
            ones = hidden_states.new_ones(hidden_states.shape[0], 1, hidden_states.shape[1], self.head_dim)
            cache.update(ones, ones, self.layer_idx, {"cache_position": cache_position})
        return nothing_added(self.adds_itself, hidden_states, *args), None


class DroppedMLP(nn.Module):
    """Stands in for a removed MLP block: adds nothing to the residual stream."""

    def __init__(self, adds_itself: bool = False) -> None:
        """adds_itself: see `adds_residual`."""
        super().__init__()
        self.adds_itself = adds_itself

    def forward(self, hidden_states: torch.Tensor, *args: Any, **_: Any) -> torch.Tensor:
        """Return the result of `nothing_added` for hidden_states, [B, T, H]."""
        return nothing_added(self.adds_itself, hidden_states, *args)


def adds_residual(block: nn.Module) -> bool:
    """Whether a block takes the residual stream as its second argument and returns it with its output added."""
    return list(inspect.signature(type(block).forward).parameters)[2:3] == ["residual"]


def nothing_added(adds_itself: bool, hidden_states: torch.Tensor, *args: Any) -> torch.Tensor:
    """Return zeros [B, T, H]; for a block that itself adds to the residual stream, the unchanged stream, args[0]."""
    stream: torch.Tensor = args[0] if adds_itself else torch.zeros_like(hidden_states)
    return stream


class PerLayerWidths:
    """Mixin for a stock `...Model` or `...ForCausalLM` class: builds each decoder layer at its own widths."""

    def __init__(self, config: PreTrainedConfig) -> None:
        """config: the architecture's configuration, with `per_layer_config`."""
        dense = homogeneous(config)
        text = text_config(dense)
        overrides = per_layer_overrides(config)
        check_overrides(overrides)
        with _zero_widths():
            super().__init__(dense)
        layers = decoder_layers(self, config)
        for index, own in overrides.items():
            layers[index] = build_layer(layers[index], text, own, index)
            for kind in own.get("skip", ()):
                drop_block(layers[index], kind)
        config._attn_implementation = {"": dense._attn_implementation, "text_config": text._attn_implementation}
        config.auto_map = auto_map(config.model_type)
        self.config: PreTrainedConfig = config
        getattr(self, self.base_model_prefix, self).config = config
        if text is not dense:
            self.get_decoder().config = text_config(config)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False: for custom code, transformers would not convert stored weights, such as separate experts'."""
        return False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # The stock method reads the source file of the class that it is called on, which has to be the stock class.
        return bool(stock_class(cls)._can_set_attn_implementation())

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return bool(stock_class(cls)._can_set_experts_implementation())

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Call the stock method, and apply its effect to the layers' own configurations, too."""
        super().set_attn_implementation(*args, **kwargs)
        for module in decoder_layers(self, self.config).modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = text_config(self.config)._attn_implementation

    def set_experts_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Call the stock method, and apply its effect to the layers' own configurations, too."""
        super().set_experts_implementation(*args, **kwargs)
        for module in decoder_layers(self, self.config).modules():
            if hasattr(module, "config"):
                module.config._experts_implementation = text_config(self.config)._experts_implementation


def __getattr__(name: str) -> Any:
    """Return the class `Pruned...` of that name, which is created on first use."""
    own, _, config = name.removeprefix("Pruned").partition(_OF)
    stock = getattr(transformers, own, None) if name.startswith("Pruned") else None
    if not isinstance(stock, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pruned_class(stock, getattr(transformers, config) if config else None)


def pruned_class(stock: Any, config: type | None = None) -> Any:
    """Return the class that adds per-layer widths to a stock one: `PrunedLlamaForCausalLM` to `LlamaForCausalLM`.

    config: the stock class of the model's configuration; by default the `config_class` of `stock`. Some architectures
        borrow another's model class: InternLM3's is `PrunedLlamaForCausalLM_of_InternLM3Config`, because transformers
        compares a model class's `config_class` with the configuration.
    """
    name = f"Pruned{stock.__name__}"
    if config is not None and config.__name__ != stock.config_class.__name__:
        name += f"{_OF}{config.__name__}"
    found = globals().get(name)
    if found is not None:
        return found
    mixin = PerLayerHeads if issubclass(stock, PreTrainedConfig) else PerLayerWidths
    about = f"{stock.__name__.removesuffix('Config')} with layers of different widths."
    made: Any = type(name, (mixin, stock), {"__module__": __name__, "__doc__": about})
    if issubclass(stock, PreTrainedConfig):
        auto = "AutoConfig"
    else:
        auto = next((auto for auto, names in CLASSES_BY_AUTO.items() if stock.__name__ in names.values()), "AutoModel")
        made.config_class = pruned_class(config or stock.config_class)
    # When an object of a registered class is saved, transformers also writes this file, and puts the class into the
    # configuration's auto_map.
    made.register_for_auto_class(auto)
    globals()[name] = made
    return made


def class_names(model_type: str) -> dict[str, str]:
    """The class that each auto class of transformers loads an architecture as; empty if it predicts no tokens."""
    auto = auto_class_name(model_type)
    if auto is None:
        return {}
    names: dict[str, Any] = {
        "AutoConfig": CONFIG_MAPPING_NAMES,
        "AutoModel": MODEL_MAPPING_NAMES,
        auto: CLASSES_BY_AUTO[auto],
    }
    return {each: of[model_type] for each, of in names.items() if isinstance(of.get(model_type), str)}


def auto_class_name(model_type: str) -> str | None:
    """Name of the auto class for an architecture's whole models that predict tokens; None if there is none."""
    return next((auto for auto, names in CLASSES_BY_AUTO.items() if model_type in names), None)


def causal_lm(model_type: str) -> Any:
    """Name of the class of an architecture's whole models that predict tokens; None if there is none."""
    return class_names(model_type).get(str(auto_class_name(model_type)))


def auto_class(model_type: str, auto: str | None) -> Any:
    """The class of this file that the auto class named `auto` loads an architecture as; None if there is none."""
    names = class_names(model_type)
    if auto not in names:
        return None
    config = getattr(transformers, names["AutoConfig"])
    return pruned_class(config) if auto == "AutoConfig" else pruned_class(getattr(transformers, names[auto]), config)


def auto_map(model_type: str) -> dict[str, str]:
    """`config.auto_map` of a pruned checkpoint: for each auto class, the class of this file that it is to load."""
    classes = {auto: auto_class(model_type, auto) for auto in class_names(model_type)}
    classes["AutoModelForCausalLM"] = auto_class(model_type, auto_class_name(model_type))
    return {auto: f"modeling_gradprune.{of.__name__}" for auto, of in classes.items() if of is not None}


def text_config(config: Any) -> Any:
    """The decoder's part of a vision-language model's configuration; of any other configuration, all of it."""
    inner = getattr(config, "text_config", None)
    return inner if isinstance(inner, PreTrainedConfig) else config


def per_layer_overrides(config: PreTrainedConfig) -> dict[int, dict[str, Any]]:
    """`per_layer_config` by layer index, also with transformers releases that do not know the attribute."""
    stated = text_config(config).to_dict().get("per_layer_config") or {}
    return {int(index): overrides for index, overrides in stated.items()}


def check_overrides(layers: dict[int, dict[str, Any]]) -> None:
    """Refuse overrides that `PerLayerWidths` does not apply, because ignoring them would load a different model."""
    known = {*KV_HEADS, "num_attention_heads", *EXPERT_WIDTHS, *SHARED_WIDTHS, *EXPERTS, "skip"}
    for index, overrides in layers.items():
        if unknown := sorted(set(overrides) - known) or sorted(set(overrides.get("skip", ())) - set(PLACES)):
            raise ValueError(
                f"per_layer_config: layer {index} has {unknown}; known are {sorted(known)}, "
                f"and in skip {', '.join(PLACES)}"
            )


def stock_class(pruned: type) -> Any:
    """The architecture's own class: `pruned` itself, or the class to which it adds per-layer widths."""
    return next((base for base in pruned.__mro__ if base.__module__.startswith("transformers.models.")), pruned)


def homogeneous(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of the configuration in which every layer has the global values."""
    dense = copy.copy(config)
    state_dtype(dense)
    if text_config(config) is not config:
        dense.text_config = homogeneous(text_config(config))
    dense.per_layer_config = None
    return dense


def state_dtype(config: PreTrainedConfig) -> None:
    """Replace the dtype's name, which `save_pretrained` leaves, by the dtype: some layers create parameters in it."""
    if isinstance(config.dtype, str):
        config.dtype = getattr(torch, config.dtype)


def name_in(config: PreTrainedConfig, names: tuple[str, ...]) -> str | None:
    """The first of the names under which the configuration has a number; None if it has none."""
    return next((name for name in names if isinstance(getattr(config, name, None), int)), None)


def kv_heads_name(config: PreTrainedConfig) -> str | None:
    """The configuration's name for the number of KV heads; None if it states none, or one that has no effect."""
    unread = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
    return None if unread else name_in(config, KV_HEADS)


def width_name(config: PreTrainedConfig) -> str:
    """The configuration's name for an MLP's number of channels; its value may be None, or the attribute missing."""
    return name_in(config, WIDTHS) or next((name for name in WIDTHS if hasattr(config, name)), WIDTHS[0])


def heads_per_group(dense: PreTrainedConfig) -> int:
    """Query heads per KV head; 1 if the architecture has equally many of both and states a single number."""
    name = kv_heads_name(dense)
    return 1 if name is None else dense.num_attention_heads // getattr(dense, name)


def with_query_heads(dense: PreTrainedConfig, overrides: Any) -> Any:
    """Return one layer's overrides; if they state the number of KV heads, with the number of query heads added."""
    if not isinstance(overrides, dict):
        return overrides
    name = next((name for name in KV_HEADS if name in overrides), None)
    if name is None:
        return overrides
    return {"num_attention_heads": overrides[name] * heads_per_group(dense), **overrides}


def resolve_layer_config(dense: PreTrainedConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    """The configuration to build one layer from: the model's global values, updated by the layer's overrides."""
    if not overrides:
        return dense
    config = copy.copy(dense)
    for name, value in with_query_heads(dense, overrides).items():
        if name != "skip":
            setattr(config, name, value)
    return config


def decoder_layers(model: Any, config: PreTrainedConfig) -> nn.ModuleList:
    """The model's decoder layers: the decoder's first module list that has `num_hidden_layers` entries."""
    text = text_config(config)
    decoder = model if text is config else model.get_decoder()
    lists = (entry for entry in decoder.modules() if isinstance(entry, nn.ModuleList))
    return next(entry for entry in lists if len(entry) == text.num_hidden_layers)


@contextmanager
def _zero_widths() -> Iterator[None]:
    """Silence PyTorch's warning about zero-element tensors: removed blocks are built with width 0, then dropped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors is a no-op")
        yield


@_zero_widths()
def build_layer(stock: Any, dense: PreTrainedConfig, overrides: dict[str, Any], index: int) -> Any:
    """Build a new decoder layer of `stock`'s class at its own widths.

    Args:
        stock: any decoder layer of that class.
        dense: the configuration with the model's global values.
        overrides: the layer's values that differ from the global ones.
        index: the layer's index.
    """
    config = resolve_layer_config(dense, overrides)
    try:
        layer = type(stock)(config, index)
    except ValueError:  # some classes refuse numbers of heads that do not divide the hidden size
        layer = None
    if layer is not None and (not overrides or _heads_fit(layer, config, dense)):
        return with_channels(layer, overrides)
    kept = {name: value for name, value in overrides.items() if name in (*EXPERT_WIDTHS, *SHARED_WIDTHS, *EXPERTS)}
    layer = type(stock)(resolve_layer_config(dense, kept), index)
    place = place_of(layer, "attention")
    setattr(layer, place, _narrow_attention(stock, config, head_dim(dense), index))
    return with_channels(layer, overrides)


def with_channels(layer: Any, overrides: dict[str, Any]) -> Any:
    """Return the layer, with its MLP resized to the width in `overrides` if its class has built it at another width."""
    place = place_of(layer, "mlp")
    width = next((overrides[name] for name in WIDTHS if name in overrides), None)
    block = None if place is None else getattr(layer, place)
    output = None if block is None else output_of(block, "mlp")
    if width is None or output is None:
        return layer
    stated = weight_of(getattr(block, output)).shape[1]
    if stated == width:
        return layer
    for name, linear in block.named_children():
        if is_linear(linear):
            rows, columns = weight_of(linear).shape
            resize(linear, *((rows, width) if name == output else (rows * width // stated, columns)))
    return layer


def is_linear(module: Any) -> bool:
    """Whether a module is a linear layer; `Conv1D`, whose weight is stored transposed, counts as one."""
    return isinstance(module, nn.Linear) or stored_transposed(module)


def stored_transposed(linear: nn.Module) -> bool:
    """Whether a linear layer's weight is stored [I, O]."""
    return type(linear).__name__ == "Conv1D"


def weight_of(linear: Any) -> Any:
    """A linear layer's weight, [O, I]; a view if it is stored transposed."""
    return linear.weight.T if stored_transposed(linear) else linear.weight


def resize(linear: Any, rows: int, columns: int) -> None:
    """Give a linear layer a new weight [rows, columns] and, if it has a bias, a new bias [rows], both uninitialised."""
    shape = (columns, rows) if stored_transposed(linear) else (rows, columns)
    linear.weight = nn.Parameter(linear.weight.new_empty(shape))
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.new_empty(rows))
    state_features(linear)


def state_features(linear: Any) -> None:
    """Make a linear layer's attributes for its numbers of inputs and outputs agree with its weight."""
    names = ("nf", "nx") if stored_transposed(linear) else ("out_features", "in_features")
    for name, size in zip(names, weight_of(linear).shape, strict=True):
        setattr(linear, name, size)


def head_dim(dense: PreTrainedConfig) -> int:
    """Width of an attention head."""
    return int(getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads)


def _heads_fit(layer: nn.Module, config: PreTrainedConfig, dense: PreTrainedConfig) -> bool:
    """Whether the layer's attention heads have the model's head width; True if it has no heads that can be counted."""
    place = place_of(layer, "attention")
    output = None if place is None else output_of(getattr(layer, place), "attention")
    linear = None if output is None else getattr(getattr(layer, place), output)
    if not is_linear(linear) or config is dense:
        return True
    return bool(weight_of(linear).shape[1] == config.num_attention_heads * head_dim(dense))


def _narrow_attention(stock: Any, config: PreTrainedConfig, width: int, index: int) -> nn.Module:
    """Build an attention block whose class computes the heads' width as hidden size / number of heads.

    It is built for a hidden size that gives its heads this width; then its projections are resized to the model's
    hidden size.

    Args:
        stock: any decoder layer of the class.
        config: the layer's configuration.
        width: of a head.
        index: the layer's index.
    """
    narrow = copy.copy(config)
    narrow.hidden_size = config.num_attention_heads * width
    layer = type(stock)(narrow, index)
    block: nn.Module = getattr(layer, place_of(layer, "attention"))
    for name, linear in block.named_children():
        if is_linear(linear):
            rows, columns = weight_of(linear).shape
            of_model = config.hidden_size
            resize(linear, *((of_model, columns) if name in OUTPUTS["attention"] else (rows, of_model)))
    for module in block.modules():
        if "config" in vars(module):
            vars(module)["config"] = config
    return block


def place_of(layer: nn.Module, kind: str) -> Any:
    """Name of the decoder layer's attribute that holds its block of that kind; None if it has none."""
    return next((name for name in PLACES.get(kind, ()) if isinstance(getattr(layer, name, None), nn.Module)), None)


def output_of(block: nn.Module, kind: str) -> Any:
    """Name of the block's attribute that holds its output projection; None if it has none."""
    return next((name for name in OUTPUTS[kind] if isinstance(getattr(block, name, None), nn.Module)), None)


def norms_of(layer: nn.Module, kind: str) -> tuple[str | None, str | None]:
    """Names of the norms before and after the layer's block of that kind; None for each that is not the block's own."""
    if getattr(layer, "apply_residual_connection_post_layernorm", False):
        return None, None
    own = {name for name, _ in layer.named_children() if "norm" in name or name.startswith("ln_")}
    row = next((row for row in _NORMS if own == set(row) - {None}), (None,) * 4)
    return row[:2] if kind == "attention" else row[2:]


def drop_block(layer: nn.Module, kind: str) -> None:
    """Replace a decoder layer's block of that kind (a key of `PLACES`) by one that adds nothing; remove its norms."""
    place = place_of(layer, kind)
    stock = getattr(layer, place)
    if kind == "attention":
        width = getattr(stock, "head_dim", None) or stock.head_size
        setattr(layer, place, DroppedAttention(width, stock.layer_idx, adds_residual(stock)))
    else:
        setattr(layer, place, DroppedMLP(adds_residual(stock)))
    for name in norms_of(layer, kind):
        if name is not None:
            setattr(layer, name, nn.Identity())
