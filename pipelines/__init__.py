"""When and where: flows, records in MLflow, the registry and promotion. Nothing about tensors."""
