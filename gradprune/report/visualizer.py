"""`GradientVisualizer`: plots and a text report of the gradients of a model's decoder layers."""

import math
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

from matplotlib import style
from matplotlib.figure import Figure
from torch import nn

from gradprune.errors import ConfigError, GradPruneError, NonFiniteError, counted
from gradprune.report.plots import STYLE, comparison_figure, distribution_figure, heatmap_figure, plain, variance_figure
from gradprune.vanishing.diagnosis import Diagnosis, diagnose_gradients
from gradprune.vanishing.from_model import gradients_of_model
from gradprune.vanishing.statistics import LayerGradients, pool_steps


class GradientVisualizer:
    """Collects the gradient statistics of training or calibration steps, and writes plots and a report.

        visualizer = GradientVisualizer("gradient_analysis")
        loss.backward()
        visualizer.collect_gradients(model, "batch_0")
        visualizer.write_all()

    Only statistics are kept: a few numbers per parameter and step. Each method that writes a file returns its path,
    and the same statistics give the same bytes. These methods raise `GradPruneError` if no step was collected, and
    `ConfigError` if `step_idx` is out of range.
    """

    def __init__(self, output_dir: str | PathLike[str] = "gradient_analysis") -> None:
        """Prepare to write to the folder `output_dir`, which is created with the first file.

        Raises:
            ConfigError: `output_dir` exists and is not a folder.
        """
        self.output_dir = Path(output_dir)
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise ConfigError(f"output_dir: {self.output_dir} exists and is not a folder")
        self._names: list[str] = []
        self._steps: list[list[LayerGradients]] = []

    def collect_gradients(self, model: nn.Module, step_name: str = "batch_0") -> None:
        """Read the `.grad` of every decoder layer's parameters; call it after `loss.backward()`.

        Raises:
            GradPruneError: no parameter of a decoder layer has a `.grad`.
            NonFiniteError: a gradient is NaN or infinite; the message names the parameter.
            UnsupportedArchitectureError: the model has no decoder layers that can be recognised.
        """
        self.collect_statistics(gradients_of_model(model), step_name)

    def collect_statistics(self, layers: list[LayerGradients], step_name: str = "batch_0") -> None:
        """Add the layer statistics of a step that were computed elsewhere, as by `ImportanceEngine.scores().gradients`.

        Raises:
            GradPruneError: `layers` is empty.
            NonFiniteError: a statistic is NaN or infinite; the message names the layer.
        """
        if not layers:
            raise GradPruneError(
                f"layers: step '{step_name}' has no layer statistics; methods without gradients collect none"
            )
        for layer in layers:
            numbers = (layer.mean, layer.std, layer.norm, layer.maximum, layer.minimum, *layer.parameter_norms.values())
            if not all(map(math.isfinite, numbers)):
                raise NonFiniteError(f"layers: the gradient statistics of layer {layer.layer} are NaN or infinite")
        self._names.append(step_name)
        self._steps.append(sorted(layers, key=lambda layer: layer.layer))

    def plot_gradient_distribution(self, step_idx: int = 0) -> Path:
        """Plot each layer's minimum, mean - std, mean, mean + std and maximum of |g| in one step."""
        layers = self._step(step_idx)
        title = f"Distribution of |gradient| in each layer, step {step_idx} ({plain(self._names[step_idx])})"
        return self._write(f"grad_dist_batch{step_idx}.png", lambda: distribution_figure(title, layers))

    def plot_gradient_heatmap(self, step_idx: int = 0) -> Path:
        """Plot log10 of the L2 norm of each parameter's gradient in one step, by layer and parameter name."""
        layers = self._step(step_idx)
        title = f"Gradient norm of each parameter, step {step_idx} ({plain(self._names[step_idx])})"
        return self._write(f"grad_heatmap_batch{step_idx}.png", lambda: heatmap_figure(title, layers))

    def plot_gradient_comparison(self) -> Path:
        """Plot the layers' mean |g|, one line per collected step."""
        self._require_steps()
        return self._write("grad_comparison.png", lambda: comparison_figure(self._names, self._steps))

    def plot_layer_variance(self) -> Path:
        """Plot each layer's mean |g|, its std over the weights within a step, and the std of the mean across steps."""
        self._require_steps()
        return self._write("layer_variance.png", lambda: variance_figure(self._steps))

    def generate_report(self) -> Path:
        """Write a text report: a table of layers and a verdict for each step, then the verdict on all steps pooled."""
        self._require_steps()
        parts = [f"Gradient analysis of {counted(len(self._steps), 'step')}"]
        for index, (name, layers) in enumerate(zip(self._names, self._steps, strict=True)):
            diagnosis = diagnose_gradients(layers)
            parts.append("\n".join([f"Step {index}: {name}", *_table(diagnosis), diagnosis.verdict_text()]))
        parts.append(_overall(diagnose_gradients(pool_steps(self._steps))))
        path = self._path("gradient_report.txt")
        path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        return path

    def write_all(self) -> list[Path]:
        """Write the four plots (plots of a single step show step 0) and the text report."""
        return [
            self.plot_gradient_distribution(),
            self.plot_gradient_heatmap(),
            self.plot_gradient_comparison(),
            self.plot_layer_variance(),
            self.generate_report(),
        ]

    def _require_steps(self) -> None:
        if not self._steps:
            raise GradPruneError(
                "no gradients collected; call collect_gradients(model) after loss.backward(), "
                "or collect_statistics(engine.scores().gradients)"
            )

    def _step(self, step_idx: int) -> list[LayerGradients]:
        self._require_steps()
        if not 0 <= step_idx < len(self._steps):
            raise ConfigError(
                f"step_idx: {step_idx} is out of range; the collected steps are "
                + ", ".join(f"{index} ({name})" for index, name in enumerate(self._names))
            )
        return self._steps[step_idx]

    def _write(self, name: str, draw: Callable[[], Figure]) -> Path:
        path = self._path(name)
        with style.context(STYLE):
            draw().savefig(path, dpi=120, metadata={"Software": None})
        return path

    def _path(self, name: str) -> Path:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        return self.output_dir / name


def write_plots(steps: Sequence[list[LayerGradients]], folder: Path) -> list[Path]:
    """Write all files of `GradientVisualizer` to `folder`; steps: the statistics of the first calibration batches."""
    visualizer = GradientVisualizer(folder)
    for index, step in enumerate(steps):
        visualizer.collect_statistics(step, f"batch_{index}")
    return visualizer.write_all()


def _table(diagnosis: Diagnosis) -> list[str]:
    lines = [f"{'layer':>5}  {'grad_mean':>10}  {'grad_std':>10}  {'largest / this':>14}"]
    largest = max(layer.mean for layer in diagnosis.layers)
    for layer in diagnosis.layers:
        ratio = largest / layer.mean if layer.mean > 0.0 else math.inf
        numbers = f"{layer.layer:>5}  {layer.mean:>10.3e}  {layer.std:>10.3e}  {ratio:>14.1f}"
        lines.append(f"{numbers}  {diagnosis.mark(layer)}".rstrip())
    return lines


def _overall(diagnosis: Diagnosis) -> str:
    """Format the verdict on all steps together, with the layers that it marks."""
    return "\n".join(
        [
            "Overall (mean over the steps)",
            f"gradient ratio:   {diagnosis.ratio:.1f} (largest layer mean / smallest)",
            f"verdict:          {diagnosis.verdict}",
            f"marked layers:    {diagnosis.marked_layers()}",
            f"recommendation:   {diagnosis.recommendation}",
        ]
    )
