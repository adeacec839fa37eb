import math
import struct
import time
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import PatchCollection

from gradprune import GradientVisualizer
from gradprune.calibration.engine import ImportanceEngine
from gradprune.errors import ConfigError, GradPruneError, NonFiniteError
from gradprune.models.loss import sample_losses
from gradprune.report.plots import comparison_figure, distribution_figure, heatmap_figure, plain, variance_figure
from gradprune.vanishing.diagnosis import diagnose_gradients
from gradprune.vanishing.from_model import gradients_of_model
from gradprune.vanishing.statistics import LayerGradients, pool_steps
from helpers.tiny_models import tiny_ids, tiny_model

FILES = [
    "grad_dist_batch0.png",
    "grad_heatmap_batch0.png",
    "grad_comparison.png",
    "layer_variance.png",
    "gradient_report.txt",
]


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    """Fail on warnings: Matplotlib warns if a log scale meets a zero or if a layout does not fit."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def layer(index: int, mean: float, std: float | None = None, frozen: bool = False) -> LayerGradients:
    names = {} if frozen else {"self_attn.q_proj": 100.0 * mean, "mlp.up_proj": 200.0 * mean}
    std = mean / 2 if std is None else std
    return LayerGradients(index, mean, std, 250.0 * mean, 50.0 * mean, mean / 1e3, names)


def visualizer_of(folder: Path, *steps: list[LayerGradients]) -> GradientVisualizer:
    visualizer = GradientVisualizer(folder)
    for index, step in enumerate(steps):
        visualizer.collect_statistics(step, f"batch_{index}")
    return visualizer


VANISHING = [layer(0, 1e-7), layer(1, 2e-5), layer(2, 2e-3, 5e-3)]
DEAD = [layer(0, 0.0, frozen=True), layer(1, 0.0), layer(2, 2e-3), layer(3, 1e-3)]


def marked(axes) -> list[int]:
    """Return the layers that are marked with a triangle."""
    found = [line for line in axes.lines if line.get_label() == "vanishing or frozen layer"]
    return [] if not found else list(found[0].get_xdata())


def test_write_all_writes_the_named_files(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "gradient_analysis"
    written = visualizer_of(folder, VANISHING).write_all()
    assert written == [folder / name for name in FILES]
    for path in written[:4]:
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert all(size > 400 for size in struct.unpack(">II", data[16:24]))
        assert b"tEXt" not in data


def test_plots_of_a_later_step_carry_its_number(tmp_path: Path) -> None:
    visualizer = visualizer_of(tmp_path, VANISHING, DEAD)
    assert visualizer.plot_gradient_distribution(1) == tmp_path / "grad_dist_batch1.png"
    assert visualizer.plot_gradient_heatmap(1) == tmp_path / "grad_heatmap_batch1.png"
    visualizer.plot_gradient_distribution(0)
    assert (tmp_path / "grad_dist_batch0.png").read_bytes() != (tmp_path / "grad_dist_batch1.png").read_bytes()


def test_the_report_lists_every_step_and_the_overall_verdict(tmp_path: Path) -> None:
    visualizer = visualizer_of(tmp_path, VANISHING, [layer(0, 3e-5), layer(1, 2e-5), layer(2, 2e-3)])
    text = visualizer.generate_report().read_text(encoding="utf-8")
    assert text == (
        """\
Gradient analysis of 2 steps

Step 0: batch_0
layer   grad_mean    grad_std  largest / this
    0   1.000e-07   5.000e-08         20000.0  vanishing
    1   2.000e-05   1.000e-05           100.0
    2   2.000e-03   5.000e-03             1.0
Gradient ratio 20000.0: severe; scale the layers' gradients adaptively, then weight them by depth.

Step 1: batch_1
layer   grad_mean    grad_std  largest / this
    0   3.000e-05   1.500e-05            66.7
    1   2.000e-05   1.000e-05           100.0
    2   2.000e-03   1.000e-03             1.0
Gradient ratio 100.0: mild; scale the layers' gradients adaptively.

