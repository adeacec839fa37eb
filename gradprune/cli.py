"""The `gradprune` command. Heavy imports wait until a command runs, so that `--help` is quick."""

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console

from gradprune.config import (
    METHODS,
    Backend,
    Dtype,
    MethodOption,
    Normalize,
    NormalizePer,
    Prior,
    PruneConfig,
    Reduction,
    Repair,
)
from gradprune.errors import ConfigError, GradPruneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gradprune.result import PruneResult
    from gradprune.vanishing.diagnosis import Diagnosis

# typer's usage errors share this base, in releases that depend on click as in those that carry their own.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]

_Number = TypeVar("_Number", int, float)

DEFAULT = PruneConfig()
OUT = Console()
PROGRESS = Console(stderr=True)

app = typer.Typer(
    help="Gradient-based structured pruning of large language models. Options may be written with _ or -.",
    context_settings={"help_option_names": ["-h", "--help"]},
    # The plain help: at 80 columns the boxed one cuts option names off.
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

BaseModel = Annotated[str | None, typer.Option(help="Model folder or hub id; without it, the embedded demo model.")]
Dataset = Annotated[
    str | None,
    typer.Option(help=".txt, .jsonl or .npy file, or wikitext2 | ptb | c4; without it, the embedded text."),
]
SeqLen = Annotated[int, typer.Option(help="Tokens a sample.")]
BatchSize = Annotated[int, typer.Option(help="Samples a forward pass.")]
NumSamples = Annotated[int, typer.Option(help="Calibration samples.")]
Seed = Annotated[int, typer.Option(help="Seed of the calibration sampling.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes CUDA where there is one.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Type of the weights; auto keeps the checkpoint's.")]
Checkpointing = Annotated[bool, typer.Option(help="Recompute activations: less memory, more time.")]
TrustRemoteCode = Annotated[bool, typer.Option(help="Run the checkpoint's own code. Off unless asked for.")]
BackendOption = Annotated[Backend, typer.Option(help="Who computes the importance.")]
ReductionOption = Annotated[Reduction, typer.Option(help="Exact per sample, or the cheaper per-batch variant.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


@app.command()
def prune(
    base_model: BaseModel = None,
    pruning_ratio: Annotated[
        str, typer.Option(help="Fraction of the parameters to remove; several as 0.1,0.2,0.3 from one calibration.")
    ] = f"{DEFAULT.pruning_ratio:g}",
    importance_method: Annotated[
        MethodOption,
        typer.Option(metavar="METHOD", help=f"How groups are scored: {', '.join(METHODS)}, or auto, which searches."),
    ] = DEFAULT.importance_method,
    reduction: ReductionOption = DEFAULT.reduction,
    backend: BackendOption = DEFAULT.backend,
    temperature: Annotated[float, typer.Option(help="H-GSP temperature T; 0 is off.")] = DEFAULT.temperature,
    tau: Annotated[float | None, typer.Option(help="H-GSP gate; default the 25th percentile.")] = DEFAULT.tau,
    epsilon: Annotated[float, typer.Option(help="Drop layers that keep less than this.")] = DEFAULT.epsilon,
    prior: Annotated[Prior, typer.Option(help="What H-GSP weighs blocks by.")] = DEFAULT.prior,
    prior_samples: Annotated[int, typer.Option(help="Samples the priors are measured on.")] = DEFAULT.prior_samples,
    fix_gradient_vanishing: Annotated[bool, typer.Option(help="Short for --gradient_fix adaptive.")] = False,
    gradient_fix: Annotated[
        str,
        typer.Option(
            help="none, adaptive, normalize, depth:linear, depth:sqrt, depth:log, a chain such as "
            "adaptive+depth:sqrt, or auto, which follows the diagnosis."
        ),
    ] = DEFAULT.gradient_fix,
    normalize_scores: Annotated[Normalize, typer.Option(help="Make layers comparable.")] = DEFAULT.normalize_scores,
    normalize_per: Annotated[NormalizePer, typer.Option(help="Within what.")] = DEFAULT.normalize_per,
    clip_percentile: Annotated[float, typer.Option(help="Clip scores there first.")] = DEFAULT.clip_percentile,
    attention_factor: Annotated[float, typer.Option(help="Times the scores of KV groups.")] = DEFAULT.attention_factor,
    collect_batches: Annotated[int, typer.Option(help="Batches in the gradient plots.")] = DEFAULT.collect_batches,
    repair: Annotated[Repair, typer.Option(help="Re-solve the weights that stay.")] = DEFAULT.repair,
    held_out_samples: Annotated[int, typer.Option(help="Samples it chooses on.")] = DEFAULT.held_out_samples,
    scores: Annotated[str | None, typer.Option(help="scores.safetensors of an earlier run: no calibration.")] = None,
    search_minutes: Annotated[float, typer.Option(help="Time for auto.")] = DEFAULT.search_minutes,
    freeze_first_n_layers: Annotated[int, typer.Option(help="Leave these whole.")] = DEFAULT.freeze_first_n_layers,
    freeze_last_n_layers: Annotated[int, typer.Option(help="Leave these whole.")] = DEFAULT.freeze_last_n_layers,
    max_layer_ratio: Annotated[float, typer.Option(help="Most that one layer may lose.")] = DEFAULT.max_layer_ratio,
    round_to: Annotated[int, typer.Option(help="MLP widths are a multiple of this.")] = DEFAULT.round_to,
    uniform: Annotated[bool, typer.Option(help="Same widths in all layers: a plain checkpoint.")] = DEFAULT.uniform,
    dataset: Dataset = None,
    eval_dataset: Annotated[str | None, typer.Option(help="Held-out text; default the end of --dataset.")] = None,
    num_samples: NumSamples = DEFAULT.num_samples,
    seq_len: SeqLen = DEFAULT.seq_len,
    batch_size: BatchSize = DEFAULT.batch_size,
    eval_samples: Annotated[int | None, typer.Option(help="Windows for perplexity; default all.")] = None,
    seed: Seed = DEFAULT.seed,
    use_gradient_checkpointing: Checkpointing = DEFAULT.use_gradient_checkpointing,
    measure_speed: Annotated[bool, typer.Option(help="Time dense against pruned; needs both in memory.")] = True,
    device: Device = DEFAULT.device,
    dtype: DtypeOption = DEFAULT.dtype,
    trust_remote_code: TrustRemoteCode = False,
    output_dir: Annotated[str, typer.Option(help="Where results folders go.")] = DEFAULT.output_dir,
    output_name: Annotated[str | None, typer.Option(help="Results folder; default names model and method.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing results folder.")] = False,
) -> None:
    """Prune a model; write a smaller checkpoint and a report."""
    options = dict(locals())
    if options.pop("fix_gradient_vanishing"):
        if gradient_fix not in ("none", "adaptive"):
            raise ConfigError(
                f"fix_gradient_vanishing: means gradient_fix 'adaptive', but '{gradient_fix}' is given too"
            )
        options["gradient_fix"] = "adaptive"
    ratios = _numbers("pruning_ratio", pruning_ratio, float)
    model_name = Path(base_model).name if base_model else "demo"
    options["pruning_ratio"] = ratios[0]
    options["output_name"] = output_name or f"{model_name}-{importance_method}-{'-'.join(f'{r:g}' for r in ratios)}"
    if len(ratios) == 1:
        _prune(PruneConfig(**options))
    else:
        _prune_ratios(PruneConfig(**options), sorted(ratios))


@app.command()
def search(
    base_model: BaseModel = None,
    pruning_ratio: Annotated[float, typer.Option(help="Fraction of the parameters to remove.")] = DEFAULT.pruning_ratio,
    search_minutes: Annotated[
        float, typer.Option(help="Stop after; decide with what was seen.")
    ] = DEFAULT.search_minutes,
    scores: Annotated[str | None, typer.Option(help="scores.safetensors of an earlier run: no calibration.")] = None,
    repair: Annotated[Repair, typer.Option(help="Re-solve the weights that stay.")] = DEFAULT.repair,
    dataset: Dataset = None,
    eval_dataset: Annotated[str | None, typer.Option(help="Held-out text; default the end of --dataset.")] = None,
    num_samples: NumSamples = DEFAULT.num_samples,
    held_out_samples: Annotated[int, typer.Option(help="Samples it chooses on.")] = DEFAULT.held_out_samples,
    seq_len: SeqLen = DEFAULT.seq_len,
    batch_size: BatchSize = DEFAULT.batch_size,
    eval_samples: Annotated[int | None, typer.Option(help="Windows for perplexity; default all.")] = None,
    seed: Seed = DEFAULT.seed,
    backend: BackendOption = DEFAULT.backend,
    use_gradient_checkpointing: Checkpointing = DEFAULT.use_gradient_checkpointing,
    device: Device = DEFAULT.device,
    dtype: DtypeOption = DEFAULT.dtype,
    trust_remote_code: TrustRemoteCode = False,
    output_dir: Annotated[str, typer.Option(help="Where results folders go.")] = DEFAULT.output_dir,
    output_name: Annotated[str | None, typer.Option(help="Results folder; default names model and ratio.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing results folder.")] = False,
) -> None:
    """Find the scoring with the least held-out loss, and prune with it."""
    options = dict(locals())
    model_name = Path(base_model).name if base_model else "demo"
    options["output_name"] = output_name or f"{model_name}-search-{pruning_ratio:g}"
    _prune(PruneConfig(importance_method="auto", **options))


@app.command()
def demo(
    pruning_ratio: Annotated[float, typer.Option(help="Fraction of the parameters to remove.")] = 0.2,
    output_dir: Annotated[str, typer.Option(help="Where the results folder goes.")] = DEFAULT.output_dir,
) -> None:
    """Train a tiny model, prune it, show what that costs."""
    result = _prune(PruneConfig(pruning_ratio=pruning_ratio, output_dir=output_dir, output_name="demo", overwrite=True))
    from gradprune.demo import demo_model_path

    training = json.loads((demo_model_path(quiet=True) / "training.json").read_text(encoding="utf-8"))
    OUT.print(
        f"Held-out perplexity per byte: unigram {training['unigram_perplexity']:.2f}, "
        f"dense {result.before.perplexity.value:.2f}, pruned {result.after.perplexity.value:.2f}."
    )


@app.command()
def diagnose(
    base_model: BaseModel = None,
    dataset: Dataset = None,
    seq_len: Annotated[str, typer.Option(help="Tokens a sample; several to compare, as 128,256,512.")] = "256",
    num_samples: NumSamples = 32,
    batch_size: BatchSize = DEFAULT.batch_size,
    seed: Seed = DEFAULT.seed,
    reduction: ReductionOption = DEFAULT.reduction,
    backend: BackendOption = DEFAULT.backend,
    use_gradient_checkpointing: Checkpointing = False,
    device: Device = DEFAULT.device,
    dtype: DtypeOption = DEFAULT.dtype,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Show every layer's gradients, and whether they vanish."""
    from gradprune.report.tables import comparison_table, diagnosis_table
    from gradprune.vanishing.diagnosis import stablest

    lengths = _numbers("seq_len", seq_len, int)
    PruneConfig(seq_len=min(lengths), num_samples=num_samples, batch_size=batch_size, seed=seed)
    model, tokenizer = _load(base_model, device, dtype, trust_remote_code)
    diagnoses = _diagnoses(
        model,
        tokenizer,
        lengths,
        dataset,
        num_samples,
        batch_size,
        seed,
        reduction,
        backend,
        use_gradient_checkpointing,
    )
    if as_json:
        found = [{"seq_len": length, **diagnosis.to_dict()} for length, diagnosis in diagnoses.items()]
        _print_json(found[0] if len(found) == 1 else {"stablest": stablest(diagnoses), "lengths": found})
        return
    for length, diagnosis in diagnoses.items():
        OUT.print(diagnosis_table(diagnosis, length))
        OUT.print(diagnosis.verdict_text())
    if len(lengths) > 1:
        OUT.print(comparison_table(diagnoses))
        OUT.print(f"Stablest: {stablest(diagnoses)} tokens a sample, the smallest ratio.")


@app.command("eval")
def evaluate(
    model: Annotated[str | None, typer.Option(help="Dense or pruned checkpoint; default the demo model.")] = None,
    dataset: Dataset = None,
    seq_len: SeqLen = DEFAULT.seq_len,
    batch_size: BatchSize = DEFAULT.batch_size,
    eval_samples: Annotated[int | None, typer.Option(help="Windows for perplexity; default all.")] = None,
    device: Device = DEFAULT.device,
    dtype: DtypeOption = DEFAULT.dtype,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure a checkpoint's perplexity on held-out text."""
    from gradprune.data.sources import load_tokens
    from gradprune.data.windows import check_context
    from gradprune.evaluation.perplexity import perplexity
    from gradprune.evaluation.size import model_size

    PruneConfig(seq_len=seq_len, batch_size=batch_size, eval_samples=eval_samples)
    loaded, tokenizer = _load(model, device, dtype, trust_remote_code)
    check_context(loaded.config, seq_len)
    tokens = load_tokens(dataset, tokenizer, split="evaluation", vocab_size=loaded.config.vocab_size)
    measured = perplexity(
        loaded, tokens, seq_len=seq_len, batch_size=batch_size, max_windows=eval_samples, console=PROGRESS
    )
    parameters = model_size(loaded).parameters
    if as_json:
        _print_json({"perplexity": measured.value, "tokens": measured.tokens, "parameters": parameters})
    else:
        OUT.print(f"perplexity {measured.value:.4f} on {measured.tokens:,} tokens; {parameters:,} parameters")


@app.command()
def info(as_json: AsJson = False) -> None:
    """Show versions, devices, and which backends work here."""
    from gradprune.environment import environment
    from gradprune.report.tables import environment_table

    if as_json:
        _print_json(environment())
    else:
        OUT.print(environment_table(environment()))


def main() -> NoReturn:
    """Run the command; errors are one line on standard error, with exit code 2, and leave nothing half written."""
    # A terminated run unwinds like an interrupted one, so that its temporary folder goes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(app([_dashed(argument) for argument in sys.argv[1:]], standalone_mode=False) or 0)
    except GradPruneError as error:
        message = str(error)
    except _UsageError as error:
        message = error.format_message()  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        PROGRESS.print("interrupted; nothing was written")
        sys.exit(130)
    Console(stderr=True, soft_wrap=True).print(f"error: {message}", markup=False, highlight=False)
    sys.exit(2)


def _dashed(argument: str) -> str:
    """`--pruning_ratio=0.2` as `--pruning-ratio=0.2`; values stay as they are."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _numbers(option: str, text: str, kind: type[_Number]) -> list[_Number]:
    """The numbers of a comma-separated list, each once."""
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{option}: '{text}' is not {what}, nor several separated by commas") from None


def _diagnoses(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    lengths: list[int],
    dataset: str | None,
    num_samples: int,
    batch_size: int,
    seed: int,
    reduction: Reduction,
    backend: Backend,
    use_gradient_checkpointing: bool,
) -> "dict[int, Diagnosis]":
    """The model's diagnosis at each length."""
    from gradprune.calibration.engine import ImportanceEngine
    from gradprune.calibration.gather import calibrate
    from gradprune.data.sources import load_tokens
    from gradprune.data.windows import check_context, sample_windows
    from gradprune.vanishing.diagnosis import diagnose_gradients

    check_context(model.config, max(lengths))
    tokens = load_tokens(dataset, tokenizer, vocab_size=model.config.vocab_size)
    windows = {length: sample_windows(tokens, num_samples=num_samples, seq_len=length, seed=seed) for length in lengths}
    diagnoses = {}
    for length in lengths:
        engine = ImportanceEngine(model, "taylor", reduction, backend, use_gradient_checkpointing)
        calibrate(engine, windows[length], batch_size, PROGRESS)
        diagnoses[length] = diagnose_gradients(engine.gradients())
    return diagnoses


def _prune(config: PruneConfig) -> "PruneResult":
    from gradprune.config import command_line
    from gradprune.pipeline import prune
    from gradprune.report.folder import summarize
    from gradprune.report.tables import diagnosis_table, layer_table, search_table, summary_table

    model, tokenizer = _load_free(config)
    result = prune(model, tokenizer, config, console=PROGRESS)
    summary, gradients = summarize(result), result.gradients
    OUT.print(diagnosis_table(gradients.before, gradients.seq_len))
    OUT.print(gradients.before.verdict_text())
    if gradients.repair is not None:
        if gradients.repair.fix != "none":
            OUT.print(diagnosis_table(gradients.after, gradients.seq_len, repaired=gradients.repair.fix))
        OUT.print(gradients.repair_text())
    if result.search is not None:
        OUT.print(search_table(result.search))
        OUT.print(f"Chosen: {command_line(result.config)}", soft_wrap=True)
    OUT.print(layer_table(summary))
    if result.warning:
        OUT.print(f"Warning: {result.warning}")
    OUT.print(summary_table(summary))
    OUT.print(f"Model:  {result.output}/model\nReport: {result.output}/report.html", soft_wrap=True)
    return result


def _prune_ratios(config: PruneConfig, ratios: list[float]) -> None:
    from gradprune.pipeline import prune_ratios
    from gradprune.report.folder import summarize
    from gradprune.report.tables import curve_table

    for ratio in ratios:
        replace(config, pruning_ratio=ratio)  # refuses one out of range before anything is loaded
    model, tokenizer = _load_free(config)
    results = prune_ratios(model, tokenizer, config, ratios, console=PROGRESS)
    OUT.print(curve_table([summarize(result) for result in results]))
    for result in results:
        if result.warning:
            OUT.print(f"Warning, at {result.config.pruning_ratio:g}: {result.warning}")
    OUT.print(f"Models: {results[0].output.parent}/*/model", soft_wrap=True)  # type: ignore[union-attr]
    OUT.print(f"Report: {results[0].output.parent}/report.html", soft_wrap=True)  # type: ignore[union-attr]


def _load_free(config: PruneConfig) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase | None]":
    """Load the model of a run whose results folder may be written."""
    from gradprune.checkpoint.atomic import check_free

    assert config.output_name is not None
    check_free(Path(config.output_dir) / config.output_name, overwrite=config.overwrite, argument="output_name")
    return _load(config.base_model, config.device, config.dtype, config.trust_remote_code)


def _load(
    base_model: str | None, device: str, dtype: Dtype, trust_remote_code: bool
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase | None]":
    import torch
    from transformers.utils import logging

    from gradprune.checkpoint.load import load_model
    from gradprune.demo import demo_model_path

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: '{device}' does not work here: {str(error).splitlines()[0]}") from error
    path = base_model or str(demo_model_path(PROGRESS))
    return load_model(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


def _print_json(content: Any) -> None:
    from gradprune.report.strict_json import json_text

    print(json_text(content))
