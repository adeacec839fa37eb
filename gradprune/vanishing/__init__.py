"""How the layers' gradients differ, and scales that even them out."""
