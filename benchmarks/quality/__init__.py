"""How good the pruned models are."""
