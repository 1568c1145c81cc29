"""Files: frames read and written, the labels in them, and the package's own tensor files."""
