"""The results folder of a run: its name is held from before the model is loaded until the results are written."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from gradprune.checkpoint.atomic import claimed
from gradprune.config import PruneConfig
from gradprune.errors import ConfigError

_READS = ("base_model", "dataset", "eval_dataset", "evidence_file", "tasks", "prompts")
_ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@contextmanager
def claimed_results(
    config: PruneConfig, ratios: Sequence[float] = (), reads: Mapping[str, str | None] | None = None
) -> Iterator[Path | None]:
    """Hold the name of the results folder while the body runs; yield its path, or None if no `output_name` is given.

    Args:
        config: the options, including those of the output and the names of what the run reads.
        ratios: the pruning ratios if the run has several, each with its own subfolder; by default the one of `config`.
        reads: what the run reads, by option; None means what `config` names.

    Raises:
        CheckpointError: the folder cannot be written, or may not be replaced; see `claimed`.
        ConfigError: two ratios have the same folder name.
    """
    if config.output_name is None:
        yield None
        return
    ratios = ratios or (config.pruning_ratio,)
    ratio_names(ratios)
    size = None if config.base_model is None else _bytes_as(config.dtype, config.base_model)
    output = Path(config.output_dir) / config.output_name
    reads = {name: getattr(config, name) for name in _READS} if reads is None else reads
    claim = claimed(
        output,
        overwrite=config.overwrite,
        argument="output_name",
        reads={name: value for name, value in reads.items() if value is not None},
        free_bytes=int(sum(1.0 - ratio for ratio in ratios) * (size or 0)),
    )
    with claim:
        yield output


def model_name(checkpoint: str | Path) -> str:
    """Return a short name for a checkpoint: its folder's name or, for `results/NAME/model`, the results folder's name.

    For a run with several ratios, it is the name of the results folder and the ratio, such as "base-0.1".
    """
    path = Path(checkpoint).absolute()
    run = path.parent
    if path.name != "model" or not path.is_dir() or not run.name:
        return path.name
    return f"{run.parent.name}-{run.name}" if (run.parent / "report.html").is_file() else run.name


def ratio_names(ratios: Sequence[float]) -> list[str]:
    """Return the name of each ratio's subfolder.

    Raises:
        ConfigError: two ratios have the same name.
    """
    names = [f"{ratio:g}" for ratio in ratios]
    for ratio, name in zip(ratios, names, strict=True):
        if names.count(name) > 1:
            raise ConfigError(f"pruning_ratio: {ratio!r} and another one are both written to '{name}'; leave one out")
    return names


def weight_bytes_on_disk(checkpoint: str | Path) -> int | None:
    """Bytes of a checkpoint folder's safetensors files; None if there are none, e.g. for a hub id."""
    files = list(Path(checkpoint).glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) if files else None


def _bytes_as(dtype: str, checkpoint: str | Path) -> int | None:
    """Bytes of a checkpoint folder's weights in `dtype`, or on disk if unknown; None without safetensors files."""
    stored = weight_bytes_on_disk(checkpoint)
    if stored is None or dtype not in _ELEMENT_BYTES:
        return stored
    try:
        return _ELEMENT_BYTES[dtype] * sum(map(_elements, Path(checkpoint).glob("*.safetensors")))
    except (OSError, SafetensorError):
        return stored  # a damaged file is reported when it is loaded


def _elements(file: Path) -> int:
    """Count the elements of all tensors in a file; only the header is read, and without importing torch."""
    with safe_open(file, framework="np") as content:
        return sum(math.prod(content.get_slice(name).get_shape()) for name in content.keys())  # noqa: SIM118 (no mapping)
