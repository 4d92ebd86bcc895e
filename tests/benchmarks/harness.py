"""Ratios measured beside their baseline: process CPU time, one thread, interleaved, medians of paired ratios."""
import os

for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'NUMBA_NUM_THREADS'):
    os.environ.setdefault(name, '1')

import statistics
import time
from dataclasses import dataclass, field
from typing import Callable

BENCHMARKS = {}  # goal -> function that yields cases


class Skip(Exception):
    """This benchmark cannot run here; says why."""


@dataclass
class Case:
    """Several ways to do one job; the first is the baseline, the last is ours."""
    what: str                  # one line: the job and its size
    ways: dict                 # label -> function without arguments
    items: float               # objects each call handles, for the rates
    floor: float = None        # lowest ratio (ours over baseline) that counts as met
    goal: float = None         # the ratio aimed at
    rounds: int = 7
    unit: str = 'img/s'
    note: str = ''             # printed under the case
    clock: Callable = time.process_time  # seconds
    seconds: dict = field(default_factory=dict)  # label -> list, filled by `measure`


def benchmark(goal):
    """Register a function that yields `Case`s under the name of a goal."""
    def keep(function):
        BENCHMARKS[goal] = function
        return function
    return keep


def measure(case):
    """Run the ways in turn, `rounds` times, after one call each to warm up."""
    for function in case.ways.values():
        function()
    case.seconds = {label: [] for label in case.ways}
    for _ in range(case.rounds):
        for label, function in case.ways.items():
            start = case.clock()
            function()
            case.seconds[label].append(case.clock() - start)
    return case


def ratio(case, label, base=None):
    """Median of the paired ratios: how many times faster `label` is than `base` (the first way)."""
    base = base or next(iter(case.ways))
    return statistics.median(b/s for b, s in zip(case.seconds[base], case.seconds[label]))


def rows(goal, case):
    """One row per way: goal, job, way, rate, ratio to the baseline, floor, goal, verdict."""
    ours = list(case.ways)[-1]
    for label in case.ways:
        r = ratio(case, label)
        judged = label == ours and case.floor is not None
        yield {'goal': goal, 'what': case.what, 'way': label, 'rate': case.items/statistics.median(case.seconds[label]), 'unit': case.unit,
               'ratio': r, 'floor': case.floor if judged else None, 'aim': case.goal if judged else None,
               'verdict': '' if not judged else 'goal met' if case.goal and r >= case.goal else 'floor met' if r >= case.floor else 'BELOW FLOOR'}
