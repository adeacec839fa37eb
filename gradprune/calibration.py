"""Calibration and evaluation data: from a dataset's name or file to windows of token ids."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from gradprune.errors import CalibrationError

Split = Literal["calibration", "evaluation"]

# Hub id, configuration, and by split the name (or file) that holds it; none of them runs code of its own.
_HUB: dict[str, dict[str, Any]] = {
    "wikitext2": {
        "path": "Salesforce/wikitext",
        "name": "wikitext-2-raw-v1",
        "calibration": {"split": "train"},
        "evaluation": {"split": "test"},
        "field": "text",
    },
    "ptb": {
        "path": "FALcon6/ptb_text_only",
        "calibration": {"split": "train"},
        "evaluation": {"split": "test"},
        "field": "sentence",
    },
    "c4": {
        "path": "allenai/c4",
        "calibration": {"split": "train", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}},
        "evaluation": {"split": "validation", "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}},
        "field": "text",
    },
}
_PIECE = 1 << 16


def load_tokens(
    dataset: str | None, tokenizer: PreTrainedTokenizerBase | None, *, split: Split = "calibration"
) -> Tensor:
    """Read a dataset as one stream of token ids.

    Args:
        dataset: a .txt file (UTF-8), a .jsonl file (field `text`), a .npy file of token ids, one of wikitext2,
            ptb and c4 (needs the `data` extra and the hub), or None for the embedded text.
        tokenizer: the model's; needed for everything but .npy.
        split: which part of a dataset that has two; files have one.

    Returns:
        [tokens] int64. Documents of a .jsonl or hub dataset are separated by the end-of-text token.

    Raises:
        CalibrationError: the dataset is unknown, missing, empty, malformed, or cannot be fetched.
    """
    if dataset is not None and Path(dataset).suffix == ".npy":
        return _load_ids(Path(dataset), tokenizer)
    if tokenizer is None:
        raise CalibrationError("dataset: the model has no tokenizer; give token ids in a .npy file")
    separator = tokenizer.eos_token or "\n\n"
    if dataset is None:
        from gradprune.demo import embedded_text

        text = embedded_text().train if split == "calibration" else embedded_text().held_out
    elif dataset in _HUB:
        text = separator.join(_load_hub(dataset, split))
    else:
        text = _read_file(dataset, separator)
    tokens = encode(tokenizer, text)
    if not len(tokens):
        raise CalibrationError(f"dataset: '{dataset}' is empty")
    return tokens


def split_held_out(tokens: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """Cut a stream into calibration and, its last tenth, held-out tokens.

    Args:
        tokens: [tokens] int64.
        seq_len: the held-out part has at least one window of so many tokens.

    Raises:
        CalibrationError: too short for one window of each.
    """
    held_out = max(len(tokens) // 10, seq_len)
    if len(tokens) < held_out + seq_len:
        raise CalibrationError(
            f"dataset: {len(tokens)} tokens are too few to calibrate and to hold out a window of {seq_len} tokens for "
            "perplexity; give more text, a smaller seq_len, or an eval_dataset"
        )
    return tokens[:-held_out], tokens[-held_out:]


def sample_windows(tokens: Tensor, *, num_samples: int, seq_len: int, seed: int) -> Tensor:
    """Draw windows of consecutive tokens, without replacement and without overlap.

    Args:
        tokens: [tokens] int64.
        num_samples, seq_len: how many windows of how many tokens.
        seed: the same seed draws the same windows.

    Returns:
        [num_samples, seq_len] int64.

    Raises:
        CalibrationError: too little text; says how much there is and how many windows it holds.
    """
    available = len(tokens) // seq_len
    if available < num_samples:
        raise CalibrationError(
            f"num_samples: {num_samples} samples of {seq_len} tokens need {num_samples * seq_len:,} tokens, but the "
            f"dataset has {len(tokens):,}, enough for {available}; give more text, or fewer or shorter samples"
        )
    generator = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(len(tokens) - available * seq_len + 1, (), generator=generator))
    windows = tokens[offset : offset + available * seq_len].view(available, seq_len)
    return windows[torch.randperm(available, generator=generator)[:num_samples]]


def batches(windows: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Split windows [N, T] into consecutive batches [<= batch_size, T]."""
    yield from windows.split(batch_size)


def check_context(config: PreTrainedConfig, seq_len: int) -> None:
    """Raise if a sequence is longer than the model's context.

    Raises:
        CalibrationError: naming both lengths.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        raise CalibrationError(f"seq_len: {seq_len} is longer than the model's context of {longest} tokens")


def _load_ids(path: Path, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    _check_exists(path)
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CalibrationError(f"dataset: '{path}' is not a .npy array of integers: {error}") from error
    if not np.issubdtype(ids.dtype, np.integer):
        raise CalibrationError(f"dataset: '{path}' holds {ids.dtype}; token ids are integers")
    if not ids.size:
        raise CalibrationError(f"dataset: '{path}' is empty")
    if ids.min() < 0 or (tokenizer is not None and ids.max() >= len(tokenizer)):
        limit = "" if tokenizer is None else f" and below the tokenizer's {len(tokenizer)}"
        raise CalibrationError(f"dataset: '{path}' has ids from {ids.min()} to {ids.max()}; they are at least 0{limit}")
    return torch.from_numpy(ids.astype(np.int64).reshape(-1))


def _read_file(dataset: str, separator: str) -> str:
    path = Path(dataset)
    readers: dict[str, Callable[[], str]] = {
        ".txt": lambda: path.read_text(encoding="utf-8"),
        ".jsonl": lambda: separator.join(_jsonl_texts(path)),
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


def _jsonl_texts(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise CalibrationError(f"dataset: line {number} of '{path}' is not JSON: {error}") from error
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise CalibrationError(f"dataset: line {number} of '{path}' has no string field 'text'")
            yield record["text"]


def _load_hub(dataset: str, split: Split) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"dataset: '{dataset}' needs the data extra (pip install 'gradprune[data]'); or give a .txt file"
        ) from error
    source = _HUB[dataset]
    arguments = {key: source[key] for key in ("path", "name") if key in source}
    try:
        rows = datasets.load_dataset(**arguments, **source[split])
    # Which of its many dependencies' errors says "no network" differs from release to release.
    except Exception as error:
        raise CalibrationError(
            f"dataset: '{dataset}' cannot be fetched from the hub: {str(error).splitlines()[0]}; or give a .txt file"
        ) from error
    return [text for text in rows[source["field"]] if text]


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise CalibrationError(f"dataset: there is no file '{path}'")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids of a long text, piece by piece, without special tokens; pieces end at line ends."""
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n", start + _PIECE) + 1 or len(text)
        pieces.append(text[start:end])
        start = end
    # Given as a list, the pieces are tokenised in parallel.
    encoded = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"] if pieces else []
    return torch.cat([torch.empty(0, dtype=torch.int64), *(torch.tensor(ids, dtype=torch.int64) for ids in encoded)])
