"""The divergence averaged with the text's next-token loss, against the same from all logits at once."""

import pytest
import torch
import torch.nn.functional as F

from gradprune.models.divergence import divergence_with_text
from gradprune.surgery.cut import cut
from helpers.architectures import random_masks_of, tiny
from helpers.tiny_models import tiny_ids


# A plain head, a head with a bias, and logits that are scaled after the head.
@pytest.mark.parametrize("architecture", ["starcoder2", "phi", "granite"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_is_the_weighted_average_of_divergence_and_text_loss(
    architecture: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = tiny(architecture)
    student = cut(dense, random_masks_of(dense, 0.6))
    ids = tiny_ids()
    text = ids[:, 1:].flatten()
    expected, found = (F.log_softmax(model(ids).logits[:, :-1].flatten(0, 1), -1) for model in (dense, student))
    apart = (expected.detach().exp() * (expected.detach() - found)).sum(-1).mean()
    mixed = (1.0 - share) * apart + share * F.cross_entropy(found, text)
    parameters = list(student.parameters())
    gradients = torch.autograd.grad(mixed, parameters)
    taught = dense.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1).detach()
    for chunk in (256, 5):
        monkeypatch.setattr("gradprune.models.loss.MIN_TOKENS", chunk)
        monkeypatch.setattr("gradprune.models.loss.LOGITS", 1)
        hidden = student.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        loss, alone = divergence_with_text(student, hidden, taught, text, share)
        torch.testing.assert_close((loss, alone), (mixed, apart.detach()), rtol=1e-9, atol=1e-12)
        assert not alone.requires_grad
        torch.testing.assert_close(torch.autograd.grad(loss, parameters), gradients)
