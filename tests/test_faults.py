"""The fault table: what can happen to a file, a disk, a coordinate or a setting, and what is promised then.

Every test carries its row: the fault and the promise stand in the decorator, and `test_every_row_is_covered` counts the rows.
"""
import bz2
import gzip
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import tempfile
import time
import warnings
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import Table
from common import TINY, contents, embed, fit, like
from jobs import finish, start

from galaxy_ssl import cli
from galaxy_ssl.batch import Loader, fit_preprocess, load_batch
from galaxy_ssl.catalogs import match_sky, read_catalog
from galaxy_ssl.config import make_config
from galaxy_ssl.core import CutoutError
from galaxy_ssl.cutouts import CutoutSet, concat, open_cutouts
from galaxy_ssl.fits import read_fits
from galaxy_ssl.probe import probe_score
from galaxy_ssl.runs import load_resume, load_run, save_resume, save_weights
from galaxy_ssl.screen import screen
from galaxy_ssl.synthetic import synthetic_cutouts
from galaxy_ssl.table import EmbeddingTable
from galaxy_ssl.train import TrainConfig, train

ROWS = set()


def fault(row, what, promise):
    """Say which row of the table a test covers, and what it promises."""
    ROWS.add(row)

    def keep(test):
        test.__doc__ = f'{row}. {what}: {promise}.'
        return test
    return keep


def refused(path, read=None):
    """The text of the CutoutError that a file gives, which names it; None if it is read, and then what was read."""
    try:
        with warnings.catch_warnings(record=True):
            warnings.simplefilter('always')
            return None, (read or (lambda p: read_fits(p)[0]))(path)
    except CutoutError as e:
        assert Path(path).name in str(e), e
        return str(e), None


@pytest.fixture
def image(tmp_path):
    """A FITS cube of g, r, z and what is in it."""
    truth = np.random.default_rng(0).normal(size=(3, 20, 20)).astype(np.float32)
    fits.writeto(tmp_path/'image.fits', truth, fits.Header({'BANDS': 'g,r,z', 'BUNIT': 'nanomaggy'}))
    return tmp_path/'image.fits', truth


# FITS files.

@fault(1, 'FITS cut off in its header, in its data, or at 0 bytes', 'an error with the bytes there are and the bytes there should be')
def test_fits_cut_off(image, tmp_path):
    path, _ = image
    whole = path.read_bytes()
    for at in [0, 100, 2879, 2880, *np.random.default_rng(0).integers(1, 2880 + 4800, 26)]:
        (tmp_path/'cut.fits').write_bytes(whole[:at])
        said, _ = refused(tmp_path/'cut.fits')
        assert said and ('empty file' if at == 0 else 'truncated' if at < 2880 else f'truncated: {at:,} of 8,640 bytes') in said


@fault(2, 'FITS cut off in its padding only', 'the pixels, and one warning')
def test_fits_without_its_padding(image, tmp_path):
    path, truth = image
    whole = path.read_bytes()
    for lost in (1, 17, 500, 959, 960):
        (tmp_path/'cut.fits').write_bytes(whole[:-lost])
        with pytest.warns(UserWarning, match='padding') as caught:
            found, _ = read_fits(tmp_path/'cut.fits')
        assert np.array_equal(found, truth) and len(caught) == 1


@fault(3, 'a web page, JSON or a PNG saved as .fits', 'an error that says what the file starts with')
@pytest.mark.parametrize('body, word', [(b'<!DOCTYPE html><html>502</html>', '<!DOCTYPE'), (b'{"error": "quota"}', 'error'), (b'\x89PNG\r\n\x1a\n' + bytes(99), 'PNG')], ids=['html', 'json', 'png'])
def test_not_fits(body, word, tmp_path):
    (tmp_path/'page.fits').write_bytes(body*99)
    said, _ = refused(tmp_path/'page.fits')
    assert 'not FITS: starts with' in said and word in said


@fault(4, 'a flipped bit in a FITS file that carries CHECKSUM', 'an error; without CHECKSUM a flip of a pixel cannot be seen')
def test_a_flipped_bit_in_fits(image, tmp_path):
    path, truth = image
    fits.writeto(tmp_path/'summed.fits', truth, checksum=True)
    whole = (tmp_path/'summed.fits').read_bytes()
    start_of_data = len(whole) - 5760
    rng = np.random.default_rng(0)
    for at in rng.integers(start_of_data, start_of_data + 4800, 60):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.integers(8)
        (tmp_path/'flip.fits').write_bytes(flipped)
        assert 'checksum' in refused(tmp_path/'flip.fits')[0]
    plain = bytearray(path.read_bytes())
    plain[3000] ^= 1
    (tmp_path/'flip.fits').write_bytes(plain)
    assert refused(tmp_path/'flip.fits')[0] is None


@fault(5, 'a flipped bit in .fits.gz or .fits.bz2, or a stream cut off', 'an error, or the true pixels where the flip changes none')
@pytest.mark.parametrize('pack', [gzip.compress, bz2.compress], ids=['gz', 'bz2'])
def test_a_damaged_stream(pack, image, tmp_path):
    path, truth = image
    whole = pack(path.read_bytes())
    rng = np.random.default_rng(0)
    caught = 0
    for k in range(200):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        (tmp_path/'damaged.fits.gz').write_bytes(damaged if k < 170 else whole[:rng.integers(1, len(whole) - 1)])
        said, found = refused(tmp_path/'damaged.fits.gz')
        assert said or np.array_equal(found, truth)
        caught += said is not None
    assert caught >= 190


