"""What re-solving the weights of experts gains, depending on how many calibration tokens the experts see.

    python -m benchmarks.quality.experts [--device cuda] [--quick]

A mixture of experts is trained on the embedded text, pruned by channels and by whole experts, and repaired in every
way. Not part of `make bench`, because training takes minutes; --quick trains less, under another name.
"""

import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.options import parse, parser
from benchmarks.progress import Deadline, say
from benchmarks.results import append, record
from gradprune.calibration.gather import gather_evidence
from gradprune.config import PruneConfig
from gradprune.data.embedded import embedded_text
from gradprune.data.samples import draw_samples
from gradprune.data.tokenize import encode
from gradprune.demo.model import byte_tokenizer
from gradprune.demo.training import DemoTraining, fit
from gradprune.evaluation.perplexity import perplexity
from gradprune.models import describe
from gradprune.models.modes import seeded
from gradprune.progress import QUIET
from gradprune.run import Run
from gradprune.scoring.choose import choose
from gradprune.surgery.cut import cut, sharing_copy
from gradprune.surgery.expert_repair import TOKENS_PER_CHANNEL
from gradprune.surgery.least_squares import BLEND, least_squares


@dataclass(frozen=True)
class RepairSetting:
    """A way to repair: arguments of `least_squares`. solves: whether anything is re-solved at all."""

    blend: float = BLEND
    tokens_per_channel: float = TOKENS_PER_CHANNEL
    solves: bool = True


REPAIRS = {
    "no repair": RepairSetting(solves=False),
    "attention alone": RepairSetting(tokens_per_channel=math.inf),
    "experts too": RepairSetting(),
    "blend 0": RepairSetting(blend=0.0),
    "any number of tokens": RepairSetting(tokens_per_channel=0.0),
    "2 tokens a channel": RepairSetting(tokens_per_channel=2.0),
}
# The kinds of groups that are pruned, and the fraction of the parameters that is removed.
CASES = (("attention,expert_channels", 0.3), ("expert_channels", 0.35), ("experts", 0.3))
_RECIPE = DemoTraining(
    steps=900, learning_rate=4e-3, warmup=20, hidden_size=96, intermediate_size=32, heads=6, kv_heads=3
)
# What is measured, by default, with --quick and with --toy: the model's name in the results, its recipe, and numbers of
# calibration samples.
_FULL = ("mixture", _RECIPE, (4, 16, 64))
_QUICK = ("mixture, quick,", replace(_RECIPE, steps=60), (4, 16))
_TOY = ("toy mixture", replace(_RECIPE, steps=4, layers=2, hidden_size=24, heads=2, kv_heads=1, seq_len=32), (4,))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the model, then prune and repair it in every way."""
    made = parser(__doc__)
    made.add_argument("--eval_samples", type=int, default=64, help="windows that the perplexity is measured on")
    options = parse(made, arguments)
    deadline = Deadline(options.seconds)
    name, recipe, numbers = _TOY if options.toy else _QUICK if options.quick else _FULL
    tokenizer, text = byte_tokenizer(), embedded_text()
    tokens, held_out = encode(tokenizer, text.train), encode(tokenizer, text.held_out)
    say(f"repair of experts: training the {name} model")
    model = mixture(recipe, len(tokenizer), tokenizer.eos_token_id)
    fit(model, recipe, tokens, QUIET)
    for found in _measure(model.to(options.device), tokens, held_out, numbers, options):
        if not deadline.allows(0.0):
            say("    the time for this run is used up")
            return
        shape = f"{found['kinds']} {found['ratio']:.0%}, {found['samples']} samples"
        append(record("experts", name, found["repair"], shape, "fp32", options.device, extra=found), options.output)
        say(f"    {shape:48s} {found['repair']:22s} perplexity {found['perplexity']:7.3f}")


def mixture(recipe: DemoTraining, vocab_size: int, eos_token_id: int) -> PreTrainedModel:
    """Build a random mixture of 8 experts in the recipe's sizes; every token is routed to 2 of them."""
    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        moe_intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.hidden_size // recipe.heads,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        mlp_only_layers=[],
    )
    # "eager" loops over the experts; grouped matrix products would accept only certain widths.
    config._experts_implementation = "eager"
    with seeded(recipe.seed):
        return Qwen3MoeForCausalLM(config)


def _measure(
    model: PreTrainedModel, tokens: Tensor, held_out: Tensor, numbers: Sequence[int], options: Namespace
) -> Iterator[dict[str, Any]]:
    """Yield a record's `extra` for each case, number of samples and repair; tokens, held_out: [tokens] int64."""

    def quality(of: PreTrainedModel) -> float:
        return perplexity(of, held_out, seq_len=128, batch_size=8, max_windows=options.eval_samples).value

    dense = quality(model)
    for kinds, ratio in CASES:
        for samples in numbers:
            config = PruneConfig(
                num_samples=samples, held_out_samples=max(8, samples // 4), seq_len=128, batch_size=4, prune_kinds=kinds
            )
            view = describe(model, config.kinds)
            run = Run(view, config, draw_samples(model, None, config, tokens, held_out))
            masks = choose(view, gather_evidence(run), config.scoring, config.constraints, ratio).masks
            for name, repair in REPAIRS.items():
                pruned = sharing_copy(model)
                if repair.solves:
                    least_squares(
                        describe(pruned, config.kinds),
                        masks,
                        run.calibration,
                        run.held_out,
                        blend=repair.blend,
                        tokens_per_channel=repair.tokens_per_channel,
                    )
                yield {
                    "kinds": kinds,
                    "ratio": ratio,
                    "samples": samples,
                    "repair": name,
                    "perplexity": quality(cut(pruned, masks, inplace=True)),
                    "perplexity_dense": dense,
                }


if __name__ == "__main__":
    main()
