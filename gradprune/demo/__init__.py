"""The built-in default: text that comes with every Python installation, and a small model trained on it."""

from gradprune.data.embedded import EmbeddedText, embedded_text
from gradprune.demo.model import byte_tokenizer, demo_model_path, unigram_perplexity
from gradprune.demo.training import DemoTraining

__all__ = [
    "DemoTraining",
    "EmbeddedText",
    "byte_tokenizer",
    "demo_model_path",
    "embedded_text",
    "unigram_perplexity",
]
