import io
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradprune.checkpoint.results import weight_bytes_on_disk
from gradprune.checkpoint.save import save_checkpoint
from gradprune.data.sources import load_tokens
from gradprune.errors import CalibrationError, ConfigError, NonFiniteError
from gradprune.evaluation import perplexity as perplexity_module
from gradprune.evaluation import speed as speed_module
from gradprune.evaluation.perplexity import perplexity
from gradprune.evaluation.size import model_size
from gradprune.evaluation.speed import throughput
from gradprune.progress import progress
from helpers.tiny_models import tiny_ids, tiny_model

TOKENS = tiny_ids(samples=1, tokens=107).flatten()


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_perplexity_equals_its_definition_at_any_batch_size(batch_size: int) -> None:
    model = tiny_model()
    found = perplexity(model, TOKENS, seq_len=10, batch_size=batch_size)
    nll = []
    with torch.no_grad():
        for start in range(0, 107, 10):
            window = TOKENS[start : start + 10]
            logits = model(window[None]).logits[0]
            nll += F.cross_entropy(logits[:-1], window[1:], reduction="none").tolist()
    assert found.tokens == len(nll) == 10 * 9 + 6
    assert found.windows == 11
    assert found.value == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-12)


def test_a_limited_number_of_windows_is_spread_over_the_text() -> None:
    model = tiny_model()
    some = perplexity(model, TOKENS, seq_len=10, batch_size=4, max_windows=5)
    every_other = torch.cat([TOKENS[start : start + 10] for start in range(0, 100, 20)])
    assert some.windows == 5
    assert some.value == pytest.approx(perplexity(model, every_other, seq_len=10, batch_size=4).value, rel=1e-12)


def test_a_shorter_last_window_is_measured_only_with_all_others() -> None:
    model = tiny_model()
    for max_windows, windows, tokens in ((None, 11, 96), (12, 11, 96), (11, 11, 96), (10, 10, 90), (1, 1, 9)):
        found = perplexity(model, TOKENS, seq_len=10, batch_size=4, max_windows=max_windows)
        assert (found.windows, found.tokens) == (windows, tokens)
    one_left = perplexity(model, TOKENS[:101], seq_len=10, batch_size=4)
    assert (one_left.windows, one_left.tokens) == (10, 90)


def test_a_real_model_knows_its_language(stories_model: Path, stories_text: tuple[Path, Path]) -> None:
    model, tokenizer = (kind.from_pretrained(stories_model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    tokens = load_tokens(str(stories_text[1]), tokenizer)[:8000]
    found = perplexity(model, tokens, seq_len=128, batch_size=8)
    assert found.value < 4.6
    shuffled = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))]
    assert perplexity(model, shuffled, seq_len=128, batch_size=8).value > 50


def test_models_are_measured_in_evaluation_mode_and_keep_their_own() -> None:
    model = tiny_model(attention_dropout=0.5)
    expected = perplexity(model, TOKENS, seq_len=10, batch_size=4)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    assert perplexity(model, TOKENS, seq_len=10, batch_size=4) == expected
    assert [module.training for module in model.modules()] == modes
    throughput({"a": model}, seq_len=8, seed=0, repeats=1)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(IndexError):
        perplexity(model, TOKENS + 1000, seq_len=10, batch_size=4)
    assert [module.training for module in model.modules()] == modes


def test_the_total_is_accumulated_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    # In fp32, adding 1 to 2^25 would change nothing.
    monkeypatch.setattr(perplexity_module, "losses", lambda _model, parts: (ids[:, 0].float() for ids in parts))
    tokens = torch.ones(400, dtype=torch.int64)
    tokens[0] = 2**25
    found = perplexity(tiny_model(), tokens, seq_len=4, batch_size=7)
    assert found.nll == (2**25 + 99) / 100
    assert found.value == math.inf


@pytest.mark.parametrize(("option", "value"), [("seq_len", 1), ("max_windows", 0)])
def test_windows_that_predict_nothing_are_refused(option: str, value: int) -> None:
    options = {"seq_len": 10, "batch_size": 1, option: value}
    with pytest.raises(CalibrationError, match=f"{option}: {value} is not at least"):
        perplexity(tiny_model(), TOKENS, **options)


def test_text_shorter_than_one_window_is_refused() -> None:
    with pytest.raises(CalibrationError, match="107 held-out tokens are less than one window of 108"):
        perplexity(tiny_model(), TOKENS, seq_len=108, batch_size=1)


