"""Students as ONNX, checked against PyTorch: one module per task, driven by `python -m stages.export STUDENT`.

A task adds `stages/export/<task>.py`, which has

    INPUT, OUTPUTS  names; of inputs the first
    AXES            names of the first input's first dimensions, which may have any size: ("batch",), or more
    FILES           what of the prepared data set travels with the graph, by name, with the key of the interface that
                    holds its sha256
    MEASURED        what `inputs` gives, for whoever reads a latency
    Graph           the network as it is deployed; `shortest` where a length of 1 is too little
    inputs          what the graph is checked and timed with, arrays by name, and what the metric compares with
    answers, metric of outputs
    differences     only where the largest one of each output is not what counts
"""
