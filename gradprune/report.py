"""What a run leaves for people: tables on the terminal, JSON files, and a self-contained HTML report."""

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from gradprune.search import SearchResult, describe_scoring

# Okabe and Ito's colours stay apart for colour-blind readers.
COLORS = {"attention": "#0072B2", "mlp": "#E69F00"}

_STYLE = """
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
  table { border-collapse: collapse; margin: 1rem 0; }
  th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
  th:first-child, td:first-child { text-align: left; }
  svg, img { max-width: 100%; height: auto; }
  .scroll { overflow-x: auto; }
  .warning { border-left: .3rem solid #D55E00; padding-left: .8rem; }
  pre { overflow-x: auto; font-size: .8rem; }
  code { background: #f4f4f4; padding: .1rem .3rem; }
"""
_CURVE_HEADER = ("ratio", "parameters", "perplexity", "tokens per second")

_CURVE_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>gradprune: several ratios</title>
<style>$style</style>
</head>
<body>
<h1>gradprune: several ratios</h1>
$chart
$table
<p>Each ratio's own report:</p>
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
<h2>Before and after</h2>
$measured
<h2>What each layer keeps</h2>
$chart
$layers
<h2>Gradients</h2>
$gradients
$search
<h2>How it was made</h2>
$options
$versions
</body>
</html>
""")


def json_text(content: Any) -> str:
    """Strict JSON, indented; a NaN or infinity in `content` becomes a string, since JSON has no such number."""
    return json.dumps(_finite(content), indent=2, allow_nan=False)


def write_json(path: Path, content: Any) -> None:
    """Write `json_text`."""
    path.write_text(json_text(content) + "\n", encoding="utf-8")


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(quantity, before, after, change) as text, for every quantity of `summary.json` that was measured."""
    named = [
        ("parameters", "parameters", "{:,.0f}"),
        ("perplexity", "perplexity", "{:.3f}"),
        ("bytes on disk", "bytes_on_disk", "{:,.0f}"),
        ("tokens per second", "tokens_per_second", "{:,.0f}"),
    ]
    rows = []
    for name, key, style in named:
        before, after = summary[key]["before"], summary[key]["after"]
        if before is not None and after is not None:
            rows.append((name, style.format(before), style.format(after), f"{after / before:.3f}x"))
    return rows


def summary_table(summary: dict[str, Any]) -> Table:
    """The before-and-after table for the terminal."""
    table = Table(title="Dense and pruned", title_justify="left")
    for column in ("", "dense", "pruned", "pruned / dense"):
        table.add_column(column, justify="left" if not column else "right")
    for row in summary_rows(summary):
        table.add_row(*row)
    return table


def layer_table(summary: dict[str, Any]) -> Table:
    """What each layer keeps, for the terminal."""
    table = Table(title="Kept per layer", title_justify="left")
    for column in ("layer", "KV groups", "", "MLP channels", ""):
        table.add_column(column, justify="right")
    for row in _layer_rows(summary):
        table.add_row(*row)
    return table


def write_report(
    path: Path,
    summary: dict[str, Any],
    record: dict[str, Any],
    gradients: dict[str, Any],
    plots: Sequence[Path],
    search: SearchResult | None = None,
) -> None:
    """Write one HTML file that needs no other: tables, charts, the gradients' plots, options and versions.

    Args:
        path: the file.
        summary, record, gradients: contents of `summary.json`, `run.json` and `gradients.json`.
        plots: what `GradientVisualizer` wrote, images and text; embedded.
        search: what was tried, if anything was.
    """
    config = record["config"]
    ratio = summary["pruning_ratio"]["achieved"]
    options = [(name, "default" if value is None else str(value)) for name, value in config.items()]
    page = _PAGE.substitute(
        style=_STYLE,
        title=escape(f"gradprune: {Path(config['base_model'] or 'the model').name} pruned by {ratio:.1%}"),
        lead=escape(
            f"{config['importance_method']} importance over {config['num_samples']} samples of "
            f"{config['seq_len']} tokens; perplexity on {summary['evaluation_tokens']:,} held-out tokens."
        ),
        measured=_html_table(("", "dense", "pruned", "pruned / dense"), summary_rows(summary)),
        chart=_kept_chart(summary["layers"]),
        layers=_html_table(("layer", "KV groups", "kept", "MLP channels", "kept"), _layer_rows(summary)),
        gradients=_gradient_section(gradients, plots),
        search="" if search is None else _search_section(search),
        options=_html_table(("option", "value"), options),
        versions=_html_table(("package", "version"), list(record["versions"].items())),
    )
    path.write_text(page, encoding="utf-8")


