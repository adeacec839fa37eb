"""What exported GGUF files contain, and which exports are refused."""

import os
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gradprune.checkpoint.gguf_splitters import SPLITTERS, split_as_the_file_says
from gradprune.demo import byte_tokenizer
from gradprune.errors import ExportError
from gradprune.export.gguf import check_export, export_gguf
from gradprune.surgery.cut import cut
from helpers.cut_models import full_masks, random_masks
from helpers.llama_cpp import ascii_tokenizer
from helpers.tiny_models import ARCHITECTURE_NAMES, tiny_model

gguf = pytest.importorskip("gguf", reason="the gguf library is not installed (pip install gguf)")

TOKENIZER = ascii_tokenizer(61)


def exported(model, path: Path, tokenizer=TOKENIZER, **options):
    export_gguf(model, tokenizer, path, **options)
    return gguf.GGUFReader(path)


def value(reader, name: str):
    found = reader.fields[name].contents()
    return found.tolist() if isinstance(found, np.ndarray) else found


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_widths_are_stated_per_layer(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, tied=True)
    masks = full_masks(model)
    masks.attention[1][:] = False
    masks.attention[2][0] = False
    masks.mlp[0][:4] = False
    masks.mlp[2][:] = False
    reader = exported(cut(model, masks), tmp_path / "m.gguf", outtype="f32")
    name = value(reader, "general.architecture")
    assert name == ("openelm" if architecture == "qwen3" else "deci")
    # openelm has no layers without attention, so a head of zeros stands in; zeros always stand in for an MLP.
    absent = 1 if name == "openelm" else 0
    assert value(reader, f"{name}.attention.head_count") == [6, absent, 4]
    assert value(reader, f"{name}.attention.head_count_kv") == [3, absent, 2]
    assert value(reader, f"{name}.feed_forward_length") == [6, 10, 32]
    assert value(reader, f"{name}.attention.key_length") == value(reader, f"{name}.rope.dimension_count") == 4
    assert value(reader, f"{name}.vocab_size") == 61


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_plain_models_keep_the_architecture(architecture: str, tmp_path: Path) -> None:
    reader = exported(tiny_model(architecture, hidden=24), tmp_path / "m.gguf")
    name = value(reader, "general.architecture")
    assert name == {"mistral": "llama"}.get(architecture, architecture)
    assert value(reader, f"{name}.attention.head_count") == 6


def test_heads_that_do_not_add_up_to_the_hidden_size_need_deci(tmp_path: Path) -> None:
    assert value(exported(tiny_model("qwen2", hidden=20), tmp_path / "m.gguf"), "general.architecture") == "deci"


def test_fused_weights_are_split_and_rows_of_q_reordered(tmp_path: Path) -> None:
    model = tiny_model("phi3", dtype=torch.float32)
    masks = full_masks(model)
    masks.mlp[1][:3] = False
    model = cut(model, masks)
    tensors = {tensor.name: tensor.data for tensor in exported(model, tmp_path / "m.gguf", outtype="f32").tensors}
    fused = model.model.layers[1].mlp.gate_up_proj.weight.detach().numpy()
    np.testing.assert_array_equal(tensors["blk.1.ffn_gate.weight"], fused[:7])
    np.testing.assert_array_equal(tensors["blk.1.ffn_up.weight"], fused[7:])
    q = model.model.layers[1].self_attn.qkv_proj.weight.detach().numpy()[:24]
    # The 4 rows of each head are written in the order 0, 2, 1, 3.
    order = [head * 4 + row for head in range(6) for row in (0, 2, 1, 3)]
    np.testing.assert_array_equal(tensors["blk.1.attn_q.weight"], q[order])


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_every_tensor_equals_the_models_own(architecture: str, tmp_path: Path) -> None:
    """Layers that differ are written as deci: each head's rows of q and k, and biases, in the order 0, 2, 1, 3."""
    model = tiny_model(architecture, dtype=torch.float32, tied=False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter)
    model = cut(model, random_masks(model, 0.7))
    tensors = {tensor.name: tensor.data for tensor in exported(model, tmp_path / "m.gguf", outtype="f32").tensors}
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    expected = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
        "output.weight": model.lm_head.weight,
    }
    for index, layer in enumerate(model.model.layers):
        for path, name in names.items():
            for kind, values in layer.get_submodule(path).named_parameters():
                if name in ("attn_q", "attn_k"):
                    values = values[[head + row for head in range(0, len(values), 4) for row in (0, 2, 1, 3)]]
                expected[f"blk.{index}.{name}.{kind}"] = values
    assert tensors.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(tensors[name], values.detach().numpy(), err_msg=name)


