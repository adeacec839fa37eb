"""Vanishing gradients: diagnosis across layers, and scaling that evens them out."""
