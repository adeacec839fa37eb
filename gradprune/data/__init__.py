"""Text to windows of tokens: datasets, tokenisation and sampling."""
