"""Programs that make what is under `figures/`; each is a subcommand of `minidistill` too.

    quickstart.py   the two-minute tour: a ring and real digits, distilled to one step
    cifar10.py      the run book: teacher and students on CIFAR-10, within minutes of a GPU or hours of a laptop;
                    beside it its settings, records, speed and quality
    sweep.py        the long experiments of the notebooks on objectives, over several seeds
    digits.py       every objective on real digits, over several seeds
    rows.py         how the last two keep their rows
    classifier.py   the stored CIFAR-10 classifier, made again
    soft_labels.py  many small classifiers at once, which learn from labels or from logits
    spawned.py      what their worker processes must not do
"""

