"""The demo model in the user's cache folder, which is trained on first use and written atomically."""

import hashlib
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from rich.console import Console
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

import gradprune
from gradprune.checkpoint.atomic import atomic_directory
from gradprune.data.embedded import embedded_text
from gradprune.data.tokenize import encode
from gradprune.demo.training import DemoTraining, train_model
from gradprune.errors import CheckpointError
from gradprune.evaluation.perplexity import perplexity

# Part of the cache folder's name: increment it whenever the recipe or the text changes.
RECIPE = 3
END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
# 256 byte tokens and the two special tokens.
VOCABULARY = 258
# How many seconds to wait for another process that is writing the same folder.
_PATIENCE = 60.0
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json")


def demo_model_path(console: Console | None = None, *, training: DemoTraining | None = None) -> Path:
    """Return the folder of the demo model, after training it if the cache has no complete copy.

    The cache is `$GRADPRUNE_CACHE`, else `$XDG_CACHE_HOME/gradprune`, else `~/.cache/gradprune`. The folder is a
    Hugging Face checkpoint with its tokenizer; `training.json` records how it was trained and its perplexity.

    Args:
        console: where progress is shown; None for standard error.
        training: another recipe, whose model is cached separately; None for the default recipe.

    Raises:
        CalibrationError: this Python installation contains too little text.
        CheckpointError: the cache folder cannot be written.
    """
    recipe = training or DemoTraining()
    console = console or Console(stderr=True)
    python = ".".join(platform.python_version_tuple()[:2])
    suffix = "" if training is None else "-" + hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]
    folder = _cache_folder() / f"demo-model-{RECIPE}-py{python}{suffix}"
    if not _is_whole(folder):
        _check_writable(folder.parent)
        console.print("Training the demo model on Python's own documentation (only once; takes a minute or two)")
        _make(folder, recipe, console)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer that round-trips any text: 256 bytes, and special tokens for end and padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    # There are no merges, so the text need not be split into words first.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )


def unigram_perplexity(train_ids: Tensor, held_out_ids: Tensor, vocab_size: int = VOCABULARY) -> float:
    """Compute the held-out tokens' perplexity under the training tokens' frequencies, with add-one smoothing.

    Args:
        train_ids, held_out_ids: [tokens] int64.
        vocab_size: size of the vocabulary.
    """
    counts = torch.bincount(train_ids, minlength=vocab_size).double() + 1.0
    return math.exp(-(counts / counts.sum()).log()[held_out_ids].mean().item())


def _cache_folder() -> Path:
    chosen, caches = (os.environ.get(name) for name in ("GRADPRUNE_CACHE", "XDG_CACHE_HOME"))
    try:
        return Path(chosen).expanduser() if chosen else Path(caches or Path.home() / ".cache") / "gradprune"
    except RuntimeError as error:
        raise CheckpointError(
            f"GRADPRUNE_CACHE: '{chosen or ''}' names no place for the demo model, and this user has no home folder; "
            "set it to a folder"
        ) from error


def _is_whole(folder: Path) -> bool:
    """Whether every file exists and the weight file is as long as its header says."""
    if not all((folder / name).is_file() for name in _FILES):
        return False
    try:
        with safe_open(folder / "model.safetensors", framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _check_writable(cache: Path) -> None:
    """Raise if the cache cannot be written, so that the error comes before training rather than after it."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise CheckpointError(
            f"GRADPRUNE_CACHE: '{cache}' cannot be written ({error.strerror}); set it to a writable folder"
        ) from error


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Context manager that disables transformers' own progress bars, which ignore our console."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _make(folder: Path, recipe: DemoTraining, console: Console) -> None:
    tokenizer = byte_tokenizer()
    text = embedded_text()
    train, held_out = (encode(tokenizer, part) for part in (text.train, text.held_out))
    start = time.perf_counter()
    model = train_model(recipe, train, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, console=console)
    seconds = time.perf_counter() - start
    measured = perplexity(
        model,
        held_out,
        seq_len=recipe.seq_len,
        batch_size=16,
        max_windows=recipe.evaluation_windows,
        console=console,
    )
    record = {
        "recipe": asdict(recipe),
        "seconds": round(seconds, 3),
        "parameters": model.num_parameters(),
        "held_out_perplexity": measured.value,
        "unigram_perplexity": unigram_perplexity(train, held_out, len(tokenizer)),
        "training_bytes": len(train),
        "held_out_bytes": len(held_out),
        "versions": {
            "gradprune": gradprune.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    # Overwriting is safe: an existing folder is incomplete, or it is the same model, just written by another process.
    with atomic_directory(
        folder, overwrite=True, argument="GRADPRUNE_CACHE", replaces=lambda _: True, patience=_PATIENCE
    ) as partial:
        with _no_progress_bars():
            model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
