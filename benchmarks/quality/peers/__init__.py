"""Other pruning methods, each written from its paper, for comparison on the same models and calibration samples."""

from collections.abc import Iterable, Iterator

from benchmarks.progress import say
from benchmarks.quality.peers.choice import Peer, obstacle
from benchmarks.quality.peers.flap import flap
from benchmarks.quality.peers.layerwise_obs import layerwise_obs
from benchmarks.quality.peers.llm_pruner import llm_pruner
from benchmarks.quality.peers.wanda_sp import wanda_sp
from gradprune.models import PrunableModel

PEERS: dict[str, Peer] = {
    "FLAP": flap,
    "Wanda-sp": wanda_sp,
    "LLM-Pruner": llm_pruner,
    "layerwise OBS": layerwise_obs,
}
"""The peers, by the names under which they are reported."""


def taking_part(names: Iterable[str], view: PrunableModel) -> Iterator[str]:
    """Yield the names of those peers that can prune the model, and report why each of the others cannot."""
    for name in names:
        fault = obstacle(view, uniform=PEERS[name] is not flap)
        if fault is None:
            yield name
        else:
            say(f"    {name} takes no part: {fault}")
