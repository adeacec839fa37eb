"""Text to windows: datasets, tokenising, sampling."""
