"""What memory a run used."""
