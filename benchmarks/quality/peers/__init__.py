"""Other pruning methods, each written from its paper, to compare with on the same models and calibration samples."""

from benchmarks.quality.peers.choice import Peer
from benchmarks.quality.peers.flap import flap
from benchmarks.quality.peers.layerwise_obs import layerwise_obs
from benchmarks.quality.peers.llm_pruner import llm_pruner
from benchmarks.quality.peers.wanda_sp import wanda_sp

PEERS: dict[str, Peer] = {
    "FLAP": flap,
    "Wanda-sp": wanda_sp,
    "LLM-Pruner": llm_pruner,
    "layerwise OBS": layerwise_obs,
}
"""By the name under which they are reported."""
