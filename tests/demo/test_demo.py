"""The demo model: its embedded text, its tokenizer, its training and its cache."""

import hashlib
import json
import math
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import gradprune.data.embedded as embedded_module
import gradprune.demo.model as model_module
from gradprune import PruneConfig, prune
from gradprune.checkpoint.load import load_model
from gradprune.data.embedded import Document, EmbeddedText, embedded_text, split_documents
from gradprune.demo import DemoTraining, byte_tokenizer, demo_model_path, unigram_perplexity
from gradprune.demo.training import Muon, orthogonal, train_model, warmup_cosine
from gradprune.errors import CalibrationError, CheckpointError, NonFiniteError
from helpers.programs import run_program

TINY = DemoTraining(
    steps=3, batch_size=2, seq_len=16, warmup=1, hidden_size=16, intermediate_size=24, layers=2, heads=4, kv_heads=2
)
QUIET = Console(quiet=True)
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json")
documents = st.lists(
    st.builds(
        Document,
        st.integers(0, 200).map(str),
        st.lists(st.text("ab", min_size=1, max_size=4).map(lambda text: text * 30), max_size=4).map(tuple),
    ),
    unique_by=lambda document: document.name,
    max_size=20,
)


# --- the text


def test_the_text_is_the_same_in_every_process() -> None:
    code = (
        "import hashlib, gradprune.demo as d; t = d.embedded_text();"
        "print(hashlib.sha256(repr((t.train, t.held_out)).encode()).hexdigest())"
    )
    root = str(Path(model_module.__file__).parents[2])
    printed = run_program([sys.executable, "-c", code], environment={"PYTHONHASHSEED": "1", "PYTHONPATH": root})
    text = embedded_text()
    assert printed.stdout.strip() == hashlib.sha256(repr((text.train, text.held_out)).encode()).hexdigest()


def test_nothing_held_out_is_in_the_training_text() -> None:
    text = embedded_text()
    assert len(text.train) > 1_000_000
    assert 0.02 < len(text.held_out) / len(text.train) < 0.15
    train_lines = {line.strip() for line in text.train.splitlines()}
    assert not [line for line in text.held_out.splitlines() if len(line.strip()) >= 40 and line.strip() in train_lines]
    passages = [passage for passage in text.held_out.split("\n\n") if len(passage) >= 80]
    assert len(passages) > 300
    assert not [passage for passage in passages if passage in text.train]


def test_the_text_has_no_trailing_spaces_and_no_long_gaps() -> None:
    text = embedded_text()
    for part in (text.train, text.held_out):
        assert part == part.strip("\n")
        assert "\n\n\n\n" not in part
        assert "\r" not in part
        assert not [line for line in part.split("\n") if line != line.rstrip()]


@given(documents)
def test_split_keeps_each_passage_once(given_documents: list[Document]) -> None:
    text = split_documents(given_documents)
    passages = [passage for part in (text.train, text.held_out) for passage in part.split() if passage]
    assert len(passages) == len(set(passages))
    assert set(passages) == {passage for document in given_documents for passage in document.passages}


@given(documents, documents)
def test_a_documents_side_does_not_depend_on_other_documents(one: list[Document], other: list[Document]) -> None:
    def side(document: Document, others: list[Document]) -> str:
        marked = replace(document, passages=(f"<{document.name}>",))
        return "train" if f"<{document.name}>" in split_documents([marked, *others]).train else "held out"

    for document in one[:3]:
        others = [other_document for other_document in other if other_document.name != document.name]
        assert side(document, []) == side(document, others)


def test_held_out_passages_that_share_a_long_line_with_the_training_text_are_removed() -> None:
    names = [f"n{i}" for i in range(200)]
    held_out_name = next(name for name in names if split_documents([Document(name, ("x",))]).held_out)
    train_name = next(name for name in names if split_documents([Document(name, ("x",))]).train)
    line = "the very same words in a line that is long enough to tell"
    text = split_documents(
        [Document(held_out_name, (f"start\n  {line}\nend", "fresh")), Document(train_name, (f"other\n{line}",))]
    )
    assert text == EmbeddedText(train=f"other\n{line}", held_out="fresh")


