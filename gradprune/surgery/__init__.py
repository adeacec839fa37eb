"""From masks to a smaller model: masking, repairing (re-solving) the remaining weights, cutting, distilling."""
