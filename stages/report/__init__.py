"""What came of the pipeline, side by side: one module per task, driven by `python -m stages.report [TASK]`.

Files are read, nothing is trained or evaluated. What all tasks share stands in four modules:

    results.py      what is read, per task and data set, and standard errors
    comparison.py   the table, as text and as HTML, and what may be concluded from it
    sections.py     curves, export, latency, validation, how to reproduce
    page.py         safe HTML, the style, and the page; charts.py draws lines and the chain of teachers

A task adds `stages/report/<task>.py`, which has

    METRICS         what stages/evaluate/<task>.py measures, in the order of the columns: {name: results.Metric}
    MAIN_METRIC     the name of the one that models are compared by
    PER_SAMPLE      the column of <model>.samples.csv whose mean is the main metric, or None if it is no mean
    size            what goes into a model, in a word: size(interface of its description) -> str
    figures         sections of its own: figures(group: results.Group) -> [(title, page.Html)]
"""
