"""Find the blocks of a decoder layer from its modules: which projections they have, and which rows make up a group.

A block reads the residual stream through input projections, whose *rows* belong to groups, and writes to it through
one output projection, whose *columns* belong to groups. The names that transformers uses for them are listed here;
`gradprune.models.self_test` checks that an architecture computes with them what their names suggest.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradprune.errors import UnsupportedArchitectureError
from gradprune.models.blocks import InputLinear, LinearBlock, OutputLinear, Part, Rider, added, writing
from gradprune.models.kinds import Kind
from gradprune.models.modeling_gradprune import output_of, place_of, weight_of

# For each kind, the known sets of input projections: the attribute, and the parts whose rows are stacked in its weight.
# "qkv" is one part because the query, key and value rows of each KV head are neighbours.
_INPUTS: dict[str, tuple[dict[str, tuple[str, ...]], ...]] = {
    "attention": (
        {"q_proj": ("q",), "k_proj": ("k",), "v_proj": ("v",)},
        {"qkv_proj": ("q", "k", "v")},
        {"query_key_value": ("qkv",)},
        {"c_attn": ("q", "k", "v")},
    ),
    "mlp": (
        {"gate_proj": ("gate",), "up_proj": ("up",)},
        {"gate_up_proj": ("gate", "up")},
        {"w1": ("gate",), "w3": ("up",)},
        {"up_proj": ("up",)},
        {"c_fc": ("up",)},
        {"fc1": ("up",)},
        {"fc_in": ("up",)},
        {"dense_h_to_4h": ("up",)},
    ),
}
# The projection to a compressed form, from which all heads' keys and values are computed and which is cached instead.
_COMPRESSING = "kv_a_proj_with_mqa"
# Classes of linear layers that compute the same as nn.Linear. Others quantise the weight, or add to the result.
_LINEAR = ("Linear", "FalconLinear", "Conv1D")


def find_block(layer: nn.Module, index: int, kind: Kind) -> LinearBlock | str:
    """Return the block of a kind in a decoder layer, or the reason, for messages, why it has none that can be pruned.

    Raises:
        UnsupportedArchitectureError: a projection is not a plain floating-point linear layer.
    """
    place = place_of(layer, kind.name)
    if place is None:
        return f"no {kind.name} block under a known name"
    return block_at(layer, index, kind, place)


def block_at(layer: nn.Module, index: int, kind: Kind, place: str) -> LinearBlock | str:
    """Return the block at a path in a decoder layer, attention or a form of MLP; see `find_block`."""
    module = layer.get_submodule(place)
    form = "attention" if kind.name == "attention" else "mlp"
    output, inputs = output_of(module, form), _inputs_of(module, form)
    if output is None or not inputs:
        return f"{place} has no known set of projections"
    linears = {name: _linear(module, name, index) for name in (*inputs, output)}
    shape = _GROUP_SHAPES[form](module, linears, linears[output])
    if isinstance(shape, str):
        return f"{place}: {shape}"
    rest = _gates_and_riders(module, linears, shape)
    if isinstance(rest, str):
        return f"{place}: {rest}"
    gates, riders = rest
    entries = tuple(
        [_input(name, linears[name], parts, shape) for name, parts in inputs.items()]
        + [InputLinear(name, gate, (Part("gate", 0, gate.out_features // shape.groups),)) for name, gate in gates]
    )
    written, width = weight_of(linears[output]).shape
    columns = width // shape.groups
    cost = written * columns + sum(rider.rows * rider.parameter[0].numel() for rider in riders)
    for entry in entries:
        cost += sum(part.rows for part in entry.parts) * (entry.weight.shape[1] + (entry.linear.bias is not None))
    own = writing(module, linears[output])
    adds, writer = added(layer, own, form)
    return LinearBlock(
        kind=kind,
        layer=index,
        path=place,
        module=own,
        groups=shape.groups,
        cost=cost,
        adds=adds,
        writer=writer,
        inputs=entries,
        output=OutputLinear(output, linears[output], columns),
        head_dim=shape.head_dim,
        riders=riders,
    )


def cached_width(layer: nn.Module) -> int:
    """How many numbers a decoder layer caches for each token in generation, keys and values together.

    It is 0 for a layer without attention, or with a form of attention that carries a state of constant size instead.
    """
    place = place_of(layer, "attention")
    module = None if place is None else layer.get_submodule(place)
    output = None if module is None else output_of(module, "attention")
    if module is None or output is None:
        return 0
    if hasattr(module, _COMPRESSING):
        return int(weight_of(module.get_submodule(_COMPRESSING)).shape[0])
    columns = int(weight_of(getattr(module, output)).shape[1])
    rows = {name: int(weight_of(getattr(module, name)).shape[0]) for name in _inputs_of(module, "attention")}
    if "k_proj" in rows:
        return rows["k_proj"] + rows["v_proj"]
    # Falcon caches keys and values repeated for every query head; unknown forms of attention are assumed to do so, too.
    repeated = not rows or getattr(module, "new_decoder_architecture", False)
    return 2 * columns if repeated else sum(rows.values()) - columns


@dataclass(frozen=True)
class _GroupShape:
    """The sizes of a block's groups.

    groups: the number of groups. rows: by part of the input projections, the number of rows of one group. heads: the
    number of query heads, or of an MLP's channels. head_dim: see `LinearBlock`.
    """

    groups: int
    rows: dict[str, int]
    heads: int
    head_dim: int


def _inputs_of(module: nn.Module, kind: str) -> dict[str, tuple[str, ...]]:
    """Return the first known set of input projections that the module has completely; empty if there is none."""
    names = {name for name, _ in module.named_children()}
    return next((found for found in _INPUTS[kind] if found.keys() <= names), {})


def _kv_groups(module: nn.Module, linears: dict[str, nn.Linear], output: nn.Linear) -> _GroupShape | str:
    """Return the sizes of attention's groups, each a KV head with its query heads; or why it cannot be pruned."""
    width: Any = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    if not isinstance(width, int):
        return "its heads have no stated width"
    if _has_alibi(module):
        return "its heads differ by a bias on distances (alibi), which depends on their number"
    heads = weight_of(output).shape[1] // width
    if "k_proj" in linears:
        kv_heads = weight_of(linears["k_proj"]).shape[0] // width
    else:
        rows = sum(weight_of(linear).shape[0] for linear in linears.values() if linear is not output)
        kv_heads = (rows // width - heads) // 2
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        return f"{heads} query heads cannot be shared among {kv_heads} KV heads"
    ratio = heads // kv_heads
    rows_of = {"q": ratio * width, "k": width, "v": width, "qkv": (ratio + 2) * width}
    if "q_proj" in linears:
        # In some architectures the rows of q_proj include a gate for each head, next to its query.
        rows_of["q"] = weight_of(linears["q_proj"]).shape[0] // kv_heads
    return _GroupShape(kv_heads, rows_of, heads, width)


def _channels(_module: nn.Module, _linears: dict[str, nn.Linear], output: nn.Linear) -> _GroupShape | str:
    """Return the sizes of an MLP's groups, each one intermediate channel."""
    channels = weight_of(output).shape[1]
    return _GroupShape(channels, {"gate": 1, "up": 1}, channels, 1)


def _has_alibi(module: nn.Module) -> bool:
    """Whether attention receives a bias for each head (alibi) and the configuration does not say that it is unused."""
    given = not {"alibi", "position_bias"}.isdisjoint(inspect.signature(type(module).forward).parameters)
    return given and bool(getattr(getattr(module, "config", None), "alibi", True))


_GROUP_SHAPES: dict[str, Callable[[nn.Module, dict[str, nn.Linear], nn.Linear], _GroupShape | str]] = {
    "attention": _kv_groups,
    "mlp": _channels,
}


def _input(name: str, linear: nn.Linear, parts: Sequence[str], shape: _GroupShape) -> InputLinear:
    found, offset = [], 0
    for part in parts:
        found.append(Part(part, offset, shape.rows[part]))
        offset += shape.rows[part] * shape.groups
    return InputLinear(name, linear, tuple(found))


def _gates_and_riders(
    module: nn.Module, linears: dict[str, nn.Linear], shape: _GroupShape
) -> tuple[list[tuple[str, nn.Linear]], tuple[Rider, ...]] | str:
    """Return a block's gates on heads and its parameters with rows for every head, or why it cannot be pruned."""
    gates: list[tuple[str, nn.Linear]] = []
    riders: list[Rider] = []
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and type(child).__name__ in _LINEAR and name not in linears:
            if shape.head_dim == 1 or child.out_features not in (shape.heads, shape.heads * shape.head_dim):
                return f"{name} is not a known part of the block"
            gates.append((name, child))
        elif name not in linears and list(child.parameters()) and not ("norm" in name or "act" in name):
            return f"{name} is not a known part of the block"
    for path, parameter in module.named_parameters():
        owner = path.rpartition(".")[0]
        if owner in linears or owner in dict(gates) or not parameter.ndim:
            continue
        per_head_norm = "norm" in path and parameter.shape == (shape.head_dim,)
        kv = parameter.shape[0] == shape.groups and path.split(".")[0].startswith("k")
        if not per_head_norm and shape.head_dim > 1 and (parameter.shape[0] == shape.heads or kv):
            riders.append(Rider(path, parameter, parameter.shape[0] // shape.groups))
    return gates, tuple(riders)


def _linear(module: nn.Module, path: str, layer: int) -> nn.Linear:
    linear: Any = module.get_submodule(path)
    if type(linear).__name__ not in _LINEAR or not linear.weight.is_floating_point():
        dtype = getattr(getattr(linear, "weight", None), "dtype", None)
        raise UnsupportedArchitectureError(
            f"base_model: layer {layer}'s {path} is a {type(linear).__name__} of {dtype}; "
            "gradprune prunes plain floating-point nn.Linear layers (load the model unquantised, merge adapters)"
        )
    return linear  # type: ignore[no-any-return]
