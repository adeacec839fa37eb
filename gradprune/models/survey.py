"""Survey which models of the installed transformers are tested, pass the self-test, or are refused, and why.

To update the documentation: python -m gradprune.models.survey > docs/architectures.md
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import transformers

from gradprune.errors import one_line
from gradprune.models.modeling_gradprune import CLASSES_BY_AUTO, class_names
from gradprune.models.self_test import SelfTest, quiet, self_test
from gradprune.models.tested import LEFT_WHOLE, TESTED

Status = Literal["tested", "self-test", "refused"]


@dataclass(frozen=True)
class Support:
    """How well one architecture is supported.

    pruned: the kinds of blocks that can be pruned. whole: by kind, why it is left whole, or under "model" why the
    architecture is refused.
    """

    architecture: str
    status: Status
    pruned: tuple[str, ...]
    whole: dict[str, str]


def survey() -> Iterator[Support]:
    """Yield the support of every causal LM and vision-language model of the installed transformers, alphabetically.

    The whole survey takes a minute or two.
    """
    for architecture in sorted(set().union(*CLASSES_BY_AUTO.values())):
        yield support(architecture)


def support(architecture: str) -> Support:
    """Return the support of an architecture, a `config.model_type`; if needed, its default configuration is tested."""
    if architecture in TESTED:
        complete = {"attention", "mlp"} <= set(TESTED[architecture])
        # The result for "model" is dropped, because some default configurations describe no valid model.
        found = {} if complete else _self_tested(architecture).refused
        whole = {kind: reason for kind, reason in found.items() if kind != "model"}
        whole |= LEFT_WHOLE.get(architecture, {})
        return Support(architecture, "tested", TESTED[architecture], whole)
    result = _self_tested(architecture)
    return Support(architecture, "self-test" if result.accepted else "refused", result.accepted, result.refused)


def _self_tested(architecture: str) -> SelfTest:
    try:
        with quiet():
            config: Any = getattr(transformers, class_names(architecture)["AutoConfig"])()
    except Exception as error:  # a configuration that has required values, or needs a package
        return SelfTest((), {"model": f"it has no default configuration: {one_line(error)}"})
    return self_test(config)


def markdown() -> str:
    """Return the text of `docs/architectures.md`."""
    rows = list(survey())
    counts = {status: sum(row.status == status for row in rows) for status in ("tested", "self-test", "refused")}
    head = f"""# Architectures

All causal LMs and vision-language models of transformers {transformers.__version__}, as `gradprune info
--architectures` lists them. *tested*: the test suite prunes, saves and reloads them. *self-test*: they are pruned if a
tiny random model of the given configuration passes the self-test (*masked = cut*), as the default configuration did
here. *refused*: they are not pruned; the last column says what failed. Here {counts["tested"]} are tested,
{counts["self-test"]} pass the self-test, {counts["refused"]} are refused.

In a vision-language model only the decoder is pruned, by calibration on text. In a mixture of experts, the channels of
the routed experts are pruned, the same number in every expert of every layer, or, with `--prune_kinds`, whole experts,
the same number in every layer. Attention, shared experts and the MLPs of layers without experts are pruned as well, and
the result is always a plain checkpoint.

| architecture | status | pruned | left whole or refused because |
|---|---|---|---|
"""
    return head + "".join(f"| {' | '.join(cells(row))} |\n" for row in rows)


def cells(row: Support) -> tuple[str, str, str, str]:
    """Return the cells of a table row: architecture, status, pruned kinds, and why others are left whole."""
    whole = "; ".join(f"{kind}: {reason}" for kind, reason in row.whole.items())
    if len(whole) > _LONGEST:
        whole = whole[: _LONGEST - 3] + "..."
    return row.architecture, row.status, ", ".join(row.pruned), whole.replace("|", "/")


_LONGEST = 160

if __name__ == "__main__":
    print(markdown(), end="")
