"""G7, G7b, G7c: random batches from a file that is in the page cache, beside h5py, memcpy, and a file opened anew per object."""
import tempfile
from functools import partial
from itertools import cycle
from pathlib import Path

import h5py
import numpy as np
import torch
from harness import Case, benchmark

from galaxy_ssl.batch import Buffers, load_batch
from galaxy_ssl.cutouts import CutoutSet, open_cutouts

SETS = {'64 px': (5, 64, 4096, 256), '256 px': (3, 256, 512, 64)}  # bands, size, objects, batch
_FOLDER = tempfile.TemporaryDirectory()


def stored(bands, size, n):
    """A native file of noise, in the page cache, and its set."""
    path = Path(_FOLDER.name)/f'{bands}x{size}.h5'
    if not path.exists():
        flux = np.random.default_rng(0).standard_normal((n, bands, size, size), dtype=np.float32)
        CutoutSet(flux, {'id': [f'g{i}' for i in range(n)], 'ra': np.arange(n)/n, 'dec': np.zeros(n)}, [f'b{i}' for i in range(bands)]).save(path)
    return path, open_cutouts(path)


def batches(n, size):
    """Random rows without end: the same few batches in turn."""
    rng = np.random.default_rng(1)
    return cycle([rng.choice(n, size, replace=False) for _ in range(8)])


def per_item(pixels, rows):
    """What a data set that indexes an open HDF5 file gives its collate function."""
    return torch.from_numpy(np.stack([pixels[i] for i in next(rows).tolist()]))


def reopening(path, rows):
    """A data set that opens the file for every object, clips the pixels below, makes a mask of its size and reads the coordinates."""
    items = []
    for i in next(rows).tolist():
        with h5py.File(path, 'r') as h5:
            flux = torch.from_numpy(h5['flux'][i].clip(-3, None))
            items.append((flux, torch.zeros_like(flux), torch.tensor([h5['meta/ra'][i], h5['meta/dec'][i]])))
    return [torch.stack(part) for part in zip(*items)]


def pixels_only(cs, rows, buffers):
    """The pixels of a batch as the loader reads them."""
    rows = next(rows)
    flux = buffers.empty((len(rows), *cs.shape[1:]), np.float32)
    cs.flux.into(rows, flux.numpy())
    return flux


def whole_batch(cs, rows, buffers):
    """A batch as the loader gives it: pixels, bad pixels, ids, coordinates."""
    return load_batch(cs, next(rows), (), buffers)


def ways(label, *names):
    """Some of the ways to make a batch, by name."""
    bands, size, n, batch = SETS[label]
    path, cs = stored(bands, size, n)
    rows, buffers = batches(n, batch), Buffers()
    a, b = np.ones((2, batch, bands, size, size), np.float32)
    known = {'h5py, ds[i] per object + stack': partial(per_item, h5py.File(path)['flux'], rows), 'memcpy of the same bytes': partial(np.copyto, a, b),
             'file opened per object': partial(reopening, path, rows), 'whole batch (ours, with bad, id, ra, dec)': partial(whole_batch, cs, rows, buffers),
             'pixels (ours)': partial(pixels_only, cs, rows, buffers)}
    return {k: known[k] for k in names}


@benchmark('G7')
def against_h5py():
    """Random batches, hot cache."""
    for label, floor, goal in (('64 px', 3, 4.5), ('256 px', 5, 8)):
        yield Case(f'random batch, {label}', ways(label, 'h5py, ds[i] per object + stack', 'memcpy of the same bytes', 'whole batch (ours, with bad, id, ra, dec)', 'pixels (ours)'),
                   items=SETS[label][3], floor=floor, goal=goal)


@benchmark('G7b')
def against_memcpy():
    """How near to the limit."""
    for label in SETS:
        yield Case(f'share of memcpy, {label}', ways(label, 'memcpy of the same bytes', 'pixels (ours)'), items=SETS[label][3], floor=0.5, goal=0.85)


@benchmark('G7c')
def against_reopening():
    """Against a loader that opens the file for every object."""
    for label, floor, goal in (('64 px', 30, 80), ('256 px', 8, 15)):
        yield Case(f'random batch, {label}', ways(label, 'file opened per object', 'whole batch (ours, with bad, id, ra, dec)', 'pixels (ours)'),
                   items=SETS[label][3], floor=floor, goal=goal, rounds=5)
