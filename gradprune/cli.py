"""The `gradprune` command. Heavy imports wait until a command runs, so that `--help` is quick."""

import json
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from gradprune.config import (
    OLDER_NAMES,
    OPTIONS,
    PARTS,
    Calibration,
    Constraints,
    Data,
    Model,
    Output,
    PruneConfig,
    Repair,
    Search,
    command_line,
)
from gradprune.config.commands import StagedCommand, takes
from gradprune.errors import ConfigError, GradPruneError
from gradprune.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gradprune.evaluation.perplexity import Perplexity
    from gradprune.result import PruneResult
    from gradprune.vanishing.diagnosis import Diagnosis

# typer's usage errors share this base, in releases that depend on click as in those that carry their own.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]

OUT = Console()
PROGRESS = Console(stderr=True)

app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    # The plain help: at 80 columns the boxed one cuts option names off.
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


@app.callback(invoke_without_command=True)
def gradprune(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False
) -> None:
    """Gradient-based structured pruning of large language models. Options may be written with _ or -."""
    if version:
        print(f"gradprune {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(cls=StagedCommand)
@takes(*PARTS, several={"pruning_ratio": "Several, as 0.1,0.2,0.3, are pruned from one calibration."})
def prune(
    options: dict[str, Any],
    fix_gradient_vanishing: Annotated[
        bool,
        typer.Option(help="Short for --gradient_fix adaptive.", rich_help_panel="Scoring"),
    ] = False,
) -> None:
    """Prune a model; write a smaller checkpoint and a report."""
    if fix_gradient_vanishing:
        if options["gradient_fix"] not in ("none", "adaptive"):
            raise ConfigError(
                f"fix_gradient_vanishing: means gradient_fix 'adaptive', but '{options['gradient_fix']}' is given too"
            )
        options["gradient_fix"] = "adaptive"
    ratios = options.pop("pruning_ratio")
    name = f"{options['importance_method']}-{'-'.join(f'{ratio:g}' for ratio in ratios)}"
    config = _config({**options, "pruning_ratio": ratios[0]}, name)
    if len(ratios) == 1:
        _prune(config)
    else:
        _prune_ratios(config, sorted(ratios))


@app.command(cls=StagedCommand)
@takes(Model, Data, Calibration, "prior", Search, Constraints, Repair, Output)
def search(options: dict[str, Any]) -> None:
    """Choose the scoring by held-out loss, and prune with it."""
    _prune(_config({**options, "importance_method": "auto"}, f"search-{options['pruning_ratio']:g}"))


@app.command(cls=StagedCommand)
@takes("pruning_ratio", "output_dir")
def demo(options: dict[str, Any]) -> None:
    """Train a tiny model, prune it, show what that costs."""
    result = _prune(PruneConfig(**options, output_name="demo", overwrite=True))
    from gradprune.demo import demo_model_path

    training = json.loads((demo_model_path(quiet=True) / "training.json").read_text(encoding="utf-8"))
    OUT.print(
        f"Held-out perplexity per byte: unigram {training['unigram_perplexity']:.2f}, "
        f"dense {result.before.perplexity.value:.2f}, pruned {result.after.perplexity.value:.2f}."
    )


@app.command(cls=StagedCommand)
@takes(
    *("base_model", "device", "dtype", "trust_remote_code"),
    *("dataset", "seq_len", "num_samples", "batch_size", "seed"),
    *("reduction", "backend", "use_gradient_checkpointing"),
    defaults={"seq_len": 256, "num_samples": 32},
    several={"seq_len": "Several, as 128,256,512, are compared."},
)
def diagnose(options: dict[str, Any], as_json: AsJson = False) -> None:
    """Show every layer's gradients, and whether they vanish."""
    from gradprune.report.tables import comparison_table, diagnosis_table
    from gradprune.vanishing.diagnosis import stablest

    lengths = options.pop("seq_len")
    diagnoses = _diagnoses(PruneConfig(**options, seq_len=max(lengths)), lengths)
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


@app.command("eval", cls=StagedCommand)
@takes(
    *("device", "dtype", "trust_remote_code"),
    *("dataset", "seq_len", "batch_size", "eval_samples", "tasks", "task_questions"),
)
def evaluate(
    options: dict[str, Any],
    model: Annotated[
        str | None, typer.Option(help="Dense or pruned checkpoint; default the demo model.", rich_help_panel="Model")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="Perplexity as papers do: wikitext2-128 or wikitext2-2048; dataset may be its text.",
            rich_help_panel="Data",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a checkpoint's perplexity and zero-shot accuracy."""
    from gradprune.evaluation.size import model_size
    from gradprune.evaluation.tasks import check_tasks, evaluate_tasks

    # Here the option has another name, by which an error is to call it.
    config = PruneConfig(**options, base_model=replace(OPTIONS["base_model"], name="model").accepted(model))
    loaded, tokenizer = _load(config)
    tasks = config.tasks.split(",") if config.tasks else []
    if tasks:
        check_tasks(tasks, tokenizer)
    measured = _measure_perplexity(loaded, tokenizer, config, protocol)
    accuracies = (
        evaluate_tasks(
            loaded,
            tokenizer,
            tasks,
            batch_size=config.batch_size,
            max_questions=config.task_questions,
            console=PROGRESS,
        )
        if tasks
        else ()
    )
    parameters = model_size(loaded).parameters
    if as_json:
        found = {"perplexity": measured.value, "tokens": measured.tokens, "parameters": parameters}
        _print_json({**found, "tasks": [asdict(each) for each in accuracies]} if tasks else found)
        return
    OUT.print(f"perplexity {measured.value:.4f} on {measured.tokens:,} tokens; {parameters:,} parameters")
    for each in accuracies:
        OUT.print(f"{each.task}: {each.text()}")


@app.command(cls=StagedCommand)
@takes("device", "dtype", "trust_remote_code", "overwrite", defaults={"device": "cpu"})
def export(
    options: dict[str, Any],
    model: Annotated[
        str | None, typer.Option(help="Dense or pruned checkpoint; default the demo model.", rich_help_panel="Model")
    ] = None,
    output: Annotated[str, typer.Option(help="File to write.", rich_help_panel="Output")] = "model.gguf",
    format: Annotated[str, typer.Option(help="Only gguf so far: llama.cpp's.", rich_help_panel="Output")] = "gguf",
    outtype: Annotated[
        str, typer.Option(help="Type of the matrices: f32, f16, bf16 or q8_0.", rich_help_panel="Output")
    ] = "f16",
) -> None:
    """Write a checkpoint as a file that other programs load."""
    from gradprune.errors import ExportError
    from gradprune.export.gguf import export_gguf

    if format != "gguf":
        raise ExportError(f"format: '{format}' is unknown; it can be gguf")
    config = PruneConfig(**options, base_model=replace(OPTIONS["base_model"], name="model").accepted(model))
    loaded, tokenizer = _load(config)
    export_gguf(loaded, tokenizer, output, outtype=outtype, overwrite=config.overwrite)
    OUT.print(f"{output}: {Path(output).stat().st_size:,} bytes", soft_wrap=True)


@app.command(cls=StagedCommand)
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
        sys.exit(app([_today(argument) for argument in sys.argv[1:]], standalone_mode=False) or 0)
    except GradPruneError as error:
        message = str(error)
    except _UsageError as error:
        message = error.format_message()  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        PROGRESS.print("interrupted; nothing was written")
        sys.exit(130)
    Console(stderr=True, soft_wrap=True).print(f"error: {message}", markup=False, highlight=False)
    sys.exit(2)


def _today(argument: str) -> str:
    """`--pruning_ratio=0.2` as `--pruning-ratio=0.2`, and older names as today's; values stay as they are."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    name = name[2:].replace("-", "_")
    return "--" + OLDER_NAMES.get(name, name).replace("_", "-") + equals + value


def _config(options: dict[str, Any], name: str) -> PruneConfig:
    """The configuration of a run; without an output name the results folder is named after the model, and `name`."""
    if options["output_name"] is None:
        base_model = options["base_model"]
        options["output_name"] = f"{'demo' if base_model is None else Path(base_model).absolute().name}-{name}"
    # Nobody needs the dense model any more, unless it is timed.
    return PruneConfig(**options, in_place=not options["measure_speed"])


def _measure_perplexity(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", config: PruneConfig, protocol: str | None
) -> "Perplexity":
    """By a protocol of the literature, or on the windows that the options say."""
    from gradprune.data.sources import load_tokens
    from gradprune.data.windows import check_context
    from gradprune.evaluation.perplexity import perplexity
    from gradprune.evaluation.protocols import protocol_perplexity

    if protocol is not None:
        return protocol_perplexity(
            model, tokenizer, protocol, dataset=config.dataset, batch_size=config.batch_size, console=PROGRESS
        )
    check_context(model.config, config.seq_len)
    tokens = load_tokens(config.dataset, tokenizer, split="evaluation", vocab_size=model.config.vocab_size)
    return perplexity(
        model,
        tokens,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        max_windows=config.eval_samples,
        console=PROGRESS,
    )


def _diagnoses(config: PruneConfig, lengths: list[int]) -> "dict[int, Diagnosis]":
    """The model's diagnosis at each length, in tokens."""
    from gradprune.calibration.engine import ImportanceEngine
    from gradprune.calibration.gather import calibrate
    from gradprune.data.sources import load_tokens
    from gradprune.data.windows import check_context, sample_windows
    from gradprune.vanishing.diagnosis import diagnose_gradients

    model, tokenizer = _load(config)
    check_context(model.config, max(lengths))
    tokens = load_tokens(config.dataset, tokenizer, vocab_size=model.config.vocab_size)
    windows = {
        length: sample_windows(tokens, num_samples=config.num_samples, seq_len=length, seed=config.seed)
        for length in lengths
    }
    diagnoses = {}
    for length in lengths:
        engine = ImportanceEngine(model, "taylor", config.reduction, config.backend, config.use_gradient_checkpointing)
        calibrate(engine, windows[length], config.batch_size, PROGRESS)
        diagnoses[length] = diagnose_gradients(engine.gradients())
    return diagnoses


def _prune(config: PruneConfig) -> "PruneResult":
    from gradprune.pipeline import prune
    from gradprune.report.folder import summarize
    from gradprune.report.tables import diagnosis_table, layer_table, search_table, summary_table

    model, tokenizer = _load_free(config)
    result = prune(model, tokenizer, config, console=PROGRESS)
    summary, gradients = summarize(result), result.gradients
    OUT.print(diagnosis_table(gradients.before, gradients.seq_len))
    OUT.print(gradients.before.verdict_text())
    if gradients.scaling is not None:
        if gradients.scaling.fix != "none":
            OUT.print(diagnosis_table(gradients.after, gradients.seq_len, scaled_by=gradients.scaling.fix))
        OUT.print(gradients.scaling_text())
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
    return _load(config)


def _load(config: PruneConfig) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase | None]":
    """The model on its device, and its tokenizer; the demo's, which is trained if need be, where none is named."""
    import torch
    from transformers.utils import logging

    from gradprune.checkpoint.load import load_model
    from gradprune.demo import demo_model_path

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: '{device}' does not work here: {str(error).splitlines()[0]}") from error
    path = str(demo_model_path(PROGRESS)) if config.base_model is None else config.base_model
    return load_model(path, dtype=config.dtype, device=device, trust_remote_code=config.trust_remote_code)


def _print_json(content: Any) -> None:
    from gradprune.report.strict_json import json_text

    print(json_text(content))