Overall (mean over the steps)
gradient ratio:   132.9 (largest layer mean / smallest)
verdict:          mild
marked layers:    vanishing 0
recommendation:   scale the layers' gradients adaptively
"""
    )


def test_the_report_names_zero_and_frozen_layers(tmp_path: Path) -> None:
    lines = visualizer_of(tmp_path, DEAD).generate_report().read_text(encoding="utf-8").splitlines()
    assert lines[0] == "Gradient analysis of 1 step"
    assert lines[4] == "    0   0.000e+00   0.000e+00             inf  frozen"
    assert lines[5] == "    1   0.000e+00   0.000e+00             inf  vanishing (zero)"
    assert lines[6] == "    2   2.000e-03   1.000e-03             1.0"
    assert lines[-4] == "gradient ratio:   inf (largest layer mean / smallest)"
    assert lines[-2] == "marked layers:    frozen 0; vanishing (zero) 1"


def test_marked_layers_are_listed_as_ranges() -> None:
    weak = [layer(index, 1.0 if index in (4, 6) else 1e-5) for index in range(10)]
    assert diagnose_gradients(weak).marked_layers() == "vanishing 0-3, 5, 7-9"
    assert diagnose_gradients([layer(0, 1.0), layer(1, 0.5)]).marked_layers() == "none"


def test_pooled_steps_have_equal_weight() -> None:
    pooled = pool_steps([[layer(0, 1.0, 0.5), layer(1, 1.0)], [layer(0, 3.0, 1.5)]])
    assert [entry.layer for entry in pooled] == [0, 1]
    assert pooled[1] == layer(1, 1.0)
    first = pooled[0]
    # E[x^2] - E[x]^2 with E[x^2] = (1 + 0.25 + 9 + 2.25) / 2.
    assert (first.mean, first.std) == (2.0, pytest.approx(math.sqrt(6.25 - 4.0)))
    assert first.norm == pytest.approx(250.0 * math.sqrt(5.0))
    assert (first.maximum, first.minimum) == (150.0, 1e-3)
    assert first.parameter_norms["mlp.up_proj"] == pytest.approx(200.0 * math.sqrt(5.0))


def test_gradients_of_the_model_and_of_the_engine_draw_the_same_heatmap(tmp_path: Path) -> None:
    model, ids = tiny_model(), tiny_ids(samples=1)
    with ImportanceEngine(model, "taylor", backend="reference") as engine:
        engine.step(ids)
    sample_losses(model, ids).sum().backward()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.grad = None
    by_grad, by_engine = GradientVisualizer(tmp_path / "grad"), GradientVisualizer(tmp_path / "engine")
    by_grad.collect_gradients(model)
    by_engine.collect_statistics(engine.scores().gradients, "batch_0")
    assert by_grad.generate_report().read_text() == by_engine.generate_report().read_text()
    images = [heatmap_figure("", layers).axes[0].images[0].get_array()
              for layers in (gradients_of_model(model), engine.scores().gradients)]  # fmt: skip
    assert images[0].shape == (7, 3)
    np.testing.assert_allclose(images[0], images[1], rtol=0.0, atol=1e-6)


def test_the_same_statistics_give_the_same_bytes(tmp_path: Path) -> None:
    steps = (VANISHING, DEAD)
    first = [path.read_bytes() for path in visualizer_of(tmp_path / "first", *steps).write_all()]
    with matplotlib.rc_context({"font.size": 20.0, "axes.facecolor": "red", "savefig.dpi": 30.0}):
        second = [path.read_bytes() for path in visualizer_of(tmp_path / "second", *steps).write_all()]
    assert first == second


def test_the_distribution_shows_every_statistic_on_a_log_scale() -> None:
    axes = distribution_figure("title", [*VANISHING, layer(3, 0.0)]).axes[0]
    assert axes.get_yscale() == "log"
    whiskers, means = axes.collections[0].get_segments(), axes.collections[1].get_segments()
    assert [segment[1][1] for segment in whiskers] == [entry.maximum for entry in VANISHING]
    assert [segment[0][1] for segment in means] == [entry.mean for entry in VANISHING]
    boxes = {patch.get_x() + 0.35: patch for patch in axes.containers[0]}
    assert boxes[0].get_y() == pytest.approx(5e-8)
    assert boxes[0].get_y() + boxes[0].get_height() == pytest.approx(1.5e-7)
    # Layer 2's std exceeds its mean, so its box has no lower half: it is open and begins at the mean.
    assert 2 not in boxes
    assert axes.containers[2].patches[0].get_y() == 2e-3
    assert axes.containers[2].patches[0].get_height() == 5e-3
    bottom, top = axes.get_ylim()
    assert bottom < 1e-7 / 2
    assert top >= 0.1
    assert marked(axes) == [0, 3]


def test_the_axis_shows_the_means_if_all_minima_are_zero() -> None:
    layers = [LayerGradients(index, 1e-4, 2e-4, 1.0, 1e-1, 0.0, {"w": 1.0}) for index in range(4)]
    axes = distribution_figure("title", layers).axes[0]
    assert axes.get_ylim()[0] < 1e-5
    assert next(list(line.get_xdata()) for line in axes.lines if "is 0" in line.get_label()) == [0, 1, 2, 3]


def test_the_heatmap_shows_log10_norms_and_hatches_zero_and_missing() -> None:
    layers = [*DEAD[:3], LayerGradients(4, 1e-3, 0.0, 1.0, 1.0, 0.0, {"mlp.up_proj": 1e-2})]
    figure = heatmap_figure("title", layers)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["self_attn.q_proj", "mlp.up_proj"]
    values = np.ma.filled(axes.images[0].get_array(), np.nan)
    nan = math.nan
    expected = [[nan, nan, math.log10(0.2), nan, nan], [nan, nan, math.log10(0.4), nan, -2.0]]
    np.testing.assert_allclose(values, expected)
    hatched = [c for c in axes.collections if isinstance(c, PatchCollection)]
    cells = [sorted((int(p.vertices[:, 0].min() + 0.5), int(p.vertices[:, 1].min() + 0.5)) for p in c.get_paths())
             for c in hatched]  # fmt: skip
    assert cells[0] == [(1, 0), (1, 1)]
    assert cells[1] == [(0, 0), (0, 1), (3, 0), (3, 1), (4, 0)]
    assert [text.get_text() for text in figure.legends[0].get_texts()][-2:] == ["zero", "no gradient"]
    assert marked(axes) == [0, 1]


def test_equal_norms_lie_in_the_middle_of_the_color_scale() -> None:
    layers = [LayerGradients(index, 1.0, 0.0, 1.0, 1.0, 1.0, {"w": 1e-2}) for index in range(3)]
    assert heatmap_figure("title", layers).axes[0].images[0].get_clim() == (-2.5, -1.5)


def test_no_marker_lies_on_the_axis() -> None:
    bottom, top = comparison_figure(["only"], [[layer(0, 1e-8), layer(1, 1e-4)]]).axes[0].get_ylim()
    assert (bottom, top) == pytest.approx((1e-9, 1e-3))


def test_the_comparison_has_a_line_per_step_and_crosses_for_zeros() -> None:
    steps = [[layer(0, 1e-4), layer(1, 1e-3)], [layer(0, 0.0), layer(1, 2e-3)], [layer(1, 3e-3)]]
    figure = comparison_figure(["first", "second", "third"], steps)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines) == ["step 0 (first)", "step 1 (second)", "zero", "step 2 (third)"]
    np.testing.assert_array_equal(lines["step 0 (first)"].get_ydata(), [1e-4, 1e-3])
    np.testing.assert_array_equal(lines["step 1 (second)"].get_ydata(), [math.nan, 2e-3])
    assert lines["zero"].get_xdata() == [0]
    assert lines["step 2 (third)"].get_xdata() == range(1, 2)


def test_many_steps_get_a_color_bar_instead_of_a_legend() -> None:
    steps = [[layer(0, 1e-4 * (index + 1))] for index in range(9)]
    figure = comparison_figure([str(index) for index in range(9)], steps)
    assert len({line.get_color() for line in figure.axes[0].lines}) == 9
    assert figure.axes[1].get_ylabel() == "step"
    assert not figure.legends


def test_the_variance_shows_spread_within_and_across_steps() -> None:
    steps = [[layer(0, 1e-3, 3e-3)], [layer(0, 3e-3, 4e-3)]]
    lines = {line.get_label(): line.get_ydata() for line in variance_figure(steps).axes[0].lines}
    assert lines["mean"] == pytest.approx([2e-3])
    assert lines["std over the weights, within a step"] == pytest.approx([math.sqrt(12.5) * 1e-3])
    assert lines["std of the mean, across steps"] == pytest.approx([1e-3])
    assert not [line for line in variance_figure(steps[:1]).axes[0].lines if "across" in line.get_label()]


@pytest.mark.parametrize(
    "layers",
    [
        [layer(0, 0.0), layer(1, 0.0)],
        [layer(0, 0.0, frozen=True)],
        [layer(0, 1.0)],
        [layer(0, 1e-42), layer(1, 1e36)],
        [layer(0, 1e-4), layer(7, 1e-4)],
        [layer(index, 10.0**-index) for index in range(40)],
    ],
    ids=["zero", "frozen", "single", "extreme", "gap", "steep"],
)
def test_odd_statistics_are_drawn_without_a_warning(tmp_path: Path, layers: list[LayerGradients]) -> None:
    assert len(visualizer_of(tmp_path, layers, layers).write_all()) == 5


def test_eighty_layers_are_quick_and_legible(tmp_path: Path) -> None:
    layers = [layer(index, 1e-4 * (index + 1)) for index in range(80)]
    start = time.perf_counter()
    paths = visualizer_of(tmp_path, layers).write_all()
    # An idle core takes a few seconds; the limit leaves room for a busy machine.
    assert time.perf_counter() - start < 60.0
    for path in paths[:4]:
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert 1500 <= width <= 2400
        assert height <= 1000
    for figure in (heatmap_figure("", layers), distribution_figure("", layers)):
        assert 8 <= sum(0 <= tick < 80 for tick in figure.axes[0].get_xticks()) <= 20
    assert list(distribution_figure("", layers[:32]).axes[0].get_xticks()) == list(range(32))


def test_special_characters_of_step_names_are_escaped(tmp_path: Path) -> None:
    visualizer = GradientVisualizer(tmp_path)
    visualizer.collect_statistics(VANISHING, "_cost $\\frac{ in $\nUSD")
    assert len(visualizer.write_all()) == 5
    assert plain("a $b$\nc") == r"a \$b\$ c"
    assert plain("x" * 60) == "x" * 45 + "..."


def test_layers_come_in_order_and_the_callers_list_is_not_kept(tmp_path: Path) -> None:
    layers = list(reversed(VANISHING))
    visualizer = visualizer_of(tmp_path, layers)
    layers.clear()
    lines = visualizer.generate_report().read_text(encoding="utf-8").splitlines()
    assert [line.split()[0] for line in lines[4:7]] == ["0", "1", "2"]


@pytest.mark.parametrize("index", [-1, 2])
def test_a_step_out_of_range_is_refused_with_the_steps_there_are(tmp_path: Path, index: int) -> None:
    visualizer = visualizer_of(tmp_path, VANISHING, DEAD)
    for plot in (visualizer.plot_gradient_distribution, visualizer.plot_gradient_heatmap):
        with pytest.raises(ConfigError, match=rf"step_idx: {index} .* 0 \(batch_0\), 1 \(batch_1\)"):
            plot(index)


def test_nothing_collected_is_an_error(tmp_path: Path) -> None:
    visualizer = GradientVisualizer(tmp_path / "out")
    for write in (
        visualizer.plot_gradient_distribution,
        visualizer.plot_gradient_heatmap,
        visualizer.plot_gradient_comparison,
        visualizer.plot_layer_variance,
        visualizer.generate_report,
        visualizer.write_all,
    ):
        with pytest.raises(GradPruneError, match=r"no gradients collected; call collect_gradients\(model\)"):
            write()
    assert not (tmp_path / "out").exists()


def test_unusable_input_is_refused_and_not_kept(tmp_path: Path) -> None:
    visualizer = GradientVisualizer(tmp_path)
    with pytest.raises(GradPruneError, match=r"call loss\.backward\(\) first"):
        visualizer.collect_gradients(tiny_model())
    with pytest.raises(GradPruneError, match="step 'empty' has no layer statistics"):
        visualizer.collect_statistics([], "empty")
    with pytest.raises(NonFiniteError, match="layer 1 are NaN or infinite"):
        visualizer.collect_statistics([layer(0, 1.0), layer(1, math.nan)], "nan")
    with pytest.raises(GradPruneError, match="no gradients collected"):
        visualizer.write_all()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output_dir: .*file exists and is not a folder"):
        GradientVisualizer(tmp_path / "file")
