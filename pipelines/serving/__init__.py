"""What a registered student runs as: one self-contained module per task, which imports nothing of this project."""