@fault(6, 'a tile-compressed file (fpack), whole and cut off', 'the image of its HDU; an error that names the file')
@pytest.mark.parametrize('codec', ['RICE_1', 'GZIP_1', 'GZIP_2', 'HCOMPRESS_1'])
def test_compressed_fits(codec, tmp_path):
    truth = np.random.default_rng(0).integers(-999, 999, (40, 50)).astype(np.int32)
    fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(truth, compression_type=codec)]).writeto(tmp_path/'whole.fits.fz')
    found, _ = read_fits(tmp_path/'whole.fits.fz')
    assert found.dtype == np.float32 and np.array_equal(found, truth)
    whole = (tmp_path/'whole.fits.fz').read_bytes()
    for at in np.random.default_rng(0).integers(1, len(whole) - 2880, 10):
        (tmp_path/'cut.fits.fz').write_bytes(whole[:at])
        said, _ = refused(tmp_path/'cut.fits.fz')
        assert 'truncated' in said or 'no image' in said


@fault(7, 'the image is not in HDU 0, or there are several', 'the only image there is; several are an error that lists them, `hdu=` chooses')
def test_several_hdus(tmp_path):
    a, b = np.full((8, 8), 1.0), np.full((9, 9), 2.0)
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(a, name='ONE')]).writeto(tmp_path/'one.fits')
    assert np.array_equal(read_fits(tmp_path/'one.fits')[0], a)
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(a, name='ONE'), fits.ImageHDU(b, name='TWO')]).writeto(tmp_path/'two.fits')
    said, _ = refused(tmp_path/'two.fits')
    assert 'hdu=' in said and 'ONE' in said and 'TWO' in said
    assert np.array_equal(read_fits(tmp_path/'two.fits', hdu='TWO')[0], b) and np.array_equal(read_fits(tmp_path/'two.fits', hdu=1)[0], a)


PLANES = {'NaN': np.nan, 'inf': np.inf, 'zero': 0.0, 'constant': 7.5}


@fault(8, 'a plane that is NaN, inf, zero or constant', 'an error, a blank or an object left out, as asked; the network input is finite')
@pytest.mark.parametrize('policy', ['error', 'fill', 'drop'])
@pytest.mark.parametrize('plane', PLANES)
def test_a_plane_without_data(plane, policy, tmp_path):
    flux = synthetic_cutouts(6, size=20, seed=3).flux[:]
    flux[2, 1] = PLANES[plane]
    for i in range(6):
        fits.writeto(tmp_path/f'o{i}.fits', flux[i], fits.Header({'BANDS': 'g,r,z', 'BUNIT': 'nanomaggy'}))
    cs = open_cutouts(tmp_path)
    if policy == 'error':
        with pytest.raises(CutoutError, match='1 of 6 objects.*o2 .*r'):
            screen(cs, 'error')
        return
    done = screen(cs, policy)
    assert done.bad_files.path.tolist() == ['o2'] and ('o2' in done.ids) == (policy == 'fill')
    batch = load_batch(done, np.arange(len(done)))
    made = fit_preprocess(done, size=16)(batch)
    assert torch.isfinite(made['image']).all()
    if policy == 'fill':
        assert batch['bad'][2, 1].all() and not batch['bad'][2, 0].any()


STORED = {
    'int16 scaled': (np.int16, dict(BSCALE=0.25, BZERO=3.0)), 'uint16': (np.uint16, {}), 'uint32': (np.uint32, {}), 'uint8': (np.uint8, {}),
    'int32': (np.int32, {}), 'int64': (np.int64, {}), 'float32': (np.float32, {}), 'float64': (np.float64, {}), 'int16 with BLANK': (np.int16, dict(BLANK=-7)),
}


@fault(9, 'BSCALE, BZERO, BLANK, unsigned, big-endian, double', 'physical values in native float32')
@pytest.mark.parametrize('kind', STORED)
def test_stored_numbers(kind, tmp_path):
    dtype, cards = STORED[kind]
    low = 0 if np.dtype(dtype).kind == 'u' else -100
    x = np.random.default_rng(0).integers(low, 200, (12, 10)).astype(dtype)
    if 'BLANK' in cards:
        x[3, 4] = -7
    hdu = fits.PrimaryHDU(x)
    hdu.header.update({k: v for k, v in cards.items() if k == 'BLANK'})
    hdu.writeto(tmp_path/'x.fits')
    truth = x.astype(np.float64)
    if 'BSCALE' in cards:  # written as raw integers, so that the cards are ours
        raw = (tmp_path/'x.fits').read_bytes()
        cards_text = b''.join(f'{k:<8}= {v:>20}'.ljust(80).encode() for k, v in cards.items())
        at = raw.index(b'END' + b' '*77)
        (tmp_path/'x.fits').write_bytes((raw[:at] + cards_text + raw[at:at + 80]).ljust(2880, b' ') + raw[2880:])
        truth = truth*0.25 + 3
    found, _ = read_fits(tmp_path/'x.fits')
    truth[x == cards.get('BLANK', 'none')] = np.nan
    assert found.dtype == np.float32 and found.dtype.isnative and np.array_equal(found, truth.astype(np.float32), equal_nan=True)


@fault(10, 'a header with impossible or damaged cards', 'an error, or what the header says; never another exception')
def test_header_fuzz(image, tmp_path):
    path, truth = image
    whole = path.read_bytes()
    n_cards = whole.index(b'BANDS')//80
    rng = np.random.default_rng(0)
    outcome = {'error': 0, 'read': 0}
    for _ in range(400):
        damaged = bytearray(whole)
        for at in rng.integers(0, 80*n_cards, rng.integers(1, 4)):
            damaged[at] = rng.choice(list(b' 0123456789-.TFE=X\'\x00\xff'))
        (tmp_path/'fuzz.fits').write_bytes(damaged)
        said, found = refused(tmp_path/'fuzz.fits')
        outcome['error' if said else 'read'] += 1
        if found is not None and not np.array_equal(found, truth):
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                assert np.array_equal(found, fits.getdata(tmp_path/'fuzz.fits').astype(np.float32), equal_nan=True)
    assert outcome['error'] > 50 and outcome['read'] > 50


