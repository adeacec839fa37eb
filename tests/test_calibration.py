import builtins
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model

from gradprune.calibration import batches, check_context, load_tokens, sample_windows, split_held_out
from gradprune.demo import byte_tokenizer, embedded_text
from gradprune.errors import CalibrationError

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
        with pytest.raises(
            CalibrationError, match=f"{num_samples} samples of {seq_len} tokens need|dataset: it is empty"
        ):
            sample_windows(stream, num_samples=num_samples, seq_len=seq_len, seed=seed)
        return
    windows = sample_windows(stream, num_samples=num_samples, seq_len=seq_len, seed=seed)
    assert windows.shape == (num_samples, seq_len)
    assert len(windows.unique()) == num_samples * seq_len, "a token was drawn twice"
    assert (windows.diff(dim=1) == 1).all()
    again = sample_windows(stream, num_samples=num_samples, seq_len=seq_len, seed=seed)
    assert torch.equal(windows, again)


def test_another_seed_draws_other_windows() -> None:
    stream = torch.arange(10_000)
    first, second = (sample_windows(stream, num_samples=8, seq_len=16, seed=seed) for seed in (0, 1))
    assert not torch.equal(first, second)


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
    assert len(held_out) >= seq_len


def test_batches_keep_order_and_lose_nothing() -> None:
    windows = torch.arange(70).view(7, 10)
    assert [len(batch) for batch in batches(windows, 3)] == [3, 3, 1]
    assert torch.equal(torch.cat(list(batches(windows, 3))), windows)


def test_text_files(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_token_ids(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(12, dtype=np.uint16).reshape(shape))
    for tokenizer in (TOKENIZER, None):
        assert torch.equal(load_tokens(str(path), tokenizer), torch.arange(12))


def write_npy(path: Path, array: np.ndarray) -> None:
    np.save(path, array, allow_pickle=True)


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
        ("a.npy", None, "there is no file"),
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
    real = builtins.__import__

    def without_datasets(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(CalibrationError, match=r"'wikitext2' needs the data extra \(pip install 'gradprune\[data\]'\)"):
        load_tokens("wikitext2", TOKENIZER)


def test_without_a_tokenizer_only_ids_work() -> None:
    with pytest.raises(CalibrationError, match="the model has no tokenizer"):
        load_tokens(None, None)


def test_the_embedded_text_is_split() -> None:
    calibration, evaluation = (load_tokens(None, TOKENIZER, split=split) for split in ("calibration", "evaluation"))
    assert TOKENIZER.decode(evaluation) == embedded_text().held_out
    assert len(calibration) > 5 * len(evaluation)


def test_a_sequence_longer_than_the_context_is_refused() -> None:
    config = tiny_model().config
    check_context(config, 64)
    with pytest.raises(CalibrationError, match="seq_len: 65 is longer than the model's context of 64"):
        check_context(config, 65)
