"""MODEL -> ANOTHER PROGRAM'S FILE. Export to GGUF, and what `--serve` checks and writes."""