@fault(10, 'BSCALE=0 or NaN, negative NAXIS, BITPIX=17, NAXIS=999', 'an error that names the card')
@pytest.mark.parametrize('card, value', [('BSCALE', '0.0'), ('BSCALE', 'NaN'), ('NAXIS1', '-20'), ('BITPIX', '17'), ('NAXIS', '999')])
def test_impossible_cards(card, value, image, tmp_path):
    path, _ = image
    whole = path.read_bytes()
    line = f'{card:<8}= {value:>20}'.ljust(80).encode()
    at = whole.find(f'{card:<8}='.encode())
    at = at if at >= 0 else whole.index(b'BUNIT')
    (tmp_path/'bad.fits').write_bytes(whole[:at] + line + whole[at + 80:])
    assert card in refused(tmp_path/'bad.fits')[0]


@fault(11, 'a wrong number, order or choice of bands', 'an error that lists wanted and found; bands in another order are the same bands; nothing is filled with zeros')
@pytest.mark.parametrize('bands', [('g', 'r'), ('g', 'r', 'i', 'z'), ('u', 'g', 'r', 'i', 'y')], ids=len)
def test_files_with_other_bands(bands, tmp_path):
    flux = np.random.default_rng(0).normal(size=(len(bands), 16, 16)).astype(np.float32)
    fits.writeto(tmp_path/'a.fits', flux, fits.Header({'BANDS': ','.join(bands)}))
    wanted = ('z', 'g', 'r')
    if set(wanted) <= set(bands):
        got = open_cutouts(tmp_path, bands=wanted)
        assert got.bands == ('g', 'r', 'z') and np.array_equal(got.flux[0], flux[[0, 1, 3]])
    else:
        with pytest.raises(CutoutError, match=f'wanted.*z.*found.*{bands[0]}'):
            open_cutouts(tmp_path, bands=wanted, strict=True)


@fault(12, 'cutouts of other sizes, not square, or with an axis of no length', 'an error; cropped or padded only where `size` is given')
def test_other_sizes(tmp_path):
    for name, shape in {'a': (2, 20, 20), 'b': (2, 25, 20)}.items():
        fits.writeto(tmp_path/f'{name}.fits', np.arange(np.prod(shape), dtype=np.float32).reshape(shape), fits.Header({'BANDS': 'g,r'}))
    with pytest.raises(CutoutError, match='size'):
        open_cutouts(tmp_path, strict=True)
    cs = open_cutouts(tmp_path, size=16)
    assert cs.shape == (2, 2, 16, 16) and np.array_equal(cs.flux[0], fits.getdata(tmp_path/'a.fits')[:, 2:18, 2:18])
    wide = open_cutouts(tmp_path, size=30)
    assert np.isnan(wide.flux[0]).any() and np.array_equal(wide.flux[0][:, 5:25, 5:25], fits.getdata(tmp_path/'a.fits'))
    raw = (tmp_path/'a.fits').read_bytes().replace(b'NAXIS1  =                   20', b'NAXIS1  =                    0')
    (tmp_path/'none.fits').write_bytes(raw[:2880])
    assert '0 pixels' in refused(tmp_path/'none.fits')[0].replace('x0', ' 0').replace('  ', ' ')


# Claims that would eat the memory.

def claim_fits(folder):
    """A FITS header that claims 10^12 pixels."""
    header = fits.Header([('SIMPLE', True), ('BITPIX', -32), ('NAXIS', 2), ('NAXIS1', 10**6), ('NAXIS2', 10**6)])
    (folder/'claim.fits').write_bytes(header.tostring().encode() + bytes(2880))
    return folder/'claim.fits'


def claim_gz(folder):
    """900 million pixels of zeros in a small gzip file."""
    header = fits.Header([('SIMPLE', True), ('BITPIX', -32), ('NAXIS', 2), ('NAXIS1', 30000), ('NAXIS2', 30000)])
    (folder/'claim.fits.gz').write_bytes(gzip.compress(header.tostring().encode() + bytes(64*2**20), 1))
    return folder/'claim.fits.gz'


def tail_gz(folder):
    """A small image followed by 256 MB of zeros."""
    header = fits.Header([('SIMPLE', True), ('BITPIX', -32), ('NAXIS', 2), ('NAXIS1', 20), ('NAXIS2', 36)])
    (folder/'tail.fits.gz').write_bytes(gzip.compress(header.tostring().encode() + bytes(2880) + bytes(256*2**20), 1))
    return folder/'tail.fits.gz'


def claim_h5(folder):
    """An HDF5 file whose images claim 977 GiB and hold nothing."""
    with h5py.File(folder/'claim.h5', 'w') as h5:
        h5.create_dataset('images', (10**6, 5, 229, 229), np.float32)
    return folder/'claim.h5'


