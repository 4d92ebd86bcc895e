"""G8: FITS cutouts into native float32 arrays, beside astropy and fitsio; warm page cache, our checks included."""
import tempfile
from functools import partial
from pathlib import Path

import fitsio
import numpy as np
from astropy.io import fits
from harness import Case, benchmark

from galaxy_ssl.fits import find_image, read_fits, read_pixels
from galaxy_ssl.folders import read_fits_folder

KEEP = tempfile.TemporaryDirectory()


def folder(n, shape, checksum=False):
    """`n` files of random cutouts with a header such as the Legacy Surveys'."""
    rng = np.random.default_rng(0)
    place = Path(KEEP.name)/f'{shape[-1]}-{checksum}'
    place.mkdir()
    header = fits.Header({'BANDS': 'grizy'[:shape[0]], 'SURVEY': 'LegacySurvey', 'VERSION': 'DR9-south', 'CTYPE1': 'RA---TAN', 'CTYPE2': 'DEC--TAN', 'CRVAL1': 150.0, 'CRVAL2': 2.0,
                          'CRPIX1': shape[2]/2, 'CRPIX2': shape[1]/2, 'CD1_1': -7.3e-5, 'CD1_2': 0.0, 'CD2_1': 0.0, 'CD2_2': 7.3e-5})
    for i in range(n):
        fits.writeto(place/f'{i:04d}.fits', rng.normal(size=shape).astype(np.float32), header, checksum=checksum)
    return sorted(place.iterdir())


def through(read, items):
    """Read each; native float32 whatever the reader gives."""
    for item in items:
        x = read(item)
        if x.dtype != np.float32 or not x.dtype.isnative:
            x.astype(np.float32)


def with_open(path):
    """The common way to read a cutout."""
    with fits.open(path) as f:
        return f[0].data.astype(np.float32)


@benchmark('G8')
def fits_cutouts():
    """Files one by one, and a folder that is open."""
    for shape, n in (((5, 64, 64), 100), ((3, 256, 256), 40)):
        for checksum in (False, True):
            paths = folder(n, shape, checksum)
            cs, rows = read_fits_folder(paths), np.arange(n)
            assert np.array_equal(cs.flux[1], fits.getdata(paths[1])) and np.array_equal(read_pixels(paths[1]), fitsio.read(str(paths[1])))
            name = f'{shape[1]}x{shape[2]}x{shape[0]} float32{", CHECKSUM verified by ours only" if checksum else ""}'
            theirs = {'astropy fits.open': partial(through, with_open, paths), 'astropy getdata': partial(through, fits.getdata, paths),
                      'fitsio.read': partial(through, fitsio.read, [str(p) for p in paths])}
            ways = {**theirs, 'ours: read_fits (with header)': lambda paths=paths: through(lambda p: read_fits(p)[0], paths),
                    'ours: read_pixels': partial(through, read_pixels, paths), 'ours: cs.flux[rows] of an open folder': lambda cs=cs, rows=rows: cs.flux[rows]}
            yield Case(f'{name}, against astropy', ways, items=n, floor=4, goal=8)
            yield Case(f'{name}, against fitsio', {'fitsio.read': theirs['fitsio.read'], 'ours: read_pixels (file never seen before)': ways['ours: read_pixels'],
                                                   'ours: cs.flux[rows] of an open folder': ways['ours: cs.flux[rows] of an open folder']}, items=n, floor=1.3, goal=2)
    paths = folder(200, (3, 32, 32))
    yield Case('headers of a folder: what is where, place on the sky', {'astropy getheader': lambda: [fits.getheader(p) for p in paths],
               'ours: find_image': lambda: [find_image(p) for p in paths], 'ours: read_fits_folder': lambda: read_fits_folder(paths)}, items=200, unit='files/s')
