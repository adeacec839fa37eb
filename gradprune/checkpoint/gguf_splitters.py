"""llama.cpp's pre-tokenizers, which split text before byte-level BPE and which a GGUF file selects by name."""

from pathlib import Path

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from transformers import PreTrainedTokenizerBase

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

SPLITTERS = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_CONTRACTIONS + r"\p{N}" + _REST,): "qwen2",
    (_TEKKEN,): "tekken",
}
"""llama.cpp's name of a pre-tokenizer, by its steps: "bytes" is the splitting of `ByteLevel` itself (use_regex),
"digits" splits off each digit, and any other step is the pattern of a `Split`."""


def split_as_the_file_says(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Give a tokenizer that transformers read from a GGUF file the file's pre-tokenizer, which transformers ignores.

    If the file has no byte-level BPE or its pre-tokenizer is not in `SPLITTERS`, the tokenizer is left unchanged.
    """
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    model, name = (
        str(fields[key].contents()) if key in fields else "" for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre")
    )
    steps = {known: steps for steps, known in SPLITTERS.items()}.get(name)
    if model == "gpt2" and steps is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = _splitter(steps)


def _splitter(steps: tuple[str, ...]) -> PreTokenizer:
    made: list[PreTokenizer] = []
    for step in steps:
        if step == "digits":
            made.append(Digits(individual_digits=True))
        elif step != "bytes":
            made.append(Split(Regex(step), "isolated"))
    made.append(ByteLevel(add_prefix_space=False, use_regex="bytes" in steps))
    return made[0] if len(made) == 1 else Sequence(made)
