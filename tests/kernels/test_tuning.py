"""The choice among configurations, with stand-ins for the GPU, its kernels and its clock."""

from types import SimpleNamespace

import pytest
import torch
import triton

from gradprune.kernels import tuning

# Milliseconds that a launch takes; None: it requires more shared memory than the device has.
TIMES = {"default": 3.0, "fast": 1.0, "slow": 9.0, "large": None}


def launch(config: str) -> float:
    if TIMES[config] is None:
        raise triton.OutOfResources(131072, 101376, "shared memory")
    return TIMES[config]


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch):
    """A function that chooses the fastest of the given configurations on a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a GPU")
    monkeypatch.setattr(tuning, "_milliseconds", lambda launched: launched())
    monkeypatch.setattr(tuning, "_chosen", {})
    tensor = SimpleNamespace(is_cuda=True, device="cuda:0", dtype=torch.bfloat16)
    return lambda *configs: tuning.fastest(configs, launch, tensor, 4096)


@pytest.mark.parametrize("configs", [("default", "slow", "fast"), ("default", "large", "fast")])
def test_the_fastest_that_fits_the_device_is_chosen(configs: tuple[str, ...], chosen) -> None:
    assert chosen(*configs) == "fast"


def test_the_default_is_chosen_if_no_other_fits(chosen) -> None:
    assert chosen("default", "large", "large") == "default"


def test_a_default_that_does_not_fit_raises(chosen) -> None:
    with pytest.raises(triton.OutOfResources, match="shared memory"):
        chosen("large", "fast")


def test_a_choice_is_remembered(chosen, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen("default", "fast") == "fast"
    monkeypatch.setitem(TIMES, "fast", 5.0)
    assert chosen("default", "fast") == "fast"
