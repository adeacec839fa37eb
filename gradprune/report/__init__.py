"""The output of a run: results folder, tables, charts and plots."""
