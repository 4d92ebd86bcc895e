"""What every test shares: one thread per process, no network, toy sizes."""
import os
from pathlib import Path

for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'):
    os.environ.setdefault(name, '1')
os.environ.setdefault('IN_TEST', '1')
os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='session')
def root():
    """The checkout."""
    return ROOT
