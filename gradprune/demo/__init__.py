"""The built-in default model and text: a small model, trained on text that comes with every Python installation."""

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
