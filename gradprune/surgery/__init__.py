"""Masks to a smaller model: masking, re-solving the weights that stay, cutting."""
