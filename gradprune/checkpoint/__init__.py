"""Checkpoints: loaded from safetensors or GGUF files, written as safetensors files, completely or not at all."""
