"""Find the decoder layers of any causal LM, described in `architecture.py` or not."""

from collections.abc import Iterator

from torch import nn

from gradprune.errors import UnsupportedArchitectureError


def find_decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The longest `nn.ModuleList` whose entries are all of one class and hold parameters.

    Lists inside another list (a layer's experts) do not count. Of equally long lists the one with the most parameters
    is taken: the decoder of an encoder-decoder model, whose layers have cross attention.

    Raises:
        UnsupportedArchitectureError: there is no such list.
    """
    candidates = [entries for entries in _outer_lists(model) if len({type(entry) for entry in entries}) == 1]
    if not candidates:
        raise UnsupportedArchitectureError(
            f"model: no decoder layers found in a {type(model).__name__}; expected an nn.ModuleList of layers "
            "of one class with parameters, such as model.layers or transformer.h"
        )
    return max(candidates, key=lambda entries: (len(entries), _size(entries)))


def _outer_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """The lists with parameters that lie in no other such list, `module` itself included."""
    if isinstance(module, nn.ModuleList) and _size(module):
        yield module
        return
    for child in module.children():
        yield from _outer_lists(child)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