def test_docstrings_are_read_without_importing(tmp_path: Path) -> None:
    def write(name: str, content: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")

    write("json/__init__.py", '"""Module.\n\n    Indented.   \n\n\n\n    More.\n    """\nraise RuntimeError\n')
    write("json/tool.py", 'if 1:\n    def f():\n        "Function."\n        class C:\n            "Class \\d."\n')
    write("json/test/case.py", '"Never."')
    write("site-packages/json.py", '"Never."')
    write("lib2to3/main.py", '"Never."')
    write("os.py", "def broken(:")
    found = list(embedded_module._docstrings(tmp_path))
    assert found == [
        Document("module:json/__init__.py", ("Module.\n\nIndented.\n\nMore.",)),
        Document("module:json/tool.py", ("Function.", "Class \\d.")),
    ]


def test_docstrings_are_enough_without_the_language_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    text = embedded_text.__wrapped__()
    assert 500_000 < len(text.train) < len(embedded_text().train)


def test_a_stripped_installation_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(CalibrationError, match=r"carries only 0 characters .* --dataset"):
        embedded_text.__wrapped__()


# --- the tokenizer


@given(st.text())
@example("<|endoftext|> and <|padding|>")
@example("  leading, trailing  \n\t\r\n ☃ 🧡 e\u0301 \x00\x7f\ufeff")
def test_the_tokenizer_round_trips(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    if "<|" not in text:
        assert len(ids) == len(text.encode())


TOKENIZER = byte_tokenizer()


def test_the_tokenizer_survives_saving(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "  def f(x):\n\treturn x  # ☃ it 's, do n't  <|endoftext|>"
    assert loaded.is_fast
    assert len(loaded) == len(TOKENIZER) == model_module.VOCABULARY == 258
    assert (loaded.eos_token_id, loaded.pad_token_id) == (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id)
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text


def test_the_tokenizer_knows_every_byte() -> None:
    ids = {TOKENIZER.convert_tokens_to_ids(token) for token in TOKENIZER.get_vocab()}
    assert ids == set(range(258))


# --- the arithmetic


def test_unigram_perplexity_by_hand() -> None:
    train, held_out = torch.tensor([0, 0, 1]), torch.tensor([0, 2])
    assert unigram_perplexity(train, held_out, 3) == pytest.approx(1 / math.sqrt(3 / 6 * 1 / 6), rel=1e-12)
    assert unigram_perplexity(torch.empty(0, dtype=torch.int64), held_out, 3) == pytest.approx(3.0, rel=1e-12)


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_orthogonal_evens_out_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonal(matrix)
    assert result.shape == matrix.shape
    inner = u.T @ result @ v.T
    assert 0.6 < inner.diagonal().min() <= inner.diagonal().max() < 1.3
    # An odd polynomial of the singular values keeps the singular vectors, up to rounding: 15 fp64 products of 8 x 8.
    assert (inner - inner.diagonal().diag()).abs().max() < 1e-10


def test_muon_follows_its_formula() -> None:
    weight = torch.nn.Parameter(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
    before, gradient = weight.detach().clone(), torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    muon = Muon([weight], momentum=0.5, weight_decay=0.25)
    weight.grad = gradient.clone()
    muon.step(0.1)
    expected = before * (1 - 0.1 * 0.25) - 0.1 * math.sqrt(2) * orthogonal(gradient * 0.75)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(weight.grad, gradient)


def test_the_schedule_warms_up_and_decays() -> None:
    scales = [warmup_cosine(step, 4, 20) for step in range(20)]
    assert scales[:4] == [0.25, 0.5, 0.75, 1.0]
    assert scales[4:] == sorted(scales[4:], reverse=True)
    assert scales[12] == pytest.approx(0.5)
    assert 0 < scales[-1] < 0.02


def test_training_lowers_the_loss_and_leaves_the_global_generator_alone() -> None:
    tokens = torch.tensor(list(b"abcdefgh" * 100))
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    recipe = replace(TINY, steps=60, warmup=5)
    model = train_model(recipe, tokens, vocab_size=258, eos_token_id=256, console=QUIET)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert not model.training
    with torch.inference_mode():
        loss = model(input_ids=tokens[None, :16], labels=tokens[None, :16]).loss.item()
    assert loss < math.log(8)


def test_training_refuses_too_little_text_and_divergence() -> None:
    with pytest.raises(CalibrationError, match="seq_len: 16 is not below the 16 tokens"):
        train_model(TINY, torch.zeros(16, dtype=torch.int64), vocab_size=258, eos_token_id=256, console=QUIET)
    diverging = replace(TINY, matrix_learning_rate=1e30)
    with pytest.raises(NonFiniteError, match=r"training step [12] is"):
        train_model(diverging, torch.arange(200), vocab_size=258, eos_token_id=256, console=QUIET)


# --- the cache


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder that does not exist yet; the embedded text is replaced by some two thousand characters."""
    monkeypatch.setenv("GRADPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        model_module, "embedded_text", lambda: EmbeddedText("some words of text\n" * 100, "other words\n" * 20)
    )
    return tmp_path / "cache"


def _no_training(*_: object, **__: object) -> LlamaForCausalLM:
    raise AssertionError("the cached model should have been used")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_model_is_trained_once_and_loads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = demo_model_path(QUIET, training=TINY)
    assert list(cache.iterdir()) == [path]
    assert not [file for file in path.iterdir() if file.suffix not in (".json", ".safetensors")]
    monkeypatch.setattr(model_module, "train_model", _no_training)
    assert demo_model_path(QUIET, training=TINY) == path

    model = AutoModelForCausalLM.from_pretrained(path)
    assert type(model) is LlamaForCausalLM
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(path))
    record = json.loads((path / "training.json").read_text(encoding="utf-8"))
    assert record["recipe"]["steps"] == 3
    assert record["recipe"]["seed"] == 0
    assert record["training_bytes"] == 1900
    assert record["parameters"] == model.num_parameters()
    assert record["seconds"] > 0
    assert set(record["versions"]) == {"gradprune", "torch", "transformers", "python"}


def test_the_same_seed_gives_the_same_bytes(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = demo_model_path(QUIET, training=TINY)
    other_seed = demo_model_path(QUIET, training=replace(TINY, seed=1))
    monkeypatch.setenv("GRADPRUNE_CACHE", str(tmp_path / "second"))
    second = demo_model_path(QUIET, training=TINY)
    assert first.name == second.name != other_seed.name
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        assert _digest(first / name) == _digest(second / name)
    assert _digest(first / "model.safetensors") != _digest(other_seed / "model.safetensors")


@pytest.mark.parametrize("interrupted", ["sample_losses", "save_pretrained"])
def test_an_interrupted_training_leaves_nothing_in_the_cache(
    cache: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if interrupted == "save_pretrained":
            patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", interrupt)
        else:
            patch.setattr("gradprune.demo.training.sample_losses", interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo_model_path(QUIET, training=TINY)
    assert list(cache.iterdir()) == []
    assert demo_model_path(QUIET, training=TINY).is_dir()


@pytest.mark.parametrize("damage", [*FILES, "truncated"])
def test_a_damaged_entry_is_made_again(cache: Path, damage: str) -> None:
    path = demo_model_path(QUIET, training=TINY)
    whole = _digest(path / "model.safetensors")
    if damage == "truncated":
        weights = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(weights[:-1])
    else:
        (path / damage).unlink()
    assert demo_model_path(QUIET, training=TINY) == path
    assert {file.name for file in path.iterdir()} >= set(FILES)
    assert _digest(path / "model.safetensors") == whole
    assert list(cache.iterdir()) == [path]


def test_a_cache_that_cannot_be_written_is_an_error_before_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRADPRUNE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(model_module, "train_model", _no_training)
    with pytest.raises(CheckpointError, match=r"GRADPRUNE_CACHE: '.*cache' cannot be written \(Not a directory\)"):
        demo_model_path(QUIET, training=TINY)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"GRADPRUNE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"GRADPRUNE_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/gradprune"),
        ({"GRADPRUNE_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/gradprune"),
        ({"GRADPRUNE_CACHE": "~/d", "HOME": "/c"}, "/c/d"),
    ],
)
def test_the_cache_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert model_module._cache_folder() == Path(expected)


def test_progress_shows_rate_and_loss_and_quiet_shows_nothing(
    cache: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with (tmp_path / "log").open("w+", encoding="utf-8") as file:
        demo_model_path(Console(file=file, force_terminal=True, width=160), training=TINY)
        file.seek(0)
        shown = file.read()
    assert "Training the demo model" in shown
    assert "3/3" in shown
    assert "steps/s  loss " in shown
    capfd.readouterr()
    demo_model_path(QUIET, training=replace(TINY, seed=7))
    assert capfd.readouterr() == ("", "")


# --- the real demo model


@pytest.mark.timeout(1200)  # the model is trained on first use, which takes long on a busy machine
def test_the_demo_model_has_learned() -> None:
    path = demo_model_path(QUIET)
    record = json.loads((path / "training.json").read_text(encoding="utf-8"))
    assert record["held_out_perplexity"] < record["unigram_perplexity"] / 2
    tokens = torch.tensor(list(embedded_text().held_out.encode()))
    ids = TOKENIZER(embedded_text().held_out[:20_000])["input_ids"]
    assert len(ids) == len(embedded_text().held_out[:20_000].encode())
    windows = torch.tensor(ids)[: 64 * 128].view(64, 128)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert 300_000 < model.num_parameters() < 500_000
    with torch.inference_mode():
        measured = math.exp(model(input_ids=windows, labels=windows).loss.item())
    assert measured < unigram_perplexity(tokens, tokens) / 2


@pytest.mark.timeout(1200)
def test_methods_differ_on_the_demo_model() -> None:
    model, tokenizer = load_model(demo_model_path(QUIET))[:2]
    options = {"num_samples": 32, "eval_samples": 32, "measure_speed": False, "generations": False}

    def ratio(**others: str) -> float:
        result = prune(model, tokenizer, PruneConfig(**options, **others))
        return result.after.perplexity.value / result.before.perplexity.value

    assert 1.005 < ratio() < 1.1
    assert ratio(importance_method="magnitude", repair="none") > 2.0


@pytest.mark.parametrize("chosen", ["", "~/d"])
def test_a_user_without_a_home_is_told_what_to_set(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user has no entry in the user database, as in a container that runs under an arbitrary user id."""
    for name, value in {"GRADPRUNE_CACHE": chosen, "XDG_CACHE_HOME": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HOME", raising=False)

    def unknown(_number: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(CheckpointError, match=r"GRADPRUNE_CACHE: .* no home folder"):
        model_module._cache_folder()
