"""The `gradprune` command. Heavy imports wait until a command runs, so that `--help` is quick."""

import atexit
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer
from rich.console import Console

from gradprune.checkpoint.results import claimed_results, model_name
from gradprune.config import (
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
    options_of,
    rerun_command,
)
from gradprune.config.commands import StagedCommand, takes
from gradprune.config.recovery_config import RecoveryConfig
from gradprune.errors import ConfigError, GradPruneError, counted, one_line
from gradprune.interrupts import Interrupted, interruptible
from gradprune.progress import QUIET, Clock, say
from gradprune.ranks import current, launched, speaks
from gradprune.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gradprune.evaluation.perplexity import Perplexity
    from gradprune.evaluation.tasks import TaskAccuracy
    from gradprune.models.footprint import StageName
    from gradprune.result import PruneResult
    from gradprune.vanishing.diagnosis import Diagnosis

# The base class of typer's usage errors, both in releases that depend on click and in those that bundle a copy of it.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]

# The user's text, such as a path, is never interpreted as markup.
_PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
OUT = Console(**_PLAIN)
PROGRESS = Console(stderr=True, **_PLAIN)

app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    # Use the plain help, because the boxed one cuts option names off at 80 columns.
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# The commands that can run in several processes, which share the work.
_SHARED = ("prune", "search", "diagnose", "eval")

# Options of commands that prune nothing: no second model is copied or timed.
_UNCHANGED: dict[str, Any] = {"measure_speed": False, "in_place": True}

# The section of the help that lists the option which names a command's model.
_MODEL = "Model and target"

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


@app.callback(invoke_without_command=True)
def gradprune(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print warnings and errors only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print more, such as how long each stage took.")] = False,
) -> None:
    """Gradient-based structured pruning of large language models. Options may be written with _ or -."""
    OUT.quiet = PROGRESS.quiet = quiet or not current().leads
    _log("ERROR" if not current().leads else "INFO" if verbose else "WARNING")
    if current().world > 1 and context.invoked_subcommand not in _SHARED:
        raise ConfigError(
            f"{context.invoked_subcommand or 'gradprune'}: runs in one process only; start it without torchrun "
            f"(several processes can share {', '.join(_SHARED)})"
        )
    if version:
        print(f"gradprune {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(cls=StagedCommand)
@takes(*PARTS, several={"pruning_ratio": "Several, such as 0.1,0.2,0.3, share one calibration."}, from_file=True)
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
                f"fix_gradient_vanishing: means gradient_fix 'adaptive', but '{options['gradient_fix']}' is given too; "
                "leave out one or the other"
            )
        options["gradient_fix"] = "adaptive"
    ratios = options.pop("pruning_ratio")
    config = _pruning_config({**options, "pruning_ratio": ratios[0]})
    if config.target is not None and len(ratios) > 1:
        raise ConfigError(f"pruning_ratio: several are given, and {config.target} too; leave out one or the other")
    config = _named(config, f"{config.importance_method}-{_goal(config, ratios)}")
    if len(ratios) == 1:
        _prune(config)
    else:
        _prune_ratios(config, sorted(ratios))


@app.command(cls=StagedCommand)
@takes(Model, Data, Calibration, "prior", Search, Constraints, Repair, Output, from_file=True)
def search(options: dict[str, Any]) -> None:
    """Choose the scoring by held-out loss, and prune with it."""
    config = _pruning_config({**options, "importance_method": "auto"})
    _prune(_named(config, f"search-{_goal(config, [config.pruning_ratio])}"))


def _goal(config: PruneConfig, ratios: list[float]) -> str:
    """Return the part of a run's name that says how much is pruned: its target or, without one, the ratios."""
    if config.target is None:
        return "-".join(f"{ratio:g}" for ratio in ratios)
    return f"{config.target.removeprefix('target_')}-{config.target_value}"


