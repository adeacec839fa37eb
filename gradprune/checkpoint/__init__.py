"""Loading and saving, whole or not at all. Only safetensors, never a pickle."""
