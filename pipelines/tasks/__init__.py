"""What the registry has to know of a task, one module each: what a caller sends, and how an ONNX file is evaluated.

REQUEST, signature(description), example(description)      what a caller sends and gets
FILES               what is served beside the ONNX file, each with the field of `interface` that holds its sha256
REQUIREMENTS        packages that a server needs beyond those of every task
TESTED              settings under `tasks` on which it depends what is tested; none where that is the samples alone
evaluate(files, description, prepared)          what a version answers to today's test data
"""
