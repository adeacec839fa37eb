"""Several ranks give the result of one process, write it once, and end together."""

import csv
import json
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from gradprune.calibration.engine import ImportanceEngine
from gradprune.calibration.evidence import Evidence
from gradprune.calibration.joined import joined_state
from gradprune.checkpoint.load import load_pruned
from gradprune.config import PruneConfig
from gradprune.errors import ConfigError, GradPruneError
from gradprune.pipeline import _config_of_rank
from gradprune.ranks import ALONE, Ranks, _launcher, in_order
from helpers.commands import QUICK, at_stage, run, signalled
from helpers.launched import run_ranks, start_ranks
from helpers.mixtures import tiny_mixture
from helpers.programs import run_program
from helpers.tiny_models import tiny_ids, tiny_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and a file of token ids."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny_model(channels=24).save_pretrained(folder / "model")
    np.save(folder / "text.npy", tiny_ids(samples=1, tokens=4000).flatten().numpy())
    return folder


def options(name: str, *more: object, **changed: object) -> tuple[object, ...]:
    given = dict(zip(QUICK[:-1:2], QUICK[1:-1:2], strict=True)) | {f"--{key}": value for key, value in changed.items()}
    flat = [word for pair in given.items() for word in pair]
    return ("--base_model", "model", "--dataset", "text.npy", "--output_name", name, *flat, QUICK[-1], *more)


WHOLE = {"stream_layers": "off"}
# With this memory there is about one wave per batch.
STREAMED = {"stream_layers": "on", "stream_memory": "40KB"}


def run_by_torchrun(ranks: int, *command: str, cwd: Path) -> CompletedProcess[str]:
    """Run a file, or a module with "-m", in `ranks` independently started processes to its end."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks))
    return run_program([sys.executable, *launcher, *command], cwd=cwd)


def check_in_ranks(folder: Path, ranks: int, program: str) -> None:
    """Run a program that asserts something in `ranks` independently started processes; none may fail."""
    (folder / "program.py").write_text(program, encoding="utf-8")
    done = run_by_torchrun(ranks, "program.py", cwd=folder)
    assert done.returncode == 0, done.stderr


def experts_one_by_one() -> None:
    """Run experts one by one, because transformers' grouped matrix products do not support fp64; for `prepare`."""
    pytest.MonkeyPatch().setattr(PreTrainedModel, "get_correct_experts_implementation", lambda *_: "eager")


