"""Choice of the groups to prune: from calibration evidence to masks, without running the model."""
