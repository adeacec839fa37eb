import pytest
import torch

from gradprune.config import PruneConfig
from gradprune.errors import OutOfMemoryError
from gradprune.memory import memory_advice
from gradprune.progress import Clock

CPU = "[enforce fail at alloc_cpu.cpp:127] can't allocate memory: you tried to allocate 4096 bytes."
CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB."


def advice_for(error: Exception, stage: str = "calibration", **options) -> str:
    clock = Clock()

    def fail() -> None:
        with memory_advice(clock, PruneConfig(**options)), clock.stage(stage):
            raise error

    with pytest.raises(OutOfMemoryError) as found:
        fail()
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize(
    ("error", "needed"),
    [
        (RuntimeError(CPU), "another 4096 bytes"),
        (torch.OutOfMemoryError(CUDA), "another 20.00 GiB"),
        (MemoryError(), ""),
        (RuntimeError("could not create a primitive"), ""),
    ],
)
def test_out_of_memory_says_what_ran_what_it_needed_and_what_would_need_less(error: Exception, needed: str) -> None:
    message = advice_for(error)
    assert message.startswith("memory: calibration ran out of memory")
    assert needed in message
    order = ["--batch_size 2", "--use_gradient_checkpointing", "--no_measure_speed", "--dtype bfloat16"]
    assert sorted(order, key=message.index) == order


def test_only_options_that_are_not_yet_given_are_advised() -> None:
    given = {
        "use_gradient_checkpointing": True,
        "measure_speed": False,
        "dtype": "bfloat16",
        "batch_size": 1,
        "stream_layers": "on",
    }
    assert advice_for(MemoryError(), device="cpu", **given).endswith("a machine with more memory")
    assert "--seq_len 512" in advice_for(MemoryError(), seq_len=1024, **given)
    assert "--repair none" in advice_for(MemoryError(), "repair")
    assert "--distill_samples 0" in advice_for(MemoryError(), "distillation")
    assert "--importance_method group_fisher" in advice_for(MemoryError(), "importance", importance_method="obs")
    assert "--importance_method" not in advice_for(MemoryError(), "importance", importance_method="wanda")
    assert "--stream_layers on" in advice_for(MemoryError(), "repair")
    assert "--stream_layers on" not in advice_for(MemoryError(), reduction="batch")


def test_a_smaller_batch_is_said_to_give_the_same_result_unless_it_depends_on_batches() -> None:
    assert "--batch_size 2 (the same result)" in advice_for(MemoryError())
    assert "--batch_size 2 (a different result)" in advice_for(MemoryError(), reduction="batch")
    # The model generates different text in different batches, and cannot generate while it is streamed.
    own_text = advice_for(MemoryError(), own_text=0.5)
    assert "--batch_size 2 (a different result)" in own_text
    assert "--stream_layers" not in own_text


def test_another_error_stays_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_advice(Clock(), PruneConfig()):
        raise RuntimeError("shapes do not match")


def test_a_real_allocation_that_is_too_large_is_reported() -> None:
    with pytest.raises(OutOfMemoryError, match="needed another"), memory_advice(Clock(), PruneConfig()):
        torch.empty(2**60, dtype=torch.uint8)
