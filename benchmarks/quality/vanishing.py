"""What repairs of vanishing gradients bring and cost, on a deep healthy model and on one that pruning harms.

    python -m benchmarks.quality.vanishing

Both compute the same (see `deep_model`). For every repair, without and with H-GSP: the gradient ratio before and after,
what the first layer's MLP loses, and the perplexity, at one pruning ratio, from one calibration a model.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel

from benchmarks.options import parse, parser
from benchmarks.progress import Deadline, say
from benchmarks.quality.deep_model import SPLIT_LAYER, healthy_model, suffering_model
from benchmarks.results import append, record
from gradprune.calibration.gather import gather_evidence
from gradprune.config import Constraints, PruneConfig, Scoring
from gradprune.data.embedded import embedded_text
from gradprune.data.samples import draw_samples
from gradprune.data.tokenize import encode
from gradprune.demo.model import byte_tokenizer
from gradprune.evaluation.perplexity import perplexity
from gradprune.evaluation.size import model_size
from gradprune.models import describe
from gradprune.progress import QUIET
from gradprune.scoring.over_pruning import over_pruned, pruning_distribution
from gradprune.scoring.scoring import score_groups
from gradprune.scoring.selection import select
from gradprune.surgery.cut import cut
from gradprune.vanishing.diagnosis import diagnose_gradients

FIXES = ("none", "adaptive", "normalize", "depth:sqrt", "adaptive+depth:sqrt")
METHOD = "taylor_2nd"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, print, record."""
    made = parser(__doc__)
    made.add_argument("--ratio", type=float, default=0.5)
    made.add_argument("--eval_samples", type=int, default=64)
    options = parse(made, arguments)
    deadline = Deadline(options.seconds)
    tokenizer, text = byte_tokenizer(), embedded_text()
    tokens, held_out = encode(tokenizer, text.train), encode(tokenizer, text.held_out)
    say("training the deep model")
    healthy = healthy_model(tokens, len(tokenizer), tokenizer.eos_token_id, QUIET)
    print("| model | T | repair | ratio before | after | layer 0 MLP pruned | over-pruned blocks | perplexity |")
    print("|---|---|---|---|---|---|---|---|")
    for name, model in (("healthy", healthy), ("suffering", suffering_model(healthy))):
        _measure(name, model, tokens, held_out, deadline, options)


def _measure(name: str, model: PreTrainedModel, tokens, held_out, deadline: Deadline, options) -> None:
    config = PruneConfig(num_samples=32, temperature=1.0, tau=0.0, prior="removal", repair="none")
    samples = draw_samples(model, None, config, tokens, held_out)
    view, parameters = describe(model), model_size(model).parameters
    evidence = gather_evidence(model, view, samples, config)

    def quality(pruned: PreTrainedModel) -> float:
        found = perplexity(pruned, held_out, seq_len=128, batch_size=8, max_windows=options.eval_samples)
        return found.value

    dense, before = quality(model), diagnose_gradients(evidence.gradients).ratio
    print(f"| {name} | - | dense | {before:,.1f} | - | - | - | {dense:.2f} |", flush=True)
    for temperature in (0.0, 1.0):
        for fix in FIXES:
            if not deadline.allows(0.0):
                return
            table = score_groups(view, evidence, Scoring(METHOD, fix, temperature=temperature, tau=0.0))
            masks = table.masks(select(table, options.ratio, parameters, Constraints()))
            distribution = pruning_distribution(masks)
            repair = evidence.repaired(fix, len(view.layers))
            after = before if repair is None else diagnose_gradients(repair.after).ratio
            extra = {
                "ratio": options.ratio,
                "method": METHOD,
                "temperature": temperature,
                "gradient_fix": fix,
                "gradient_ratio_before": before,
                "gradient_ratio_after": after,
                "first_mlp_pruned": distribution[SPLIT_LAYER].pruned["mlp"],
                "over_pruned_blocks": len(over_pruned(distribution)),
                "perplexity": quality(cut(model, masks)),
                "perplexity_dense": dense,
            }
            provider = f"gradprune {fix} T={temperature:g}"
            found = record("vanishing", f"deep {name}", provider, f"{options.ratio:.0%}", "fp32", "cpu", extra=extra)
            append(found, options.output)
            print(
                f"| {name} | {temperature:g} | {fix} | {before:,.1f} | {after:,.1f} "
                f"| {extra['first_mlp_pruned']:.0%} | {extra['over_pruned_blocks']} | {extra['perplexity']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
