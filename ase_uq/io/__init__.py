"""Files: reading and writing frames, the labels in them, and the package's own tensor files."""