@app.command(cls=StagedCommand)
@takes("pruning_ratio", "output_dir")
def demo(options: dict[str, Any]) -> None:
    """Train a tiny model, prune it, show what that costs."""
    result = _prune(PruneConfig(**options, output_name="demo", overwrite=True))
    from gradprune.demo import demo_model_path

    training = json.loads((demo_model_path(QUIET) / "training.json").read_text(encoding="utf-8"))
    OUT.print(
        f"Held-out perplexity per byte: unigram {training['unigram_perplexity']:.2f}, "
        f"dense {result.before.perplexity.value:.2f}, pruned {result.after.perplexity.value:.2f}."
    )


@app.command(cls=StagedCommand)
@takes(
    *("base_model", "device", "device_map", "dtype", "trust_remote_code", "stream_layers", "stream_memory"),
    *("dataset", "seq_len", "num_samples", "batch_size", "seed"),
    *("reduction", "backend", "use_gradient_checkpointing"),
    defaults={"seq_len": 256, "num_samples": 32},
    several={"seq_len": "Several, such as 128,256,512, are compared."},
    from_file=True,
)
def diagnose(options: dict[str, Any], as_json: AsJson = False) -> None:
    """Show every layer's gradients, and whether they vanish."""
    from gradprune.report.tables import comparison_table, diagnosis_table
    from gradprune.vanishing.diagnosis import stablest

    lengths = options.pop("seq_len")
    diagnoses = _diagnoses(PruneConfig(**options, seq_len=max(lengths), **_UNCHANGED), lengths)
    if as_json:
        found = [{"seq_len": length, **diagnosis.to_dict()} for length, diagnosis in diagnoses.items()]
        _print_json(found[0] if len(found) == 1 else {"stablest": stablest(diagnoses), "lengths": found})
        return
    for length, diagnosis in diagnoses.items():
        OUT.print(diagnosis_table(diagnosis, length))
        OUT.print(diagnosis.verdict_text())
    if len(lengths) > 1:
        OUT.print(comparison_table(diagnoses))
        OUT.print(f"Most stable: {stablest(diagnoses)} tokens per sample, with the smallest ratio.")


