"""Evaluation of a model: perplexity, zero-shot accuracy, size and speed."""
