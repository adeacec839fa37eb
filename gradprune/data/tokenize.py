"""Tokenise text of any length, piece by piece."""

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

# Text is tokenised in pieces of at least 64 Ki characters, 64 pieces per call: the tokenizer holds offsets and masks
# besides the ids, so this bounds its memory.
_PIECE = 1 << 16
_PIECES = 64


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids [tokens] int64 of a text of any length, with no special tokens added."""
    return _encode_pieces(tokenizer, list(_pieces(text)))


def encode_documents(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> Tensor:
    """Token ids [tokens] int64 of documents separated by the end-of-text token, or by a blank line if there is none."""
    separator = tokenizer.eos_token
    if not separator:
        return encode(tokenizer, "\n\n".join(documents))
    # The separator is a piece of its own, so it is never split.
    pieces = chain.from_iterable((separator, *_pieces(document)) for document in documents)
    return _encode_pieces(tokenizer, list(pieces)[1:])


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer prepends its beginning-of-text token."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a", verbose=False)["input_ids"][0] == bos


def _encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: list[str]) -> Tensor:
    ids = [torch.empty(0, dtype=torch.int64)]
    for start in range(0, len(pieces), _PIECES):
        # A list is tokenised in parallel. verbose=False suppresses the warning about the model's context length.
        encoded = tokenizer(pieces[start : start + _PIECES], add_special_tokens=False, verbose=False)["input_ids"]
        ids += [torch.tensor(piece, dtype=torch.int64) for piece in encoded]
    return torch.cat(ids)


def _pieces(text: str) -> Iterator[str]:
    """Cut a text into pieces: after a newline if one is near, else before a space, else anywhere."""
    start = 0
    while start < len(text):
        limit = start + 2 * _PIECE
        end = text.find("\n", start + _PIECE, limit) + 1
        if not end:
            space = text.rfind(" ", start + 1, limit)
            end = len(text) if limit >= len(text) else space if space > 0 else limit
        yield text[start:end]
        start = end
