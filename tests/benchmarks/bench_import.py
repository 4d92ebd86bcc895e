"""G16: `import galaxy_ssl` beside `import torch`, each in a fresh process."""
import resource
import subprocess
import sys
from functools import partial

from harness import Case, benchmark


def children():
    """CPU seconds of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def fresh(code):
    """Run `code` in a Python of its own."""
    subprocess.run([sys.executable, '-c', code], check=True)


@benchmark('G16')
def import_cost():
    """The library and its noun, without and with astropy's part, against torch."""
    light = 'import galaxy_ssl, galaxy_ssl.cutouts, sys; assert "torch" not in sys.modules'
    yield Case('import, fresh process', {'import torch': partial(fresh, 'import torch'), 'import galaxy_ssl.cutouts (the data rooms)': partial(fresh, light),
               'import galaxy_ssl': partial(fresh, 'import galaxy_ssl, sys; assert "torch" not in sys.modules')},
               items=1, floor=1/0.35, goal=1/0.3, unit='/s', clock=children)
