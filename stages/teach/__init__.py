"""Teachers: the ordinary objective of each task, one module per task, driven by `python -m stages.teach TEACHER`."""
