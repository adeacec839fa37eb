"""Find the decoder layers of any model, whether or not gradprune can prune it."""

from collections.abc import Iterator

from torch import nn

from gradprune.errors import UnsupportedArchitectureError


def find_decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the longest `nn.ModuleList` whose entries are all of one class and hold parameters.

    Lists nested in another list (a layer's experts) do not count. Among equally long lists the one with the most
    parameters wins: in an encoder-decoder model that is the decoder, because its layers have cross attention too.

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
    """Yield the outermost lists with parameters in `module`, which may itself be such a list."""
    if isinstance(module, nn.ModuleList) and _size(module):
        yield module
        return
    for child in module.children():
        yield from _outer_lists(child)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
