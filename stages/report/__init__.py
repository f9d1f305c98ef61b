"""What came of the pipeline, side by side: one module per task, driven by `python -m stages.report [TASK]`.

Files are read, nothing is trained; a network may run on the few samples that are shown. What all tasks share:

    results.py      what is read, per task and data set, and standard errors
    comparison.py   the table, as text and as HTML, and what may be concluded from it
    sections.py     curves, figures by class, export, latency, validation, how to reproduce
    samples.py      which samples are shown, and what every model says of one
    page.py         safe HTML, the style, and the page; charts.py and pictures.py draw

A task adds `stages/report/<task>.py`, which has

    METRICS         what stages/evaluate/<task>.py measures, in the order of the columns: {name: results.Metric}
    main_metric     the name of the one that models are compared by: main_metric(group: results.Group) -> str;
                    stages/scores/<task>.py says what it is made from
    BESIDE          another of them that stands beside it, on the test split, where a model has it; None otherwise
    PARITY          the one that exports are checked by: results.Metric
    relatives       methods of students that a model is compared with, the first in the table too, where it is the same
                    for all: relatives(model: results.Model) -> tuple[str, ...]
    ANSWER          column of the samples with what a model answers, if students and teachers are to be compared by it;
                    None otherwise
    size            what goes into a model, in a word: size(interface of its description) -> str
    figures         sections of its own: figures(group: results.Group) -> [(title, page.Html)]
"""
