"""How a student learns: one file per method, driven by `python -m stages.distill STUDENT`."""
