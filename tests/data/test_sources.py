import json
import logging
import pickle
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from gradprune import hub
from gradprune.data import tokenize
from gradprune.data.embedded import EmbeddedText
from gradprune.data.sources import load_tokens
from gradprune.data.tokenize import encode
from gradprune.data.windows import batches, check_context, overlap_of, sample_windows, split_held_out
from gradprune.demo import byte_tokenizer
from gradprune.errors import CalibrationError
from helpers.tiny_models import tiny_model

TOKENIZER = byte_tokenizer()


@given(
    tokens=st.integers(0, 400),
    num_samples=st.integers(1, 12),
    seq_len=st.integers(2, 40),
    seed=st.integers(0, 5),
)
def test_windows_are_disjoint_consecutive_and_deterministic(
    tokens: int, num_samples: int, seq_len: int, seed: int
) -> None:
    stream = torch.arange(tokens)
    if tokens // seq_len < num_samples:
        message = f"num_samples: {num_samples} samples of {seq_len} tokens need" if tokens else "dataset: it is empty"
        with pytest.raises(CalibrationError, match=message):
            sample_windows(stream, num_samples=num_samples, seq_len=seq_len, seed=seed)
        return
    windows = sample_windows(stream, num_samples=num_samples, seq_len=seq_len, seed=seed)
    assert windows.shape == (num_samples, seq_len)
    assert len(windows.unique()) == num_samples * seq_len, "a token was drawn twice"
    assert (windows.diff(dim=1) == 1).all()
    again = sample_windows(stream, num_samples=num_samples, seq_len=seq_len, seed=seed)
    assert torch.equal(windows, again)
    offsets = windows[:, 0] % seq_len
    assert (offsets == offsets[0]).all(), "the windows do not lie on one grid"
    assert windows.min() >= 0
    assert windows.max() < tokens