def test_a_nan_loss_names_its_window() -> None:
    model = tiny_model()
    tokens = TOKENS.clone()
    tokens[(tokens == 60)] = 59
    tokens[45] = 60
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = float("nan")
    for batch_size in (1, 3, 50):
        with pytest.raises(NonFiniteError, match="evaluation window 4 is nan"):
            perplexity(model, tokens, seq_len=10, batch_size=batch_size)
    with pytest.raises(NonFiniteError, match="evaluation window 4 is nan"):
        perplexity(model, tokens, seq_len=10, batch_size=2, max_windows=5)
    rest = tokens.roll(60)
    with pytest.raises(NonFiniteError, match="evaluation window 10 is nan"):
        perplexity(model, rest, seq_len=10, batch_size=3)


def test_throughput_alternates_its_models() -> None:
    order: list[str] = []
    models = {"a": tiny_model(), "b": tiny_model(layers=1)}
    for name, model in models.items():
        model.register_forward_pre_hook(lambda _m, _a, name=name: order.append(name))
    found = throughput(models, seq_len=8, seed=0, repeats=3)
    assert order == ["a", "b"] * 5
    assert all(0 < speed.p20 <= speed.p50 <= speed.p80 for speed in found.values())


def test_speeds_are_percentiles_of_the_timed_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two warm-up passes, then passes of 1, 2, 4, 5 and 10 seconds.
    durations = [1000.0, 1000.0, 1.0, 2.0, 4.0, 5.0, 10.0]
    clock = iter(time for duration in durations for time in (0.0, duration))
    monkeypatch.setattr(speed_module, "_seconds", lambda run, model: -next(clock) + next(clock))
    speed = throughput({"a": tiny_model()}, seq_len=10, batch_size=2, seed=0, repeats=5)["a"]
    # Rates 2, 4, 5, 10, 20; the 20th percentile lies 0.8 of the way from the first to the second.
    assert (speed.p20, speed.p50, speed.p80) == pytest.approx((3.6, 5.0, 12.0), rel=1e-12)


def test_no_repeats_are_refused() -> None:
    with pytest.raises(ConfigError, match="repeats: 0 is not at least 1"):
        throughput({"a": tiny_model()}, seq_len=8, seed=0, repeats=0)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_parameters_count_once(tied: bool) -> None:
    model = tiny_model(tied=tied)
    embeddings = model.config.vocab_size * model.config.hidden_size
    others = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)
    assert model_size(model).parameters == others + embeddings * (1 if tied else 2)
    assert model_size(model).bytes == 8 * model_size(model).parameters


def test_bytes_on_disk_are_those_of_the_weight_files(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), None, tmp_path / "x")
    assert weight_bytes_on_disk(tmp_path / "x") == (tmp_path / "x" / "model.safetensors").stat().st_size
    assert weight_bytes_on_disk("some/hub-id") is None


ERASE_LINE = "\x1b[2K"


def terminal() -> Console:
    return Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None, legacy_windows=False)


def last_drawn(console: Console) -> str:
    """Return the last line that was drawn; each new line is drawn in the place of the erased previous one."""
    return console.file.getvalue().split(ERASE_LINE)[-1].split("\n")[0]  # type: ignore[attr-defined]


@pytest.mark.parametrize("total", [3, 12_345])
def test_progress_is_readable_in_80_columns(total: int) -> None:
    console = terminal()
    with progress(console, "Measuring perplexity", total, "windows") as advance:
        advance(total)
    line = last_drawn(console)
    assert len(line) <= 80
    for part in ("Measuring perplexity", f"{total}/{total}", "windows/s", "0:00:0", "left", "━━━"):
        assert part in line


def test_progress_is_silent_outside_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    with progress(console, "Measuring perplexity", 3, "windows") as advance:
        advance()
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [NonFiniteError, KeyboardInterrupt])
def test_progress_disappears_when_the_work_fails(error: type[BaseException]) -> None:
    finished, failed = terminal(), terminal()
    with progress(finished, "Measuring perplexity", 3, "windows") as advance:
        advance(3)

    def fail() -> None:
        with progress(failed, "Measuring perplexity", 3, "windows") as advance:
            advance(3)
            raise error

    with pytest.raises(error):
        fail()
    assert "3/3" in last_drawn(finished)
    assert last_drawn(failed) == ""


def test_two_remaining_tokens_are_a_window() -> None:
    two_left = perplexity(tiny_model(), TOKENS[:102], seq_len=10, batch_size=4)
    assert (two_left.windows, two_left.tokens) == (11, 91)
