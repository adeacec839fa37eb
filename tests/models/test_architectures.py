"""Importances, cutting, saving and loading of the tested architectures that `helpers.architectures` makes."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

from gradprune import ImportanceEngine, load_pruned
from gradprune.checkpoint.save import save_checkpoint
from gradprune.errors import SelectionError
from gradprune.models import describe
from gradprune.models.loss import sample_losses
from gradprune.models.modeling_gradprune import auto_class_name
from gradprune.models.shrink import with_random_weights
from gradprune.models.streams import Streams
from gradprune.models.tested import TESTED
from gradprune.models.widths import plain_widths
from gradprune.ops.dispatch import select_ops
from gradprune.surgery.cut import cut
from gradprune.surgery.least_squares import least_squares
from helpers.architectures import OPTIONS, random_masks_of, silenced, tiny
from helpers.cut_models import TOLERANCE, full_masks
from helpers.mixtures import MIXTURES, WITH_SHARED
from helpers.pipeline_runs import run
from helpers.programs import run_program
from helpers.tiny_models import CLASSES, tiny_ids

SHAPES = ((1, 4), (2, 4), (3, 8))
FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert "gradprune" not in sys.modules
    torch.save(model(ids).logits.detach(), folder + ".out")
"""


def tolerance(architecture: str) -> dict[str, float]:
    """The tolerance for logits: Gemma's norms are computed in fp32, whatever the model's dtype."""
    return {"rtol": 1e-4, "atol": 1e-5} if architecture.startswith("gemma") else TOLERANCE


def shapes_of(architecture: str) -> tuple[tuple[int, int], ...]:
    return ((1, 4), (1, 8)) if architecture in ("bloom", "gpt2", "gpt_neox") else SHAPES


CASES = [(architecture, *shape) for architecture in OPTIONS for shape in shapes_of(architecture)]


def test_the_tests_cover_the_tested_list() -> None:
    assert set(TESTED) == set(OPTIONS) | set(CLASSES) | set(MIXTURES) | set(WITH_SHARED)


