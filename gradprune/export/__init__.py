"""MODEL -> ANOTHER PROGRAM'S FILE. GGUF, and what `--serve` writes."""
