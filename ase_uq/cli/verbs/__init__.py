"""One file a verb of the command line; each turns arguments into one call of the library."""