@pytest.mark.parametrize(("architecture", "ratio", "head_dim"), CASES)
def test_cutting_equals_silencing_and_survives_saving(
    architecture: str, ratio: int, head_dim: int, tmp_path: Path
) -> None:
    model, ids = tiny(architecture, ratio=ratio, head_dim=head_dim), tiny_ids(2)
    kinds = {block.kind.name for block in describe(model).blocks}
    assert kinds == set(TESTED[architecture])
    masks = random_masks_of(model, 0.5)
    masks[describe(model).blocks[0].key][:] = False
    with torch.no_grad():
        dense = model(ids).logits
        with silenced(model, masks):
            expected = model(ids).logits
            tokens = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
        assert not torch.allclose(dense, expected)
        pruned = cut(model, masks)
        torch.testing.assert_close(pruned(ids).logits, expected, **tolerance(architecture))
        save_checkpoint(pruned, None, tmp_path / "x")
        for found in (pruned, load_pruned(tmp_path / "x")):
            torch.testing.assert_close(found(ids).logits, expected, **tolerance(architecture))
            made = found.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
            assert torch.equal(made, tokens)
        torch.testing.assert_close(model(ids).logits, dense, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", OPTIONS)
def test_importances_equal_fp64_autograd_and_dead_groups_are_lowest(architecture: str) -> None:
    model, ids = tiny(architecture, ratio=1), tiny_ids(3)
    for block in describe(model).blocks:
        # The last group writes nothing.
        dead = torch.tensor([block.groups - 1])
        with torch.no_grad():
            block.output.weight[:, block.output.columns_of(dead)] = 0.0
    with ImportanceEngine(model, method="taylor_2nd", backend="reference") as engine:
        engine.step(ids)
    found = {method: engine.evidence().scores(method, "none") for method in ("taylor", "group_fisher")}
    for block in describe(model).blocks:
        gradients = [sample_gradients(model, block, sample) for sample in ids.split(1)]
        fisher = torch.stack([mask.square() for _, mask in gradients]).mean(0)
        taylor = torch.stack([weights for weights, _ in gradients]).mean(0)
        for method, expected in (("taylor", taylor), ("group_fisher", fisher)):
            scores = found[method]
            of_layer = getattr(scores, block.kind.name)[block.layer].double()
            torch.testing.assert_close(of_layer, expected, rtol=1e-4, atol=1e-9)
            assert of_layer.argmin() == block.groups - 1 or method == "taylor"


def sample_gradients(model, block, ids):
    """Per group, the sum of |w g| over its weights and the gradient of a mask on it, by autograd from the logits."""
    linears = [entry.linear for entry in block.projections]
    stored = [entry.transposed for entry in block.projections]
    mask = torch.ones(block.groups, dtype=torch.float64, requires_grad=True)
    width = block.width // block.groups

    def gate(_module, args):
        return (args[0] * mask.repeat_interleave(width),)

    handle = block.output.linear.register_forward_pre_hook(gate)
    logits = model(ids).logits[:, :-1]
    handle.remove()
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    *of_weights, of_mask = torch.autograd.grad(loss, [*(linear.weight for linear in linears), mask])
    absolute = [(linear.weight * g).abs().detach() for linear, g in zip(linears, of_weights, strict=True)]
    absolute = [values.T if transposed else values for values, transposed in zip(absolute, stored, strict=True)]
    total = absolute[-1].sum(0).view(block.groups, width).sum(1)
    for entry, values in zip(block.inputs, absolute, strict=False):
        for group in range(block.groups):
            total[group] += values[entry.rows_of(torch.tensor([group]))].sum()
    return total, of_mask


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "glm4"])
def test_a_single_kv_head_before_a_norm_is_scored_by_a_mask_after_the_norm(architecture: str) -> None:
    """The norm removes the scale of its input, so the gradient of a mask before it would be only rounding error."""
    model, ids = tiny(architecture, kv_heads=1, ratio=4), tiny_ids()
    with ImportanceEngine(model, method="group_fisher", backend="reference") as engine:
        engine.step(ids)
        found = engine.scores().attention
    for block in describe(model, ["attention"]).blocks:
        gate = torch.ones((), dtype=torch.float64, requires_grad=True)
        handle = block.writer.register_forward_hook(lambda _module, _args, output, gate=gate: output * gate)
        squares = []
        for sample in ids.split(1):
            loss = F.cross_entropy(model(sample).logits[:, :-1].flatten(0, 1), sample[:, 1:].flatten())
            squares.append(torch.autograd.grad(loss, gate)[0].square())
        handle.remove()
        torch.testing.assert_close(found[block.layer].double(), torch.stack(squares).mean().view(1), rtol=1e-4, atol=0)


