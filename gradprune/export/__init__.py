"""MODEL -> ANOTHER PROGRAM'S FILE. One file per format."""
