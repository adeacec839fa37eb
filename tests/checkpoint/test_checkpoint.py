import json
import re
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from gradprune import hub, load_pruned
from gradprune.checkpoint.load import load_model
from gradprune.checkpoint.save import save_checkpoint
from gradprune.demo import byte_tokenizer
from gradprune.errors import CheckpointError, ConfigError, UnsupportedArchitectureError
from gradprune.models.modeling_gradprune import PerLayerWidths
from gradprune.surgery.cut import cut
from helpers.cut_models import assert_same, extreme_masks, full_masks, greedy, masked, random_masks
from helpers.programs import run_program
from helpers.tiny_models import ARCHITECTURE_NAMES, tiny_ids, tiny_model

# A script that cannot import gradprune and saves what each reloaded model computes, for comparison.
FRESH = """
import sys
sys.modules["gradprune"] = None
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folders, ids = sys.argv[2:], torch.load(sys.argv[1])
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    torch.save((logits, tokens), folder + ".out")
    model.save_pretrained(folder + ".again")
    again = AutoModelForCausalLM.from_pretrained(folder + ".again", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, logits)
    body = AutoModel.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(model.lm_head(body(ids).last_hidden_state), logits)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    # As vLLM reads it: one configuration per layer, from which it sizes the layer's attention and cache.
    assert config.is_heterogeneous and len(config.per_layer_config) == config.num_hidden_layers
    for layer, module in zip(config.per_layer_config, body.layers):
        if "attention" not in layer.skip:
            assert layer.num_attention_heads * layer.head_dim == module.self_attn.o_proj.in_features
            assert layer.num_attention_heads // layer.num_key_value_heads == module.self_attn.num_key_value_groups
        if "mlp" not in layer.skip:
            assert layer.intermediate_size == module.mlp.down_proj.in_features
    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    assert half(ids).logits.isfinite().all()
"""


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_a_reloaded_model_computes_the_same(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    for number, (_, masks) in enumerate([("random", random_masks(model, 0.5)), *extreme_masks(model)]):
        folder = tmp_path / str(number)
        save_checkpoint(cut(model, masks), None, folder)
        found, expected = load_pruned(folder), masked(model, masks)
        assert_same(found, expected)
        assert torch.equal(greedy(found, tiny_ids(2)), greedy(expected, tiny_ids(2), cached=False))


def test_a_pruned_checkpoint_loads_without_gradprune(tmp_path: Path) -> None:
    ids, folders, expected = tiny_ids(2), [], []
    torch.save(ids, tmp_path / "ids.pt")
    for architecture in ARCHITECTURE_NAMES:
        model = tiny_model(architecture)
        masks = random_masks(model, 0.5)
        masks.attention[0][:] = False
        masks.mlp[2][:] = False
        folder = tmp_path / architecture
        save_checkpoint(cut(model, masks), None, folder)
        folders.append(str(folder))
        expected.append(masked(model, masks))
    command = [sys.executable, "-c", FRESH, str(tmp_path / "ids.pt"), *folders]
    done = run_program(command, cwd=tmp_path, environment={"HF_MODULES_CACHE": str(tmp_path / "modules")})
    assert done.returncode == 0, done.stderr
    for folder, model in zip(folders, expected, strict=True):
        logits, tokens = torch.load(folder + ".out")
        with torch.no_grad():
            torch.testing.assert_close(logits, model(ids).logits, rtol=1e-9, atol=1e-11)
        assert torch.equal(tokens, greedy(model, ids, steps=6))


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_a_pruned_model_does_not_load_without_trusting_its_code(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    save_checkpoint(cut(model, random_masks(model, 0.5)), None, tmp_path / "x")
    with pytest.raises((RuntimeError, ValueError, OSError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "x")


def test_dropped_blocks_leave_no_global_width_that_the_stock_model_would_fit(tmp_path: Path) -> None:
    # transformers releases without per_layer_config would build the stock model and randomly fill in missing weights.
    model = tiny_model()
    for number, kinds in enumerate((["attention"], ["mlp"], ["attention", "mlp"])):
        masks = full_masks(model)
        for kind in kinds:
            getattr(masks, kind)[0][:] = False
        save_checkpoint(cut(model, masks), None, tmp_path / str(number))
        config = json.loads((tmp_path / str(number) / "config.json").read_text())
        assert config["intermediate_size"] == 0
        assert_same(load_pruned(tmp_path / str(number)), masked(model, masks))


def test_dtype_and_device_may_be_names_or_objects(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), None, tmp_path / "x")
    for dtype, device in (("bfloat16", "cpu"), (torch.bfloat16, torch.device("cpu"))):
        model, _ = load_model(tmp_path / "x", dtype=dtype, device=device)
        assert (model.dtype, model.device) == (torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "abacus"}, "dtype: 'abacus' is unknown; choose one of auto, float32"),
        ({"dtype": torch.int8}, "dtype: 'int8' is unknown"),
        ({"device": "abacus"}, "device: 'abacus' does not work here"),
        ({"device": "meta"}, "device: 'meta' holds no weights"),
        ({"device_map": "abacus"}, "device_map: 'abacus'"),
        ({"stream_layers": "yes"}, "stream_layers: 'yes' is unknown; choose one of auto, on, off"),
        ({"stream_memory": "much"}, "stream_memory: 'much'"),
    ],
)
def test_wrong_arguments_of_loading_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), None, tmp_path / "x")
    with pytest.raises(ConfigError, match=f"^{message}"):
        load_model(tmp_path / "x", **options)