@app.command("eval", cls=StagedCommand)
@takes(
    *("device", "device_map", "dtype", "trust_remote_code", "stream_layers", "stream_memory"),
    *("dataset", "seq_len", "batch_size", "eval_samples", "tasks", "task_questions"),
    from_file=True,
    evaluates=True,
)
def evaluate(
    options: dict[str, Any],
    model: Annotated[
        str | None, typer.Option(help="Dense or pruned checkpoint; default the demo model.", rich_help_panel=_MODEL)
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="Measure perplexity as papers do, on WikiText-2 in windows of 128 or 2048 tokens: wikitext2-128 or "
            "wikitext2-2048. dataset may then name a local file with WikiText-2's test text.",
            rich_help_panel="Data",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a checkpoint's perplexity and zero-shot accuracy."""
    # This command calls the option --model, so errors about its value must say "model".
    config = PruneConfig(
        **options, base_model=replace(OPTIONS["base_model"], name="model").accepted(model), **_UNCHANGED
    )
    measured, accuracies, parameters = _evaluated(config, protocol)
    if as_json:
        found = {"perplexity": measured.value, "tokens": measured.tokens, "parameters": parameters}
        _print_json({**found, "tasks": [asdict(each) for each in accuracies]} if accuracies else found)
        return
    OUT.print(f"perplexity {measured.value:.4f} on {measured.tokens:,} tokens; {parameters:,} parameters")
    for each in accuracies:
        OUT.print(f"{each.task}: {each.text()}")


@app.command(cls=StagedCommand)
@takes("device", "dtype", "trust_remote_code", defaults={"device": "cpu"})
def export(
    options: dict[str, Any],
    model: Annotated[
        str | None, typer.Option(help="Dense or pruned checkpoint; default the demo model.", rich_help_panel=_MODEL)
    ] = None,
    output: Annotated[str, typer.Option(help="File to write.", rich_help_panel="Output")] = "model.gguf",
    format: Annotated[
        str, typer.Option(help="File format; so far only gguf, which llama.cpp loads.", rich_help_panel="Output")
    ] = "gguf",
    outtype: Annotated[
        str, typer.Option(help="Data type of the weight matrices: f32, f16, bf16 or q8_0.", rich_help_panel="Output")
    ] = "f16",
    overwrite: Annotated[bool, typer.Option(help="Replace an existing GGUF file.", rich_help_panel="Output")] = False,
) -> None:
    """Write a checkpoint as a file that other programs load."""
    from gradprune.errors import ExportError
    from gradprune.export.gguf import check_export, export_gguf

    if format != "gguf":
        raise ExportError(f"format: '{format}' is unknown; the only format so far is gguf")
    config = PruneConfig(**options, base_model=replace(OPTIONS["base_model"], name="model").accepted(model))
    check_export(output, outtype, overwrite=overwrite, model=config.base_model)
    loaded, tokenizer = _load(config, "model", streams=False)
    export_gguf(loaded, tokenizer, output, outtype=outtype, overwrite=overwrite)
    OUT.print(f"{output}: {Path(output).stat().st_size:,} bytes", soft_wrap=True)


@app.command(cls=StagedCommand)
@takes(
    *("device", "dtype", "trust_remote_code", "dataset", "eval_dataset", "eval_samples"),
    RecoveryConfig,
    *("output_dir", "output_name", "overwrite"),
    from_file=True,
)
def recover(
    options: dict[str, Any],
    model: Annotated[str, typer.Option(help="Pruned checkpoint.", rich_help_panel=_MODEL)],
    teacher: Annotated[
        str | None,
        typer.Option(help="Dense model whose predictions are matched; required by --loss kd.", rich_help_panel=_MODEL),
    ] = None,
) -> None:
    """Train a pruned model to recover quality, and save it."""
    from gradprune.recovery.job import recover_checkpoint, state_folder

    config = RecoveryConfig(**{name: options.pop(name) for name in options_of(RecoveryConfig)})
    config.check_teacher(given=teacher is not None)
    if options["output_name"] is None:
        options["output_name"] = f"{model_name(model)}-recovered"
    places = PruneConfig(**options, base_model=model, seq_len=config.seq_len)
    reads = {"model": model, "teacher": teacher, "dataset": places.dataset, "eval_dataset": places.eval_dataset}
    state = state_folder(Path(places.output_dir, options["output_name"]))
    advice = "repeat the command to continue from its last check"
    with _advised(lambda: state, advice), claimed_results(places, reads=reads):
        loaded, tokenizer = _load(places, "model", streams=False)
        dense = None if teacher is None else _load(replace(places, base_model=teacher), "teacher", streams=False)[0]
        summary = recover_checkpoint(loaded, tokenizer, dense, config, places, console=PROGRESS)
    before, after = summary["perplexity"]["before"], summary["perplexity"]["after"]
    done = f"{summary['best_step']} of {counted(summary['steps'], 'step')}"
    OUT.print(f"perplexity {before:.4f} before, {after:.4f} after {done}")
    OUT.print(f"Model:  {places.output_dir}/{places.output_name}/model", soft_wrap=True)


@app.command(cls=StagedCommand)
@takes(
    *("base_model", "pruning_ratio", "prune_kinds", "dtype", "trust_remote_code", "stream_memory"),
    *("own_text", "num_samples", "seq_len", "batch_size", "held_out_samples", "eval_samples"),
    *("reduction", "evidence", "importance_method", "gradient_fix", "temperature", "prior"),
    *("repair", "distill_samples", "shots", "measure_speed"),
    from_file=True,
)
def plan(
    options: dict[str, Any],
    device: Annotated[
        str,
        typer.Option(
            help="Memory to fit into: a size such as 80GB, or a device of this machine, whose free memory counts: cpu, "
            "cuda, cuda:1, ...; auto takes CUDA if available.",
            rich_help_panel=_MODEL,
        ),
    ] = "auto",
    ranks: Annotated[
        int,
        typer.Option(
            help="Number of processes in the plans where several share the work, each with such a device.",
            min=2,
            rich_help_panel=_MODEL,
        ),
    ] = 2,
    as_json: AsJson = False,
) -> None:
    """Show how much memory a run would take, and what fits."""
    from gradprune.checkpoint.gguf_source import find_gguf
    from gradprune.checkpoint.load import load_shape
    from gradprune.demo import demo_model_path
    from gradprune.plan import planned, room_on
    from gradprune.report.plan import fitting_lines, plan_table

    config = _pruning_config(options)
    room = room_on(device)
    path = config.base_model or str(demo_model_path(PROGRESS))
    shape = load_shape(
        path,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        seq_len=config.seq_len,
        kinds=config.kinds,
    )
    found = planned(shape, config, room, ranks, streamable=find_gguf(path) is None)
    if as_json:
        _print_json(found.to_dict())
        return
    OUT.print(plan_table(found))
    for line in fitting_lines(found):
        say(OUT, line)


@app.command(cls=StagedCommand)
def push(
    model: Annotated[str, typer.Option(help="Checkpoint that gradprune wrote.", rich_help_panel="Model")],
    repo: Annotated[str, typer.Option(help="Repository on the hub, as user/name.", rich_help_panel="Output")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private if it is new.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Share a pruned checkpoint on the Hugging Face hub."""
    from gradprune.checkpoint.push import push_checkpoint

    OUT.print(push_checkpoint(model, repo, private=private), soft_wrap=True)


@app.command(cls=StagedCommand)
def info(
    as_json: AsJson = False,
    architectures: Annotated[
        bool, typer.Option("--architectures", help="List which causal LMs of the installed transformers can be pruned.")
    ] = False,
) -> None:
    """Show versions, devices, and which backends work here."""
    from gradprune.environment import environment
    from gradprune.models.survey import survey
    from gradprune.report.tables import architecture_table, environment_table

    if architectures:
        found = list(survey())
        if as_json:
            _print_json([asdict(support) for support in found])
        else:
            OUT.print(architecture_table(found))
        return
    if as_json:
        _print_json(environment())
    else:
        OUT.print(environment_table(environment()))


def main() -> NoReturn:
    """Run the command; on an error, print one line to standard error, exit with 2 and leave nothing half written."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # File names may contain characters that the stream's encoding lacks.
            stream.reconfigure(errors="backslashreplace")
    arguments = [_hyphenated(argument) for argument in sys.argv[1:]]
    # These flags belong to no command, so they may appear anywhere on the command line.
    flags = [argument for argument in arguments if argument in ("--quiet", "--verbose")]
    try:
        with interruptible(), launched() as ranks:
            code = app(flags + [each for each in arguments if each not in flags], standalone_mode=False) or 0
        if ranks.world > 1:
            _end_at_once(code)
        if sys.stdout is not None:
            # Flush here, because at exit it is too late to report that the output's disk is full.
            sys.stdout.flush()
        sys.exit(code)
    except GradPruneError as error:
        _fail(str(error))
    except _UsageError as error:
        _fail(_usage(error))
    except SystemExit as end:
        # Typer and rich exit like this if the reader of the output has closed the pipe.
        if isinstance(end.__context__, BrokenPipeError):
            _end_of_pipe()
        raise
    except BrokenPipeError:
        _end_of_pipe()
    except OSError as error:
        # An error without a file name may come from anywhere; writing a blank line shows whether from standard output.
        where = error.filename or ("standard output" if _refuses(sys.stdout, "\n") else None)
        _fail(one_line(error) if where is None else f"{where}: {one_line(error)}")
    except Interrupted as interrupt:
        if speaks():
            what = f"stopped by {interrupt.name}; unfinished results have been removed"
            say(Console(stderr=True), f"{what}{interrupt.advice}")
        sys.exit(interrupt.exit_code)


def _end_of_pipe() -> NoReturn:
    """Exit with the code of SIGPIPE, as programs do whose output is no longer read."""
    _drop_unwritten()
    sys.exit(128 + signal.SIGPIPE)


def _drop_unwritten() -> None:
    """Discard what a standard stream could not write, because failing again at exit would change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if _refuses(stream):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _refuses(stream: TextIO | None, text: str = "") -> bool:
    """Whether a standard stream cannot write its buffered output and `text`; False for None, a closed stream."""
    try:
        if stream is not None:
            stream.write(text)
            stream.flush()
    except OSError:
        return True
    return False


def _usage(error: Any) -> str:
    """Return the message of a usage error, including the refused value, which typer omits if pydantic refused it."""
    message = str(error.format_message()).replace(": Value error, ", ": ")
    refused: list[dict[str, Any]] = getattr(error.__cause__, "errors", list)()
    given = repr(refused[0]["input"]) if refused else ""
    return message if given in message else f"{message}, not {given}"


def _fail(message: str) -> NoReturn:
    """Exit with 2 after printing an error on one line; control characters in it, e.g. from a path, are escaped."""
    if not speaks():
        sys.exit(2)
    line = "".join(f"\\x{ord(character):02x}" if ord(character) < 32 else character for character in message)
    # The exit code reports the failure even if standard error cannot be written.
    with suppress(OSError, SystemExit):
        say(Console(stderr=True), f"error: {line}")
    _drop_unwritten()
    sys.exit(2)


class _LogLines(logging.Handler):
    """A log handler that prints gradprune's own log to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        say(Console(stderr=True), f"{record.levelname.lower()}: {record.getMessage()}")


def _log(level: str) -> None:
    logger = logging.getLogger("gradprune")
    logger.handlers = [_LogLines()]
    logger.setLevel(level)


def _end_at_once(code: int) -> NoReturn:
    """Exit a finished rank without Python's finalization, during which threads of PyTorch may abort the process."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    atexit._run_exitfuncs()
    os._exit(code)


def _hyphenated(argument: str) -> str:
    """Replace underscores in an option's name, not in its value: `--output_name=my_run` -> `--output-name=my_run`."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _named(config: PruneConfig, name: str) -> PruneConfig:
    """Return the options with `output_name` set, by default to the model's name and `name`; None on all ranks but 0."""
    if not current().leads:
        return replace(config, output_name=None)
    if config.output_name is not None:
        return config
    model = "demo" if config.base_model is None else model_name(config.base_model)
    return replace(config, output_name=f"{model}-{name}")


def _pruning_config(options: dict[str, Any]) -> PruneConfig:
    """Return the options of a command that prunes, in place unless the dense model is kept to be timed."""
    return PruneConfig(**options, in_place=not options["measure_speed"])


def _evaluated(config: PruneConfig, protocol: str | None) -> "tuple[Perplexity, tuple[TaskAccuracy, ...], int]":
    """Return a checkpoint's perplexity, its accuracy on the requested tasks and its number of parameters."""
    from gradprune.data.agreement import check_same_options
    from gradprune.evaluation.protocols import protocol_window
    from gradprune.evaluation.size import model_size
    from gradprune.evaluation.tasks import ask_tasks, read_tasks

    if protocol is not None and config.seq_len not in (OPTIONS["seq_len"].default, protocol_window(protocol)):
        raise ConfigError(
            f"seq_len: {config.seq_len} is given, but protocol '{protocol}' uses windows of "
            f"{protocol_window(protocol)} tokens; leave out one or the other"
        )
    check_same_options(current(), [config])
    current().check_same({"protocol": protocol})
    model, tokenizer = _load(config, "model", stages=("evaluation",))
    tasks = read_tasks(config.tasks.split(","), tokenizer) if config.tasks else None
    measured = _measure_perplexity(model, tokenizer, config, protocol)
    accuracies: tuple[TaskAccuracy, ...] = ()
    if tasks is not None:
        accuracies = ask_tasks(
            model, tasks, batch_size=config.batch_size, max_questions=config.task_questions, console=PROGRESS
        )
    return measured, accuracies, model_size(model).parameters


def _measure_perplexity(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", config: PruneConfig, protocol: str | None
) -> "Perplexity":
    """Measure perplexity by a protocol of the literature or, if that is None, as the options specify."""
    from gradprune.data.agreement import check_same_inputs
    from gradprune.data.sources import load_tokens
    from gradprune.data.windows import check_context
    from gradprune.evaluation.perplexity import perplexity
    from gradprune.evaluation.protocols import protocol_perplexity
    from gradprune.models.sizes import vocabulary_of

    if protocol is not None:
        return protocol_perplexity(
            model,
            tokenizer,
            protocol,
            dataset=config.dataset,
            batch_size=config.batch_size,
            max_windows=config.eval_samples,
            console=PROGRESS,
            ranks=current(),
        )
    check_context(model.config, config.seq_len)
    tokens = load_tokens(config.dataset, tokenizer, split="evaluation", vocab_size=vocabulary_of(model))
    check_same_inputs(current(), model, {"dataset": (tokens,)}, argument="model")
    return perplexity(
        model,
        tokens,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        max_windows=config.eval_samples,
        argument="dataset",
        console=PROGRESS,
        ranks=current(),
    )


def _diagnoses(config: PruneConfig, lengths: list[int]) -> "dict[int, Diagnosis]":
    """Return the diagnosis of the model's gradients for each sample length (in tokens)."""
    from gradprune.calibration.engine import ImportanceEngine
    from gradprune.calibration.gather import calibrate
    from gradprune.data.agreement import check_same_inputs, check_same_options
    from gradprune.data.sources import load_tokens
    from gradprune.data.windows import check_context, sample_windows
    from gradprune.models.sizes import vocabulary_of
    from gradprune.vanishing.diagnosis import diagnose_gradients

    check_same_options(current(), [replace(config, seq_len=length) for length in lengths])
    model, tokenizer = _load(config, stages=("calibration",))
    check_context(model.config, max(lengths))
    tokens = load_tokens(config.dataset, tokenizer, vocab_size=vocabulary_of(model))
    windows = {
        length: sample_windows(tokens, num_samples=config.num_samples, seq_len=length, seed=config.seed)
        for length in lengths
    }
    check_same_inputs(current(), model, {"dataset": windows.values()})
    diagnoses = {}
    for length in lengths:
        engine = ImportanceEngine(
            model,
            "taylor",
            config.reduction,
            config.backend,
            use_gradient_checkpointing=config.use_gradient_checkpointing,
            ranks=current(),
        )
        calibrate(engine, windows[length], config.batch_size, PROGRESS)
        diagnoses[length] = diagnose_gradients(engine.gradients())
    return diagnoses


@contextmanager
def _advised(state: Callable[[], Path | None], advice: str) -> Iterator[None]:
    """If a signal ends the body and `state()` is a file or folder that exists, add `advice` to the final message."""
    try:
        yield
    except Interrupted as interrupt:
        path = state()
        if path is not None and path.exists():
            interrupt.advice = f"; {advice}"
        raise


def _resumable(config: PruneConfig) -> AbstractContextManager[None]:
    """If a signal ends the body and the calibration's state was saved, advise in the final message to resume it."""

    def state() -> Path | None:
        from gradprune.calibration.resume import calibration_file

        return calibration_file(config) if config.checkpoint_every is not None else None

    return _advised(state, "repeat the command with --resume to continue its calibration")


def _prune(config: PruneConfig) -> "PruneResult":
    from gradprune.pipeline import prune
    from gradprune.report.folder import summarize
    from gradprune.report.tables import diagnosis_table, layer_table, search_table, search_verdict, summary_table

    with _resumable(config), claimed_results(config):
        model, tokenizer = _load(config)
        result = prune(model, tokenizer, config, console=PROGRESS, ranks=current())
    summary, gradients = summarize(result), result.gradients
    OUT.print(diagnosis_table(gradients.before, gradients.seq_len))
    OUT.print(gradients.before.verdict_text())
    if gradients.scaling is not None:
        if gradients.scaling.fix != "none":
            OUT.print(diagnosis_table(gradients.after, gradients.seq_len, scaled_by=gradients.scaling.fix))
        OUT.print(gradients.scaling_text())
    if result.search is not None:
        OUT.print(search_table(result.search))
        say(OUT, search_verdict(result.search))
        say(OUT, f"Chosen: {rerun_command(result.config)}")
    OUT.print(layer_table(summary))
    for warning in result.warnings:
        _warn(f"Warning: {warning}")
    OUT.print(summary_table(summary))
    say(OUT, f"Model:  {result.output}/model\nReport: {result.output}/report.html")
    return result


def _prune_ratios(config: PruneConfig, ratios: list[float]) -> None:
    from gradprune.pipeline import prune_ratios
    from gradprune.report.folder import summarize
    from gradprune.report.tables import curve_table

    with _resumable(config), claimed_results(config, ratios):
        model, tokenizer = _load(config)
        results = prune_ratios(model, tokenizer, config, ratios, console=PROGRESS, ranks=current())
    OUT.print(curve_table([summarize(result) for result in results]))
    for result in results:
        for warning in result.warnings:
            _warn(f"Warning, at pruning ratio {result.config.pruning_ratio:g}: {warning}")
    folder = Path(config.output_dir, str(config.output_name))
    say(OUT, f"Models: {folder}/*/model\nReport: {folder}/report.html")


def _warn(line: str) -> None:
    """Print a warning with the results or, if --quiet suppresses these, to standard error."""
    if not OUT.quiet:
        say(OUT, line)
    elif current().leads:
        say(Console(stderr=True), line)


def _load(
    config: PruneConfig,
    argument: str = "base_model",
    *,
    streams: bool = True,
    stages: "tuple[StageName, ...] | None" = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase | None]":
    """Load the model that the options name onto its device, with its tokenizer; without a name, the demo's.

    The demo's model is trained first if necessary. argument: the option that names the model, for messages. streams:
    whether its layers may be streamed. stages: the stages that the command runs; None means all those of `prune`.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    from gradprune.checkpoint.load import load_model
    from gradprune.data.sources import check_dataset
    from gradprune.demo import demo_model_path
    from gradprune.memory import memory_advice
    from gradprune.models.footprint import STAGES, Job
    from gradprune.models.placement import device_of_name

    for name in ("dataset", "eval_dataset"):
        check_dataset(getattr(config, name), name)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if config.device_map is not None and current().world > 1:
        raise ConfigError("device_map: a single process uses all the devices; start it without torchrun")
    device = config.device
    if device in ("auto", "cuda") and current().world > 1 and torch.cuda.is_available():
        device = f"cuda:{current().local}"
    place = device_of_name(device)
    path = config.base_model or current().after_lead(lambda: str(demo_model_path(PROGRESS)))
    clock = Clock(PROGRESS)
    with memory_advice(clock, config), clock.stage("loading the model"):
        return load_model(
            path,
            dtype=config.dtype,
            device=place,
            device_map=config.device_map,
            trust_remote_code=config.trust_remote_code,
            stream_layers=config.stream_layers if streams else "off",
            stream_memory=config.stream_memory,
            job=Job(config, stages or STAGES, current().world),
            argument=argument,
        )


def _print_json(content: Any) -> None:
    from gradprune.report.strict_json import json_text

    if current().leads:
        print(json_text(content))
