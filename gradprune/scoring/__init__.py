"""Evidence to masks: which groups go. No model is run."""
