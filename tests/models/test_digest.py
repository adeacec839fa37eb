import copy

import pytest
import torch

from gradprune.models import digest
from gradprune.models.digest import model_digest, tensors_digest
from helpers.tiny_models import tiny_model


def test_equal_models_have_equal_digests(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    expected = model_digest(model)
    again = copy.deepcopy(model).train().requires_grad_(False)
    again.config._name_or_path = "elsewhere"
    again.config.transformers_version = "9.9"
    assert model_digest(again) == expected
    monkeypatch.setattr(digest, "_CHUNK", 7)
    assert model_digest(model) == expected


@pytest.mark.parametrize("name", [name for name, _ in tiny_model().named_parameters()])
def test_every_weight_counts(name: str) -> None:
    model = tiny_model()
    expected = model_digest(model)
    with torch.no_grad():
        values = model.get_parameter(name).flatten()
        values[-1] = torch.nextafter(values[-1], torch.tensor(9.0, dtype=values.dtype))
    assert model_digest(model) != expected


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1e-5}, {"rope_theta": 5.0}, {"hidden_act": "gelu"}])
def test_the_configuration_counts(change: dict[str, object]) -> None:
    model = tiny_model()
    expected = model_digest(model)
    for name, value in change.items():
        setattr(model.config, name, value)
    assert model_digest(model) != expected


def test_shapes_and_dtypes_count() -> None:
    zeros = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(6), torch.zeros(2, 3, dtype=torch.int32), torch.zeros(0)]
    assert len({tensors_digest([tensor]) for tensor in zeros}) == len(zeros)
    assert tensors_digest([torch.ones(3, 2).T]) == tensors_digest([torch.ones(2, 3)])
