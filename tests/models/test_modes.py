"""Global state that is changed temporarily."""

import pytest
import torch

from gradprune.models.modes import seeded


def test_seeded_leaves_the_callers_random_numbers_unchanged() -> None:
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(2)
    own = torch.rand(4)
    torch.manual_seed(2)
    with seeded(1):
        assert torch.equal(torch.rand(4), expected)
    assert torch.equal(torch.rand(4), own)


def test_work_on_the_cpu_leaves_the_random_numbers_of_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    monkeypatch.setattr("torch.cuda.manual_seed_all", seeds.append)
    with seeded(1):
        torch.rand(1)
    assert not seeds
