"""What came of the pipeline, side by side: one module per task, driven by `python -m stages.report [TASK]`.

Files are read, nothing is trained; a network may run on the few samples that are shown. What all tasks share:

    results.py      what is read, per task and data set, and standard errors
    comparison.py   the table, as text and as HTML, and what may be concluded from it
    sections.py     curves, figures by class, export, latency, validation, how to reproduce
    page.py         safe HTML, the style, and the page; charts.py and pictures.py draw

A task adds `stages/report/<task>.py`, which has

    METRICS         what stages/evaluate/<task>.py measures, in the order of the columns: {name: results.Metric}
    MAIN_METRIC     the name of the one that models are compared by; stages/scores/<task>.py says what it is made from
    size            what goes into a model, in a word: size(interface of its description) -> str
    figures         sections of its own: figures(group: results.Group) -> [(title, page.Html)]
"""