def test_another_seed_draws_other_windows() -> None:
    stream = torch.arange(10_000)
    first, second = (sample_windows(stream, num_samples=8, seq_len=16, seed=seed) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_spare_tokens_move_the_grid() -> None:
    stream = torch.arange(105)
    draws = [sample_windows(stream, num_samples=10, seq_len=10, seed=seed) for seed in range(40)]
    assert {int(draw.min()) for draw in draws} == set(range(6))


def test_every_window_is_drawn_by_some_seed() -> None:
    stream = torch.arange(100)
    draws = [sample_windows(stream, num_samples=1, seq_len=10, seed=seed) for seed in range(100)]
    assert {int(draw[0, 0]) for draw in draws} == set(range(0, 100, 10))


@pytest.mark.parametrize(("num_samples", "seq_len", "name"), [(0, 4, "num_samples"), (4, 0, "seq_len")])
def test_no_windows_or_empty_windows_are_refused(num_samples: int, seq_len: int, name: str) -> None:
    with pytest.raises(CalibrationError, match=f"{name}: 0 is not at least 1"):
        sample_windows(torch.arange(100), num_samples=num_samples, seq_len=seq_len, seed=0)


def test_too_little_text_says_how_much_there_is() -> None:
    with pytest.raises(
        CalibrationError, match=r"need 1,600 tokens, but the dataset has 1,000: num_samples can be 10 at most"
    ):
        sample_windows(torch.arange(1000), num_samples=16, seq_len=100, seed=0)


@given(st.integers(2, 300), st.integers(2, 40))
def test_held_out_tokens_are_the_end_and_overlap_nothing(count: int, seq_len: int) -> None:
    stream = torch.arange(count)
    if count < 2 * seq_len:
        with pytest.raises(CalibrationError, match="too few"):
            split_held_out(stream, seq_len)
        return
    calibration, held_out = split_held_out(stream, seq_len)
    assert torch.equal(torch.cat([calibration, held_out]), stream)
    assert len(held_out) == max(count // 10, seq_len)


def test_a_tenth_is_held_out_of_a_long_stream() -> None:
    calibration, held_out = split_held_out(torch.arange(1000), 5)
    assert (len(calibration), len(held_out)) == (900, 100)


def test_batches_keep_order_and_lose_nothing() -> None:
    windows = torch.arange(70).view(7, 10)
    assert [len(batch) for batch in batches(windows, 3)] == [3, 3, 1]
    assert torch.equal(torch.cat(list(batches(windows, 3))), windows)


def test_no_windows_are_no_batches() -> None:
    assert list(batches(torch.empty(0, 16, dtype=torch.int64), 4)) == []


def test_a_text_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    text = "héllo\nwörld\n" * 20_000
    path.write_text(text, encoding="utf-8")
    tokens = load_tokens(str(path), TOKENIZER)
    assert TOKENIZER.decode(tokens) == text
    assert tokens.dtype == torch.int64


def test_jsonl_documents_are_separated(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two", "other": 3}\n', encoding="utf-8")
    assert TOKENIZER.decode(load_tokens(str(path), TOKENIZER)) == "one<|endoftext|>two"
    plain = byte_tokenizer()
    plain.eos_token = None
    assert plain.decode(load_tokens(str(path), plain)) == "one\n\ntwo"


CHAT = {"messages": [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}]}
TEMPLATE = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"


def test_a_chat_is_formatted_by_the_tokenizers_template(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(CHAT) + '\n{"text": "plain"}\n', encoding="utf-8")
    talking = byte_tokenizer()
    talking.chat_template = TEMPLATE
    assert talking.decode(load_tokens(str(path), talking)) == "[user]Tea?[assistant]Yes.<|endoftext|>plain"


@pytest.mark.parametrize(
    ("record", "template", "message"),
    [
        (CHAT, None, "line 1 of .* is a chat, but the tokenizer has no chat template"),
        ({"messages": "hello"}, TEMPLATE, "line 1 of .* has 'messages' that are not a list"),
        ({"messages": [{"role": "user"}]}, TEMPLATE, "line 1 of .* has 'messages' that are not a list"),
        (CHAT, "{{ raise_exception('no user') }}", "line 1 of .* that the tokenizer's template refuses: .*no user"),
    ],
)
def test_a_chat_that_cannot_be_read_is_named(tmp_path: Path, record, template, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record), encoding="utf-8")
    talking = byte_tokenizer()
    talking.chat_template = template
    with pytest.raises(CalibrationError, match=f"^dataset: {message}"):
        load_tokens(str(path), talking)


@pytest.mark.parametrize(("weights", "share"), [((":3", ":1"), 0.75), (("", ""), 0.5), ((":0.2", ":0.8"), 0.2)])
def test_several_datasets_keep_their_shares_in_both_parts_of_the_split(tmp_path: Path, weights, share) -> None:
    for name, letter, size in (("a.txt", "a", 5000), ("b.txt", "b", 3000)):
        (tmp_path / name).write_text(letter * size)
    names = ",".join(f"{tmp_path / name}{weight}" for name, weight in zip(("a.txt", "b.txt"), weights, strict=True))
    tokens = load_tokens(names, TOKENIZER)
    assert min(5000 / share, 3000 / (1 - share)) - len(tokens) < 3  # one of the two datasets is used up
    a = int(TOKENIZER("a")["input_ids"][0])
    for part in (tokens, *split_held_out(tokens, 16)):
        assert float((part == a).double().mean()) == pytest.approx(share, abs=0.01)


def test_a_file_with_a_comma_in_its_name_is_one_dataset(tmp_path: Path) -> None:
    path = tmp_path / "a,b.txt"
    path.write_text("one")
    assert TOKENIZER.decode(load_tokens(str(path), TOKENIZER)) == "one"


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (":0,b.txt", "the weight of .*, 0, is not a finite number above 0"),
        (":nan,b.txt", "the weight of .*, nan, is not"),
        (",:2", "':2' names no dataset"),
        (",b.pdf:2", "'b.pdf' is unknown"),
    ],
)
def test_a_meaningless_mixture_is_refused(tmp_path: Path, suffix: str, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    with pytest.raises(CalibrationError, match=f"^dataset: {message}"):
        load_tokens(f"{path}{suffix}", TOKENIZER)


def test_the_separator_between_documents_is_never_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "_PIECE", 3)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abcdefgh"}\n' * 9, encoding="utf-8")
    tokens = load_tokens(str(path), TOKENIZER)
    assert int((tokens == TOKENIZER.eos_token_id).sum()) == 8
    assert TOKENIZER.decode(tokens) == TOKENIZER.eos_token.join(["abcdefgh"] * 9)


@pytest.mark.parametrize(("name", "text"), [("a.txt", "wörd"), ("a.jsonl", '{"text": "wörd"}')])
def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8-sig")
    assert TOKENIZER.decode(load_tokens(str(path), TOKENIZER)) == "wörd"


