import pytest
import torch
import torch.nn.functional as F

from gradprune.models.backward import deterministic_attention
from gradprune.models.precision import products, rounded_products
from gradprune.surgery import distillation, repair
from helpers.pipeline_runs import run
from helpers.tiny_models import tiny_ids, tiny_model


@pytest.fixture
def in_attention(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The precision of fp32 products in each attention's forward and backward pass."""
    found: list[str | None] = []
    attention = F.scaled_dot_product_attention

    def watched(*args, **kwargs):
        found.append(products())
        output = attention(*args, **kwargs)
        if output.requires_grad:
            output.grad_fn.register_hook(lambda *_: found.append(products()))
        return output

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    return found


def test_products_are_rounded_except_those_of_attention(in_attention: list[str | None]) -> None:
    model, elsewhere = tiny_model(layers=2), []
    for linear in (model.model.layers[0].mlp.down_proj, model.model.layers[0].self_attn.o_proj):
        linear.register_forward_hook(lambda *_: elsewhere.append(products()))
        linear.register_full_backward_hook(lambda *_: elsewhere.append(products()))
    with deterministic_attention(), rounded_products():
        model(input_ids=tiny_ids()).logits.sum().backward()
        assert products() == "medium"
    assert in_attention == ["highest"] * 4
    assert elsewhere == ["medium"] * 4
    assert products() == "highest"


def test_the_previous_precision_is_restored_after_an_exception() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(RuntimeError, match="boom"), rounded_products():
            raise RuntimeError("boom")
        assert products() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_precision_set_per_device_is_kept() -> None:
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    try:
        assert products() is None
        with rounded_products():
            assert backend.fp32_precision == "tf32"
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before
    assert products() == "highest"


def test_rounded_fp32_products_are_near_those_in_fp64_and_fp64_is_exact() -> None:
    left, right = (torch.randn(256, 300, generator=torch.Generator().manual_seed(k)) for k in range(2))
    expected = left.double() @ right.double().T
    with rounded_products():
        found, exact = left @ right.T, left.double() @ right.double().T
    assert torch.equal(exact, expected)
    # Both factors are rounded to 8 bits, and each sum has 300 products.
    assert (found - expected).square().mean().sqrt().item() < 2.0**-8 * 300**0.5


def test_a_run_rounds_products_only_in_repair_and_distillation(in_attention: list[str | None], monkeypatch) -> None:
    seen: dict[str, str | None] = {}
    for module, name in ((repair, "least_squares"), (distillation, "distil")):
        called = getattr(module, name)

        def watched(*args, name=name, called=called, **kwargs):
            seen[name] = products()
            return called(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)
    run(tiny_model(dtype=torch.float32), held_out_samples=4)
    assert seen == {"least_squares": "medium", "distil": "medium"}
    assert products() == "highest"
    assert set(in_attention) == {"highest"}
