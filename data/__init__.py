"""What goes in: reading, preparing, what is expected of it, and batches. One module per task."""