@pytest.mark.filterwarnings("error::UserWarning")
def test_models_with_removed_blocks_load_without_a_warning(tmp_path: Path) -> None:
    model = tiny_model()
    masks = full_masks(model)
    for kind in ("attention", "mlp"):
        getattr(masks, kind)[1][:] = False
    save_checkpoint(cut(model, masks), None, tmp_path / "x")
    for stream_layers in ("off", "on"):
        load_model(tmp_path / "x", stream_layers=stream_layers)


def by_remote_code(folder: Path, monkeypatch: pytest.MonkeyPatch, modules: Path):
    """Load a model with the code saved beside its weights, not with gradprune's own classes."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert not isinstance(model, PerLayerWidths)
    return model


def test_a_model_loaded_by_remote_code_can_be_cut_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    masks = random_masks(model, 0.7)
    masks.attention[0][:] = False
    save_checkpoint(cut(model, masks), None, tmp_path / "once")
    once = by_remote_code(tmp_path / "once", monkeypatch, tmp_path / "modules")
    twice = cut(once, random_masks(once, 0.7, seed=3))
    twice.set_attn_implementation("eager")
    twice.set_attn_implementation("sdpa")
    save_checkpoint(twice, None, tmp_path / "twice")
    assert_same(load_pruned(tmp_path / "twice"), twice)


def test_a_transformers_pipeline_accepts_a_pruned_model_without_a_warning(tmp_path: Path, monkeypatch, caplog) -> None:
    model = tiny_model(vocab=300)
    save_checkpoint(cut(model, random_masks(model, 0.7)), byte_tokenizer(), tmp_path / "pruned")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with caplog.at_level("WARNING", logger="transformers"):
        text = pipeline("text-generation", model=str(tmp_path / "pruned"), trust_remote_code=True)
        assert text("ab", max_new_tokens=2)[0]["generated_text"].startswith("ab")
    assert "not supported" not in caplog.text


def test_a_model_loaded_by_remote_code_can_become_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    masks = full_masks(model)
    masks.mlp[0][3:] = False
    save_checkpoint(cut(model, masks), None, tmp_path / "once")
    once = by_remote_code(tmp_path / "once", monkeypatch, tmp_path / "modules")
    rest = full_masks(once)
    for kept in rest.mlp[1:]:
        kept[3:] = False
    plain = cut(once, rest)
    assert type(plain) is type(model)
    save_checkpoint(plain, None, tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), plain)


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_the_configuration_and_tokenizer_need_no_remote_code(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, vocab=300)
    save_checkpoint(cut(model, random_masks(model, 0.5)), byte_tokenizer(), tmp_path / "x")
    assert AutoConfig.from_pretrained(tmp_path / "x").model_type == architecture
    assert AutoTokenizer.from_pretrained(tmp_path / "x").decode([5, 6])


def test_per_layer_config_states_the_widths(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    masks = full_masks(model)
    masks.attention[0][:] = False
    masks.attention[1][0] = False
    masks.mlp[1][:7] = False
    masks.mlp[2][:] = False
    save_checkpoint(cut(model, masks), None, tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    layers = {int(index): overrides for index, overrides in config["per_layer_config"].items()}
    assert layers[0]["skip"] == ["attention"]
    assert (layers[1]["num_key_value_heads"], layers[1]["num_attention_heads"]) == (2, 4)
    assert layers[1]["intermediate_size"] == 3
    assert layers[2]["skip"] == ["mlp"]
    assert (config["num_key_value_heads"], config["intermediate_size"], config["head_dim"]) == (3, 10, 4)


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_checkpoints_of_the_first_release_still_load(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    masks = random_masks(model, 0.5)
    masks.attention[1][:] = False
    save_checkpoint(cut(model, masks), None, tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    # The first release registered only one class, and did not record the query heads of Llama and Phi-3.
    layers = config["per_layer_config"]
    if architecture in ("llama", "phi3"):
        layers = {index: {k: v for k, v in own.items() if k != "num_attention_heads"} for index, own in layers.items()}
        assert layers != config["per_layer_config"]
    auto_map = {"AutoModelForCausalLM": config["auto_map"]["AutoModelForCausalLM"]}
    set_config(tmp_path / "x", per_layer_config=layers, auto_map=auto_map)
    found = load_pruned(tmp_path / "x")
    assert_same(found, masked(model, masks))
    kept = found.config.per_layer_config[0]
    assert kept.num_attention_heads == 2 * kept.num_key_value_heads == 2 * int(masks.attention[0].sum())
    save_checkpoint(found, None, tmp_path / "again")
    assert "AutoModel" in json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_uniform_widths_load_without_custom_code(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, kv_heads=4, ratio=2)
    masks = full_masks(model)
    for attention, mlp in zip(masks.attention, masks.mlp, strict=True):
        attention[:2] = False
        mlp[4:] = False
    save_checkpoint(cut(model, masks), None, tmp_path / "x")
    assert not list((tmp_path / "x").glob("*.py"))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert type(found) is type(model)
    assert_same(found, masked(model, masks))


def test_only_safetensors_are_written(tmp_path: Path) -> None:
    model = tiny_model()
    save_checkpoint(cut(model, random_masks(model, 0.5)), None, tmp_path / "x")
    names = {path.name for path in (tmp_path / "x").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_gradprune.py",
        "modeling_mlx.py",
    }


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        model = tiny_model()
        save_checkpoint(cut(model, random_masks(model, 0.5)), None, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_dense_checkpoint_is_loaded_with_its_tokenizer(tmp_path: Path) -> None:
    model = tiny_model(vocab=300)
    save_checkpoint(model, byte_tokenizer(), tmp_path / "x")
    found, tokenizer = load_model(tmp_path / "x")
    assert not isinstance(found, PerLayerWidths)
    assert not found.training
    assert_same(found, model)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer("héllo").input_ids) == "héllo"
    assert load_model(tmp_path / "x", dtype="bfloat16")[0].dtype == torch.bfloat16


def broken_checkpoint(folder: Path, how: str) -> None:
    save_checkpoint(tiny_model(), None, folder)
    weights = folder / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif how == "pickled only":
        weights.unlink()
        torch.save({}, folder / "pytorch_model.bin")
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "config is no JSON":
        (folder / "config.json").write_text("{")


def set_config(folder: Path, **values: object) -> None:
    """Set `values` in the folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def loading_error(folder: Path) -> str:
    """Return the one-line error with which loading `folder` fails."""
    with pytest.raises(CheckpointError, match=r"^base_model: ") as error:
        load_model(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("how", ["truncated", "pickled only", "no weights", "no config", "config is no JSON"])
def test_a_broken_checkpoint_gives_one_clear_error(how: str, tmp_path: Path) -> None:
    broken_checkpoint(tmp_path / "x", how)
    loading_error(tmp_path / "x")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"intermediate_size": 11}, r"9 weights .* first model.layers.0.mlp.down_proj.weight: \[72, 10\] instead of"),
        ({"num_hidden_layers": 0}, "describes no model: num_hidden_layers is 0"),
        ({"hidden_size": 0}, "describes no model: hidden_size is 0"),
        ({"num_hidden_layers": 4}, "lacks 9 weights .* first model.layers.3"),
        ({"num_hidden_layers": 2}, "9 weights in layers that its config.json does not name, first model.layers.2"),
        ({"per_layer_config": {"0": {"skip": ["attention"]}}}, "5 weights in layers .* first model.layers.0"),
        ({"per_layer_config": {"0": {"skip": ["attn"]}}}, r"layer 0 has \['attn'\]"),
        ({"per_layer_config": {"0": {"hidden_act": "relu"}}}, r"layer 0 has \['hidden_act'\]"),
        ({"per_layer_config": {"7": {"intermediate_size": 4}}}, "7"),
        ({"per_layer_config": [1]}, "no configuration"),
        ({"hidden_size": "wide"}, ""),
        ({"num_attention_heads": 0}, ""),
        ({"hidden_act": "nope"}, "'nope'"),
        ({"dtype": "nope"}, "'nope'"),
    ],
)
def test_a_configuration_that_does_not_fit_gives_one_clear_error(values, message: str, tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), None, tmp_path / "x")
    set_config(tmp_path / "x", **values)
    assert re.search(message, loading_error(tmp_path / "x"))


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), None, tmp_path / "x")
    set_config(tmp_path / "x", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedArchitectureError, match="quantised"):
        load_model(tmp_path / "x")


