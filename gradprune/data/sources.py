"""Load calibration or evaluation data, from a named dataset or a file, as one stream of token ids."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gradprune.data.embedded import embedded_text
from gradprune.data.mixture import mixed, split_names
from gradprune.data.tokenize import encode, encode_documents
from gradprune.errors import CalibrationError, one_line
from gradprune.hub import hub_fault

Split = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class _HubSource:
    """Where a named dataset is on the hub and how it is read; none of the datasets runs code of its own.

    arguments: arguments of `datasets.load_dataset`. splits: further arguments, by split. field: the text column's name.
    joint: the separator between rows, as in the literature; None means the tokenizer's end-of-text token.
    rows: maximum number of rows to read; None reads all.
    """

    arguments: dict[str, Any]
    splits: dict[Split, dict[str, Any]]
    field: str
    joint: str | None
    rows: int | None = None


_HUB = {
    "wikitext2": _HubSource(
        arguments={"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
        splits={"calibration": {"split": "train"}, "evaluation": {"split": "test"}},
        field="text",
        joint="\n\n",
    ),
    # The main branch needs a loading script, which `datasets` 4 refuses; the hub's Parquet conversion does not.
    "ptb": _HubSource(
        arguments={"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet"},
        splits={"calibration": {"split": "train"}, "evaluation": {"split": "test"}},
        field="sentence",
        joint=" ",
    ),
    # Streamed, because one shard has 356,000 documents, far more than are ever sampled.
    "c4": _HubSource(
        arguments={"path": "allenai/c4", "streaming": True},
        splits={
            "calibration": {"split": "train", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}},
            "evaluation": {
                "split": "validation",
                "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
            },
        },
        field="text",
        joint=None,
        rows=10_000,
    ),
}


def load_tokens(
    dataset: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    split: Split = "calibration",
    vocab_size: int | None = None,
    argument: str = "dataset",
) -> Tensor:
    """Read a dataset as one stream of token ids.

    Args:
        dataset: a .txt file (UTF-8); a .jsonl file (field `text`, or a chat in the field `messages`, which is written
            out by the tokenizer's chat template); a .npy file of token ids; wikitext2, ptb or c4 (which need the
            `data` extra and the hub); several of these with weights (see `gradprune.data.mixture`); or None for the
            embedded text.
        tokenizer: the model's tokenizer; required for everything except for .npy files.
        split: which split of a named dataset or of the embedded text to read; a file has only one.
        vocab_size: vocabulary size of the model, which all ids must be below. If it is None, ids of a .npy file are
            checked against the tokenizer's size and others are not checked.
        argument: the option that `dataset` came from, for error messages.

    Returns:
        [tokens] int64. Documents of a .jsonl file and of c4 are separated by the end-of-text token (by a blank line if
        the tokenizer has none), rows of wikitext2 by a blank line, rows of ptb by a space. Only the first 10,000
        documents of one shard of c4 are read.

    Raises:
        CalibrationError: the dataset is unknown, missing, empty, malformed, or cannot be fetched; or the tokenizer
            belongs to another model.
    """
    check_dataset(dataset, argument)
    try:
        if dataset is None:
            return _tokens(None, tokenizer, split, vocab_size)
        names = _split_names(dataset)
        streams = [_tokens(name, tokenizer, split, vocab_size) for name, _ in names]
        return streams[0] if len(streams) == 1 else mixed(streams, [weight for _, weight in names])
    except _Fault as fault:
        raise CalibrationError(f"{argument}: {fault}") from fault.__cause__


def check_dataset(dataset: str | None, argument: str = "dataset") -> None:
    """Check a dataset as far as this is possible before a model is loaded, or raise.

    Args:
        dataset, argument: see `load_tokens`.

    Raises:
        CalibrationError: a name is unknown, a file is missing, or a weight is invalid.
    """
    if dataset is None:
        return
    try:
        for name, _ in _split_names(dataset):
            _check_known(name)
    except _Fault as fault:
        raise CalibrationError(f"{argument}: {fault}") from fault.__cause__


class _Fault(Exception):
    """A problem with a dataset, to whose message `check_dataset` and `load_tokens` add the name of the option."""


def _split_names(dataset: str) -> list[tuple[str, float]]:
    try:
        return split_names(dataset)
    except ValueError as error:
        raise _Fault(str(error)) from error


def _tokens(
    dataset: str | None, tokenizer: PreTrainedTokenizerBase | None, split: Split, vocab_size: int | None
) -> Tensor:
    if dataset is not None and Path(dataset).suffix == ".npy":
        return _load_ids(Path(dataset), len(tokenizer) if vocab_size is None and tokenizer is not None else vocab_size)
    if tokenizer is None:
        raise _Fault("the model has no tokenizer; give token ids in a .npy file")
    if dataset is None:
        tokens = encode(tokenizer, embedded_text().train if split == "calibration" else embedded_text().held_out)
    elif dataset in _HUB:
        documents, joint = _load_hub(dataset, split), _HUB[dataset].joint
        tokens = encode_documents(tokenizer, documents) if joint is None else encode(tokenizer, joint.join(documents))
    else:
        tokens = encode_documents(tokenizer, _read_file(dataset, tokenizer))
    if not len(tokens):
        raise _Fault(f"'{dataset or 'the embedded text'}' is empty")
    if vocab_size is not None and tokens.max() >= vocab_size:
        raise _Fault(
            f"the tokenizer gives '{dataset or 'the embedded text'}' ids up to {int(tokens.max())}, but the model has "
            f"embeddings for {vocab_size}; the tokenizer is another model's"
        )
    return tokens


def _load_ids(path: Path, vocab_size: int | None) -> Tensor:
    try:
        with path.open("rb") as file:
            # Unlike `np.load`, this reads only the .npy format. A forged header can request any amount of memory.
            ids = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, OverflowError) as error:
        raise _Fault(f"'{path}' is not a .npy array of integers: {one_line(error)}") from error
    if ids.dtype.kind not in "iu":  # not np.issubdtype: it counts timedelta64 as an integer
        raise _Fault(f"'{path}' holds {ids.dtype}; token ids are integers")
    if ids.ndim not in (1, 2):
        raise _Fault(f"'{path}' has {ids.ndim} dimensions; token ids have 1, or 2 as rows of tokens")
    if not ids.size:
        raise _Fault(f"'{path}' is empty")
    below = np.iinfo(np.int64).max if vocab_size is None else vocab_size
    if ids.min() < 0 or ids.max() >= below:
        limit = "" if vocab_size is None else f" and below the vocabulary's {vocab_size}"
        raise _Fault(f"'{path}' has ids from {ids.min()} to {ids.max()}; they are at least 0{limit}")
    return torch.from_numpy(ids.astype(np.int64).reshape(-1))


def _read_file(dataset: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    path = Path(dataset)
    readers: dict[str, Callable[[], list[str]]] = {
        ".txt": lambda: [path.read_text(encoding="utf-8-sig")],
        ".jsonl": lambda: list(_jsonl_texts(path, tokenizer)),
    }
    try:
        return readers[path.suffix]()
    except UnicodeDecodeError as error:
        raise _Fault(f"'{path}' is not UTF-8 text: {error}") from error
    except OSError as error:
        raise _Fault(f"'{path}' cannot be read: {error.strerror}") from error


def _jsonl_texts(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip() and (text := _jsonl_text(line, f"line {number} of '{path}'", tokenizer)):
                yield text


def _jsonl_text(line: bytes, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _Fault(f"{where} is not UTF-8 text: {error}") from error
    # These are malformed JSON, numbers that are too long for Python, and nesting that is too deep for it.
    except (ValueError, RecursionError) as error:
        raise _Fault(f"{where} is not JSON: {error}") from error
    text = record.get("text") if isinstance(record, dict) else None
    if text is None and isinstance(record, dict) and "messages" in record:
        text = _chat_text(record["messages"], where, tokenizer)
    if not isinstance(text, str):
        raise _Fault(f"{where} has no string field 'text' and no chat in a field 'messages'")
    try:
        text.encode()
    # An escape in JSON can denote a lone surrogate, which tokenizers reject.
    except UnicodeEncodeError as error:
        raise _Fault(f"{where} has a lone surrogate in its field 'text': {error}") from error
    return text


def _chat_text(messages: Any, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a chat as text, written out by the tokenizer's chat template with its special tokens."""
    if not tokenizer.chat_template:
        raise _Fault(f"{where} is a chat, but the tokenizer has no chat template; give a field 'text' instead")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise _Fault(f"{where} has 'messages' that are not a list of objects with the strings 'role' and 'content'")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    # A template can raise any exception, e.g. if roles do not alternate.
    except Exception as error:
        raise _Fault(f"{where} is a chat that the tokenizer's template refuses: {one_line(error)}") from error


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))


