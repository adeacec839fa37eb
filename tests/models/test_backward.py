import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gradprune.calibration.engine import ImportanceEngine
from gradprune.models.backward import deterministic_attention, without_autocast
from helpers.tiny_models import tiny_ids, tiny_model


def deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether, in each attention, cuDNN was off, and deterministic algorithms were on only in the backward pass."""
    found: list[bool] = []
    attention = F.scaled_dot_product_attention

    def watched(*args, **kwargs):
        found.append(not torch.backends.cuda.cudnn_sdp_enabled() and not deterministic())
        output = attention(*args, **kwargs)
        if output.requires_grad:
            output.grad_fn.register_hook(lambda _inputs, _outputs: found.append(deterministic()))
        return output

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    return found


@pytest.mark.parametrize("recompute", [False, True])
def test_only_the_backward_pass_of_attention_is_deterministic(seen: list[bool], recompute: bool) -> None:
    """Deterministic algorithms would refuse other products, including those of an attention that is not fused."""
    model, elsewhere = tiny_model(layers=2), []
    for linear in (model.model.layers[0].mlp.down_proj, model.model.layers[0].self_attn.o_proj):
        linear.register_forward_hook(lambda *_: elsewhere.append(deterministic()))
        linear.register_full_backward_hook(lambda *_: elsewhere.append(deterministic()))
    with ImportanceEngine(model, backend="reference", use_gradient_checkpointing=recompute) as engine:
        engine.step(tiny_ids())
    # In each layer: the forward pass, once more if the layer is recomputed, and the backward pass.
    assert seen == [True] * 2 * (3 if recompute else 2)
    assert elsewhere
    assert not any(elsewhere)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_the_callers_deterministic_setting_is_restored(seen: list[bool]) -> None:
    model = tiny_model(layers=1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with ImportanceEngine(model, backend="reference") as engine:
            engine.step(tiny_ids())
            assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [True, True]


def test_a_backward_pass_that_raises_restores_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    model, attention, nodes = tiny_model(layers=1), F.scaled_dot_product_attention, []

    def watched(*args, **kwargs):
        output = attention(*args, **kwargs)
        nodes.append(output.grad_fn)
        return output

    def boom(_gradients):
        assert deterministic()
        raise RuntimeError("boom")

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    with deterministic_attention():
        loss = model(input_ids=tiny_ids()).logits.sum()
        nodes[0].register_prehook(boom)
        with pytest.raises(RuntimeError, match="boom"):
            loss.backward()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_backward_pass_is_not_autocast() -> None:
    model, seen = tiny_model(layers=1, dtype=torch.float32), []
    linear = model.model.layers[0].mlp.down_proj
    linear.register_full_backward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16), ImportanceEngine(model, backend="reference") as engine:
        engine.step(tiny_ids())
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]
    with torch.autocast("cpu", torch.bfloat16), without_autocast(torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")


def test_engines_may_close_in_any_order(seen: list[bool]) -> None:
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    first, second = (ImportanceEngine(tiny_model(layers=1), backend="reference") for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.step(tiny_ids())
    second.__exit__(None, None, None)
    assert seen == [True, True]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_precision_set_per_device_is_kept(seen: list[bool]) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with ImportanceEngine(tiny_model(layers=1), backend="reference") as engine:
            engine.step(tiny_ids())
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert seen
