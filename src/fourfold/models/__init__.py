"""Loading any checkpoint, and what is known of each model family."""
