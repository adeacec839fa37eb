"""Tables for the terminal, and the verdict of a search in words."""

import math
from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from gradprune.config import Scoring
from gradprune.models.survey import Support, cells
from gradprune.report.rows import curve_header, curve_rows, layer_header, layer_rows, summary_rows
from gradprune.search import SearchResult, Trial
from gradprune.vanishing.diagnosis import Diagnosis

# The number of the deciding round's trials that are shown, best first.
_SEARCH_ROWS = 15


def summary_table(summary: dict[str, Any]) -> Table:
    """Tabulate the dense and the pruned model side by side."""
    table = Table(title="Dense and pruned", title_justify="left")
    for column in ("", "dense", "pruned", "pruned / dense"):
        table.add_column(column, justify="left" if not column else "right")
    for row in summary_rows(summary):
        table.add_row(*row)
    return table


def layer_table(summary: dict[str, Any]) -> Table:
    """Tabulate what each layer keeps."""
    table = Table(title="Kept per layer", title_justify="left")
    for column in layer_header(summary):
        table.add_column("" if column == "kept" else column, justify="right")
    for row in layer_rows(summary):
        table.add_row(*row)
    return table


def curve_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """Tabulate perplexity, size, accuracy and speed at several pruning ratios."""
    table = Table(title="Perplexity against size", title_justify="left")
    for column in curve_header(summaries):
        table.add_column(column, justify="right")
    for row in curve_rows(summaries):
        table.add_row(*row)
    return table


def diagnosis_table(diagnosis: Diagnosis, seq_len: int, *, scaled_by: str | None = None) -> Table:
    """Tabulate the layers' gradients; `scaled_by` names the fix if these are the gradients after scaling."""
    after = f" after '{scaled_by}'" if scaled_by else ""
    table = Table(title=f"Gradients at {seq_len} tokens per sample{after}", title_justify="left")
    for column in ("layer", "grad_mean", "grad_std", "norm", "largest / this", ""):
        table.add_column(column, justify="right")
    largest = max(layer.mean for layer in diagnosis.layers)
    for layer in diagnosis.layers:
        ratio = largest / layer.mean if layer.mean > 0.0 else math.inf
        numbers = f"{layer.mean:.3e}", f"{layer.std:.3e}", f"{layer.norm:.3e}", f"{ratio:.1f}"
        table.add_row(str(layer.layer), *numbers, diagnosis.mark(layer))
    return table


def comparison_table(diagnoses: dict[int, Diagnosis]) -> Table:
    """Tabulate the layers' mean |g|, one column per sequence length; the last rows are ratio and verdict."""
    table = Table(title="grad_mean by tokens per sample", title_justify="left")
    table.add_column("layer", justify="right")
    for seq_len in diagnoses:
        table.add_column(str(seq_len), justify="right")
    for rows in zip(*(diagnosis.layers for diagnosis in diagnoses.values()), strict=True):
        table.add_row(str(rows[0].layer), *(f"{layer.mean:.3e}" for layer in rows))
    table.add_section()
    table.add_row("ratio", *(f"{diagnosis.ratio:.1f}" for diagnosis in diagnoses.values()))
    table.add_row("verdict", *(diagnosis.verdict for diagnosis in diagnoses.values()))
    return table


def search_table(result: SearchResult) -> Table:
    """Tabulate the deciding round; "(fixed)" marks the fixed settings: each method with and without plain H-GSP."""
    table = Table(title=f"Search: best of {result.candidates} selections", title_justify="left")
    for column in ("rank", "held-out loss", "vs. default", "std. error", "samples", "setting"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for rank, trial in enumerate(result.deciding[:_SEARCH_ROWS], start=1):
        mark = " (fixed)" if trial.fixed else ""
        figures = (f"{trial.loss:.4f}", f"{trial.difference:+.4f}", f"{trial.error:.4f}", str(trial.samples))
        table.add_row(str(rank), *figures, describe_scoring(trial.scoring) + mark)
    return table


def search_verdict(result: SearchResult) -> str:
    """Explain in one or two sentences why a setting was chosen, and how certain that is."""
    late = " Time ran out before the last round ended: allow more --search_minutes." if result.cut_short else ""
    return _reason(result) + late


def _reason(result: SearchResult) -> str:
    default, winner = describe_scoring(result.default.scoring), result.winner
    needed = f"{result.threshold:.1f} are needed for the best of {result.candidates}"
    if winner != result.default:
        return (
            f"{describe_scoring(winner.scoring)} is better than the default ({default}) by {-winner.difference:.4f} "
            f"nats per token, {_in_standard_errors(winner)} ({needed})."
        )
    if result.cut_short and not result.decides:
        return f"The default ({default}) stays: no other setting was repaired in time."
    best = result.best_other
    if best is None or best.difference >= 0.0:
        return f"The default ({default}) stays: no other setting is better."
    return (
        f"The default ({default}) stays: {describe_scoring(best.scoring)} is better by only {-best.difference:.4f} "
        f"nats per token, {_in_standard_errors(best)} ({needed})."
    )


def _in_standard_errors(trial: Trial) -> str:
    """Express the difference between a trial and the default in standard errors."""
    if trial.error == 0.0:
        return f"the same in each of {trial.samples} samples"
    return f"{abs(trial.difference) / trial.error:.1f} standard errors over {trial.samples} samples"


def describe_scoring(scoring: Scoring) -> str:
    """Describe a setting briefly: the method, and every option whose effect differs from the default's."""
    parts: list[str] = [scoring.method]
    if scoring.temperature > 0.0:
        tau = "25th percentile" if scoring.tau is None else f"{scoring.tau:g}"
        prior = "" if scoring.prior == Scoring.prior else f" prior={scoring.prior}"
        parts.append(f"T={scoring.temperature:g} tau={tau}{prior}")
    if scoring.gradient_fix != "none":
        parts.append(scoring.gradient_fix)
    compared: list[str] = [scoring.normalize_scores] if scoring.normalize_scores != "none" else []
    if scoring.clip_percentile != 100.0:
        compared.append(f"clipped at {scoring.clip_percentile:g} %")
    if compared and scoring.normalize_per != "layer":
        compared[-1] += f" per {scoring.normalize_per}"
    parts += compared
    if scoring.attention_factor != 1.0:
        parts.append(f"attention x{scoring.attention_factor:g}")
    return ", ".join(parts)


def architecture_table(found: Sequence[Support]) -> Table:
    """Tabulate which architectures can be pruned."""
    table = Table(title="Causal LMs of the installed transformers", title_justify="left")
    for column in ("architecture", "status", "pruned"):
        table.add_column(column, no_wrap=True)
    table.add_column("left whole or refused because", overflow="fold")
    for support in found:
        table.add_row(*map(escape, cells(support)))
    return table


def environment_table(found: dict[str, Any]) -> Table:
    """Tabulate the environment: versions, devices, and which backends work."""
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, version in found["versions"].items():
        table.add_row(name, version or "not installed")
    for name, description in found["devices"].items():
        table.add_row(name, description)
    for ops, key in (("importance", "backends"), ("gradients", "gradient_backends")):
        for device, backends in found[key].items():
            for backend, reason in backends.items():
                table.add_row(f"{ops}: {backend} on {device}", "works" if reason is None else f"no: {reason}")
    return table
