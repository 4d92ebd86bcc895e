"""What every test shares: one thread per process, no network, toy sizes."""
import os
from pathlib import Path

for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'):
    os.environ.setdefault(name, '1')
os.environ.setdefault('IN_TEST', '1')
os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import shutil  # noqa: E402
import signal  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from astropy.io import fits  # noqa: E402
from common import embed, fit  # noqa: E402
from hypothesis import settings  # noqa: E402

from galaxy_ssl.synthetic import synthetic_cutouts  # noqa: E402

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell interrupts are ignored, and by every process started from here
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)
settings.register_profile('repeatable', derandomize=True, deadline=None)
settings.load_profile('repeatable')
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='session')
def root():
    """The checkout."""
    return ROOT


@pytest.fixture(scope='session')
def galaxies():
    return synthetic_cutouts(40, size=20, seed=1)


@pytest.fixture(scope='session')
def trained(galaxies, tmp_path_factory):
    """A run folder, not to be changed."""
    return fit(galaxies, tmp_path_factory.mktemp('run')/'mae').folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of the run folder, to be damaged."""
    return shutil.copytree(trained, tmp_path/'run')


@pytest.fixture
def good(galaxies, trained, tmp_path):
    """Suffix -> a whole file of that kind."""
    galaxies.save(tmp_path/'good.h5')
    embed(trained, galaxies).save(tmp_path/'good.parquet')
    header = fits.Header({'BANDS': 'g,r,z', 'BUNIT': 'nanomaggy'})
    fits.writeto(tmp_path/'good.fits', galaxies.flux[0], header)
    return {s: tmp_path/f'good{s}' for s in ('.h5', '.parquet', '.fits')}
