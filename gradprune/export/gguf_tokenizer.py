"""Convert a Hugging Face tokenizer to GGUF: byte-level BPE ("gpt2") or sentencepiece BPE ("llama")."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from gradprune.checkpoint.gguf_splitters import SPLITTERS
from gradprune.errors import ExportError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def add_tokenizer(writer: "GGUFWriter", tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Add the tokenizer's vocabulary, merges, special tokens and chat template.

    Args:
        writer: writer of the GGUF file.
        tokenizer: the model's tokenizer.
        config: the model's configuration. Its vocabulary may be larger than the tokenizer's; the remaining ids become
            unused tokens.

    Raises:
        ExportError: llama.cpp cannot reproduce the tokenization.
    """
    state = _state(tokenizer)
    model, vocab_size = state["model"], int(config.vocab_size)
    if model["type"] != "BPE":
        raise ExportError(f"model: its tokenizer is a {model['type']} one; gguf files of gradprune hold BPE ones")
    if len(tokenizer) > vocab_size:
        raise ExportError(
            f"model: its tokenizer has {len(tokenizer)} tokens, but its embedding only {vocab_size} (vocab_size)"
        )
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    tokens = list(_tokens(state, tokenizer, vocab_size))
    if model.get("byte_fallback"):
        _add_sentencepiece(writer, state, merges, [text for text, _ in tokens])
    else:
        _add_byte_level(writer, state, merges)
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    _add_special_tokens(writer, tokenizer)
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(template)


def _state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the tokenizer's state in the format of tokenizer.json."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"model: its tokenizer, a {type(tokenizer).__name__}, has no tokenizer.json to convert")
    state: dict[str, Any] = json.loads(backend.to_str())
    return state


def _add_sentencepiece(
    writer: "GGUFWriter", state: dict[str, Any], merges: list[tuple[str, ...]], texts: list[str]
) -> None:
    """Add the keys of sentencepiece BPE, which writes spaces as U+2581 and unknown characters as byte tokens."""
    prefix = _space_prefix(state)
    # llama.cpp merges the neighbouring tokens whose union has the highest score, so scores fall with the merges' order.
    rank: dict[str, int] = {}
    for index, merge in enumerate(merges):
        rank.setdefault("".join(merge), index)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([-float(rank.get(text, len(merges))) for text in texts])
    writer.add_add_space_prefix(prefix)


def _add_byte_level(writer: "GGUFWriter", state: dict[str, Any], merges: list[tuple[str, ...]]) -> None:
    """Add the keys of byte-level BPE, which writes each byte as a printable character."""
    # Without merges, every byte is a token however the text is split, so any pre-tokenizer will do.
    pre = SPLITTERS.get(_splitting(state)) if merges else "gpt-2"
    if pre is None:
        raise ExportError(
            "model: its tokenizer splits text differently from all of llama.cpp's pre-tokenizers that gradprune knows "
            f"({json.dumps(state['pre_tokenizer'])[:200]})"
        )
    if state["normalizer"] not in (None, {"type": "NFC"}):
        raise ExportError(f"model: llama.cpp does not normalize text as its tokenizer does ({state['normalizer']})")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    # llama.cpp refuses an empty list of merges. U+2581 never occurs in the text, because no byte is written as it.
    writer.add_token_merges([" ".join(merge) for merge in merges or [(_SPACE, _SPACE)]])


def _tokens(state: dict[str, Any], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Iterator[tuple[str, int]]:
    """Yield the text and the GGUF token type of every id in the model's vocabulary, in order."""
    from gguf import TokenType

    by_id = {index: text for text, index in tokenizer.get_vocab().items()}
    added = {token["id"]: token["special"] for token in state["added_tokens"]}
    byte_fallback = state["model"].get("byte_fallback")
    for index in range(vocab_size):
        if index not in by_id:
            yield f"[PAD{index}]", TokenType.UNUSED
        elif by_id[index] == tokenizer.unk_token and byte_fallback:
            yield by_id[index], TokenType.UNKNOWN
        elif index in added:
            yield by_id[index], TokenType.CONTROL if added[index] else TokenType.USER_DEFINED
        elif byte_fallback and _is_byte(by_id[index]):
            yield by_id[index], TokenType.BYTE
        else:
            yield by_id[index], TokenType.NORMAL


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _space_prefix(state: dict[str, Any]) -> bool:
    """Whether the tokenizer prepends a space; raise if it changes text other than by replacing spaces with U+2581."""
    steps = [*_flat(state["normalizer"], "normalizers"), *_flat(state["pre_tokenizer"], "pretokenizers")]
    prefix = replaced = False
    for step in steps:
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            prefix = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _SPACE:
            replaced = True
        elif step["type"] == "Metaspace" and step["replacement"] == _SPACE and not step.get("split", True):
            prefix, replaced = step["prepend_scheme"] != "never", True
        else:
            raise ExportError(f"model: llama.cpp does not change text as its tokenizer does ({json.dumps(step)[:200]})")
    if not replaced:
        raise ExportError("model: its tokenizer does not write spaces as U+2581, as llama.cpp does with byte fallback")
    return prefix


def _splitting(state: dict[str, Any]) -> tuple[str, ...]:
    """Return the pre-tokenizer's steps in the terms of `SPLITTERS`; steps that it cannot express become "unknown"."""
    words = []
    for step in _flat(state["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            words += ["bytes"] if step["use_regex"] else []
        elif step["type"] == "Digits" and step["individual_digits"]:
            words.append("digits")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            words.append(step["pattern"].get("Regex", "unknown"))
        else:
            words.append("unknown")
    return tuple(words)


def _flat(step: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """Return the steps of a sequence, or a single step, or no steps for None, as a list."""
    if step is None:
        return []
    return list(step[inside]) if step["type"] == "Sequence" else [step]


def _add_special_tokens(writer: "GGUFWriter", tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    # Tokenise a sample text to see which tokens the post-processor adds around it.
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    before, after = _around(whole, bare)
    allowed = [token for token in (tokenizer.bos_token_id,) if token is not None]
    if before not in ([], allowed) or after not in ([], [tokenizer.eos_token_id]):
        raise ExportError(
            f"model: its tokenizer adds {before} before and {after} after a text; llama.cpp adds bos and eos"
        )
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))


def _around(whole: list[int], bare: list[int]) -> tuple[list[int], list[int]]:
    """Return the tokens of `whole` before and after those of `bare`; all of `whole` and none if it is not found."""
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return whole, []
