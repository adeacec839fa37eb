import pytest
import torch
import torch.nn.functional as F
from tiny_models import ARCHITECTURE_NAMES, tiny_ids, tiny_model

from gradprune.loss import sample_losses


def plain_losses(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.stack([F.cross_entropy(logits[n], ids[n, 1:]) for n in range(len(ids))])


@pytest.mark.parametrize("max_logits", [1, 61 * 5, 2**24])
@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_losses_and_gradients_equal_the_whole_logits(architecture: str, max_logits: int) -> None:
    model, ids = tiny_model(architecture), tiny_ids()
    found = sample_losses(model, ids, max_logits)
    expected = plain_losses(model, ids)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)
    gradients = [torch.autograd.grad(losses[2], list(model.parameters())) for losses in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)


def test_logits_never_exist_whole() -> None:
    model, sizes = tiny_model(), []
    model.lm_head.register_forward_hook(lambda _m, _a, out: sizes.append(out.numel()))
    sample_losses(model, tiny_ids(samples=4, tokens=9), max_logits=61 * 6).sum().backward()
    assert max(sizes) == 61 * 6


def test_half_precision_losses_are_fp32() -> None:
    assert sample_losses(tiny_model(dtype=torch.bfloat16), tiny_ids()).dtype == torch.float32
