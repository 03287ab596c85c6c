"""The trainer, its callbacks and the run folder."""
