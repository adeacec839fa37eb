import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gradprune.demo.model import byte_tokenizer
from gradprune.errors import CalibrationError, ConfigError
from gradprune.evaluation.protocols import protocol_perplexity
from helpers.tiny_models import tiny_model


@pytest.mark.parametrize("bos", [False, True])
def test_a_protocol_measures_whole_windows_of_the_text_after_bos(bos: bool, tmp_path: Path) -> None:
    text = "It was a bright cold day in April, and the clocks were striking thirteen. " * 8
    path = tmp_path / "wiki.txt"
    path.write_text(text)
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    if bos:
        tokenizer.bos_token = tokenizer.eos_token
        tokenizer.backend_tokenizer.post_processor = _template(tokenizer)
        ids = [tokenizer.bos_token_id, *ids]
    model = tiny_model(vocab=258)
    model.config.max_position_embeddings = 128
    found = protocol_perplexity(model, tokenizer, "wikitext2-128", dataset=str(path), batch_size=3)
    windows = torch.tensor(ids)[: len(ids) // 128 * 128].view(-1, 128)
    assert len(ids) % 128 > 1, "the text has no partial window that must be dropped"
    with torch.no_grad():
        losses = F.cross_entropy(model(windows).logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert found.value == pytest.approx(math.exp(losses), rel=1e-9)
    assert found.windows == len(windows)


def _template(tokenizer):
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )


def test_unknown_protocols_and_short_contexts_are_refused() -> None:
    model = tiny_model(vocab=258)
    with pytest.raises(ConfigError, match=r"'wikitext2-512'.*wikitext2-128, wikitext2-2048"):
        protocol_perplexity(model, byte_tokenizer(), "wikitext2-512")
    too_long = r"^protocol: 'wikitext2-2048' does not fit: 2048 is longer than the model's context of 64"
    with pytest.raises(CalibrationError, match=too_long):
        protocol_perplexity(model, byte_tokenizer(), "wikitext2-2048")
