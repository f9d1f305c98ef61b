"""What the registry has to know of a task, one module each: what a caller sends, and how an ONNX file is evaluated."""