def test_transposed_weights_are_scored_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 stores its weights transposed; scoring them must not copy any."""
    model, scored, ops = tiny("gpt2").float(), [], select_ops("cpp", "cpu")

    def seen(x: torch.Tensor, dy: torch.Tensor, w: torch.Tensor, side: str) -> object:
        scored.append(w)
        return ops.linear_importance_uncounted(x, dy, w, side)

    monkeypatch.setattr(
        "gradprune.calibration.engine.select_ops", lambda *_: replace(ops, linear_importance_uncounted=seen)
    )
    with ImportanceEngine(model, method="taylor") as engine:
        engine.step(tiny_ids(2))
    stored = {parameter.data_ptr() for parameter in model.parameters()}
    assert len(scored) == 8
    assert all(w.is_contiguous() and w.data_ptr() in stored for w in scored)


def test_batch_reduction_of_one_sample_scores_transposed_weights_like_sample_reduction() -> None:
    found = []
    for reduction in ("sample", "batch"):
        with ImportanceEngine(tiny("gpt2"), method="taylor_2nd", reduction=reduction, backend="reference") as engine:
            engine.step(tiny_ids(1))
        found.append(engine.scores())
    for kind in ("attention", "mlp"):
        for one, other in zip(*(getattr(scores, kind) for scores in found), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("architecture", OPTIONS)
def test_the_loss_equals_the_loss_from_the_models_own_logits(architecture: str) -> None:
    model, ids = tiny(architecture, seed=1), tiny_ids(2)
    logits = model(ids).logits[:, :-1]
    expected = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    torch.testing.assert_close(sample_losses(model, ids, chunk=5), expected)


def test_uniform_keeps_a_width_that_the_configuration_cannot_state() -> None:
    model = tiny("bloom")
    assert plain_widths(describe(model)) == {"mlp": frozenset({96})}
    with pytest.raises(SelectionError, match=r"pruning_ratio: 0\.1 cannot be reached"):
        run(model, uniform=True, pruning_ratio=0.1)


@pytest.mark.parametrize("architecture", [name for name in OPTIONS if name != "bloom"])
def test_a_uniform_result_is_a_plain_checkpoint(architecture: str, tmp_path: Path) -> None:
    model, ids = tiny(architecture, kv_heads=4), tiny_ids(2)
    masks = random_masks_of(model, 2.0)
    # A plain checkpoint of these architectures cannot have fewer heads: their attention is as wide as the model.
    heads_can_be_removed = architecture not in ("falcon", "gpt2", "gpt_neox", "helium", "qwen2_vl", "qwen2_5_vl")
    assert (2 in plain_widths(describe(model)).get("attention", {2})) is heads_can_be_removed
    for key in masks:
        if key.kind == "mlp" or heads_can_be_removed:
            masks[key][: len(masks[key]) // 2] = False
    save_checkpoint(cut(model, masks), None, tmp_path / "x")
    assert not list((tmp_path / "x").glob("*.py"))
    found = getattr(transformers, auto_class_name(architecture)).from_pretrained(tmp_path / "x").eval()
    assert type(found) is type(model)
    with torch.no_grad(), silenced(model, masks):
        torch.testing.assert_close(found(ids).logits, model(ids).logits, **tolerance(architecture))


def test_run_layer_leaves_the_given_block_outputs_unchanged() -> None:
    """Falcon's layers add in place to the tensor that the MLP returns."""
    streams = Streams(describe(tiny("falcon")), [tiny_ids(2)])
    with torch.no_grad():
        (first,) = streams.take_first()
        after, written = streams.layer_and_written(0, 0, first)
        before = {module: value.clone() for module, value in written.items()}
        torch.testing.assert_close(streams.run_layer(0, 0, first, written), after)
    assert all(torch.equal(written[module], value) for module, value in before.items())


@pytest.mark.parametrize("architecture", ["gemma2", "granite", "cohere"])
def test_least_squares_reduces_the_error_of_what_blocks_write(architecture: str) -> None:
    model, samples = tiny(architecture), [tiny_ids(8), tiny_ids(8, seed=2)]
    repairs = least_squares(describe(model), random_masks_of(model, 0.7), samples, [tiny_ids(4, seed=3)]).blocks
    assert repairs
    assert all(repair.error <= repair.error_before for repair in repairs)
    assert any(repair.error < repair.error_before for repair in repairs)


@pytest.mark.parametrize("architecture", ["granite", "starcoder2", "cohere"])
def test_a_later_layer_with_enough_channels_makes_up_for_an_earlier_one(architecture: str) -> None:
    """With 24 channels and only six tokens, the last MLP can restore the dense model's residual stream."""
    model, ids = tiny(architecture, ratio=1, intermediate_size=24), tiny_ids(1, 6)
    masks = full_masks(model)
    masks.mlp[0][2:] = False
    # The attention before it keeps four columns, which are too few.
    masks.attention[1][1:] = False
    with torch.no_grad():
        dense = model(ids).logits
        least_squares(describe(model), masks, [ids], [], blend=1.0, ridges=(1e-13,))
        torch.testing.assert_close(model(ids).logits, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["granite", "starcoder2", "cohere", "gemma2"])