def test_a_damaged_tokenizer_is_an_error_but_a_missing_one_is_not(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(vocab=300), byte_tokenizer(), tmp_path / "x")
    tokenizer = tmp_path / "x" / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes()[:-50])
    assert "the tokenizer of" in loading_error(tmp_path / "x")
    tokenizer.unlink()
    assert load_model(tmp_path / "x")[1] is None


def test_an_unreachable_hub_is_reported_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        start = time.monotonic()
        with pytest.raises(CheckpointError, match=r"^model: there is no folder 'models/nowhere', nor .* be reached"):
            load_model("models/nowhere", argument="model")
        assert time.monotonic() - start < 5.0


def test_a_hub_that_does_not_answer_in_time_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_TIMEOUT", 0.1)
    monkeypatch.setattr(hub, "_ask", lambda: time.sleep(3.0))  # like name resolution, which has no time limit
    start = time.monotonic()
    assert "no answer in 0.1 s" in str(hub.hub_fault())
    assert time.monotonic() - start < 2.0


def sharded(folder: Path) -> dict[str, str]:
    """Save a checkpoint in shards, and return its index's map from weights to files."""
    tiny_model().save_pretrained(folder, max_shard_size="20KB")
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.parametrize(
    "name",
    ["evil.bin", "../outside.safetensors", "/tmp/x.safetensors", "sub/x.safetensors", "a\\b.safetensors", 3, None],
)
def test_an_index_may_name_only_safetensors_files_beside_it(tmp_path: Path, name: object) -> None:
    weights = sharded(tmp_path / "x")
    load_model(tmp_path / "x")
    first = next(iter(weights))
    # Files with two of these names exist, but must not be opened.
    torch.save({}, tmp_path / "x" / "evil.bin")
    (tmp_path / "outside.safetensors").write_bytes((tmp_path / "x" / weights[first]).read_bytes())
    index = {"metadata": {}, "weight_map": {**weights, first: name}}
    (tmp_path / "x" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"names {name!r}; only *.safetensors files beside it are read" in loading_error(tmp_path / "x")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', "[" * 100_000])
def test_a_damaged_index_gives_one_clear_error(tmp_path: Path, content: str) -> None:
    sharded(tmp_path / "x")
    (tmp_path / "x" / "model.safetensors.index.json").write_text(content)
    assert "is not an index of weights" in loading_error(tmp_path / "x")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shard = sorted(set(sharded(tmp_path / "x").values()))[-1]
    (tmp_path / "x" / shard).unlink()
    assert f"lacks '{shard}'" in loading_error(tmp_path / "x")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_of_eight_bits_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    save_checkpoint(tiny_model(), None, tmp_path / "x")
    weights = load_file(tmp_path / "x" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"].to(dtype)
    save_file(weights, tmp_path / "x" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UnsupportedArchitectureError, match=r"^base_model: model.layers.1.mlp.up_proj.weight .* stored as"
    ):
        load_model(tmp_path / "x")


def test_a_configuration_may_not_name_the_file_of_weights(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), None, tmp_path / "x")
    set_config(tmp_path / "x", transformers_weights="adapter_model.bin")
    assert "transformers_weights" in loading_error(tmp_path / "x")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_path_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"base_model: .* is not a folder"):
        load_model(name)


def test_an_unsupported_architecture_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ctrl"}))
    with pytest.raises(
        UnsupportedArchitectureError, match=r"'ctrl' .*self-test refused it.*tested are .*llama, .*qwen3"
    ):
        load_model(tmp_path)


def test_an_existing_folder_is_kept_unless_asked(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("precious")
    with pytest.raises(CheckpointError, match=r"directory: .* exists"):
        save_checkpoint(tiny_model(), None, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"directory: .* was not written by a run of gradprune"):
        save_checkpoint(tiny_model(), None, tmp_path / "x", overwrite=True)
    assert (tmp_path / "x" / "mine").read_text() == "precious"


def test_an_existing_checkpoint_is_replaced_if_asked(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), None, tmp_path / "x")
    (tmp_path / "x" / "mine").touch()
    save_checkpoint(tiny_model(), None, tmp_path / "x", overwrite=True)
    assert not (tmp_path / "x" / "mine").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_load_pruned_names_its_own_argument_in_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^directory: '.*' has no config\.json"):
        load_pruned(tmp_path)
