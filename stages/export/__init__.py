"""Students as ONNX, checked against PyTorch: one module per task, driven by `python -m stages.export STUDENT`.

A task adds `stages/export/<task>.py`, which has

    INPUT, OUTPUTS  names
    AXES            names of the input's first dimensions, which may have any size: ("batch",), or more
    FILES           what of the prepared data set travels with the graph, by name, with the key of the interface that
                    holds its sha256
    MEASURED        what `inputs` gives, for whoever reads a latency
    Graph           the network as it is deployed
    inputs          what the graph is checked and timed with, and what the metric compares with
    answers, metric of outputs
"""
