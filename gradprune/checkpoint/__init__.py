"""Checkpoints: loaded from safetensors or GGUF files, written as safetensors, whole or not at all."""