def groups(place: Path, name: str) -> list[dict[str, str]]:
    with (place / "results" / name / "analysis/groups.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_same_result(place: Path, one: str, several: str, model: str = "model") -> None:
    left, right = groups(place, one), groups(place, several)
    assert [row["pruned"] for row in left] == [row["pruned"] for row in right]
    assert "1" in {row["pruned"] for row in left} or "True" in {row["pruned"] for row in left}
    evidence = [
        Evidence.load(place / "results" / name / "analysis/evidence.safetensors", load_pruned(place / model))
        for name in (one, several)
    ]
    assert evidence[0].components.keys() == evidence[1].components.keys()
    for name, values in evidence[0].components.items():
        torch.testing.assert_close(evidence[1].components[name], values, rtol=1e-12, atol=0.0)
    assert evidence[0].steps == evidence[1].steps
    assert evidence[0].priors.keys() == evidence[1].priors.keys()


@pytest.mark.parametrize(
    ("world", "model", "method", "changed"),
    [
        (2, "model", "group_fisher", {"num_samples": 22}),  # batches of 4, 4, 4, 4, 4 and 2 samples
        (3, "model", "taylor_2nd", {"num_samples": 14, "temperature": 1, "collect_batches": 3}),
        (3, "model", "obs", {"num_samples": 8}),  # the last rank has no batch
        (2, "model", "obs", {"num_samples": 4, "held_out_samples": 4}),  # the last rank has no held-out batch either
        (2, "model", "obs", {"num_samples": 12, "shots": 2}),
        (2, "experts", "obs", {"num_samples": 10, "pruning_ratio": 0.3}),
        # The second rank's share is one sample of three tokens.
        (2, "experts", "obs", {"num_samples": 3, "batch_size": 2, "seq_len": 3, "pruning_ratio": 0.3}),
    ],
)
def test_ranks_prune_the_same_groups_as_one_process(
    place: Path, world: int, model: str, method: str, changed: dict[str, object]
) -> None:
    """The result is the same with the whole model in each rank and with streamed layers."""
    tiny_mixture().save_pretrained(place / "experts")
    given = {"importance_method": method, "base_model": model, **changed}
    one = f"{model}-{method}-{changed['num_samples']}"
    code, said = run(place, "prune", *options(one, **given), prepare=experts_one_by_one)
    assert code == 0, said
    for name, how in ((f"{one}-{world}", WHOLE), (f"{one}-{world}-streamed", STREAMED)):
        prepare = dict.fromkeys(range(world), experts_one_by_one)
        ended = run_ranks(place, world, "prune", *options(name, **given, **how), prepare=prepare)
        assert [code for code, _ in ended] == [0] * world, ended
        assert f"results/{name}/model" in ended[0][1]
        assert not any(said for _, said in ended[1:])
        assert_same_result(place, one, name, model)


def test_experts_are_repaired_from_the_tokens_of_all_ranks(place: Path) -> None:
    """The repair is the same whole and streamed; the first rank has six of the samples, the second one four."""
    tiny_mixture().float().save_pretrained(place / "mixture")
    changed = {"base_model": "mixture", "num_samples": 10, "held_out_samples": 8, "pruning_ratio": 0.3}
    # There is no distillation, because its steps amplify differences in the last bits.
    changed["distill_samples"] = 0
    code, said = run(place, "prune", *options("mixture-one", **changed))
    assert code == 0, said

    def weights(name: str) -> dict[str, torch.Tensor]:
        return load_file(place / "results" / name / "model/model.safetensors")

    def repairs(name: str) -> list[dict[str, object]]:
        return json.loads((place / "results" / name / "analysis/summary.json").read_text())["repair"]

    assert {repair["kind"] for repair in repairs("mixture-one")} == {"attention", "expert_channels"}
    for name, how in (("mixture-2", WHOLE), ("mixture-2-streamed", STREAMED)):
        ended = run_ranks(place, 2, "prune", *options(name, **changed, **how))
        assert [code for code, _ in ended] == [0, 0], ended
        assert [row["pruned"] for row in groups(place, name)] == [row["pruned"] for row in groups(place, "mixture-one")]
        torch.testing.assert_close(weights(name), weights("mixture-one"), rtol=1e-3, atol=1e-4)
        assert [repair["ridge"] for repair in repairs(name)] == [repair["ridge"] for repair in repairs("mixture-one")]


def test_parts_are_joined_in_order_by_independently_started_processes(place: Path) -> None:
    """The ranks are started by torchrun: forked ones would draw the same random order of a file's tensors."""
    program = (
        "import torch\n"
        "from gradprune.ranks import launched\n"
        "with launched() as ranks:\n"
        "    found = ranks.joined([torch.tensor(k) for k in ranks.share(range(24))])\n"
        "    assert [int(each) for each in found] == list(range(24)), found\n"
    )
    check_in_ranks(place, 2, program)


def test_a_search_by_two_ranks_chooses_the_same_as_one_process(place: Path) -> None:
    changed = {"num_samples": 8, "held_out_samples": 8}
    code, said = run(place, "search", *options("search-one", **changed))
    assert code == 0, said
    ended = run_ranks(place, 2, "search", *options("search-2", **changed))
    assert [code for code, _ in ended] == [0, 0], ended
    assert_same_result(place, "search-one", "search-2")
    chosen = [[line for line in text.splitlines() if line.startswith("Chosen")] for text in (said, ended[0][1])]
    assert chosen[0] == [line.replace("search-2", "search-one") for line in chosen[1]] != []


def test_the_same_ranks_give_the_same_bytes_twice(place: Path) -> None:
    for name in ("once", "twice"):
        assert [code for code, _ in run_ranks(place, 2, "prune", *options(name))] == [0, 0]
    for file in ("model/model.safetensors", "analysis/groups.csv", "analysis/evidence.safetensors"):
        contents = [(place / "results" / name / file).read_bytes() for name in ("once", "twice")]
        assert contents[0] == contents[1], file


def test_perplexity_is_the_same_to_the_last_digit(place: Path) -> None:
    command = ("eval", "--model", "model", "--dataset", "text.npy", "--seq_len", 16, "--batch_size", 3, "--json")
    ended = run_ranks(place, 3, *command)
    assert ended == [run(place, *command), (0, ""), (0, "")]


def test_diagnose_prints_the_same_as_in_one_process(place: Path) -> None:
    command = ("--quiet", "diagnose", "--base_model", "model", "--dataset", "text.npy", "--seq_len", 16, "--json")
    ended = run_ranks(place, 2, *command, "--num_samples", 12, "--batch_size", 4)
    assert ended == [run(place, *command, "--num_samples", 12, "--batch_size", 4), (0, "")]


def fail() -> None:
    raise GradPruneError("disk: it is gone")


def test_a_rank_that_fails_ends_all_with_its_error_in_one_line(place: Path) -> None:
    ended = run_ranks(
        place, 3, "--quiet", "prune", *options("failed", num_samples=12), prepare={1: at_stage("repair", fail)}
    )
    assert [code for code, _ in ended] == [2, 2, 2]
    assert ended[0][1].startswith("error: rank 1: disk: it is gone")
    assert [said.count("\n") for _, said in ended] == [1, 0, 0]
    assert not (place / "results/failed").exists()


def test_an_error_of_all_ranks_is_reported_once(place: Path) -> None:
    ended = run_ranks(place, 2, "prune", *options("wrong", pruning_ratio=1.5))
    assert [code for code, _ in ended] == [2, 2]
    assert ended[0][1].startswith("error: pruning_ratio")
    assert ended[0][1].count("\n") == 1
    assert ended[1][1] == ""


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_others(place: Path, killed: int) -> None:
    prepare = {killed: at_stage("repair", signalled(signal.SIGKILL))}
    ended = run_ranks(place, 3, "--quiet", "prune", *options(f"killed-{killed}", num_samples=12), prepare=prepare)
    assert [code for code, _ in ended] == [-signal.SIGKILL if rank == killed else 2 for rank in range(3)]
    assert_lost_in_one_line(ended)
    assert not (place / f"results/killed-{killed}").exists()


def test_a_hung_rank_ends_the_others_after_the_time_limit(place: Path) -> None:
    """Rank 0, which normally reports errors, hangs; torchrun would kill it once the others have ended."""
    arguments = "--quiet", "prune", *options("hung", num_samples=12)
    hung, *others = start_ranks(place, 3, *arguments, prepare={0: at_stage("repair", signal.pause)}, timeout=5.0)
    ended = [process.wait() for process in others]
    os.kill(hung.pid, signal.SIGKILL)
    assert hung.wait() == (-signal.SIGKILL, "")
    assert [code for code, _ in ended] == [2, 2]
    assert_lost_in_one_line(ended)
    assert "did not answer within 5 seconds" in "".join(said for _, said in ended)


def test_an_error_is_reported_even_if_the_other_ranks_are_dead(place: Path) -> None:
    prepare = {0: at_stage("repair", fail), 1: at_stage("repair", signalled(signal.SIGKILL))}
    ended = run_ranks(place, 2, "--quiet", "prune", *options("both"), prepare=prepare)
    assert [code for code, _ in ended] == [2, -signal.SIGKILL]
    assert ended[0][1].startswith("error: disk: it is gone")
    assert [said.count("\n") for _, said in ended] == [1, 0]


def assert_lost_in_one_line(ended: list[tuple[int, str]]) -> None:
    said = [said for _, said in ended if said]
    assert len(said) == 1, ended
    assert re.fullmatch(r"error: ranks: rank \d lost the others: .*\n", said[0])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("prune", "--checkpoint_every", 4), "checkpoint_every: "),
        (("prune", "--reduction", "batch"), "reduction: 'batch' keeps"),
        (("info",), "info: runs in one process only"),
    ],
)
def test_what_needs_one_process_is_refused(place: Path, command: tuple[object, ...], message: str) -> None:
    given = options("refused") if command[0] == "prune" else ()
    ended = run_ranks(place, 2, command[0], *given, *command[1:])
    assert [code for code, _ in ended] == [2, 2]
    assert f"error: {message}" in ended[0][1]
    assert ended[1][1] == ""


