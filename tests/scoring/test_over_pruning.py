import torch

from gradprune import PruneConfig
from gradprune.models.masks import GroupMasks
from gradprune.scoring.over_pruning import over_pruned, pruning_distribution, pruning_warning


def masks(mlp_kept: list[int], channels: int = 100) -> GroupMasks:
    kept = tuple(torch.arange(channels) < count for count in mlp_kept)
    return GroupMasks.of_layers(attention=tuple(torch.ones(2, dtype=torch.bool) for _ in mlp_kept), mlp=kept)


def test_a_block_over_90_percent_is_named_if_others_are_under_10() -> None:
    found = pruning_distribution(masks([100, 9, 10, 95]))
    assert found[1].pruned["mlp"] == 0.91
    assert over_pruned(found) == ["layer 1 mlp (91%)"]


def test_no_warning_if_all_layers_lose_the_same_share() -> None:
    uniform = GroupMasks.of_layers(
        attention=tuple(torch.tensor([True, False]) for _ in range(2)),
        mlp=tuple(torch.arange(100) < 5 for _ in range(2)),
    )
    assert over_pruned(pruning_distribution(uniform)) == []
    assert pruning_warning(pruning_distribution(uniform), PruneConfig()) is None


def test_no_warning_if_no_block_loses_under_10_percent() -> None:
    mlp = tuple(torch.arange(100) < count for count in (5, 89))
    without_attention = GroupMasks.of_layers(attention=(torch.empty(0, dtype=torch.bool),) * 2, mlp=mlp)
    assert over_pruned(pruning_distribution(without_attention)) == []


def test_exactly_10_and_90_percent_are_neither_under_nor_over() -> None:
    for count in (10, 20, 30, 70, 90, 110, 1000):
        shares = pruning_distribution(
            GroupMasks.of_layers(mlp=[torch.arange(count) < count * kept // 10 for kept in (1, 9)])
        )
        assert [layer.pruned["mlp"] for layer in shares] == [0.9, 0.1]
    nearly_all, tenth, some = (torch.arange(100) < kept for kept in (1, 90, 91))
    assert over_pruned(pruning_distribution(GroupMasks.of_layers(mlp=[nearly_all, tenth]))) == []
    assert over_pruned(pruning_distribution(GroupMasks.of_layers(mlp=[nearly_all, some]))) == ["layer 0 mlp (99%)"]


def test_a_block_that_never_existed_is_left_out() -> None:
    found = pruning_distribution(
        GroupMasks.of_layers(attention=(torch.empty(0, dtype=torch.bool),), mlp=(torch.ones(3) > 0,))
    )
    assert found[0].pruned["attention"] is None
    assert over_pruned(found) == []


def test_the_advice_begins_with_the_options_that_measured_better() -> None:
    distribution = pruning_distribution(masks([100, 1]))
    steps = [
        ({"temperature": 1.0, "gradient_fix": "normalize", "repair": "none"}, "Try --temperature 0: "),
        ({"gradient_fix": "normalize", "repair": "none"}, "Try --gradient_fix adaptive: "),
        ({"gradient_fix": "normalize+depth:sqrt"}, "Try --gradient_fix adaptive: "),
        ({"gradient_fix": "adaptive", "repair": "none"}, "Try --repair least_squares."),
        ({}, "Let gradprune search choose"),
        ({"importance_method": "wanda"}, "--max_layer_ratio"),
    ]
    for options, advice in steps:
        warning = pruning_warning(distribution, PruneConfig(**options))
        assert advice in warning
        assert "layer 1 mlp (99%)" in warning
        assert "--temperature 1" not in warning