def test_the_first_pruned_block_has_the_same_solution_at_any_blend(architecture: str) -> None:
    """Before it the residual stream is the dense model's, so both targets that are blended are the same."""
    found = []
    for blend in (0.0, 1.0):
        model = tiny(architecture)
        masks = full_masks(model)
        masks.mlp[1][::3] = False
        least_squares(describe(model), masks, [tiny_ids(8)], [], blend=blend)
        found.append(describe(model).of_kind("mlp")[1].output.linear.weight.detach())
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


def test_checkpoints_load_without_gradprune(tmp_path: Path) -> None:
    ids, folders, expected = tiny_ids(2), [], []
    torch.save(ids, tmp_path / "ids.pt")
    for architecture in OPTIONS:
        model = tiny(architecture)
        masks = random_masks_of(model, 0.5)
        masks[describe(model).blocks[0].key][:] = False
        folders.append(str(tmp_path / architecture))
        save_checkpoint(cut(model, masks), None, folders[-1])
        with torch.no_grad(), silenced(model, masks):
            expected.append(model(ids).logits)
    command = [sys.executable, "-c", FRESH, str(tmp_path / "ids.pt"), *folders]
    done = run_program(command, cwd=tmp_path, environment={"HF_MODULES_CACHE": str(tmp_path / "modules")})
    assert done.returncode == 0, done.stderr
    for architecture, folder, logits in zip(OPTIONS, folders, expected, strict=True):
        torch.testing.assert_close(torch.load(folder + ".out"), logits, **tolerance(architecture))


@pytest.mark.parametrize("architecture", ["gemma2", "olmo2", "gpt_neox"])
@pytest.mark.parametrize("prior", ["removal", "similarity", "taylor"])
def test_a_whole_run_prunes_and_its_checkpoint_loads(architecture: str, prior: str, tmp_path: Path) -> None:
    model = tiny(architecture, ratio=1)
    before = model.num_parameters()
    result = run(model, temperature=1.0, prior=prior, output_dir=str(tmp_path), output_name="out")
    assert 0.7 * before < result.model.num_parameters() < 0.85 * before
    ids = tiny_ids(2)
    with torch.no_grad():
        loaded = load_pruned(tmp_path / "out" / "model")
        torch.testing.assert_close(loaded(ids).logits, result.model(ids).logits, **tolerance(architecture))


def test_uniform_leaves_kinds_that_are_not_pruned_alone() -> None:
    result = run(tiny("olmo2"), uniform=True, pruning_ratio=0.1)
    assert type(result.model).__name__ == "Olmo2ForCausalLM"
    assert len({block.groups for block in describe(result.model).blocks}) == 1


def test_uniform_counts_only_layers_that_have_a_block(tmp_path: Path) -> None:
    """Some layers of LFM2 have a convolution instead of attention."""
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 8, "num_key_value_heads": 4}
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    config = transformers.Lfm2Config(
        **sizes, vocab_size=61, num_hidden_layers=4, layer_types=kinds, block_auto_adjust_ff_dim=False
    )
    model = with_random_weights(transformers.Lfm2ForCausalLM(config).eval())
    result = run(
        model, uniform=True, pruning_ratio=0.3, attention_factor=0.1, output_dir=str(tmp_path), output_name="x"
    )
    assert {block.kind.name for block in describe(model).blocks} == {"attention", "mlp"}
    for kind in ("attention", "mlp"):
        widths = [int(result.masks[block].sum()) for block in describe(model).blocks if block.kind.name == kind]
        assert len(set(widths)) == 1, kind
        assert 0 < widths[0] < {"attention": 4, "mlp": 24}[kind]
    plain, ids = transformers.Lfm2ForCausalLM.from_pretrained(tmp_path / "x" / "model").eval(), tiny_ids(2)
    assert not list((tmp_path / "x" / "model").glob("*.py"))
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, result.model(ids).logits)