@pytest.mark.parametrize(
    ("command", "own", "message"),
    [
        ("prune", ("--seed", 5), "seed: is 0 in rank 0 and 5 in rank 1"),
        ("prune", ("--importance_method", "taylor"), "importance_method: is obs in rank 0 and taylor in rank 1"),
        ("prune", ("--pruning_ratio", "0.1,0.3"), "pruning_ratio: is 0.2 in rank 0 and [0.1, 0.3] in rank 1"),
        ("prune", ("--dataset", "other.npy"), "dataset: is content "),
        ("prune", ("--eval_dataset", "other.npy"), "eval_dataset: is content "),
        ("prune", ("--base_model", "other"), "base_model: is content "),
        ("diagnose", ("--dataset", "other.npy"), "dataset: is content "),
        ("diagnose", ("--seq_len", "8,16"), "seq_len: is 16 in rank 0 and [8, 16] in rank 1"),
        ("eval", ("--dataset", "other.npy"), "dataset: is content "),
        ("eval", ("--model", "other"), "model: is content "),
        ("eval by default", ("--protocol", "wikitext2-128"), "protocol: is None in rank 0 and wikitext2-128 in rank 1"),
    ],
)
def test_ranks_that_differ_are_refused(place: Path, command: str, own: tuple[object, ...], message: str) -> None:
    tiny_model(seed=1, channels=24).save_pretrained(place / "other")
    np.save(place / "other.npy", np.load(place / "text.npy")[::-1])
    given = {
        "prune": options("different", eval_dataset="text.npy"),
        "diagnose": ("--base_model", "model", "--dataset", "text.npy", "--seq_len", 16, "--num_samples", 4),
        "eval": ("--model", "model", "--dataset", "text.npy", "--seq_len", 16),
        "eval by default": ("--model", "model", "--dataset", "text.npy"),
    }[command]
    ended = run_ranks(place, 2, "--quiet", command.split()[0], *given, own={1: own})
    assert [code for code, _ in ended] == [2, 2], ended
    assert ended[0][1].startswith(f"error: {message}")
    assert ended[0][1].endswith("; give all ranks the same\n")
    assert ended[1][1] == ""
    assert not (place / "results/different").exists()


