"""Speed of the pruned models."""
