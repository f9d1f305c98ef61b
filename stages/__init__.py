"""What happens: one module or package per stage of dvc.yaml. `python -m stages.NAME KEY` runs one."""
