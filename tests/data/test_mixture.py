"""Names and weights of a mixture of datasets, and which tokens of each dataset it takes."""

import pytest
import torch

from gradprune.data.mixture import mixed, split_names


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("a.txt", [("a.txt", 1.0)]),
        ("a.txt:3, b.txt", [("a.txt", 3.0), ("b.txt", 1.0)]),
        ("C:/a.txt,c4:0.5", [("C:/a.txt", 1.0), ("c4", 0.5)]),
        ("C:/a.txt:2,c4", [("C:/a.txt", 2.0), ("c4", 1.0)]),
    ],
)
def test_a_mixture_is_split_into_names_and_weights(dataset: str, expected: list[tuple[str, float]]) -> None:
    """A missing weight is 1, a space after a comma is ignored, and a name may contain a colon."""
    assert split_names(dataset) == expected


@pytest.mark.parametrize("weight", ["-1", "inf", "0", "nan"])
def test_a_weight_that_is_not_finite_and_positive_is_refused(weight: str) -> None:
    with pytest.raises(ValueError, match=f"the weight of 'b.txt', {weight}, is not a finite number above 0"):
        split_names(f"a.txt,b.txt:{weight}")


def test_a_mixture_takes_the_first_tokens_of_each_dataset() -> None:
    """The last tenth of each dataset's part is at the end, in the order of the datasets."""
    first, second = torch.arange(100), torch.arange(1000, 1020)
    found = mixed([first, second], [2.0, 1.0])
    assert found.tolist() == [*range(36), *range(1000, 1018), *range(36, 40), 1018, 1019]


def test_a_dataset_with_a_tiny_weight_gives_one_token() -> None:
    found = mixed([torch.arange(100), torch.arange(1000, 1020)], [1.0, 1e-6])
    assert found[-11:].tolist() == [1000, *range(90, 100)]