def claim_npz(folder):
    """An npz member that claims 10^12 numbers."""
    import io
    import zipfile
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {'descr': '<f4', 'fortran_order': False, 'shape': (10**6, 1, 1000, 1000)})
    with zipfile.ZipFile(folder/'claim.npz', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('images.npy', member.getvalue() + bytes(2**20))
    return folder/'claim.npz'


CLAIMS = {f.__name__: f for f in (claim_fits, claim_gz, tail_gz, claim_h5, claim_npz)}


def open_in_little_memory(path, said):
    """Open a file in a process that may not grow by more than half a gigabyte; write down how it ends and how far it grew."""
    import galaxy_ssl.folders  # noqa: F401  (all code is in memory before the limit is set)
    import galaxy_ssl.layouts  # noqa: F401
    used = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        cs = open_cutouts(path, strict=True)
        text = f'read {cs.flux[0].size}'
    except CutoutError as e:
        text = str(e)
    said.write_text(json.dumps([text, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1024]))


@fault(13, 'a header that claims 10^12 pixels, a gzip bomb, an HDF5 or npz claim of a terabyte', 'an error before anything is allocated; memory grows by less than 50 MB')
@pytest.mark.parametrize('bomb', CLAIMS)
def test_claims(bomb, tmp_path):
    path = CLAIMS[bomb](tmp_path)
    finish(start(open_in_little_memory, path, tmp_path/'said'))
    text, grown = json.loads((tmp_path/'said').read_text())
    assert path.name in text or bomb == 'tail_gz' and text == 'read 720', text
    assert grown < 50, f'{grown} MB'


# HDF5 files that are not alone.

def external_link(folder):
    with h5py.File(folder/'other.h5', 'w') as h5:
        h5['images'] = np.zeros((3, 8, 8, 3), np.uint8)
    with h5py.File(folder/'outside.h5', 'w') as h5:
        h5['images'] = h5py.ExternalLink(str(folder/'other.h5'), 'images')


def external_storage(folder):
    (folder/'secret').write_bytes(bytes(3*8*8*3))
    with h5py.File(folder/'outside.h5', 'w') as h5:
        h5.create_dataset('images', (3, 8, 8, 3), np.uint8, external=[(str(folder/'secret'), 0, 576)])


def virtual(folder):
    external_link(folder)
    layout = h5py.VirtualLayout((3, 8, 8, 3), np.uint8)
    layout[:] = h5py.VirtualSource(folder/'other.h5', 'images', (3, 8, 8, 3))
    (folder/'outside.h5').unlink()
    with h5py.File(folder/'outside.h5', 'w') as h5:
        h5.create_virtual_dataset('images', layout)


@fault(14, 'HDF5 whose pixels live in another file', 'refused')
@pytest.mark.parametrize('make', [external_link, external_storage, virtual], ids=lambda f: f.__name__)
def test_pixels_of_another_file(make, tmp_path):
    make(tmp_path)
    with pytest.raises(CutoutError, match=r'outside\.h5.*another file'):
        open_cutouts(tmp_path/'outside.h5')


def hold_open(path, ready, done):
    """Write a file and keep it open."""
    with h5py.File(path, 'w') as h5:
        h5['images'] = np.zeros((3, 8, 8, 3), np.uint8)
        h5.flush()
        ready.touch()
        while not done.exists():
            time.sleep(0.01)


def die_while_writing(path):
    """Leave a file as a killed writer leaves it."""
    h5 = h5py.File(path, 'w', libver='latest')
    h5.create_dataset('images', (3, 8, 8, 3), np.uint8, maxshape=(None, 8, 8, 3), chunks=(1, 8, 8, 3))
    h5.swmr_mode = True
    h5['images'][:] = 1
    h5.flush()
    os.kill(os.getpid(), signal.SIGKILL)


@fault(15, 'HDF5 that is still being written, or whose writer was killed', 'an error that names the file and says so')
def test_an_unfinished_file(tmp_path):
    processes = start(hold_open, tmp_path/'open.h5', tmp_path/'ready', tmp_path/'done')
    until = time.monotonic() + 30
    while not (tmp_path/'ready').exists() and time.monotonic() < until:
        time.sleep(0.01)
    with pytest.raises(CutoutError, match=r'open\.h5.*still being written'):
        open_cutouts(tmp_path/'open.h5')
    (tmp_path/'done').touch()
    finish(processes)
    (killed,) = start(die_while_writing, tmp_path/'killed.h5')
    killed.join(30)
    assert killed.exitcode == -signal.SIGKILL
    with pytest.raises(CutoutError, match=r'killed\.h5.*h5clear'):
        open_cutouts(tmp_path/'killed.h5')


def read_many(cs, seed, n, wrong):
    """Read random rows of a set in which every pixel of row i is i; count the wrong ones."""
    rng = np.random.default_rng(seed)
    for _ in range(n//100):
        rows = rng.integers(0, len(cs), 100)
        found = load_batch(cs, rows)['flux'].numpy()
        with wrong.get_lock():
            wrong.value += int((found != rows[:, None, None, None]).any((1, 2, 3)).sum())


@fault(16, 'one open set shared by processes, forked or spawned', 'the right rows: 0 of 12,000 wrong')
@pytest.mark.parametrize('method, workers', [('fork', 0), ('fork', 2), ('fork', 4), ('spawn', 2)])
def test_a_set_shared_by_processes(method, workers, tmp_path):
    flux = np.broadcast_to(np.arange(300, dtype=np.float32)[:, None, None, None], (300, 2, 8, 8))
    cs = open_cutouts(CutoutSet(flux).save(tmp_path/'rows.h5'))
    cs.flux[0]  # the map exists before the processes do
    context = multiprocessing.get_context(method)
    wrong = context.Value('i', 0)
    if workers == 0:
        read_many(cs, 0, 12_000, wrong)
    processes = [context.Process(target=read_many, args=(cs, k, 12_000//workers, wrong)) for k in range(workers)]
    for p in processes:
        p.start()
    finish(processes)
    assert wrong.value == 0


# Files that change while they are read.

def read_while_it_changes(path, change, said):
    """Open, read, change the file, read all of it again; write down how that ends."""
    cs = open_cutouts(path)
    before = cs.flux[0]
    CHANGES[change](next(p for p in [path, *path.glob('*.fits')] if p.is_file()))
    try:
        after = cs.flux[:]
        said.write_text('the same' if np.array_equal(after[0], before) else 'other pixels')
    except CutoutError as e:
        said.write_text(str(e))


def shrink(path):
    os.truncate(path, path.stat().st_size//2)


def grow(path):
    with open(path, 'ab') as f:
        f.write(bytes(100_000))


def swap(path):
    shutil.copy(path, path.with_suffix('.new'))
    os.truncate(path.with_suffix('.new'), 3000)
    os.replace(path.with_suffix('.new'), path)


CHANGES = {'shrinks': shrink, 'grows': grow, 'vanishes': lambda p: p.unlink(), 'is replaced by half a file': swap}


@fault(17, 'a file that shrinks, grows, vanishes or is replaced while it is open', 'the old pixels or an error that names it; never a dead process')
@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('kind', ['h5', 'fits'])
def test_a_file_that_changes(kind, change, tmp_path):
    cs = CutoutSet(np.random.default_rng(0).normal(size=(200, 3, 32, 32)).astype(np.float32), bands='grz')
    if kind == 'h5':
        path = cs.save(tmp_path/'set.h5')
    else:
        path = tmp_path/'set'
        path.mkdir()
        fits.writeto(path/'a.fits', cs.flux[0], fits.Header({'BANDS': 'g,r,z'}))
    (process,) = start(read_while_it_changes, path, change, tmp_path/'said')
    process.join(60)
    assert process.exitcode == 0
    said = (tmp_path/'said').read_text()
    assert said == 'the same' or ('set.h5' in said or 'a.fits' in said)


# Identities.

@fault(31, 'embeddings and a catalogue in another order, with ids missing, twice, or rounded', 'joined by id only; counts and the first ids are named')
def test_ids_rule(galaxies, trained, tmp_path):
    table = embed(trained, galaxies)
    labels = pd.DataFrame({'id': galaxies.ids, 'label': np.arange(40)})
    mixed = labels.sample(frac=1, random_state=0)
    assert galaxies.join_catalog(mixed).meta.label.tolist() == list(range(40))
    half = labels.set_index('id').label % 2
    assert probe_score(table, half.sample(frac=1, random_state=0), cv=3).score == probe_score(table, half, cv=3).score
    with pytest.warns(UserWarning, match=r'2 objects without a catalogue row \(first: .*syn-1-000000.*1 rows without an object'):
        half = galaxies.join_catalog(pd.concat([labels[2:], pd.DataFrame({'id': ['stray'], 'label': [99]})]))
    assert half.meta.label.isna().sum() == 2
    with pytest.raises(CutoutError, match="1 duplicate ids, first: .'syn-1-000003'"):
        galaxies.join_catalog(pd.concat([labels, labels[3:4]]))
    with pytest.raises(CutoutError, match='floating point'):
        galaxies.join_catalog(labels.assign(id=np.arange(40) + 1e18))
    with pytest.raises(CutoutError, match='no id in common'):
        galaxies.join_catalog(labels.assign(id=[f'x{i}' for i in range(40)]))
    big = pd.DataFrame({'id': ['1000000000000000001', '1000000000000000002', ''], 'v': [1, 2, 3]})
    big[:2].to_csv(tmp_path/'big.csv', index=False)
    assert read_catalog(tmp_path/'big.csv').index.tolist() == ['1000000000000000001', '1000000000000000002']
    Table({'objid': np.array([2**60 + 1, 2**60 + 3]), 'v': [1, 2]}).write(tmp_path/'big.fits')
    assert read_catalog(tmp_path/'big.fits').index.tolist() == [str(2**60 + 1), str(2**60 + 3)]


@fault(35, 'a corrupt image met by the reading thread', 'the training stops with the file and the image named')
def test_a_corrupt_image_in_the_reading_thread(tmp_path):
    import io

    from PIL import Image
    blobs = []
    for i in range(12):
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3)).astype(np.uint8)).save(buffer, 'JPEG')
        blobs.append(buffer.getvalue())
    blobs[7] = b'\xff\xd8 not a picture'
    with h5py.File(tmp_path/'pictures.h5', 'w') as h5:
        h5['jpeg_bytes'] = np.frombuffer(b''.join(blobs), np.uint8)
        h5['offsets'] = np.cumsum([0, *map(len, blobs)])
    cs = open_cutouts(tmp_path/'pictures.h5')
    with pytest.raises(CutoutError, match=r'pictures\.h5.*image 7'):
        list(Loader(cs, 4).epoch())


# Coordinates.

@fault(39, 'RA near 0 and 360, the poles, missing positions', 'matched on the sphere; what has no position matches nothing')
def test_positions_on_the_sphere():
    ra = np.array([359.9999, 0.0, 180.0, 12.0, np.nan, 77.0])
    dec = np.array([0.0, 90.0, -90.0, -45.0, 10.0, np.nan])
    other_ra = np.array([0.0001, 123.0, 11.0, 12.0002, 50.0])
    other_dec = np.array([0.0, 90.0, -90.0, -45.0, 10.0])
    i, j = match_sky(ra, dec, other_ra, other_dec, 1.0)
    truth = [(a, b) for a in range(4) for b in range(5)
             if SkyCoord(ra[a], dec[a], unit='deg').separation(SkyCoord(other_ra[b], other_dec[b], unit='deg')).arcsec < 1]
    assert list(zip(i.tolist(), j.tolist())) == truth and len(truth) == 4
    with pytest.raises(CutoutError, match='degrees'):
        match_sky([10.0], [91.0], [10.0], [1.0])


@fault(39, 'right ascension in hours, radians or as text', 'degrees, by the unit of the column')
@pytest.mark.parametrize('unit, value', [('hourangle', 10.0), ('deg', 150.0), ('rad', np.radians(150.0)), ('arcsec', 150*3600.0)])
def test_units_of_positions(unit, value, tmp_path):
    table = Table({'id': ['a'], 'ra': [value], 'dec': [2.0]})
    table['ra'].unit, table['dec'].unit = unit, 'deg'
    table.write(tmp_path/'c.ecsv')
    assert read_catalog(tmp_path/'c.ecsv').ra.iloc[0] == pytest.approx(150)
    (tmp_path/'c.csv').write_text('id,ra,dec\na,10:00:00,+02:00:00\n')
    assert read_catalog(tmp_path/'c.csv').ra.iloc[0] == pytest.approx(150)


# Sets that do not go together.

@fault(12, 'files of another pixel scale', 'an error that names both')
def test_mixed_pixel_scales(galaxies, tmp_path):
    galaxies[:20].save(tmp_path/'a.h5')
    like(galaxies[20:], pixscale=0.5).save(tmp_path/'b.h5')
    with pytest.raises(CutoutError, match='pixscale differ: 0.262 in a, 0.5 in b'):
        open_cutouts([tmp_path/'a.h5', tmp_path/'b.h5'])
    with pytest.raises(CutoutError, match='bands differ'):
        concat([galaxies, galaxies.select(('g', 'r'))])


@fault(11, 'a run folder of other bands or another pixel scale', 'the missing bands are an error, another scale is said')
def test_a_run_of_another_survey(galaxies, trained):
    with pytest.raises(CutoutError, match=r"wanted \('g', 'r', 'z'\), found \('g', 'r'\)"):
        embed(trained, galaxies.select(('g', 'r')))
    with pytest.warns(UserWarning, match='pixel scale 0.5'):
        embed(trained, like(galaxies, pixscale=0.5))


@fault(11, 'a catalogue row without an object, an object without a row', 'counted and said; an error if strict')
def test_a_catalogue_that_does_not_fit(galaxies, tmp_path):
    galaxies.save(tmp_path/'set.h5')
    pd.DataFrame({'id': [*galaxies.ids[1:], 'stray'], 'label': 1}).to_csv(tmp_path/'labels.csv', index=False)
    with pytest.warns(UserWarning, match='1 objects without a catalogue row.*1 rows without an object'):
        open_cutouts(tmp_path/'set.h5', catalog=tmp_path/'labels.csv')
    with pytest.raises(CutoutError, match='1 objects without a catalogue row'):
        open_cutouts(tmp_path/'set.h5', catalog=tmp_path/'labels.csv', strict=True)


@fault(1, 'one bad file in ten thousand', 'reported by name, and the others are read; an error if strict')
def test_one_bad_file_in_ten_thousand(tmp_path):
    fits.writeto(tmp_path/'first.fits', np.arange(36, dtype=np.float32).reshape(1, 6, 6), fits.Header({'BANDS': 'r'}))
    whole = (tmp_path/'first.fits').read_bytes()
    (tmp_path/'first.fits').unlink()
    (tmp_path/'many').mkdir()
    for i in range(10_000):
        (tmp_path/'many'/f'o{i:05d}.fits').write_bytes(whole if i != 6789 else whole[:2900])
    with pytest.warns(UserWarning, match='1 of 10,?000'):
        cs = open_cutouts(tmp_path/'many')
    assert len(cs) == 9999 and cs.bad_files.path.str.endswith('o06789.fits').tolist() == [True] and 'truncated' in cs.bad_files.reason[0]
    assert np.array_equal(cs.flux[9000:].sum((1, 2, 3)), np.full(999, 630.0))
    with pytest.raises(CutoutError, match='o06789'):
        open_cutouts(tmp_path/'many', strict=True)


# Native files and tables that are not what their name says.

DOORS = {'.h5': open_cutouts, '.fits': open_cutouts, '.parquet': EmbeddingTable.load}
FAULTS = {
    'missing': (lambda p: None, 'no such file'),
    'empty': (lambda p: p.write_bytes(b''), 'empty file'),
    'web page': (lambda p: p.write_text('<!DOCTYPE html><html>502 Bad Gateway</html>'*99), 'starts with|not a complete Parquet'),
    'JSON': (lambda p: p.write_text('{"error": "not found"}'), 'starts with|not a complete Parquet'),
    'PNG': (lambda p: p.write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(999)), 'starts with|not a complete Parquet'),
    'noise': (lambda p: p.write_bytes(np.random.default_rng(0).bytes(5000)), 'starts with|not a complete Parquet'),
    'folder': (lambda p: p.mkdir(), 'no cutouts found|has no part-'),
}


@fault(3, 'a file that is missing, empty, a folder, or of another kind', 'an error that names it and says what it starts with')
@pytest.mark.parametrize('suffix', DOORS)
@pytest.mark.parametrize('fault', FAULTS)
def test_a_file_of_the_wrong_kind(suffix, fault, tmp_path):
    make, message = FAULTS[fault]
    make(tmp_path/f'bad{suffix}')
    with pytest.raises(CutoutError, match=message) as error:
        DOORS[suffix](tmp_path/f'bad{suffix}')
    assert f'bad{suffix}' in str(error.value)


@fault(1, 'a native file, a FITS file or a table cut off anywhere', 'refused by name; only in the padding of a FITS file there is nothing to lose, and a warning')
@pytest.mark.parametrize('suffix', DOORS)
def test_a_file_cut_off_anywhere(suffix, good, tmp_path):
    whole = good[suffix].read_bytes()
    door = DOORS[suffix]
    pixels = (lambda t: t.X) if suffix == '.parquet' else (lambda cs: cs.flux[:])
    expected, refused = pixels(door(good[suffix])), 0
    for at in np.random.default_rng(0).integers(1, len(whole) - 1, 30):
        (tmp_path/f'cut{suffix}').write_bytes(whole[:at])
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter('always')
                found = pixels(door(tmp_path/f'cut{suffix}'))
        except CutoutError as e:
            assert f'cut{suffix}' in str(e)
            refused += 1
        else:
            assert np.array_equal(found, expected)
            assert suffix == '.fits' and any('padding' in str(w.message) for w in caught)
    assert refused >= 20


def test_hdf5_of_another_kind_is_named_with_what_it_holds(tmp_path):
    with h5py.File(tmp_path/'other.h5', 'w') as h5:
        h5['spectra'] = np.zeros(3)
    with pytest.raises(CutoutError, match=r"other\.h5.*unknown layout.*spectra"):
        open_cutouts(tmp_path/'other.h5')


@pytest.mark.parametrize('lost', ['flux', 'meta/id', 'meta/ra', '@bands', '@columns', '@version'])
def test_a_native_file_that_lacks_something(lost, good):
    with h5py.File(good['.h5'], 'a') as h5:
        if lost.startswith('@'):
            del h5.attrs[lost[1:]]
        else:
            del h5[lost]
    with pytest.raises(CutoutError, match=f"good.h5.*{lost.strip('@').split('/')[-1]}"):
        open_cutouts(good['.h5'])


def test_a_native_file_with_duplicate_ids_is_named(good):
    with h5py.File(good['.h5'], 'a') as h5:
        h5['meta/id'][1] = h5['meta/id'][0]
    with pytest.raises(CutoutError, match='duplicate ids') as error:
        open_cutouts(good['.h5'])
    assert 'good.h5' in str(error.value) and 'syn-1-000000' in str(error.value)


def test_a_bad_file_among_good_ones_is_set_aside_and_reported(good, tmp_path):
    (tmp_path/'many').mkdir()
    for name in 'abc':
        shutil.copy(good['.fits'], tmp_path/'many'/f'{name}.fits')
    (tmp_path/'many'/'b.fits').write_text('<html>')
    with pytest.warns(UserWarning, match='1 of 3 files cannot be read'):
        cs = open_cutouts(tmp_path/'many')
    assert cs.ids == ['a', 'c'] and 'b.fits' in cs.bad_files.path[0] and 'starts with' in cs.bad_files.reason[0]
    with pytest.raises(CutoutError, match='b.fits'):
        open_cutouts(tmp_path/'many', strict=True)


# Settings.

@pytest.fixture
def command(capsys):
    """The `galaxy_ssl` command in this process: its exit code and everything it said."""
    def run(*words):
        try:
            cli.main([str(w) for w in words])
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
            print(e.code)
        out = capsys.readouterr()
        return code, out.out + out.err
    return run


def toml(folder, text):
    (folder/'run.toml').write_text(text)
    return folder/'run.toml'


@fault(41, 'an unknown key in Python', 'an error with the nearest known one')
def test_unknown_key_in_python():
    with pytest.raises(CutoutError, match="unknown key 'epcohs'.*Did you mean 'epochs'"):
        make_config({'epcohs': 3})
    with pytest.raises(CutoutError, match="augment.*unknown key 'jiter'.*Did you mean 'jitter'"):
        make_config({'augment': {'jiter': 3}})


SPELT = {
    'toml': (lambda f: ['--config', toml(f, 'epcohs = 3')], 'epcohs', 'epochs'),
    'toml augment': (lambda f: ['--config', toml(f, '[augment]\njiter = 1')], 'jiter', 'jitter'),
    'toml settings': (lambda f: ['--config', toml(f, '[settings]\nmask_ration = 0.5')], 'mask_ration', 'mask_ratio'),
    'flag': (lambda f: ['--epcohs', '3'], 'epcohs', 'epochs'),
    'set': (lambda f: ['--set', 'mask_ration=0.5'], 'mask_ration', 'mask_ratio'),
    'method': (lambda f: ['--method', 'maee'], 'maee', 'mae'),
}


@fault(41, 'a misspelt key in TOML, in a flag or in --set', 'an error with the nearest known one; nothing is written')
@pytest.mark.parametrize('where', SPELT)
def test_a_misspelt_setting_is_refused_with_the_nearest_name(where, good, tmp_path, command):
    words, wrong, right = SPELT[where]
    code, said = command('train', '--data', good['.h5'], '--out', tmp_path/'run', *words(tmp_path))
    assert code != 0 and wrong in said and right in said.replace(wrong, '')
    assert not (tmp_path/'run').exists() or not contents(tmp_path/'run')


@fault(41, 'a config file that is missing, broken or of wrong types', 'an error that names the file')
@pytest.mark.parametrize('text, message', [(None, 'run.toml: no such file'), ('epochs = ', 'run.toml: not valid TOML'), ('epochs = "many"', "epochs is 'many', expected int"), ('d4 = 1', "unknown key 'd4'")], ids=['missing', 'broken', 'wrong type', 'wrong table'])
def test_a_config_file_that_cannot_be_used(text, message, good, tmp_path, command):
    if text is not None:
        toml(tmp_path, text)
    code, said = command('train', '--data', good['.h5'], '--out', tmp_path/'run', '--config', tmp_path/'run.toml')
    assert code != 0 and message in said


@pytest.mark.parametrize('words, message', [(['trian'], "Did you mean 'train'"), (['embed', '{run}', 'nowhere.h5'], 'nowhere.h5: no such file'),
                                            (['embed', 'nowhere', '{data}'], 'nowhere: no such run folder'), (['train', '--data', 'nowhere'], 'nowhere: no such file'),
                                            (['train'], 'no cutouts given'), (['embed', '{run}', '{data}', '--out', '{data}'], 'good.h5'),
                                            (['embed', '{run}', '{data}', '--pool', 'maen'], 'unknown pooling')], ids=lambda v: ' '.join(v) if isinstance(v, list) else '')
def test_a_command_that_cannot_work_says_so_in_one_line(words, message, good, trained, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    code, said = command(*[w.format(run=trained, data=good['.h5']) for w in words])
    assert code == 1 and message in said and len(said.strip().splitlines()) == 1
    assert contents(tmp_path) == before


# Places that cannot be written to.

WRITERS = {
    'cutouts': lambda cs, run, out: cs.save(out),
    'table': lambda cs, run, out: embed(run, cs).save(out),
    'embed': lambda cs, run, out: embed(run, cs, out=out),
    'train': lambda cs, run, out: fit(cs, out),
}


@fault(26, 'the place to write to lies below a file', 'an error that names it')
@pytest.mark.parametrize('writer', WRITERS)
def test_out_lies_below_a_file(writer, galaxies, trained, tmp_path):
    (tmp_path/'file').write_text('mine')
    with pytest.raises(CutoutError, match=re.escape(str(tmp_path/'file'))):
        WRITERS[writer](galaxies, trained, tmp_path/'file'/'out.parquet')
    assert contents(tmp_path) == {'file': b'mine'}


def test_out_of_a_training_is_a_file(galaxies, tmp_path):
    (tmp_path/'file').write_text('mine')
    with pytest.raises(CutoutError, match=f'{tmp_path}/file'):
        fit(galaxies, tmp_path/'file')
    assert contents(tmp_path) == {'file': b'mine'}


@fault(26, 'the file to write is a folder', 'an error that names it')
@pytest.mark.parametrize('writer', ['cutouts', 'table', 'embed'])
def test_out_is_a_folder_where_a_file_is_written(writer, galaxies, trained, tmp_path):
    (tmp_path/'out.parquet').mkdir()
    with pytest.raises(CutoutError, match=r'out\.parquet: is a folder'):
        WRITERS[writer](galaxies, trained, tmp_path/'out.parquet')
    assert not contents(tmp_path)


@fault(26, 'a place that cannot be written to', 'an error before any computing')
def test_embedding_does_not_start_when_it_cannot_be_written(galaxies, trained, tmp_path, monkeypatch):
    (tmp_path/'out.parquet').mkdir()
    run = load_run(trained)
    monkeypatch.setattr(type(run.method), 'embed', lambda *a, **k: pytest.fail('it computed first'))
    with pytest.raises(CutoutError, match='is a folder'):
        embed(run, galaxies, out=tmp_path/'out.parquet')


def write_as_nobody(writer, folder, run, data, said):
    """Write into a folder without the right to."""
    torch.set_num_threads(1)
    cs, run = open_cutouts(data), load_run(run)
    warm = Path(tempfile.mkdtemp())
    for name, write in WRITERS.items():  # everything is imported while it may be read
        write(cs, run, warm/name/'out.parquet')
    shutil.rmtree(warm)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    try:
        WRITERS[writer](cs, run, folder/'out.parquet')
    except CutoutError as e:
        said.write_text(str(e))


@fault(26, 'a read-only folder', 'an error that names it')
@pytest.mark.parametrize('writer', WRITERS)
def test_a_read_only_folder_is_refused(writer, galaxies, trained):
    outside = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    try:
        outside.chmod(0o755)
        galaxies.save(outside/'data.h5')
        (outside/'locked').mkdir(mode=0o555)
        (outside/'said').touch()
        (outside/'said').chmod(0o666)
        finish(start(write_as_nobody, writer, outside/'locked', trained, outside/'data.h5', outside/'said'))
        assert re.match(rf'{outside}/locked.*(read-only|Permission denied)', (outside/'said').read_text())
        assert not contents(outside/'locked')
    finally:
        shutil.rmtree(outside)


# A full disk.

def save_cutouts(folder):
    synthetic_cutouts(30, size=32, seed=8).save(folder/'cutouts.h5')


def save_table(folder):
    EmbeddingTable(np.ones((2000, 64))).save(folder/'table.parquet')


def save_checkpoint(folder):
    save_resume(folder/'resume.pt', {'step': 2, 'model': {'a': torch.ones(100_000)}})


def save_model(folder):
    save_weights(folder/'model.safetensors', {'a': torch.ones(100_000)})


def train_for_long(folder):
    cs = synthetic_cutouts(40, size=20, seed=1)
    train(TrainConfig(**{**TINY, 'out': str(folder), 'epochs': 3, 'save_every': 1}), cs, callbacks=[])


def on_a_full_disk(job, folder, said):
    """Run a job that may write no file beyond 20 kB; write down how it ends."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        job(folder)
    except OSError as e:
        said.write_text(f'{e.errno} {e}')
        raise SystemExit(1) from e


@fault(25, 'a full disk', 'errno, path and free space in the message, exit code 1, the old file untouched, no partial file')
@pytest.mark.parametrize('job, name', [(save_cutouts, 'cutouts.h5'), (save_table, 'table.parquet'), (save_checkpoint, 'resume.pt'), (save_model, 'model.safetensors')])
def test_a_full_disk_leaves_the_old_file(job, name, tmp_path):
    (tmp_path/'work').mkdir()
    (tmp_path/'work'/name).write_bytes(b'what was there before')
    (process,) = start(on_a_full_disk, job, tmp_path/'work', tmp_path/'said')
    process.join(60)
    assert process.exitcode == 1
    assert re.match(rf'27 .*{tmp_path}/work/{name}: no room to write it .*MB free', (tmp_path/'said').read_text())
    assert contents(tmp_path/'work') == {name: b'what was there before'}


@fault(25, 'a disk that fills up while training', 'the file that did not fit is named, the run folder stays sound')
def test_a_disk_that_fills_up_while_training_says_so(tmp_path):
    (process,) = start(on_a_full_disk, train_for_long, tmp_path/'run', tmp_path/'said')
    process.join(60)
    assert process.exitcode == 1
    assert re.match(r'27 .*run/(resume\.pt|best\.safetensors): no room to write it', (tmp_path/'said').read_text())
    assert not [n for n in contents(tmp_path/'run') if n.endswith('.tmp')]
    assert json.loads((tmp_path/'run'/'config.json').read_text())['method'] == 'mae'


def test_a_run_is_as_usable_after_a_full_disk_as_before(folder, galaxies, tmp_path):
    before = contents(folder)
    (process,) = start(on_a_full_disk, save_checkpoint, folder, tmp_path/'said')
    process.join(60)
    assert process.exitcode == 1 and contents(folder) == before
    run = fit(galaxies, folder)
    assert load_resume(folder/'resume.pt')['step'] == run.log().step.max()


def test_every_row_is_covered():
    """Rows 1 to 17, 25, 26, 31, 35, 39 and 41 of the fault table."""
    assert ROWS >= {*range(1, 18), 25, 26, 31, 35, 39, 41}
