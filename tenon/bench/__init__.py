"""The harness: contenders measured against each other so that the ratio can be believed.

Each contender runs in a process of its own with the same number of threads. A *cell* is one setting; in each *round*
of a cell every contender is sampled once, in an order drawn from the run's seed, so that drift of the machine falls on
all alike and sample i of two contenders form a pair. One contender runs twice: where the two copies differ by more
than 5 %, the result is marked as not counting. Read bandwidth and matrix-product rate are measured in the same run.

A bench is one script, ``bench/NAME.py``, of plain names:

``TITLE: str``
    What is measured, in one line.
``CONTENDERS: dict[str, ContenderEntry]``
    Name to ``ContenderEntry("bench.NAME:Class", options)``. The first is ours, and runs twice (A/A).
``BASELINE: str``
    The contender that ratios are taken over.
``LIMITS: bool``
    Whether the physical limits are measured in this run.
``cells(quick: bool) -> list[Cell]``
    What to measure; ``quick`` asks for the few that show it works.
``checks(result: Result) -> list[Check]``
    The claims, from ``result.median``, ``result.ratio``, ``result.limit`` and ``at_most`` / ``at_least`` of
    :mod:`tenon.base.result`. A quick result has only the quick cells: ask ``result.settings["quick"]``.

A contender is a class, made with its options as keyword arguments::

    class Tenon:
        def setup(self, cell: dict[str, Any]) -> None: ...   # the cell's params; loading and warming belong here
        def sample(self) -> dict[str, float]: ...            # metrics; times itself with tenon.base.clock
        def close(self) -> None: ...

``tenon bench run NAME`` keeps every finished cell in ``runs/bench-NAME/events.jsonl`` and goes on there when it is
started again; the finished result is ``bench/results/NAME.json`` (a quick one stays under ``runs/``).

Modules: ``claim`` (the script's side), ``contender`` (the child process), ``child`` (the parent's handle on it),
``runner``, ``stats``, ``limits``, ``render``, ``plot``.
"""
