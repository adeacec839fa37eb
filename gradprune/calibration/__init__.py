"""Windows to evidence: one backward pass a batch, and what it leaves."""
