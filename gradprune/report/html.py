"""Self-contained HTML reports on one run, or on runs at several pruning ratios."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from gradprune.checkpoint.results import model_name
from gradprune.config import PruneConfig, rerun_command
from gradprune.report.charts import COLORS, kept_chart, svg
from gradprune.report.rows import (
    curve_header,
    curve_rows,
    layer_header,
    layer_rows,
    repair_text,
    samples_text,
    summary_rows,
)
from gradprune.report.tables import describe_scoring, search_verdict
from gradprune.search import SearchResult

_STYLE = """
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
  table { border-collapse: collapse; margin: 1rem 0; }
  th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
  th:first-child, td:first-child { text-align: left; }
  svg, img { max-width: 100%; height: auto; }
  .scroll { overflow-x: auto; }
  .warning { border-left: .3rem solid #D55E00; padding-left: .8rem; }
  dl { display: grid; grid-template-columns: 5rem 1fr; margin: 1rem 0; border-bottom: 1px solid #ddd; }
  dt { color: #666; }
  dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
  pre { overflow-x: auto; font-size: .8rem; }
  details { margin: 1rem 0; }
  summary { cursor: pointer; color: #0072B2; }
  code { background: #f4f4f4; padding: .1rem .3rem; }
"""

_CURVE_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>gradprune: several pruning ratios</title>
<style>$style</style>
</head>
<body>
<h1>gradprune: several pruning ratios</h1>
$chart
$table
<p>Report of each ratio:</p>
<ul>$links</ul>
</body>
</html>
""")

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<h1>$title</h1>
<p>$lead</p>
$warnings
<h2>Before and after</h2>
$measured
$generations
<h2>What each layer keeps</h2>
$chart
$layers
<h2>Gradients</h2>
$gradients
$search
<h2>How the model was pruned</h2>
<p><code>$command</code></p>
$options
$versions
</body>
</html>
""")


def write_report(
    path: Path,
    summary: dict[str, Any],
    record: dict[str, Any],
    gradients: dict[str, Any],
    plots: Sequence[Path],
    search: SearchResult | None = None,
) -> None:
    """Write the report on a run as one HTML file: tables, charts, gradient plots, options and versions.

    Args:
        path: the file to write.
        summary, record, gradients: contents of `summary.json`, `run.json` and `gradients.json`.
        plots: the images and the text written by `GradientVisualizer`, which are embedded.
        search: the search result; None if the run did not search.
    """
    config = record["config"]
    ratio = summary["pruning_ratio"]["achieved"]
    options = [(name, "default" if value is None else str(value)) for name, value in config.items()]
    page = _PAGE.substitute(
        style=_STYLE,
        title=escape(f"gradprune: {model_name(config['base_model'] or 'the model')} pruned by {ratio:.1%}"),
        lead=escape(
            f"Pruned by {config['importance_method']} importance, measured on {samples_text(summary)}; "
            f"perplexity is measured on {summary['evaluation_tokens']:,} "
            f"{'held-out ' if summary['evaluation_held_out'] else ''}tokens.{repair_text(summary)}"
        ),
        measured=_html_table(("", "dense", "pruned", "pruned / dense"), summary_rows(summary)),
        generations=_generation_section(summary["generations"]),
        chart=kept_chart(summary["layers"]),
        layers=_folded("Layer by layer", _html_table(layer_header(summary), layer_rows(summary))),
        warnings="".join(f'<p class="warning">{escape(warning)}</p>' for warning in summary["warnings"]),
        gradients=_gradient_section(gradients, plots),
        search="" if search is None else _search_section(search),
        command=escape(rerun_command(PruneConfig.from_dict(config))),
        options=_folded("All options", _html_table(("option", "value"), options)),
        versions=_folded("Versions", _html_table(("package", "version"), list(record["versions"].items()))),
    )
    path.write_text(page, encoding="utf-8", errors="backslashreplace")


def write_curve_report(path: Path, summaries: Sequence[dict[str, Any]]) -> None:
    """Write one HTML file on several pruning ratios: perplexity against size, and links to each ratio's own report."""
    sizes = [summaries[0]["parameters"]["before"], *(s["parameters"]["after"] for s in summaries)]
    values = [summaries[0]["perplexity"]["before"], *(s["perplexity"]["after"] for s in summaries)]
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(sizes, values, marker="o", color=COLORS[0])
    axes.margins(0.12)
    axes.set(xlabel="parameters", ylabel="perplexity (log scale)", yscale="log")
    axes.xaxis.set_major_formatter(EngFormatter())
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted("{x:g}")
    axes.grid(alpha=0.4)
    links = [f"{s['pruning_ratio']['requested']:g}" for s in summaries]
    for name, size, value in zip(("dense", *links), sizes, values, strict=True):
        axes.annotate(name, (size, value), xytext=(6, 6), textcoords="offset points")
    items = "".join(f'<li><a href="{name}/report.html">{name}</a></li>' for name in links)
    page = _CURVE_PAGE.substitute(
        style=_STYLE, chart=svg(figure), table=_html_table(curve_header(summaries), curve_rows(summaries)), links=items
    )
    path.write_text(page, encoding="utf-8", errors="backslashreplace")


def _generation_section(generations: Sequence[dict[str, str]]) -> str:
    """Return the section with the texts that both models write after each prompt; empty without prompts."""
    if not generations:
        return ""
    parts = [
        f"<dl><dt>prompt</dt><dd>{escape(each['prompt'])}</dd><dt>dense</dt><dd>{escape(each['dense'])}</dd>"
        f"<dt>pruned</dt><dd>{escape(each['pruned'])}</dd></dl>"
        for each in generations
    ]
    return "<h2>What the models write</h2><p>Always the likeliest next token.</p>" + "\n".join(parts)


def _gradient_section(gradients: dict[str, Any], plots: Sequence[Path]) -> str:
    """Return the section on gradients: the verdict, the fix, the layers before and after it, and the plots."""
    before, after = gradients["before"], gradients["after"]
    lines = [
        f"<p>Gradient ratio (largest layer mean of |gradient| / smallest) at {gradients['seq_len']} tokens per sample: "
        f"{float(before['ratio']):,.1f} ({before['verdict']}; {escape(before['recommendation'])}). "
        f"Gradient fix: {escape(gradients['gradient_fix'])}; ratio after the fix: {float(after['ratio']):,.1f} "
        f"({after['verdict']}).</p>"
    ]
    scales = gradients["scales"]
    rows = [
        (
            str(b["layer"]),
            f"{b['mean']:.3e}",
            f"{b['std']:.3e}",
            "1" if scales is None else f"{scales[b['layer']]:.4g}",
            f"{a['mean']:.3e}",
        )
        for b, a in zip(before["layers"], after["layers"], strict=True)
    ]
    table = _html_table(("layer", "mean |g|", "std |g|", "scale", "mean |g| after scaling"), rows)
    lines.append(_folded("Layer by layer", table))
    lines += [_embedded(plot) for plot in plots]
    return "\n".join(lines)


def _search_section(search: SearchResult) -> str:
    """Return the section on the search: the verdict, and the deciding round's trials as a chart and a table."""
    trials = search.deciding[:25]
    names = [describe_scoring(trial.scoring) for trial in trials]
    figure = Figure(figsize=(8.0, 0.8 + 0.25 * len(trials)), layout="constrained")
    axes = figure.add_subplot()
    colors = [COLORS[0] if trial.fixed else COLORS[1] for trial in trials]
    axes.scatter([trial.loss for trial in trials], range(len(trials)), c=colors)
    axes.set_yticks(range(len(trials)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="held-out loss, nats per token (blue: fixed settings)")
    axes.grid(axis="x", alpha=0.4)
    rows = [
        (str(rank), name, f"{trial.loss:.4f}", f"{trial.difference:+.4f}", f"{trial.error:.4f}")
        for rank, (name, trial) in enumerate(zip(names, trials, strict=True), 1)
    ]
    lead = (
        f"<p>{escape(search_verdict(search))}</p><p>{search.candidates} different selections were compared. The "
        f"best of the deciding round, on {search.winner.samples} held-out samples:</p>"
    )
    header = ("rank", "setting", "held-out loss", "difference from the default", "its standard error")
    return "<h2>Search</h2>" + lead + svg(figure) + _html_table(header, rows)


def _embedded(plot: Path) -> str:
    """Return the HTML of one plot file: an embedded image, or preformatted text."""
    if plot.suffix == ".txt":
        return _folded(plot.name, f"<pre>{escape(plot.read_text(encoding='utf-8'))}</pre>")
    image = base64.b64encode(plot.read_bytes()).decode()
    return f'<p><img alt="{plot.stem}" src="data:image/png;base64,{image}"></p>'


def _folded(title: str, content: str) -> str:
    """Return content that is shown only after its title is clicked."""
    return f"<details><summary>{title}</summary>{content}</details>"


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in header)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return '<div class="scroll"><table>' + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table></div>"
