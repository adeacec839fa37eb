"""Evidence to masks: which groups are pruned. No model is run."""