def curve_rows(summaries: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """(ratio, parameters, perplexity, tokens per second) as text: the dense model, then one row a ratio."""
    first = summaries[0]
    rows = [("dense", first, "before")] + [(f"{s['pruning_ratio']['requested']:g}", s, "after") for s in summaries]
    cells = [(name, s["parameters"][k], s["perplexity"][k], s["tokens_per_second"][k]) for name, s, k in rows]
    return [
        (name, f"{parameters:,}", f"{perplexity:.3f}", f"{speed:,.0f}" if speed else "-")
        for name, parameters, perplexity, speed in cells
    ]


def curve_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """The ratios side by side, for the terminal."""
    table = Table(title="Perplexity against size", title_justify="left")
    for column in _CURVE_HEADER:
        table.add_column(column, justify="right")
    for row in curve_rows(summaries):
        table.add_row(*row)
    return table


def write_curve_report(path: Path, summaries: Sequence[dict[str, Any]]) -> None:
    """Write one HTML file: perplexity against size over several ratios, linking to each ratio's own report."""
    sizes = [summaries[0]["parameters"]["before"], *(s["parameters"]["after"] for s in summaries)]
    values = [summaries[0]["perplexity"]["before"], *(s["perplexity"]["after"] for s in summaries)]
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(sizes, values, marker="o", color=COLORS["attention"])
    axes.set(xlabel="parameters", ylabel="perplexity (log scale)", yscale="log")
    axes.grid(alpha=0.4)
    links = [f"{s['pruning_ratio']['requested']:g}" for s in summaries]
    items = "".join(f'<li><a href="{name}/report.html">{name}</a></li>' for name in links)
    page = _CURVE_PAGE.substitute(
        style=_STYLE, chart=_svg(figure), table=_html_table(_CURVE_HEADER, curve_rows(summaries)), links=items
    )
    path.write_text(page, encoding="utf-8")


def _gradient_section(gradients: dict[str, Any], plots: Sequence[Path]) -> str:
    """Verdict, repair and warning; the layers before and after; the plots."""
    before, after = gradients["before"], gradients["after"]
    lines = [
        f"<p>Largest layer mean of |gradient| over smallest, at {gradients['seq_len']} tokens a sample: "
        f"{float(before['ratio']):,.1f} ({before['verdict']}; {escape(before['recommendation'])}). "
        f"Repair: {escape(gradients['gradient_fix'])}; after it {float(after['ratio']):,.1f} ({after['verdict']}).</p>"
    ]
    if gradients["warning"]:
        lines.append(f'<p class="warning">{escape(gradients["warning"])}</p>')
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
    lines.append(_html_table(("layer", "mean |g|", "std |g|", "scale", "mean |g| after"), rows))
    lines += [_embedded(plot) for plot in plots]
    return "\n".join(lines)


def _search_section(search: SearchResult) -> str:
    """The last round's trials as a chart and a table."""
    last = [trial for trial in search.trials if trial.repaired == search.winner.repaired]
    last = [trial for trial in last if trial.samples == search.winner.samples][:25]
    names = [describe_scoring(trial.scoring) for trial in last]
    figure = Figure(figsize=(8.0, 0.8 + 0.25 * len(last)), layout="constrained")
    axes = figure.add_subplot()
    colors = [COLORS["attention"] if trial.fixed else COLORS["mlp"] for trial in last]
    axes.scatter([trial.loss for trial in last], range(len(last)), c=colors)
    axes.set_yticks(range(len(last)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="held-out loss, nats a token (blue: fixed settings)")
    axes.grid(axis="x", alpha=0.4)
    rows = [
        (str(rank), name, f"{trial.loss:.4f}") for rank, (name, trial) in enumerate(zip(names, last, strict=True), 1)
    ]
    lead = f"<p>{search.candidates} different selections; the last round, {search.winner.samples} held-out samples:</p>"
    return "<h2>Search</h2>" + lead + _svg(figure) + _html_table(("rank", "setting", "held-out loss"), rows)


def _embedded(plot: Path) -> str:
    """An image, or a text in its own words."""
    if plot.suffix == ".txt":
        return f"<details><summary>{plot.name}</summary><pre>{escape(plot.read_text(encoding='utf-8'))}</pre></details>"
    image = base64.b64encode(plot.read_bytes()).decode()
    return f'<p><img alt="{plot.stem}" src="data:image/png;base64,{image}"></p>'


def _layer_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for layer in summary["layers"]:
        cells = [str(layer["layer"])]
        for total, part in (("groups", layer["attention"]), ("channels", layer["mlp"])):
            cells += [f"{part['kept']} of {part[total]}", f"{part['kept'] / part[total]:.0%}" if part[total] else "-"]
        rows.append(tuple(cells))
    return rows


def _kept_chart(layers: list[dict[str, Any]]) -> str:
    """An SVG bar chart of the fraction of KV groups and MLP channels that each layer keeps."""
    figure = Figure(figsize=(min(max(6.0, 0.35 * len(layers)), 16.0), 3.2), layout="constrained")
    axes = figure.add_subplot()
    positions = range(len(layers))
    for shift, name, total in ((-0.2, "attention", "groups"), (0.2, "mlp", "channels")):
        kept = [layer[name]["kept"] / layer[name][total] if layer[name][total] else 0.0 for layer in layers]
        label = {"attention": "attention (KV groups)", "mlp": "MLP (channels)"}[name]
        axes.bar([position + shift for position in positions], kept, 0.4, label=label, color=COLORS[name])
    axes.set(xlabel="decoder layer", ylabel="fraction kept", ylim=(0.0, 1.0), xlim=(-0.6, len(layers) - 0.4))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    """The figure as an SVG element, the same bytes every time."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "gradprune"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in header)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return '<div class="scroll"><table>' + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table></div>"


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, float) and content - content != 0.0:
        return str(content)
    return content
