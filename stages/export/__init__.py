"""Students as ONNX, checked against PyTorch: one module per task, driven by `python -m stages.export STUDENT`."""
