"""Calibration and evaluation data: from a dataset's name or file to windows of token ids."""

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

from gradprune.data.tokenize import encode, encode_documents
from gradprune.errors import CalibrationError

Split = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class _HubSource:
    """Where a named dataset lies on the hub; none of them runs code of its own.

    arguments: of `datasets.load_dataset`, and by split what comes on top. field: the column of text.
    joint: what stands between rows, as the literature has it; None is the tokenizer's end of text.
    rows: at most so many are read.
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
    # Its main branch holds a loading script, which `datasets` 4 refuses; the hub's own conversion holds the data.
    "ptb": _HubSource(
        arguments={"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet"},
        splits={"calibration": {"split": "train"}, "evaluation": {"split": "test"}},
        field="sentence",
        joint=" ",
    ),
    # Streamed, because one shard is 356,000 documents, far more than is ever sampled.
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
_HUB_TIMEOUT = 5.0  # seconds


def load_tokens(
    dataset: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    split: Split = "calibration",
    vocab_size: int | None = None,
) -> Tensor:
    """Read a dataset as one stream of token ids.

    Args:
        dataset: a .txt file (UTF-8), a .jsonl file (field `text`), a .npy file of token ids, one of wikitext2,
            ptb and c4 (needs the `data` extra and the hub), or None for the embedded text.
        tokenizer: the model's; needed for everything but .npy.
        split: which part of a dataset that has two; files have one.
        vocab_size: ids of a .npy file are below it; the tokenizer's by default.

    Returns:
        [tokens] int64. Documents of a .jsonl file and of c4 are separated by the end-of-text token (a blank line where
        the tokenizer has none), rows of wikitext2 by a blank line, those of ptb by a space. c4 is the first 10,000
        documents of a shard.

    Raises:
        CalibrationError: the dataset is unknown, missing, empty, malformed, or cannot be fetched.
    """
    if dataset is not None and Path(dataset).suffix == ".npy":
        return _load_ids(Path(dataset), len(tokenizer) if vocab_size is None and tokenizer is not None else vocab_size)
    if tokenizer is None:
        raise CalibrationError("dataset: the model has no tokenizer; give token ids in a .npy file")
    if dataset is None:
        from gradprune.data.embedded import embedded_text

        tokens = encode(tokenizer, embedded_text().train if split == "calibration" else embedded_text().held_out)
    elif dataset in _HUB:
        documents, joint = _load_hub(dataset, split), _HUB[dataset].joint
        tokens = encode_documents(tokenizer, documents) if joint is None else encode(tokenizer, joint.join(documents))
    else:
        tokens = encode_documents(tokenizer, _read_file(dataset))
    if not len(tokens):
        raise CalibrationError(f"dataset: '{dataset or 'the embedded text'}' is empty")
    return tokens


def _load_ids(path: Path, vocab_size: int | None) -> Tensor:
    _check_exists(path)
    try:
        with path.open("rb") as file:
            # Unlike `np.load` it takes nothing but the .npy format. A forged header asks for any amount of memory.
            ids = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, OverflowError) as error:
        raise CalibrationError(f"dataset: '{path}' is not a .npy array of integers: {_first_line(error)}") from error
    if not np.issubdtype(ids.dtype, np.integer):
        raise CalibrationError(f"dataset: '{path}' holds {ids.dtype}; token ids are integers")
    if ids.ndim not in (1, 2):
        raise CalibrationError(f"dataset: '{path}' has {ids.ndim} dimensions; token ids have 1, or 2 as rows of tokens")
    if not ids.size:
        raise CalibrationError(f"dataset: '{path}' is empty")
    below = np.iinfo(np.int64).max if vocab_size is None else vocab_size
    if ids.min() < 0 or ids.max() >= below:
        limit = "" if vocab_size is None else f" and below the vocabulary's {vocab_size}"
        raise CalibrationError(f"dataset: '{path}' has ids from {ids.min()} to {ids.max()}; they are at least 0{limit}")
    return torch.from_numpy(ids.astype(np.int64).reshape(-1))


def _read_file(dataset: str) -> list[str]:
    path = Path(dataset)
    readers: dict[str, Callable[[], list[str]]] = {
        ".txt": lambda: [path.read_text(encoding="utf-8-sig")],
        ".jsonl": lambda: list(_jsonl_texts(path)),
    }
    if path.suffix not in readers:
        raise CalibrationError(
            f"dataset: '{dataset}' is unknown; give a .txt, .jsonl or .npy file, or one of {', '.join(_HUB)}"
        )
    _check_exists(path)
    try:
        return readers[path.suffix]()
    except UnicodeDecodeError as error:
        raise CalibrationError(f"dataset: '{path}' is not UTF-8 text: {error}") from error
    except OSError as error:
        raise CalibrationError(f"dataset: '{path}' cannot be read: {error.strerror}") from error


def _jsonl_texts(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip() and (text := _jsonl_text(line, f"line {number} of '{path}'")):
                yield text


def _jsonl_text(line: bytes, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise CalibrationError(f"dataset: {where} is not UTF-8 text: {error}") from error
    # Beside malformed JSON there are numbers too long and nesting too deep for Python.
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"dataset: {where} is not JSON: {error}") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise CalibrationError(f"dataset: {where} has no string field 'text'")
    try:
        text.encode()
    # JSON can escape half of a surrogate pair, which tokenizers refuse.
    except UnicodeEncodeError as error:
        raise CalibrationError(f"dataset: {where} has a lone surrogate in its field 'text': {error}") from error
    return text


def _load_hub(dataset: str, split: Split) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"dataset: '{dataset}' needs the data extra (pip install 'gradprune[data]'); or give a .txt file"
        ) from error
    if not datasets.config.HF_HUB_OFFLINE:
        _check_hub(dataset)
    source = _HUB[dataset]
    try:
        rows = datasets.load_dataset(**source.arguments, **source.splits[split])
        return [row[source.field] for row in islice(rows, source.rows)]
    # Which of its many dependencies' errors says "no network" differs from release to release.
    except Exception as error:
        raise CalibrationError(
            f"dataset: '{dataset}' cannot be read from the hub: {_first_line(error)}; or give a .txt file"
        ) from error


def _check_hub(dataset: str) -> None:
    """Ask once, by the hub's own client as that knows proxies; `datasets` would retry for half a minute or more."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_TIMEOUT)
    # The client, and with it its exceptions, differs from release to release.
    except Exception as error:
        raise CalibrationError(
            f"dataset: '{dataset}' needs the hub, but {constants.ENDPOINT} cannot be reached ({_first_line(error)}); "
            "set HF_HUB_OFFLINE=1 where it is cached, or give a .txt file"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise CalibrationError(f"dataset: there is no file '{path}'")
