import pytest
import torch
import torch.nn.functional as F
from tiny_models import ARCHITECTURE_NAMES, tiny_ids, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

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
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.shape), t)[1], lambda t: t):
        losses = sample_losses(model, tiny_ids(samples=4, tokens=9), max_logits=61 * 6)
    assert not [shape for shape in saved if shape[-1:] == (61,)], "logits are kept for the backward pass"
    losses.sum().backward()
    assert max(sizes) == 61 * 6
    assert len(sizes) == 2 * 6, "each chunk is made once, and once more in the backward pass"


@pytest.mark.parametrize("max_logits", [61 * 5, 2**24])
def test_single_precision_is_as_good_as_its_rounding(max_logits: int) -> None:
    ids = tiny_ids(samples=3, tokens=12)
    exact = plain_losses(tiny_model(), ids)
    found = sample_losses(tiny_model(dtype=torch.float32), ids, max_logits)
    assert found.dtype == torch.float32
    rounded = plain_losses(tiny_model(dtype=torch.float32), ids).double()
    budget = 2 * (rounded - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (found.double() - exact).abs().max() <= budget


@pytest.mark.parametrize(("samples", "tokens"), [(1, 2), (1, 9), (5, 2)])
def test_the_smallest_shapes(samples: int, tokens: int) -> None:
    model, ids = tiny_model(), tiny_ids(samples, tokens)
    torch.testing.assert_close(sample_losses(model, ids, 61), plain_losses(model, ids), rtol=1e-12, atol=0.0)


class _HostReads(TorchDispatchMode):
    """Counts how often a tensor's value is asked for, which on an accelerator waits for all that was queued."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("max_logits", [61 * 5, 2**24])
def test_nothing_but_the_decoder_reads_back_to_the_host(max_logits: int) -> None:
    model, ids = tiny_model(tied=True), tiny_ids()
    with _HostReads() as decoder:
        model.get_decoder()(input_ids=ids, use_cache=False)
    with _HostReads() as loss:
        sample_losses(model, ids, max_logits).sum().backward()
    assert loss.count == decoder.count


def test_half_precision_losses_are_fp32() -> None:
    assert sample_losses(tiny_model(dtype=torch.bfloat16), tiny_ids()).dtype == torch.float32