def _load_hub(dataset: str, split: Split) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise _Fault(
            f"'{dataset}' needs the data extra (pip install 'gradprune[data]'); or give a .txt file"
        ) from error
    # In offline mode `datasets` reads its cache immediately; otherwise it retries an unreachable hub for 30 s or more.
    if not datasets.config.HF_HUB_OFFLINE and (fault := hub_fault()) is not None:
        raise _Fault(
            f"'{dataset}' needs the hub, but {fault}; set HF_HUB_OFFLINE=1 where it is cached, or give a .txt file"
        )
    source = _HUB[dataset]
    try:
        rows = datasets.load_dataset(**source.arguments, **source.splits[split])
        return [row[source.field] for row in islice(rows, source.rows)]
    # The exception that signals a missing network comes from a dependency that changes from release to release.
    except Exception as error:
        raise _Fault(f"'{dataset}' cannot be read from the hub: {one_line(error)}; or give a .txt file") from error


def _check_known(dataset: str) -> None:
    """Check that `dataset` is a named dataset or an existing file of a supported type, or raise."""
    if dataset in _HUB:
        return
    path = Path(dataset)
    if path.suffix not in (".txt", ".jsonl", ".npy"):
        raise _Fault(f"'{dataset}' is unknown; give a .txt, .jsonl or .npy file, or one of {', '.join(_HUB)}")
    try:
        there = path.is_file()
    except (OSError, ValueError) as error:  # the name is too long or contains a NUL
        raise _Fault(f"'{path}' cannot be read: {one_line(error)}") from error
    if not there:
        raise _Fault(f"there is no file '{path}'")
