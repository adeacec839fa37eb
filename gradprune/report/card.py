"""The model card: the file `README.md` beside the weights, which the Hugging Face hub displays and parses."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file

from gradprune.checkpoint.card_head import CARD, TAG, card_head
from gradprune.checkpoint.gguf_source import find_gguf
from gradprune.checkpoint.push import PLACE
from gradprune.checkpoint.results import model_name
from gradprune.checkpoint.save import MLX_TYPES
from gradprune.config import OPTIONS, PruneConfig, command_line
from gradprune.errors import ExportError
from gradprune.export.gguf_model import check_config
from gradprune.hub import hub_fault
from gradprune.models.modeling_gradprune import auto_class_name, per_layer_overrides
from gradprune.report.rows import (
    kinds_text,
    layer_header,
    layer_rows,
    repair_text,
    samples_text,
    scored_kinds,
    summary_rows,
)
from gradprune.version import __version__

# Rows left out of the card: speed differs from run to run, but a checkpoint must have the same bytes every time.
_NOT_SHOWN = ("tokens per second",)
_LICENSE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class _Base:
    """The dense model that a checkpoint derives from.

    name: its name for readers. hub_id: its name on the hub; None if it is not known. license: the license entries of
    its card's head.
    """

    name: str
    hub_id: str | None
    license: dict[str, Any]


def write_card(folder: Path, model: PreTrainedConfig, config: PruneConfig, summary: dict[str, Any]) -> None:
    """Write the card of a pruned checkpoint. It contains no path of this machine.

    Args:
        folder: the checkpoint's folder.
        model: the checkpoint's configuration.
        config: the options of the run.
        summary: the content of `analysis/summary.json`.
    """
    base = _base(config.base_model, model)
    head = ModelCardData(
        base_model=base.hub_id,
        library_name="transformers",
        pipeline_tag=_task(model),
        tags=[TAG, "pruned", "structured-pruning"],
        **base.license,
    )
    sections = [
        f"# {base.name} pruned by {summary['pruning_ratio']['achieved']:.1%}",
        _provenance(base, config, summary),
        "## Measured",
        _measured(summary),
        "## Loading",
        _loading(model),
        "## Layers",
        _table(layer_header(summary), layer_rows(summary)),
    ]
    _write(folder, head.to_yaml(), "\n\n".join(sections))


def write_recovered_card(
    folder: Path, model: PreTrainedConfig, source: str | None, summary: dict[str, Any], teacher: str | None = None
) -> None:
    """Write the card of a checkpoint trained by `gradprune recover`: its earlier card and a section on the training.

    Args:
        folder: the trained checkpoint's folder.
        model: the trained checkpoint's configuration.
        source: the checkpoint before training, None if it is not known; if it has no card by gradprune, a short card is
            written.
        summary: the content of the recovery's `analysis/summary.json`.
        teacher: the model that the checkpoint learned from; None if it is not known.
    """
    head = card_head(Path(source)) if source is not None else {}
    if TAG in head.get("tags", ()):
        text = (Path(str(source)) / CARD).read_text(encoding="utf-8").split("---\n", 2)[2].strip()
    else:
        base = _base(source, model)
        tags = [TAG, "pruned"] if per_layer_overrides(model) else [TAG]
        head = {"base_model": base.hub_id, "library_name": "transformers", "pipeline_tag": _task(model), "tags": tags}
        head |= base.license
        text = f"# {base.name}, trained further\n\n## Loading\n\n{_loading(model)}"
    before, after = summary["perplexity"]["before"], summary["perplexity"]["after"]
    trained = {"lora": "low-rank updates, merged into the weights", "full": "all weights"}[summary["method"]]
    taught_by = "a teacher's predictions" if teacher is None else f"the predictions of {_name(teacher)}"
    aim = {"kd": f"towards {taught_by}", "lm": "to predict the text"}[summary["loss"]]
    when = "after pruning " if "pruned" in head["tags"] else ""
    recovered = (
        f"## Recovery\n\nTrained {when}by `gradprune recover` of version {__version__}: {trained}, {aim}. The best "
        f"weights, after {summary['best_step']:,} of {summary['steps']:,} steps ({summary['tokens']:,} tokens in all), "
        f"were kept. Perplexity on held-out text of that run: {before:.3f} before, {after:.3f} after."
    )
    _write(folder, ModelCardData(**head).to_yaml(), f"{text}\n\n{recovered}")


def _write(folder: Path, head: str, text: str) -> None:
    (folder / CARD).write_text(f"---\n{head}\n---\n\n{text}\n", encoding="utf-8", errors="backslashreplace")


def _base(base_model: str | None, model: PreTrainedConfig) -> _Base:
    if base_model is None:
        return _Base(f"A {model.model_type} model", None, {})
    folder = Path(base_model)
    if folder.is_dir():
        head = card_head(folder)
        # A model that is pruned again still derives from the same dense model.
        hub_id = head.get("base_model") if TAG in head.get("tags", ()) else None
        return _Base(_name(base_model), hub_id if isinstance(hub_id, str) else None, _license(head))
    if find_gguf(base_model) is not None:
        return _Base(_name(base_model), None, {})
    card = cached_file(
        base_model,
        CARD,
        local_files_only=hub_fault() is not None,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return _Base(base_model, base_model, {} if card is None else _license(card_head(Path(card).parent)))


def _name(checkpoint: str) -> str:
    """Return a name for readers of a checkpoint folder, a GGUF file or a model on the hub."""
    path = Path(checkpoint)
    if path.is_dir():
        return model_name(path)
    return checkpoint if find_gguf(checkpoint) is None else path.stem


def _license(head: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name in _LICENSE if isinstance(value := head.get(name), str)}


def _provenance(base: _Base, config: PruneConfig, summary: dict[str, Any]) -> str:
    before, after = summary["parameters"]["before"], summary["parameters"]["after"]
    groups = kinds_text(scored_kinds(summary["layers"]))
    text = (
        f"{base.name} with {after:,} of its {before:,} parameters: gradprune {__version__} removed the "
        f"{groups} with the lowest `{config.importance_method}` importance in the whole model, measured on "
        f"{samples_text(summary)}."
    )
    return f"{text}{repair_text(summary)}\n\n```sh\n{command_line(_without_paths(base, config))}\n```"


def _without_paths(base: _Base, config: PruneConfig) -> PruneConfig:
    """Return the options without paths of this machine, for the command that the card shows."""
    shown: dict[str, Any] = {
        name: OPTIONS[name].default for name in ("output_dir", "output_name", "overwrite", "resume")
    }
    for name in ("dataset", "eval_dataset", "evidence_file", "tasks", "prompts"):
        if (value := getattr(config, name)) is not None:
            shown[name] = ",".join(Path(part).name for part in value.split(","))
    if config.base_model is not None:
        shown["base_model"] = base.hub_id or model_name(config.base_model)
    return replace(config, **shown)


def _measured(summary: dict[str, Any]) -> str:
    rows = [row for row in summary_rows(summary) if row[0] not in _NOT_SHOWN]
    text = "held-out text" if summary["evaluation_held_out"] else "text that was also used for calibration"
    return (
        f"{_table(('', 'dense', 'pruned', 'pruned / dense'), rows)}\n\n"
        f"Perplexity was measured on {summary['evaluation_tokens']:,} tokens of {text}."
    )


def _loading(model: PreTrainedConfig) -> str:
    """Describe how to load the checkpoint in each runtime."""
    layers = per_layer_overrides(model)
    if not layers:
        return f"A plain `{model.model_type}` checkpoint: whatever loads the dense model loads it.\n\n{_python(model)}"
    without = [index for index, own in layers.items() if "attention" in own.get("skip", ())]
    vllm = (
        f"- vLLM cannot load it, because {_layers(without)} no attention block."
        if without
        else f"- vLLM, by its Transformers backend: `vllm serve {PLACE} --trust-remote-code`"
    )
    mlx = f"- MLX: `mlx_lm.generate --model {PLACE} --trust-remote-code`"
    gguf = f"- llama.cpp, after `gradprune export --model {PLACE} --output model.gguf`: `llama-cli -m model.gguf`"
    lines = [
        "Layers differ in width, so a modelling file comes with the weights; it needs only torch and transformers.\n\n"
        f"{_python(model, ', trust_remote_code=True')}\n",
        vllm,
        *([gguf] if _exportable(model) else []),
        *([mlx] if model.model_type in MLX_TYPES else []),
    ]
    return "\n".join(lines)


def _exportable(model: PreTrainedConfig) -> bool:
    """Whether `gradprune export` can write a model of this architecture whose layers differ in width."""
    try:
        check_config(model, alike=False)
    except ExportError:
        return False
    return True


def _layers(numbers: Sequence[int]) -> str:
    """Name the layers as the subject of a sentence, with "has" or "have"."""
    return f"layer {numbers[0]} has" if len(numbers) == 1 else f"layers {', '.join(map(str, numbers))} have"


def _task(model: PreTrainedConfig) -> str:
    """Return the hub's name for the task that the model performs."""
    reads_images = auto_class_name(model.model_type) == "AutoModelForImageTextToText"
    return "image-text-to-text" if reads_images else "text-generation"


def _python(model: PreTrainedConfig, argument: str = "") -> str:
    auto = auto_class_name(model.model_type)
    return f'```python\nfrom transformers import {auto}\n\nmodel = {auto}.from_pretrained("{PLACE}"{argument})\n```'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))