@given(text=st.text(alphabet="ab \nö", max_size=200), piece=st.integers(1, 20), pieces=st.integers(1, 3))
def test_pieces_add_up_to_the_whole_text(text: str, piece: int, pieces: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "_PIECE", piece)
        patch.setattr(tokenize, "_PIECES", pieces)
        parts = list(tokenize._pieces(text))
        tokens = encode(TOKENIZER, text)
    assert "".join(parts) == text
    assert all(0 < len(part) <= 2 * piece for part in parts)
    assert torch.equal(tokens, torch.tensor(TOKENIZER(text)["input_ids"], dtype=torch.int64))


def test_pieces_end_with_a_line_or_a_word() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "_PIECE", 4)
        parts = [list(tokenize._pieces(text)) for text in ("abcde\nfgh", "abcde fghi", "abcdefghij")]
    assert parts == [["abcde\n", "fgh"], ["abcde", " fghi"], ["abcdefgh", "ij"]]


def test_tokenising_a_long_text_gives_no_warning_and_adds_no_token(
    stories_model: Path, stories_text: tuple[Path, Path]
) -> None:
    """With a real tokenizer, which adds a start-of-text token and warns about text longer than its context."""
    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    tokenizer.model_max_length = 16
    text = stories_text[1].read_text(encoding="utf-8")
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        tokens = load_tokens(str(stories_text[1]), tokenizer)
        assert not records
        whole = tokenizer(text)["input_ids"]
    finally:
        logger.removeHandler(handler)
    assert records, "the check cannot fail"
    assert whole[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in tokens
    assert tokenizer.decode(tokens[:500]) == tokenizer.decode(whole[1:501])
    # The tokenizer puts its word mark before the first word of every piece, so a few tokens may differ.
    assert abs(len(tokens) - len(whole) + 1) < 10


@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_token_ids_are_read_with_and_without_a_tokenizer(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(12, dtype=np.uint16).reshape(shape))
    for tokenizer in (TOKENIZER, None):
        assert torch.equal(load_tokens(str(path), tokenizer), torch.arange(12))


def test_token_ids_are_checked_against_the_given_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([0, 300]))
    assert load_tokens(str(path), TOKENIZER, vocab_size=301).tolist() == [0, 300]
    for tokenizer in (TOKENIZER, None):
        with pytest.raises(
            CalibrationError, match=r"ids from 0 to 300; they are at least 0 and below the vocab.* 300$"
        ):
            load_tokens(str(path), tokenizer, vocab_size=300)


class _Executed:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["pickle", "npy"])
def test_nothing_is_unpickled(tmp_path: Path, form: str) -> None:
    path, proof = tmp_path / "a.npy", tmp_path / "executed"
    if form == "pickle":
        path.write_bytes(pickle.dumps(_Executed(proof)))
    else:
        write_npy(path, np.array([_Executed(proof)]))
    with pytest.raises(CalibrationError, match=r"is not a \.npy array of integers"):
        load_tokens(str(path), TOKENIZER)
    assert not proof.exists()
    np.load(path, allow_pickle=True)
    assert proof.exists(), "the check cannot fail"


def write_npy(path: Path, array: np.ndarray) -> None:
    np.save(path, array, allow_pickle=True)


def write_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, ids=np.arange(3))


