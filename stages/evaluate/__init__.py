"""How good every model of a task is: one module per task, driven by `python -m stages.evaluate TASK`."""
