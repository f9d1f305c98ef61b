"""What the registry has to know of a task, one module each: how it scores a sample, and what a caller sends."""
