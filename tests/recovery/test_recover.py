import copy
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from gradprune.checkpoint.load import load_pruned
from gradprune.checkpoint.save import save_checkpoint
from gradprune.config.recovery_config import RecoveryConfig
from gradprune.errors import CalibrationError, NonFiniteError, RecoveryError
from gradprune.models.passes import mean_loss
from gradprune.recovery import recover as module
from gradprune.recovery.losses import distillation_loss
from gradprune.recovery.recover import recover
from gradprune.surgery.cut import cut
from helpers.architectures import random_masks_of, tiny
from helpers.cut_models import random_masks
from helpers.tiny_models import ARCHITECTURE_NAMES, tiny_ids, tiny_model

QUICK = {"seq_len": 16, "batch_size": 4, "steps": 12, "checks": 4, "learning_rate": 3e-3}
# A text so regular that a few training steps lower its loss.
TEXT = torch.tensor([5, 9, 7, 30, 31, 8] * 200)


def dense_and_pruned(architecture: str = "llama", **options):
    dense = tiny_model(architecture, **options)
    return dense, cut(dense, random_masks(dense, 0.6))


def copied(model):
    return copy.deepcopy(model)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_weights(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


# A plain head, a head with a bias, and a head whose logits are scaled.
@pytest.mark.parametrize("architecture", ["starcoder2", "phi", "granite"])
def test_the_distillation_loss_and_its_gradient(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny(architecture)
    student = cut(dense, random_masks_of(dense, 0.6))
    ids = tiny_ids()
    expected = F.log_softmax(dense(ids).logits, -1).detach()
    found = F.log_softmax(student(ids).logits, -1)
    exact = (expected.exp() * (expected - found)).sum(-1).mean()
    gradients = torch.autograd.grad(exact, list(student.parameters()))
    for chunk in (256, 5):
        monkeypatch.setattr("gradprune.models.loss.MIN_TOKENS", chunk)
        monkeypatch.setattr("gradprune.models.loss.LOGITS", 1)
        loss = distillation_loss(student, dense, ids)
        torch.testing.assert_close(loss, exact, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(loss, list(student.parameters())), gradients)
    assert distillation_loss(dense, dense, ids).abs() < 1e-12


def test_each_head_runs_once_whether_it_is_trained_or_not() -> None:
    dense, pruned = dense_and_pruned()
    ids, found = tiny_ids(), []
    for trained in (True, False):
        pruned.lm_head.requires_grad_(trained)
        with FlopCounterMode(display=False) as counter:
            distillation_loss(pruned, dense, ids).backward()
        found.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            dense.get_decoder()(input_ids=ids, use_cache=False)
            pruned.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
        found[-1] -= counter.get_total_flops()
    once = 2 * ids.numel() * dense.lm_head.weight.numel()
    # The forward pass of both heads, the gradient of the student's head's input and, if it is trained, of its weight.
    assert found == [4 * once, 3 * once]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_the_result_is_an_ordinary_pruned_checkpoint(architecture: str, method: str, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed (pip install peft)")
    _, pruned = dense_and_pruned(architecture, dtype=torch.float32)
    kind, names = type(pruned), list(pruned.state_dict())
    before = mean_loss(pruned, [TEXT[:160].view(-1, 16)])
    found = recover(pruned, None, TEXT, RecoveryConfig(method=method, loss="lm", **QUICK))
    assert found.model is pruned
    assert type(pruned) is kind
    assert list(pruned.state_dict()) == names
    assert pruned.dtype == torch.float32
    assert found.steps == 12
    assert mean_loss(pruned, [TEXT[:160].view(-1, 16)]) < before - 0.1
    save_checkpoint(pruned, None, tmp_path / "x")
    ids = tiny_ids()
    with torch.no_grad():
        assert torch.equal(load_pruned(tmp_path / "x")(ids).logits, pruned.eval()(ids).logits)


def test_an_epoch_takes_every_window_once_and_rates_rise_and_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are 18 windows to train on and 6 per step, so 3 steps are an epoch."""
    seen, rates = [], []
    losses, step = module.sample_losses, torch.optim.AdamW.step

    def recorded(optimizer, *args, **kwargs):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(module, "sample_losses", lambda model, ids: seen.extend(ids.tolist()) or losses(model, ids))
    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    config = RecoveryConfig(method="full", loss="lm", seq_len=16, batch_size=6, steps=24, learning_rate=1e-3)
    text = tiny_ids(20, 16)
    recover(tiny_model(), None, text.flatten(), config)
    epochs = [seen[start : start + 18] for start in range(0, len(seen), 18)]
    assert len(epochs) == 8
    assert all(sorted(epoch) == sorted(text[:18].tolist()) for epoch in epochs)
    assert epochs[0] != epochs[1]
    # Ten steps of warm-up, half the peak rate in the middle, almost zero at the end.
    assert rates[0] == pytest.approx(1e-4)
    assert rates[:8] == sorted(rates[:8])
    assert rates[12] == pytest.approx(5e-4)
    assert 0.0 < rates[-1] < 1e-5


def test_distillation_brings_the_student_closer_to_its_teacher() -> None:
    dense, pruned = dense_and_pruned()
    text = tiny_ids(1, 2000).flatten()
    ids = text[:64].view(-1, 16)
    before = distillation_loss(pruned, dense, ids)
    recover(pruned, dense, text, RecoveryConfig(method="full", **{**QUICK, "steps": 40}))
    with torch.no_grad():
        assert distillation_loss(pruned, dense, ids) < 0.8 * before


# The dtype of each method, and a head size that fused attention on a GPU supports.
OPTIONS_OF_METHOD = {
    "lora": {"dtype": torch.bfloat16, "head_dim": 16}, "full": {"dtype": torch.float32, "head_dim": 16}
}  # fmt: skip


@pytest.mark.parametrize("method", OPTIONS_OF_METHOD)
def test_two_runs_give_the_same_bits(method: str, device: str) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed (pip install peft)")
    pruned = dense_and_pruned(**OPTIONS_OF_METHOD[method])[1].to(device)
    config = RecoveryConfig(method=method, loss="lm", **QUICK)
    runs = [recover(copied(pruned), None, TEXT, config) for _ in range(2)]
    assert runs[0].history == runs[1].history
    assert runs[0].best_step > 0
    assert_equal_weights(*(weights(found.model) for found in runs))


def test_the_gradient_of_attention_is_asked_to_be_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a GPU adds in any order. The steps timed for planning do it too, so that they take as long."""
    asked, attention = [], F.scaled_dot_product_attention

    def watched(*args, **kwargs):
        output = attention(*args, **kwargs)
        if output.requires_grad:
            output.grad_fn.register_hook(lambda *_: asked.append(torch.are_deterministic_algorithms_enabled()))
        return output

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    _, pruned = dense_and_pruned(layers=1)
    timed = RecoveryConfig(method="full", loss="lm", minutes=1e-9, **{**QUICK, "steps": None})
    recover(pruned, None, TEXT, timed)
    assert asked == [True] * 3, "two timed steps and one training step"
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("method", OPTIONS_OF_METHOD)
def test_an_interrupted_and_resumed_recovery_gives_the_same_bits(
    method: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed (pip install peft)")
    dense, pruned = (model.to(device) for model in dense_and_pruned(**OPTIONS_OF_METHOD[method]))
    config = RecoveryConfig(method=method, **QUICK)
    whole = copied(pruned)
    expected = recover(whole, dense, TEXT, config, state=tmp_path / "whole")
    assert not (tmp_path / "whole").exists()

    step, taken = module._Trainer._step, []

    def interrupted(self) -> None:
        taken.append(self.progress.step)
        if self.progress.step == 8 and taken.count(8) == 1:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(module._Trainer, "_step", interrupted)
    state, first = tmp_path / "state", copied(pruned)
    with pytest.raises(KeyboardInterrupt):
        recover(first, dense, TEXT, config, state=state)
    with pytest.raises(RecoveryError, match="interrupted recovery with other options"):
        recover(copied(pruned), dense, TEXT, RecoveryConfig(method=method, **{**QUICK, "seed": 1}), state=state)
    with pytest.raises(RecoveryError, match="interrupted recovery with other options"):
        recover(copied(pruned), tiny_model(seed=5).to(device), TEXT, config, state=state)
    resumed = copied(pruned)
    found = recover(resumed, dense, TEXT, config, state=state)
    assert taken == [*range(9), *range(6, 12)], "the recovery does not continue from the last check"
    assert found.history == expected.history
    assert_equal_weights(weights(resumed), weights(whole))
    assert not state.exists()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state folder that an interrupted recovery left behind."""
    state = tmp_path_factory.mktemp("interrupted") / "state"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_remove", lambda _state: None)
        recover(dense_and_pruned()[1], None, TEXT, RecoveryConfig(loss="lm", **QUICK), state=state)
    return state


def flipped(file: Path) -> None:
    """Flip one bit of the file's last number."""
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "flipped": flipped,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "empty": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("name", ["weights", "best", "moments"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused(interrupted: Path, name: str, damage: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    shutil.copytree(interrupted, state)
    DAMAGES[damage](state / f"{name}.safetensors")
    _, pruned = dense_and_pruned()
    with pytest.raises(RecoveryError, match=r"recovery that is damaged .* delete the folder to start again"):
        recover(pruned, None, TEXT, RecoveryConfig(loss="lm", **QUICK), state=state)


def test_a_model_with_another_configuration_cannot_resume_a_recovery(interrupted: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    shutil.copytree(interrupted, state)
    _, pruned = dense_and_pruned()
    pruned.config.rms_norm_eps *= 10.0
    with pytest.raises(RecoveryError, match="interrupted recovery with other options, models or text"):
        recover(pruned, None, TEXT, RecoveryConfig(loss="lm", **QUICK), state=state)


@pytest.mark.parametrize("fused", [True, False])
def test_a_resumed_optimizer_has_its_state_on_the_device_that_it_needs(fused: bool) -> None:
    """On the meta device, because saved moments are on the CPU, so with a weight on the CPU nothing would move."""
    weight = torch.nn.Parameter(torch.zeros(2, 3, device="meta"))
    trainer = SimpleNamespace(trained={"w": weight}, optimizer=torch.optim.AdamW([weight], fused=fused))
    saved = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3), "exp_avg_sq": torch.ones(2, 3)}
    module._Trainer._set_moments(trainer, {f"w.{key}": value for key, value in saved.items()})
    found = {key: value.device.type for key, value in trainer.optimizer.state[weight].items()}
    assert found == {"step": "meta" if fused else "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}


def test_weights_that_training_made_worse_are_not_kept() -> None:
    _, pruned = dense_and_pruned()
    before = weights(pruned)
    found = recover(
        pruned,
        None,
        tiny_ids(1, 1000).flatten(),
        RecoveryConfig(method="full", loss="lm", **{**QUICK, "learning_rate": 100.0}),
    )
    assert found.best_step == 0
    assert_equal_weights(weights(pruned), before)


def test_the_number_of_steps_is_planned_from_the_speed_of_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    _, pruned = dense_and_pruned()
    monkeypatch.setattr(module.time, "perf_counter", iter([0, 9, 10, 12, 20, 21]).__next__)
    config = RecoveryConfig(method="full", loss="lm", minutes=0.5, **{**QUICK, "steps": None})
    # Thirty seconds, less four checks of one second each, at two seconds per step.
    assert recover(pruned, None, TEXT, config).steps == 13


@pytest.mark.parametrize(("minutes", "steps"), [(0.5, 4), (0.25, 2), (0.1, 1)])
def test_checks_leave_time_for_steps(
    minutes: float, steps: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Six checks would take longer than any of these limits; fewer steps need fewer checks."""
    _, pruned = dense_and_pruned(dtype=torch.float32)
    monkeypatch.setattr(module.time, "perf_counter", iter([0, 9, 10, 11, 20, 26]).__next__)
    config = RecoveryConfig(loss="lm", **{**QUICK, "steps": None, "checks": 6}, minutes=minutes)
    assert recover(pruned, None, TEXT, config).steps == steps
    told = ["minutes: 0.1 is less than the 0.12 that one step and its check take; one step is trained"]
    assert caplog.messages == (told if minutes == 0.1 else [])


def test_recoveries_that_cannot_work_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, pruned = dense_and_pruned()
    with pytest.raises(RecoveryError, match="teacher: loss 'kd'"):
        recover(pruned, None, TEXT)
    with pytest.raises(RecoveryError, match="teacher: its vocabulary has 99 tokens, the model's 61"):
        recover(pruned, tiny_model(vocab=99), TEXT)
    with pytest.raises(CalibrationError, match="fewer than two windows of 16"):
        recover(pruned, None, TEXT[:20], RecoveryConfig(loss="lm", **QUICK))
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(RecoveryError, match=r"pip install 'gradprune\[recover\]'"):
        recover(pruned, None, TEXT, RecoveryConfig(method="lora", loss="lm", **QUICK))
    with torch.no_grad():
        pruned.lm_head.weight[0] = torch.nan
    with pytest.raises(NonFiniteError, match="step 0"):
        recover(pruned, None, TEXT, RecoveryConfig(method="full", loss="lm", **QUICK))


def test_low_rank_updates_show_no_warning_of_peft(recwarn: pytest.WarningsRecorder) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed (pip install peft)")
    _, pruned = dense_and_pruned(dtype=torch.float32)
    recover(pruned, None, TEXT, RecoveryConfig(**{**QUICK, "steps": 1}, method="lora", loss="lm"))
    assert [str(warning.message) for warning in recwarn if "checkpointing" in str(warning.message)] == []


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_teacher_stays_unchanged_although_the_student_shares_its_memory(method: str) -> None:
    dense, pruned = dense_and_pruned(dtype=torch.float32)
    dense.train()
    before = weights(dense)
    recover(pruned, dense, TEXT, RecoveryConfig(**QUICK, method=method))
    assert_equal_weights(weights(dense), before)
    assert dense.training


def test_dropout_is_reproducible_and_leaves_the_global_generator_alone() -> None:
    found, drawn = [], []
    for seed in (1, 2):
        pruned = tiny("gpt2").float()
        for module_ in pruned.modules():
            if isinstance(module_, torch.nn.Dropout):
                module_.p = 0.3
        torch.manual_seed(seed)
        recover(pruned, None, TEXT, RecoveryConfig(**QUICK, loss="lm"))
        drawn.append(torch.rand(1))
        found.append(weights(pruned))
    assert_equal_weights(*found)
    torch.manual_seed(2)
    assert torch.equal(drawn[1], torch.rand(1))


def test_a_failed_recovery_leaves_the_models_dtype_and_mode_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    _, pruned = dense_and_pruned(dtype=torch.bfloat16)
    monkeypatch.setattr(module, "sample_losses", lambda model, ids: torch.full((len(ids),), float("nan")))
    with pytest.raises(NonFiniteError):
        recover(pruned, None, TEXT, RecoveryConfig(**QUICK, loss="lm"))
    assert {parameter.dtype for parameter in pruned.parameters()} == {torch.bfloat16}
    assert not pruned.training


def test_a_diverged_run_leaves_no_state_that_refuses_a_smaller_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, pruned = dense_and_pruned()
    losses = module.sample_losses

    def diverging(model, ids):
        # Diverge only once a check has written a state.
        return losses(model, ids) * (float("nan") if state.exists() else 1.0)

    state = tmp_path / "state"
    config = RecoveryConfig(loss="lm", **QUICK)
    monkeypatch.setattr(module, "sample_losses", diverging)
    with pytest.raises(NonFiniteError, match="choose a smaller learning_rate"):
        recover(copied(pruned), None, TEXT, config, state=state)
    monkeypatch.undo()
    recover(pruned, None, TEXT, replace(config, learning_rate=1e-3), state=state)


@pytest.mark.parametrize(("steps", "checks"), [(7, 4), (11, 6), (12, 4), (3, 5)])
def test_held_out_loss_is_measured_no_more_often_than_asked(steps: int, checks: int) -> None:
    _, pruned = dense_and_pruned(dtype=torch.float32)
    found = recover(pruned, None, TEXT, RecoveryConfig(**{**QUICK, "steps": steps, "checks": checks}, loss="lm"))
    measured = [step for step, _ in found.history]
    assert measured[0] == 0
    assert measured[-1] == steps
    assert len(measured) - 1 <= checks


def test_tokens_are_counted_if_the_text_has_fewer_windows_than_a_batch() -> None:
    _, pruned = dense_and_pruned(dtype=torch.float32)
    config = RecoveryConfig(**{**QUICK, "steps": 3, "batch_size": 64}, loss="lm")
    short = TEXT[: 20 * config.seq_len]
    seen: list[int] = []
    handle = pruned.get_input_embeddings().register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].numel()) if pruned.training else None
    )
    found = recover(pruned, None, short, config)
    handle.remove()
    assert found.tokens == sum(seen) > 0
