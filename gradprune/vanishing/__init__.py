"""Vanishing gradients: diagnosis across layers, and scaling that makes layers' gradients comparable."""