def test_ranks_may_read_the_same_content_under_other_names(place: Path) -> None:
    shutil.copytree(place / "model", place / "copied", dirs_exist_ok=True)
    shutil.copy(place / "text.npy", place / "copied.npy")
    own = ("--base_model", "copied", "--dataset", "copied.npy", "--stream_layers", "on")
    ended = run_ranks(place, 2, "prune", *options("renamed"), own={1: own})
    assert [code for code, _ in ended] == [0, 0], ended


def test_torchrun_can_start_the_command(place: Path) -> None:
    ended = run_by_torchrun(2, "-m", "gradprune", "prune", *map(str, options("torchrun")), cwd=place)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("results/torchrun/model") == 1
    assert (place / "results/torchrun/model/model.safetensors").is_file()


def test_shares_are_put_back_in_order() -> None:
    for world in (1, 2, 3, 5):
        assert in_order([range(7)[rank::world] for rank in range(world)]) == list(range(7))
    assert ALONE.joined_json([1, 2]) == [1, 2]


def test_a_joined_state_equals_the_state_of_one_engine() -> None:
    parts = [*tiny_ids(samples=7).split(3)]

    def state(batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        engine = ImportanceEngine(tiny_model(), "taylor", backend="reference")
        with engine:
            for batch in batches:
                engine.step(batch)
        return engine.state()

    whole, joined = state(parts), joined_state([state(parts[rank::4]) for rank in range(4)], parts)
    assert whole.keys() == joined.keys()
    for name, value in whole.items():
        torch.testing.assert_close(joined[name], value, rtol=1e-13, atol=0.0)


def test_large_tensors_are_added_in_the_order_of_the_ranks(place: Path) -> None:
    """All three ranks get the sum, in three pieces; the last one's summand would be rounded away if it came first."""
    program = (
        "import torch\n"
        "from gradprune.ranks import launched, process_group\n"
        "process_group.PIECE = 64\n"
        "numbers = torch.arange(1.0, 22.0, dtype=torch.float64).view(3, 7).T\n"
        "with launched() as ranks:\n"
        "    own = numbers * (1e16, -1e16, 1.0)[ranks.rank]\n"
        "    assert torch.equal(ranks.sum(own), numbers), ranks.sum(own)\n"
    )
    check_in_ranks(place, 3, program)


class _ThreeRanks(Ranks):
    """Three ranks; the first two state the same values, and the third one states another seed."""

    world = 3

    def gather_json(self, value: dict[str, int]) -> list[dict[str, int]]:
        return [value, value, {**value, "seed": 7}]


def test_every_rank_is_compared_with_the_first() -> None:
    with pytest.raises(ConfigError, match="seed: is 0 in rank 0 and 7 in rank 2; give all ranks the same"):
        _ThreeRanks().check_same({"num_samples": 4, "seed": 0})


def test_only_the_leading_rank_writes_and_measures_speed() -> None:
    config, first, second = PruneConfig(output_name="x", measure_speed=True), _ThreeRanks(), _ThreeRanks()
    second.rank = 1
    assert _config_of_rank(config, first) == config
    assert _config_of_rank(config, second) == replace(config, output_name=None, measure_speed=False)


@pytest.mark.parametrize(("rank", "order"), [(0, ["act", "met"]), (1, ["met", "act"])])
def test_the_leading_rank_acts_before_the_others(rank: int, order: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    ranks = Ranks()
    ranks.rank, ranks.world = rank, 2
    monkeypatch.setattr(ranks, "gather_json", lambda _value: events.append("met"))
    ranks.after_lead(lambda: events.append("act"))
    assert events == order


@pytest.mark.parametrize(
    ("launched_as", "expected"),
    [
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4, 3)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "3"}, None),
    ],
)
def test_a_rank_knows_its_place_in_the_job_and_on_its_machine(
    launched_as: dict[str, str], expected: tuple[int, int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", **launched_as}.items():
        monkeypatch.setenv(name, value)
    assert _launcher() == expected
