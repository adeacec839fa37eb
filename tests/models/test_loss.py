import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from gradprune.models.loss import sample_losses
from helpers.tiny_models import ARCHITECTURE_NAMES, tiny_ids, tiny_model


def plain_losses(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.stack([F.cross_entropy(logits[n], ids[n, 1:]) for n in range(len(ids))])


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, None])
@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_losses_and_gradients_equal_those_from_whole_logits(
    architecture: str, chunk: int | None, frozen_head: bool
) -> None:
    model, ids = tiny_model(architecture), tiny_ids()
    model.get_output_embeddings().requires_grad_(not frozen_head)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found = sample_losses(model, ids, chunk)
    expected = plain_losses(model, ids)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)
    # The samples have different weights, as they may in a sum of losses.
    gradients = [torch.autograd.grad(losses[2] - 3.0 * losses[0], weights) for losses in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("frozen_head", "made"), [(False, 2), (True, 1)])
def test_logits_never_exist_whole(frozen_head: bool, made: int) -> None:
    model, sizes = tiny_model(), []
    model.lm_head.requires_grad_(not frozen_head)
    model.lm_head.register_forward_hook(lambda _m, _a, out: sizes.append(out.numel()))
    saved: list[weakref.ref[Tensor]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(weakref.ref(t)), t)[1], lambda t: t):
        losses = sample_losses(model, tiny_ids(samples=4, tokens=9), chunk=6)
    kept = [tensor.shape for reference in saved if (tensor := reference()) is not None]
    assert not [shape for shape in kept if shape[-1:] == (61,)], "logits are kept for the backward pass"
    losses.sum().backward()
    assert max(sizes) == 61 * 6
    assert len(sizes) == made * 6, "each chunk is made once, and if the head is trained, again in the backward pass"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_as_exact_as_rounding_allows(dtype: torch.dtype) -> None:
    ids = tiny_ids(samples=3, tokens=12)

    def gradient(model: PreTrainedModel, losses_of: Callable[..., Tensor]) -> Tensor:
        model.requires_grad_(False)
        embeddings = model.get_input_embeddings().weight.requires_grad_()
        (found,) = torch.autograd.grad(losses_of(model, ids).sum(), embeddings)
        return found.double()

    exact = gradient(tiny_model(), plain_losses)
    rounded = gradient(tiny_model(dtype=dtype), plain_losses)
    found = gradient(tiny_model(dtype=dtype), lambda model, ids: sample_losses(model, ids, chunk=5))
    assert (found - exact).norm() <= 1.2 * (rounded - exact).norm()


@pytest.mark.parametrize("chunk", [5, None])
def test_single_precision_losses_are_as_exact_as_rounding_allows(chunk: int | None) -> None:
    ids = tiny_ids(samples=3, tokens=12)
    exact = plain_losses(tiny_model(), ids)
    found = sample_losses(tiny_model(dtype=torch.float32), ids, chunk)
    assert found.dtype == torch.float32
    rounded = plain_losses(tiny_model(dtype=torch.float32), ids).double()
    budget = 2 * (rounded - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (found.double() - exact).abs().max() <= budget


@pytest.mark.parametrize(("samples", "tokens"), [(1, 2), (1, 9), (5, 2)])
def test_the_smallest_shapes_give_the_same_losses(samples: int, tokens: int) -> None:
    model, ids = tiny_model(), tiny_ids(samples, tokens)
    torch.testing.assert_close(sample_losses(model, ids, 1), plain_losses(model, ids), rtol=1e-12, atol=0.0)


class _HostReads(TorchDispatchMode):
    """Counts how often a tensor's value is read on the host, which on an accelerator waits for all queued work."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("chunk", [5, None])
def test_the_loss_reads_nothing_back_to_the_host(chunk: int | None, frozen_head: bool) -> None:
    model, ids = tiny_model(tied=True), tiny_ids()
    model.get_output_embeddings().requires_grad_(not frozen_head)
    with _HostReads() as decoder:
        model.get_decoder()(input_ids=ids, use_cache=False)
    with _HostReads() as loss:
        sample_losses(model, ids, chunk).sum().backward()
    assert loss.count == decoder.count


def test_half_precision_losses_are_fp32() -> None:
    assert sample_losses(tiny_model(dtype=torch.bfloat16), tiny_ids()).dtype == torch.float32
