"""Print the table of speed ratios: `python tests/benchmarks/run.py [G7 G8 ...] [--json table.json]`."""
import argparse
import importlib
import json
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import harness  # noqa: E402  (first: it limits the threads)

import torch  # noqa: E402


def cpu():
    """Name of the processor and the instruction sets that matter here."""
    info = Path('/proc/cpuinfo')
    text = info.read_text() if info.exists() else ''
    found = {k.strip(): v.strip() for k, _, v in (line.partition(':') for line in text.splitlines())}
    flags = [f for f in ('avx2', 'avx512f', 'avx512_bf16', 'avx512_vnni', 'amx_bf16', 'amx_int8') if f in found.get('flags', '').split()]
    return f'{found.get("model name", "unknown processor")}, {" ".join(flags) or "no flags known"}'


def show(row):
    """One line of the table."""
    floor = '' if row['floor'] is None else f'floor {row["floor"]:g}'
    aim = '' if row['aim'] is None else f'goal {row["aim"]:g}'
    print(f'  {row["way"]:<44}{row["rate"]:>12,.5g} {row["unit"]:<8}{row["ratio"]:>8.2f}x  {floor:<11}{aim:<10}{row["verdict"]}', flush=True)


def main():
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument('goals', nargs='*', help='e.g. G7 G8; none = all')
    ask.add_argument('--json', help='write the rows here too')
    asked = ask.parse_args()
    for p in sorted(HERE.glob('bench_*.py')):
        importlib.import_module(p.stem)
    torch.set_num_threads(1)
    unknown = set(asked.goals) - set(harness.BENCHMARKS)
    if unknown:
        ask.error(f'unknown: {", ".join(unknown)}; there are {", ".join(sorted(harness.BENCHMARKS))}')
    print(f'{cpu()}; torch {torch.__version__}; process CPU time, one thread, medians of paired ratios to the first way of each block\n')
    table = []
    for goal in asked.goals or sorted(harness.BENCHMARKS, key=lambda g: (int(''.join(c for c in g if c.isdigit())), g)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                for case in harness.BENCHMARKS[goal]():
                    harness.measure(case)
                    print(f'{goal}  {case.what}')
                    for row in harness.rows(goal, case):
                        show(row)
                        table.append(row)
                    print(f'  {case.note}\n' if case.note else '', flush=True)
        except harness.Skip as e:
            print(f'{goal}  skipped: {e}\n', flush=True)
    if asked.json:
        Path(asked.json).write_text(json.dumps({'cpu': cpu(), 'torch': torch.__version__, 'rows': table}, indent=1))


if __name__ == '__main__':
    main()
