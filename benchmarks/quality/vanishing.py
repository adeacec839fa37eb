"""What scaling the gradients gains and costs, on a deep healthy model and on one that pruning harms.

    python -m benchmarks.quality.vanishing [--device cuda] [--quick]

Both models compute the same function (see `deep_model`). For every scaling of the gradients, without H-GSP and with it:
the gradient ratio before and after, what the first layer's MLP loses, how many blocks are over-pruned, and the
perplexity. One pruning ratio, no repair of weights, one calibration per model. Not part of `make bench`, because
training alone takes two minutes on one core; --quick trains a smaller model, which is recorded under its own name.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.options import parse, parser
from benchmarks.progress import Deadline, say
from benchmarks.quality.deep_model import RECIPE, SPLIT_LAYER, healthy_model, suffering_model
from benchmarks.results import append, percent, record
from gradprune.calibration.gather import gather_evidence
from gradprune.config import Constraints, PruneConfig, Scoring
from gradprune.data.embedded import embedded_text
from gradprune.data.samples import draw_samples
from gradprune.data.tokenize import encode
from gradprune.demo.model import byte_tokenizer
from gradprune.evaluation.perplexity import perplexity
from gradprune.models import describe
from gradprune.progress import QUIET
from gradprune.run import Run
from gradprune.scoring.choose import choose
from gradprune.scoring.over_pruning import over_pruned, pruning_distribution
from gradprune.surgery.cut import cut
from gradprune.vanishing.diagnosis import diagnose_gradients

FIXES = ("none", "adaptive", "normalize", "depth:sqrt", "adaptive+depth:sqrt")
METHOD = "taylor_2nd"
# What is measured, by default, with --quick and with --toy: the model's name in the results, its recipe, and the number
# of calibration samples.
_FULL = ("deep", RECIPE, 32)
_QUICK = ("deep, quick,", replace(RECIPE, steps=60, layers=8), 16)
_TOY = ("toy", replace(RECIPE, steps=4, layers=3, hidden_size=32, intermediate_size=32, seq_len=32), 4)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the models, then prune each with every scaling and temperature."""
    made = parser(__doc__)
    made.add_argument("--ratio", type=float, default=0.5, help="fraction of all parameters to remove")
    made.add_argument("--eval_samples", type=int, default=64, help="windows that the perplexity is measured on")
    options = parse(made, arguments)
    deadline = Deadline(options.seconds)
    name, recipe, samples = _TOY if options.toy else _QUICK if options.quick else _FULL
    tokenizer, text = byte_tokenizer(), embedded_text()
    tokens, held_out = encode(tokenizer, text.train), encode(tokenizer, text.held_out)
    say(f"vanishing gradients: training the {name} model, {recipe.layers} layers")
    healthy = healthy_model(tokens, len(tokenizer), tokenizer.eos_token_id, QUIET, recipe)
    config = PruneConfig(num_samples=samples, temperature=1.0, tau=0.0, prior="removal", repair="none", evidence="all")
    for kind, model in (("healthy", healthy), ("suffering", suffering_model(healthy))):
        say(f"    {name} {kind}")
        for found in _measure(model.to(options.device), tokens, held_out, config, options):
            if not deadline.allows(0.0):
                say("    the time for this run is used up")
                return
            provider = f"gradprune {found['gradient_fix']} T={found['temperature']:g}"
            shape = percent(options.ratio)
            append(
                record("vanishing", f"{name} {kind}", provider, shape, "fp32", options.device, extra=found),
                options.output,
            )
            say(
                f"    {provider:36s} gradient ratio {found['gradient_ratio_after']:8,.1f}"
                f"  first MLP loses {found['first_mlp_pruned']:4.0%}  over-pruned {found['over_pruned_blocks']:3d}"
                f"  perplexity {found['perplexity']:7.2f}"
            )


def _measure(
    model: PreTrainedModel, tokens: Tensor, held_out: Tensor, config: PruneConfig, options: Namespace
) -> Iterator[dict[str, Any]]:
    """Yield a record's `extra` for each temperature and scaling; tokens, held_out: [tokens] int64."""
    samples = draw_samples(model, None, config, tokens, held_out)
    view = describe(model)
    evidence = gather_evidence(Run(view, config, samples))
    quality = _perplexity_of(held_out, options.eval_samples)
    dense, before = quality(model), diagnose_gradients(evidence.gradients).ratio
    for temperature in (0.0, 1.0):
        for fix in FIXES:
            scoring = Scoring(importance_method=METHOD, gradient_fix=fix, temperature=temperature, tau=0.0)
            masks = choose(view, evidence, scoring, Constraints(), options.ratio).masks
            distribution = pruning_distribution(masks)
            scaling = evidence.scaling(fix)
            yield {
                "ratio": options.ratio,
                "method": METHOD,
                "temperature": temperature,
                "gradient_fix": fix,
                "gradient_ratio_before": before,
                "gradient_ratio_after": before if scaling is None else diagnose_gradients(scaling.after).ratio,
                "first_mlp_pruned": distribution[SPLIT_LAYER].pruned["mlp"],
                "over_pruned_blocks": len(over_pruned(distribution)),
                "perplexity": quality(cut(model, masks)),
                "perplexity_dense": dense,
            }


def _perplexity_of(held_out: Tensor, windows: int) -> Callable[[PreTrainedModel], float]:
    return lambda model: perplexity(model, held_out, seq_len=128, batch_size=8, max_windows=windows).value


if __name__ == "__main__":
    main()
