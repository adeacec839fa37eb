"""What a run leaves for people and programs: folder, tables, charts, plots."""