def write_forged_npy(path: Path) -> None:
    """Write a header that promises far more values than follow it, or than fit in memory."""
    with path.open("wb") as file:
        header = {"descr": "<i8", "fortran_order": False, "shape": (10**15,)}
        np.lib.format.write_array_header_1_0(file, header)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.txt", None, "there is no file"),
        ("a.pdf", lambda p: p.write_text("x"), "is unknown; give a .txt, .jsonl or .npy file"),
        ("wikitext3", None, "is unknown"),
        ("a.txt", lambda p: p.write_text(""), "is empty"),
        ("a.txt", lambda p: p.write_bytes(b"\xff\xfe\x00"), "is not UTF-8"),
        ("a.jsonl", lambda p: p.write_text(""), "is empty"),
        ("a.jsonl", lambda p: p.write_text('{"text": "a"}\n{"text": '), "line 2 of .* is not JSON"),
        ("a.jsonl", lambda p: p.write_text(json.dumps({"txt": "a"})), "line 1 of .* has no string field 'text'"),
        ("a.jsonl", lambda p: p.write_text("[1]"), "line 1 of .* has no string field 'text'"),
        ("a.jsonl", lambda p: p.write_bytes(b'{"text": "a"}\n{"text": "\xff"}'), "line 2 of .* is not UTF-8"),
        ("a.jsonl", lambda p: p.write_text('{"text": "\\ud800"}'), "line 1 of .* has a lone surrogate"),
        ("a.jsonl", lambda p: p.write_text("[" * 100_000), "line 1 of .* is not JSON"),
        ("a.jsonl", lambda p: p.write_text('{"n": ' + "1" * 5000 + "}"), "line 1 of .* is not JSON"),
        ("a.jsonl", lambda p: p.write_text('{"text": ""}\n' * 3), "is empty"),
        ("a.npy", None, "there is no file"),
        ("a.npy", write_npz, "is not a .npy array"),
        ("a.npy", write_forged_npy, "is not a .npy array"),
        ("a.npy", lambda p: p.write_bytes(b""), "is not a .npy array"),
        ("a.npy", lambda p: write_npy(p, np.array(3)), "has 0 dimensions"),
        ("a.npy", lambda p: write_npy(p, np.zeros((2, 2, 2), dtype=int)), "has 3 dimensions"),
        ("a.npy", lambda p: write_npy(p, np.array([True])), "holds bool; token ids are integers"),
        ("a.npy", lambda p: write_npy(p, np.array([2**63], dtype=np.uint64)), "ids from 9223372036854775808 to"),
        ("a.npy", lambda p: p.write_bytes(b"nonsense"), "is not a .npy array"),
        ("a.npy", lambda p: write_npy(p, np.array([object()])), "is not a .npy array"),
        ("a.npy", lambda p: write_npy(p, np.array([1.5])), "holds float64; token ids are integers"),
        ("a.npy", lambda p: write_npy(p, np.array([], dtype=int)), "is empty"),
        ("a.npy", lambda p: write_npy(p, np.array([1, 258])), "ids from 1 to 258"),
        ("a.npy", lambda p: write_npy(p, np.array([-1, 2])), "ids from -1 to 2"),
    ],
)
def test_a_bad_dataset_is_named(tmp_path: Path, name: str, write, message: str) -> None:
    path = tmp_path / name
    if write is not None:
        write(path)
    with pytest.raises(CalibrationError, match=f"^dataset: .*{message}"):
        load_tokens(str(path) if "." in name else name, TOKENIZER)


def test_a_hub_dataset_needs_the_data_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"'wikitext2' needs the data extra \(pip install 'gradprune\[data\]'\)"):
        load_tokens("wikitext2", TOKENIZER)


