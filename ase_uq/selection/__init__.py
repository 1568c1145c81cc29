"""Which frames of a pool are worth labelling."""