def test_removed_blocks_are_written_as_zeros_after_norms_of_ones(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    masks = full_masks(model)
    masks.mlp[1][:] = False
    reader = exported(cut(model, masks), tmp_path / "m.gguf", outtype="f32")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert (tensors["blk.1.ffn_norm.weight"] == 1.0).all()
    for name in ("gate", "up", "down"):
        assert not tensors[f"blk.1.ffn_{name}.weight"].any()


def test_q8_0_widens_mlps_to_whole_blocks_and_leaves_other_odd_rows_in_f16(tmp_path: Path) -> None:
    model = tiny_model("mistral", hidden=64, channels=40, head_dim=8, dtype=torch.float32)
    model = cut(model, random_masks(model, 0.8))
    kept = model.model.layers[0].mlp.down_proj.weight
    reader = exported(model, tmp_path / "m.gguf", outtype="q8_0")
    widths = value(reader, "deci.feed_forward_length")
    assert all(width % 32 == 0 for width in widths)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    down = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_down.weight")
    assert types["blk.0.ffn_down.weight"] == types["blk.0.ffn_gate.weight"] == types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert list(down.shape) == [widths[0], 64]
    assert kept.shape[1] % 32, "the width is a multiple of 32 already: nothing is tested"
    added = gguf.quants.dequantize(down.data, down.tensor_type)[:, kept.shape[1] :]
    gate = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_gate.weight")
    assert not added.any()
    assert not gguf.quants.dequantize(gate.data, gate.tensor_type)[kept.shape[1] :].any()
    odd = [name for name, kind in types.items() if kind == "F16"]
    assert odd, "no matrix has rows that are not whole blocks: nothing is tested"
    assert all(name.endswith("attn_output.weight") for name in odd)


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    reader = exported(tiny_model("mistral", sliding_window=24), tmp_path / "m.gguf")
    assert value(reader, "llama.context_length") == 24


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        model = tiny_model()
        export_gguf(cut(model, random_masks(model, 0.5)), TOKENIZER, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_existing_file_is_kept_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_text("GGUF, precious")
    with pytest.raises(ExportError, match=r"output: .* exists; choose another name or overwrite it"):
        export_gguf(tiny_model(), TOKENIZER, path)
    assert path.read_text() == "GGUF, precious"
    export_gguf(tiny_model(), TOKENIZER, path, overwrite=True)
    gguf.GGUFReader(path)
    with pytest.raises(ExportError, match="is a folder"):
        export_gguf(tiny_model(), TOKENIZER, tmp_path)


@pytest.mark.parametrize("content", [b"", b"GGU", b"precious"])
def test_a_file_that_is_no_gguf_file_is_never_replaced(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"^output: '.*' exists, is no GGUF file, and is never overwritten"):
        export_gguf(tiny_model(), TOKENIZER, path, overwrite=True)
    assert path.read_bytes() == content


def test_the_file_that_a_model_is_read_from_is_not_replaced(tmp_path: Path) -> None:
    path, link = tmp_path / "m.gguf", tmp_path / "link.gguf"
    export_gguf(tiny_model(), TOKENIZER, path)
    link.symlink_to(path)
    before = path.read_bytes()
    for output in (path, link):
        with pytest.raises(ExportError, match=r"^output: '.*' is the model that is read; choose another name"):
            check_export(output, "f16", overwrite=True, model=str(path))
    model = tiny_model()
    model.name_or_path = str(path)
    with pytest.raises(ExportError, match="is the model that is read"):
        export_gguf(model, TOKENIZER, link, overwrite=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("", "No such file or directory"),
        ("text/m.gguf", "Not a directory"),
        ("text/folder/m.gguf", "Not a directory"),
        ("/proc/m.gguf", "No such file or directory"),
        (256 * "m", "File name too long"),
    ],
)
def test_an_output_that_cannot_be_written_is_named_as_it_was_given(
    output: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("")
    with pytest.raises(ExportError) as error:
        check_export(output, "f16", overwrite=False, model=None)
    assert str(error.value) == f"output: '{output}' cannot be written: {reason}; choose another"
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_missing_folders_of_the_output_are_made(tmp_path: Path) -> None:
    check_export(tmp_path / "a" / "b" / "m.gguf", "f16", overwrite=False, model=None)
    assert not list(tmp_path.iterdir())
    exported(tiny_model(), tmp_path / "a" / "b" / "m.gguf")


def test_the_longest_name_that_the_file_system_allows_is_written(tmp_path: Path) -> None:
    exported(tiny_model(), tmp_path / (250 * "m" + ".gguf"))


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_permissions_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        export_gguf(tiny_model(), TOKENIZER, tmp_path / "m.gguf")
    finally:
        os.umask(before)
    assert (tmp_path / "m.gguf").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("llama", {"hidden_act": "gelu"}, "'gelu'"),
        ("phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (
            "mistral",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}},
            "'yarn'",
        ),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(architecture: str, options, message: str, tmp_path: Path) -> None:
    if "rope_parameters" in options:
        options = {"rope_parameters": {"rope_theta": 10000.0, **options["rope_parameters"]}}
    with pytest.raises(ExportError, match=message):
        export_gguf(tiny_model(architecture, **options), TOKENIZER, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_an_untied_qwen3_whose_layers_differ_is_refused(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    with pytest.raises(ExportError, match=r"tie_word_embeddings.*--uniform"):
        export_gguf(cut(model, random_masks(model, 0.5)), TOKENIZER, tmp_path / "m.gguf")


def test_other_refusals_leave_no_file(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(ExportError, match="no tokenizer"):
        export_gguf(model, None, tmp_path / "m.gguf")
    with pytest.raises(ExportError, match=r"'q4_k'.*f32, f16, bf16, q8_0"):
        export_gguf(model, TOKENIZER, tmp_path / "m.gguf", outtype="q4_k")
    with pytest.raises(ExportError, match="258 tokens, but its embedding only 61"):
        export_gguf(model, byte_tokenizer(), tmp_path / "m.gguf")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(ExportError, match=r"blk.1.ffn_up.weight .* f16's range"):
        export_gguf(model, TOKENIZER, tmp_path / "m.gguf", outtype="f16")
    assert not list(tmp_path.iterdir())


def test_without_the_library_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ExportError, match=r"pip install 'gradprune\[gguf\]'"):
        export_gguf(tiny_model(), TOKENIZER, tmp_path / "m.gguf")


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(*steps, merges=(("a", "b"),), normalizer=None) -> PreTrainedTokenizerFast:
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(alphabet)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([WORDS], "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), WORDS], "smollm"),
        ([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES], "llama-bpe"),
        ([pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"), BYTES], "qwen2"),
    ],
)
def test_the_splitting_of_byte_level_tokenizers_is_named(steps, name: str, tmp_path: Path) -> None:
    reader = exported(tiny_model(vocab=260), tmp_path / "m.gguf", byte_level(*steps))
    assert value(reader, "tokenizer.ggml.pre") == name
    assert value(reader, "tokenizer.ggml.model") == "gpt2"
    assert value(reader, "tokenizer.ggml.merges") == ["a b"]
    tokens, types = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    assert tokens[256:] == ["ab", "</s>", "[PAD258]", "[PAD259]"]
    assert types[255:] == [1, 1, 3, 5, 5]
    assert value(reader, "tokenizer.ggml.eos_token_id") == 257
    assert value(reader, "tokenizer.ggml.add_bos_token") is False


def file_of_a_tokenizer(path: Path, model: str, pre: str) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", SPLITTERS.values())
def test_the_splitting_that_a_file_names_is_applied(name: str, tmp_path: Path) -> None:
    """SmolLM2's tokenizer, for example, splits digits, but transformers does not read this from the file."""
    file = file_of_a_tokenizer(tmp_path / "m.gguf", "gpt2", name)
    tokenizer = byte_level(pre_tokenizers.WhitespaceSplit())
    split_as_the_file_says(tokenizer, file)
    assert value(exported(tiny_model(vocab=260), tmp_path / "again.gguf", tokenizer), "tokenizer.ggml.pre") == name
    words = [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("In 1984")]
    assert words == ["In", *{"gpt-2": ["Ġ1984"], "llama-bpe": ["Ġ", "198", "4"]}.get(name, ["Ġ", *"1984"])]


@pytest.mark.parametrize(("model", "pre"), [("gpt2", "unheard-of"), ("llama", "smollm")])
def test_an_unknown_splitting_leaves_the_tokenizer_unchanged(model: str, pre: str, tmp_path: Path) -> None:
    tokenizer = byte_level(WORDS)
    before = tokenizer.backend_tokenizer.to_str()
    split_as_the_file_says(tokenizer, file_of_a_tokenizer(tmp_path / "m.gguf", model, pre))
    assert tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (byte_level(pre_tokenizers.Split(Regex("x"), "isolated"), BYTES), "splits text"),
        (byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "splits text"),
        (byte_level(WORDS, normalizer=normalizers.Lowercase()), "normalize"),
        (PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)], unk_id=0))), "Unigram"),
    ],
    ids=["regex", "prefix space", "lower case", "unigram"],
)
def test_tokenizers_that_llama_cpp_does_not_support_are_refused(tokenizer, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export_gguf(tiny_model(vocab=300), tokenizer, tmp_path / "m.gguf")


def test_the_chat_template_is_written(tmp_path: Path) -> None:
    tokenizer = byte_level(WORDS)
    tokenizer.chat_template = "{{ messages }}"
    assert value(exported(tiny_model(vocab=300), tmp_path / "m.gguf", tokenizer), "tokenizer.chat_template") == (
        "{{ messages }}"
    )


def test_a_write_that_fails_within_a_tensor_is_reported_in_the_systems_words(tmp_path: Path) -> None:
    exported(tiny_model(), tmp_path / "whole.gguf")
    room = (tmp_path / "whole.gguf").stat().st_size - 2000
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        with pytest.raises(ExportError, match=r"^output: '.*m.gguf' cannot be written: File too large; choose another"):
            export_gguf(tiny_model(), TOKENIZER, tmp_path / "m.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in tmp_path.iterdir()] == ["whole.gguf"]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    with pytest.raises(ExportError, match=r"^model: blk\.1\.ffn_up\.weight has values that are not finite"):
        export_gguf(model, TOKENIZER, tmp_path / "m.gguf", outtype="f32")
    assert not (tmp_path / "m.gguf").exists()
