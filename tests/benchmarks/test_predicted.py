"""Predictions: computed from counts and stated assumptions, marked as such, and shown beside measurements."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: what its kernels take is NOT predicted here")

from benchmarks.jobs import whole
from benchmarks.jobs.streamed import LOAD
from benchmarks.predicted import jobs, run
from benchmarks.predicted.counted import Counted, Launch, llama
from benchmarks.predicted.roofline import (
    CARDS,
    MEMORY,
    PRODUCTS,
    SHORTEST,
    STREAMED,
    TRITON_ENQUEUED,
    device_seconds,
    host_seconds,
    launch_seconds,
    pass_seconds,
)
from benchmarks.predicted.stages import distillation_pass, lost_at, removal_of_all, repair_pass
from benchmarks.predicted.steps import engine_step, plain_step
from benchmarks.report import report
from benchmarks.results import latest, read
from benchmarks.run import LARGE
from gradprune import PruneConfig
from gradprune.calibration import obs
from gradprune.models.streams import Streams

H100 = CARDS[0]


def test_a_launch_takes_the_longer_of_arithmetic_and_memory() -> None:
    product = Launch("mm", bytes=1000, flops=10**12, dtype=torch.bfloat16)
    copy = Launch("copy", bytes=10**9)
    assert launch_seconds(product, H100) == pytest.approx(1e12 / (PRODUCTS * H100.half))
    assert launch_seconds(copy, H100) == pytest.approx(1e9 / (MEMORY * H100.memory))
    assert launch_seconds(replace(copy, bytes=10**9 * 10, flops=10**12), H100) > 9 * launch_seconds(copy, H100)
    assert launch_seconds(Launch("add", bytes=8), H100) == SHORTEST
    assert launch_seconds(replace(product, dtype=torch.float32), H100) > 10 * launch_seconds(product, H100)


def test_fewer_tokens_hide_less_of_the_epilogue() -> None:
    def of_floor(tokens: int) -> float:
        launch = Launch("triton linear_importance", 0, 2 * tokens * 4096**2, torch.bfloat16, 1, tokens)
        return launch_seconds(replace(launch, name="mm"), H100) / launch_seconds(launch, H100)

    assert 0.5 < of_floor(128) < of_floor(512) < of_floor(2048) < 1.0


def test_the_host_is_counted_too() -> None:
    launches = [Launch("triton add", bytes=8)] * 1000
    assert host_seconds(launches) == pytest.approx(1000 * TRITON_ENQUEUED)
    assert device_seconds(launches, H100) < host_seconds(launches)


def test_the_products_of_a_layer_are_counted() -> None:
    """A decoder layer's products: forward, recomputation without the last product, and the inputs' gradients."""
    hidden, channels, kv, tokens = 4096, 14336, 1024, 2 * 512
    weights = hidden * (2 * hidden + 2 * kv) + 3 * hidden * channels

    def products(weights_too: bool) -> int:
        counts = []
        for layers in (1, 2):
            found = plain_step("8B", layers, 2, 512, weights=weights_too)
            counts.append(sum(launch.flops for launch in found.launches if "attention" not in launch.name))
        return counts[1] - counts[0]

    # The tolerance is for the product that makes the rotary table.
    assert products(False) == pytest.approx(2 * tokens * (3 * weights - hidden * channels), rel=1e-3)
    assert products(True) > products(False)
    ours = [engine_step("8B", layers, "taylor_2nd", 2, 512) for layers in (1, 2)]
    scored = [sum(launch.flops for launch in step.launches if launch.tokens) for step in ours]
    assert scored[1] - scored[0] == 2 * tokens * weights


def test_every_prediction_is_marked_as_one(tmp_path: Path) -> None:
    run.main(["--toy", "--output", str(tmp_path)])
    found = read(tmp_path)
    assert {record.hardware for record in found} == {card.name for card in CARDS}
    assert {record.kind for record in found} == {"predicted"}
    assert all(record.ms_p50 > 0 and record.repeats == 0 for record in found)
    assert {path.name for path in tmp_path.iterdir()} == {
        "nvidia-h100-80gb-hbm3-predicted.jsonl", "nvidia-h200-predicted.jsonl"
    }  # fmt: skip
    text = report(latest(found), tmp_path / "plots")
    assert "Predicted, not measured" in text
    of_plain = next(line for line in text.splitlines() if "calibration, plain" in line)
    assert of_plain.split("|")[-3:-1] == [" - ", " - "]


def test_the_products_of_a_repair_are_counted() -> None:
    """One more layer takes a pass of the dense layer, one of the repaired layer, and the products that are solved from.

    The output projections of the repaired layer have lost columns. The products are those of the projections' inputs
    with themselves and with the targets.
    """
    hidden, channels, kv, tokens, lost = 4096, 14336, 1024, 2 * 512, 0.25
    layer = hidden * (2 * hidden + 2 * kv) + 3 * hidden * channels
    counts = []
    for layers in (2, 3):
        found = repair_pass("8B", layers, lost, 1, 1, (1, 512)).launches
        counts.append(sum(launch.flops for launch in found if launch.dtype is torch.bfloat16 and "mm" in launch.name))
    grams = sum(0.5625 * width**2 + hidden * width for width in (hidden, channels))
    both = 2 * layer - lost * hidden * (hidden + channels)
    assert counts[1] - counts[0] == pytest.approx(2 * tokens * (both + grams), rel=0.02)


def test_the_products_of_distillation_are_counted() -> None:
    """One more layer takes four products per step and weight, and three passes over the held-out samples.

    The products of a step are those of the forward pass, of its recomputation (without the last product, except in the
    first step) and of both gradients. The passes are made with none, all and half of the change.
    """
    hidden, channels, kv, tokens, steps, held_out = 4096, 14336, 1024, 512, 3, 2
    weights = hidden * (2 * hidden + 2 * kv) + 3 * hidden * channels
    counts = []
    for layers in (1, 2):
        found = distillation_pass("8B", layers, 0.0, steps, held_out, tokens).launches
        counts.append(sum(launch.flops for launch in found if "mm" in launch.name))
    of_steps = 4 * steps * weights - (steps - 1) * hidden * channels
    assert counts[1] - counts[0] == pytest.approx(2 * tokens * (of_steps + 3 * held_out * weights), rel=1e-3)


def test_a_repair_that_solves_more_takes_longer() -> None:
    few, many = (repair_pass("8B", 2, lost, 1, 1, (1, 512)) for lost in (0.75, 0.25))
    assert pass_seconds(few, H100) < pass_seconds(many, H100)


def test_the_repair_of_the_whole_job_fits_in_40_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third layer stands for any layer. If all inputs of its blocks were held, 40 GiB would not suffice."""
    job = whole.FULL
    weights = sum(parameter.nbytes for parameter in llama(job.size).parameters())

    def held() -> int:
        lost, shape = lost_at(job.size, PruneConfig().pruning_ratio), (job.batch, job.compared.tokens)
        batches = (job.samples // job.batch, job.held_out // job.batch)
        return weights + repair_pass(job.size, 3, lost, *batches, shape).peak

    assert held() < 40 << 30
    reads: list[Tensor] = []
    output_input = Streams.output_input

    def holding(*given: Any) -> Tensor:
        reads.append(output_input(*given))
        return reads[-1]

    monkeypatch.setattr(Streams, "output_input", holding)
    assert held() > 40 << 30


def test_predicted_launches_of_a_removal_path_are_those_of_a_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a path whose rounds remove as many groups as they are allowed to."""
    x = torch.randn(64, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(5, 48, dtype=torch.float64)
    for columns in (1, 4):
        with Counted() as counted:
            obs.removal_path(weight, obs.with_ridge(x.T @ x), columns)
        found = removal_of_all(5, 48 // columns, columns)
        assert found.by_name["cholesky"] == counted.by_name["linalg_cholesky_ex"]
        assert abs(found.total - counted.total) < 0.25 * counted.total


def test_the_whole_job_is_the_sum_of_its_stages() -> None:
    found = {record.provider: record for record in jobs.passes(H100, toy=True)}
    stages = [record.ms_p50 for name, record in found.items() if name.startswith("stage ")]
    assert len(stages) == 5
    assert found["gradprune by default"].ms_p50 == pytest.approx(sum(stages))


def test_the_time_of_a_streamed_job_is_that_of_moving_its_weights() -> None:
    found = jobs.streamed(H100)
    # The layers take 137 GB; they are moved about twice per sample.
    assert found.ms_p50 / 1e3 == pytest.approx(18.6 * 137e9 / STREAMED, rel=0.05)
    (step,) = [step for step in LARGE if step.module == "benchmarks.jobs.streamed"]
    assert step.arguments == ("--num_samples", str(LOAD[0]), "--seq_len", str(LOAD[1]))


def test_a_measurement_is_shown_beside_its_prediction(tmp_path: Path) -> None:
    found = list(run.ops(H100, toy=True))
    measured = replace(found[0], kind="kernel", ms_p50=2.0 * found[0].ms_p50, ms_p20=1.0, ms_p80=1.0)
    text = report([*found, measured], tmp_path / "plots")
    row = text[text.index("Predicted beside measured") :].splitlines()[6]
    assert row.split("|")[-2].strip() == "2.00"


def test_the_resources_of_compiled_kernels_are_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = (
        '{"triton": "3.9.0", "name": "mask_gradient", "dtype": "bf16", "capability": 90, "warps": 8, "registers": 40, '
        '"stack": 0, "shared": 2048, "elements": 8, "default": true, "wgmma": 0, "loop": 80, "loop_barriers": 0, '
        '"epilogue": 0}'
    )
    monkeypatch.setattr(run, "_compile", lambda _path: line)
    monkeypatch.setattr(run, "_OTHER_TRITON", tmp_path / "not there")
    (found,) = run.compiled()
    # The registers allow six blocks of 256 threads, and the number of threads allows eight.
    assert (found.hardware, found.extra["blocks"], found.extra["loop"]) == ("any hardware", 6, 10.0)
    assert "| mask_gradient, bf16 | sm_90, Triton 3.9.0 | 40 | 0 | 2048 | 6 | 10.0 | - |" in report([found], tmp_path)