def _pretend_hub(monkeypatch: pytest.MonkeyPatch, load_dataset: object, *, offline: bool = True) -> None:
    """Replace the `datasets` package; in its offline mode nothing checks whether the hub can be reached."""
    module = SimpleNamespace(config=SimpleNamespace(HF_HUB_OFFLINE=offline), load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.mark.parametrize(
    ("name", "field", "joined", "fixed"),
    [
        ("wikitext2", "text", "one\n\n\n\ntwo", {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}),
        ("ptb", "sentence", "one  two", {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet"}),
        ("c4", "text", "one<|endoftext|><|endoftext|>two", {"path": "allenai/c4", "streaming": True}),
    ],
)
def test_hub_datasets_are_joined_as_in_the_literature(
    monkeypatch: pytest.MonkeyPatch, name: str, field: str, joined: str, fixed: dict[str, object]
) -> None:
    calls = []

    def load_dataset(**arguments: object) -> Iterator[dict[str, str]]:
        calls.append(arguments)
        return iter([{field: text} for text in ("one", "", "two")])

    _pretend_hub(monkeypatch, load_dataset)
    for split in ("calibration", "evaluation"):
        assert TOKENIZER.decode(load_tokens(name, TOKENIZER, split=split)) == joined
    assert all(fixed.items() <= call.items() for call in calls)
    assert calls[0]["split"] == "train"
    assert calls[1]["split"] == ("validation" if name == "c4" else "test")
    assert not any("trust_remote_code" in call for call in calls)


def test_only_as_much_of_c4_as_needed_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def endless(**_arguments: object) -> Iterator[dict[str, str]]:
        while True:
            read.append(None)
            yield {"text": "a"}

    _pretend_hub(monkeypatch, endless)
    tokens = load_tokens("c4", TOKENIZER)
    assert len(read) == 10_000
    assert len(tokens) == 2 * 10_000 - 1


@pytest.mark.parametrize("message", ["", "no such revision\nand much more"])
def test_an_error_of_the_hub_becomes_one_line(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    def load_dataset(**_arguments: object) -> None:
        raise ConnectionError(message)

    _pretend_hub(monkeypatch, load_dataset)
    reason = " ".join(message.split()) or "ConnectionError"
    with pytest.raises(CalibrationError, match=f"^dataset: 'ptb' cannot be read from the hub: {reason}; or give a"):
        load_tokens("ptb", TOKENIZER)


@pytest.mark.parametrize("silent", [False, True], ids=["nobody listens", "nobody answers"])
def test_an_unreachable_hub_is_reported_within_seconds(monkeypatch: pytest.MonkeyPatch, silent: bool) -> None:
    def load_dataset(**_arguments: object) -> None:
        raise AssertionError("the hub was asked for data, which is tried for long")

    _pretend_hub(monkeypatch, load_dataset, offline=False)
    monkeypatch.setattr(hub, "_TIMEOUT", 0.2)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if silent:
            server.listen()
        start = time.monotonic()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(
            CalibrationError, match=r"'c4' needs the hub, but http://127.* cannot be reached.*HF_HUB_OFF"
        ):
            load_tokens("c4", TOKENIZER)
    assert time.monotonic() - start < 10, "waited for longer than the limit"


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(CalibrationError, match="the model has no tokenizer"):
        load_tokens(None, None)


def test_the_embedded_text_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "gradprune.data.sources.embedded_text", lambda: EmbeddedText(train="to learn", held_out="to test")
    )
    assert TOKENIZER.decode(load_tokens(None, TOKENIZER)) == "to learn"
    assert TOKENIZER.decode(load_tokens(None, TOKENIZER, split="evaluation")) == "to test"


def test_a_sequence_longer_than_the_context_is_refused() -> None:
    config = tiny_model().config
    check_context(config, 64)
    with pytest.raises(CalibrationError, match=r"seq_len: 65 is longer than .* of 64 tokens .max_position_embeddings"):
        check_context(config, 65)


def test_text_that_the_model_has_no_embeddings_for_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abc")
    last = max(encode(TOKENIZER, "abc").tolist())
    assert len(load_tokens(str(tmp_path / "text.txt"), TOKENIZER, vocab_size=last + 1)) == 3
    with pytest.raises(
        CalibrationError, match=rf"^dataset: .* ids up to {last}, but the model has embeddings for {last}"
    ):
        load_tokens(str(tmp_path / "text.txt"), TOKENIZER, vocab_size=last)


@pytest.mark.parametrize("dtype", ["timedelta64[s]", "datetime64[s]", "bool", "float32", "complex64"])
def test_only_whole_numbers_are_token_ids(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "ids.npy", np.zeros(9, dtype))
    with pytest.raises(CalibrationError, match=rf"^dataset: .* holds {dtype.split('[')[0]}.*; token ids are integers"):
        load_tokens(str(tmp_path / "ids.npy"), None)


@pytest.mark.parametrize("dataset", ["nothing.txt", "nothing.npy", "nothing.pdf", "n" * 300 + ".txt", "a\0b.txt"])
def test_an_error_names_the_option_that_named_the_dataset(dataset: str) -> None:
    with pytest.raises(CalibrationError, match=r"^eval_dataset: ") as error:
        load_tokens(dataset, TOKENIZER, argument="eval_dataset")
    assert "\n" not in str(error.value)


def test_overlap_compares_whole_tokens() -> None:
    """In bytes, a sequence of ids 1 is part of a sequence of ids 256, shifted by one byte."""
    assert overlap_of(torch.full((64,), 1), torch.full((200,), 256)) == 0.0
    assert overlap_of(torch.full((64,), 256), torch.full((200,), 256)) == 1.0


def test_a_record_with_a_text_and_a_chat_is_read_as_its_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "plain", **CHAT}), encoding="utf-8")
    talking = byte_tokenizer()
    talking.chat_template = TEMPLATE
    assert talking.decode(load_tokens(str(path), talking)) == "plain"
