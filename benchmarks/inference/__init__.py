"""How fast the pruned models are."""
