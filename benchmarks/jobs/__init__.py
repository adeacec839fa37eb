"""What whole jobs cost."""
