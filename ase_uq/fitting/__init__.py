"""From labelled frames to an uncertainty model."""
