"""Tiles at survey scale: memory, processes, training straight from tiles, killed repacking, and the real frames."""
import multiprocessing as mp
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pandas as pd
import pytest
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.nddata import Cutout2D

from galaxy_ssl.batch import Loader
from galaxy_ssl.core import CutoutError, sample_data
from galaxy_ssl.cutouts import open_cutouts
from galaxy_ssl.mocks import mock_plane, mock_wcs
from galaxy_ssl.sources import detect_sources
from galaxy_ssl.tiles import cut_tile, open_tile, read_tile
from galaxy_ssl.tilesets import open_tiles

SIDE = 1024


def write_sky(folder, names, bands='gr', shape=(200, 200), suffix='.fits', turn=0.0):
    """Tiles of a made-up sky side by side; returns the positions of its sources."""
    rng = np.random.default_rng(0)
    skies = []
    for k, name in enumerate(names):
        w = mock_wcs(3.0 + k, -30.0, shape, turn)
        sky = w.pixel_to_world(rng.uniform(5, shape[1] - 5, 30), rng.uniform(5, shape[0] - 5, 30))
        for band in bands:
            fits.PrimaryHDU(mock_plane(w, sky, shape, seed=ord(band) + 100*k), w.to_header()).writeto(folder/f'{name}_{band}{suffix}')
        skies.append(sky)
    return skies


MEASURE = """
import re, sys, warnings
import numpy as np
from galaxy_ssl.mocks import mock_plane, mock_wcs
from galaxy_ssl.sources import detect_sources
from galaxy_ssl.tilesets import open_tiles
from galaxy_ssl.tiles import open_tile
warnings.simplefilter('ignore')
folder, job = sys.argv[1:]
align = 'g' if job == 'align' else None
open_tile(folder + '/warm_*', align=align).cut([0], [0], 32)
def memory(what):  # not ru_maxrss, which a child inherits from its parent
    return int(re.search(what + r':\\s+(\\d+)', open('/proc/self/status').read())[1])/1024
if job == 'sources':  # what the extraction library itself loads is not counted
    detect_sources(open_tile(folder + '/warm_*').read())
open('/proc/self/clear_refs', 'w').write('5')  # the peak starts from here
before = memory('VmRSS')
if job == 'sources':
    detect_sources(open_tile(folder + '/big_*'), piece=256)
elif job == 'whole':
    open_tile(folder + '/big_*').read()
else:
    cs = open_tiles(folder + '/big_*', 'random', 64, n=60, align=align)
    for a in range(0, 60, 20):
        assert np.isfinite(cs.flux[a:a + 20]).any()
print(memory('VmHWM') - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='peaks are read from /proc')
@pytest.mark.parametrize('job, suffix, limit', [('read', '.fits', 30), ('read', '.fits.gz', 34), ('align', '.fits', 60), ('sources', '.fits', 80), ('whole', '.fits', 40)])
def test_a_tile_is_never_in_memory(tmp_path, job, suffix, limit):
    """Nine bands of 1024 x 1024 are 36 MB, and 180 MB while sources are sought in all of them at once. What grows is a batch, the held cutouts,
    one strip, or one piece. The last case reads it all, to show that the measure can see it."""
    rng = np.random.default_rng(0)
    for k, band in enumerate('ugrizYJHK'):
        w = mock_wcs(shape=(SIDE, SIDE))
        if job == 'align' and band != 'g':
            w.wcs.crpix = w.wcs.crpix + 2.4
        for name, side in [('big', SIDE), ('warm', 128)]:
            fits.PrimaryHDU(rng.normal(0, 1, (side, side)).astype('>f4'), w.to_header()).writeto(tmp_path/f'{name}_{band}{suffix}')
    out = subprocess.run([sys.executable, '-c', MEASURE, str(tmp_path), job], capture_output=True, text=True, check=True)
    grown = float(out.stdout)
    print(f'{job}{suffix}: {grown:.0f} MB more than before')
    assert grown > limit if job == 'whole' else grown < limit, f'{grown:.0f} MB more than before'


@pytest.mark.parametrize('suffix', ['.fits', '.fits.gz'])
def test_training_reads_tiles_directly(tmp_path, suffix):
    write_sky(tmp_path, [f't{k}' for k in range(6)], suffix=suffix)
    cs = open_tiles(tmp_path, 'grid', 40, keep=4)
    assert len(cs) == 6*25
    opened = []
    sweep = type(cs.flux.read).tile
    reader = cs.flux.read
    reader.tile = lambda k: (opened.append(k), sweep(reader, k))[1]
    seen, mixed = [], []
    for rank in range(2):
        for batch in Loader(cs, 20, seed=1, rank=rank, world=2, drop_last=False).epoch():
            seen += batch['id']
            mixed.append(cs.meta.tile[batch['id']].nunique())
            rows = cs.meta.index.get_indexer(batch['id'])
            assert np.array_equal(batch['flux'].numpy(), cs.flux[rows])
    assert sorted(seen) == sorted(cs.ids)
    assert np.mean(mixed) > 2
    if suffix == '.fits.gz':
        assert len(opened) == 6, 'a compressed tile is unpacked once, its cutouts are held'


def _read_in_child(cs, rows, queue):
    queue.put(cs.flux[rows])


@pytest.mark.parametrize('how', ['fork', 'spawn', 'threads'])
def test_reading_from_processes_and_threads(tmp_path, how):
    write_sky(tmp_path, ['a', 'b', 'c'], suffix='.fits.gz')
    cs = open_tiles(tmp_path, 'grid', 40, keep=1)
    rows = np.arange(len(cs))[::-1]
    want = cs.flux[rows]
    got = []
    if how == 'threads':
        cs.flux.read.hold = 0
        threads = [threading.Thread(target=lambda: got.append(cs.flux[rows])) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    else:
        context = mp.get_context(how)
        queue = context.Queue()
        children = [context.Process(target=_read_in_child, args=(cs, rows, queue)) for _ in range(2 if how == 'fork' else 1)]
        for c in children:
            c.start()
        got = [queue.get(timeout=120) for _ in children]
        for c in children:
            c.join()
    assert got and all(np.array_equal(g, want) for g in got)


def test_open_files_stay_few(tmp_path):
    write_sky(tmp_path, [f't{k}' for k in range(12)], shape=(64, 64))
    cs = open_tiles(tmp_path, 'grid', 32, keep=2)
    before = len(os.listdir('/proc/self/fd'))
    cs.flux[:]
    assert len(os.listdir('/proc/self/fd')) - before <= 2*2
    assert len(pickle.dumps(cs.flux.read)) < 10**5


REPACK = """
import sys, time
import numpy as np
import galaxy_ssl.repack as r
from galaxy_ssl.cutouts import open_cutouts
write = r.write_native
def slow(*args):
    write(*args)
    time.sleep(float(sys.argv[3]))
r.write_native = slow
r.repack(sys.argv[1], sys.argv[2], shard=10, progress=False)
"""


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_a_killed_repack_goes_on(tmp_path, how):
    write_sky(tmp_path, ['a'])
    open_tiles(tmp_path, 'grid', 40).save(tmp_path/'cuts.h5')
    def start(dst, pause):
        return subprocess.Popen([sys.executable, '-c', REPACK, str(tmp_path/'cuts.h5'), str(tmp_path/dst), str(pause)], stderr=subprocess.DEVNULL)
    assert start('whole', 0).wait() == 0
    job = start('killed', 60)
    part = tmp_path/'.killed.part'
    deadline = time.time() + 60
    while not list(part.glob('*.h5')):
        assert time.time() < deadline and job.poll() is None
        time.sleep(0.05)
    job.send_signal(how)
    assert job.wait(timeout=30) != 0
    assert not (tmp_path/'killed').exists()
    with pytest.raises(CutoutError, match='its repack is unfinished'):
        open_cutouts(tmp_path/'killed')
    assert start('killed', 0).wait() == 0
    names = sorted(p.name for p in (tmp_path/'whole').iterdir())
    assert names == sorted(p.name for p in (tmp_path/'killed').iterdir()) and len(names) == 4
    assert all((tmp_path/'whole'/n).read_bytes() == (tmp_path/'killed'/n).read_bytes() for n in names)
    assert not part.exists()


def test_two_repacks_into_one_folder(tmp_path):
    write_sky(tmp_path, ['a'])
    open_tiles(tmp_path, 'grid', 40).save(tmp_path/'cuts.h5')
    job = subprocess.Popen([sys.executable, '-c', REPACK, str(tmp_path/'cuts.h5'), str(tmp_path/'out'), '60'])
    try:
        deadline = time.time() + 60
        while not list((tmp_path/'.out.part').glob('*.h5')):
            assert time.time() < deadline and job.poll() is None
            time.sleep(0.05)
        from galaxy_ssl.repack import repack
        with pytest.raises(CutoutError, match=f'in use by pid {job.pid}'):
            repack(tmp_path/'cuts.h5', tmp_path/'out', shard=10, progress=False)
    finally:
        job.kill()
        job.wait()


@pytest.fixture(scope='module')
def frames():
    """The folder of real SDSS frames."""
    folder = sample_data('sdss-frame-ugriz')
    if folder is None:
        pytest.skip('shared/data/sdss-frame-ugriz is not here')
    return folder


def test_sdss_bright_sources_are_where_the_catalogue_says(frames):
    listed = pd.read_csv(frames/'sources_sep.csv')
    listed = listed[(listed.mag < 17.5) & (listed.flag == 0) & ~listed.extended & listed.x.between(40, 2000) & listed.y.between(40, 1440)]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        tile = open_tile(frames, bands='gr', survey='sdss', align='r')
        found = detect_sources(tile, threshold=3, min_area=8)
    off = SkyCoord(listed.ra, listed.dec, unit='deg').match_to_catalog_sky(SkyCoord(found.ra, found.dec, unit='deg'))[1].arcsec
    assert len(listed) > 50 and (off < 0.3).mean() > 0.97


@pytest.mark.parametrize('size', [32, 33])
def test_sdss_cutouts_are_those_of_astropy(frames, size):
    tile = open_tile({'r': frames/'frame-r-002583-2-0136.fits.bz2'}, survey='sdss')
    whole = read_tile({'r': frames/'frame-r-002583-2-0136.fits.bz2'}, survey='sdss')
    sky = tile.wcs.pixel_to_world([3.2, 900.5, 2040.7, 1200.0], [4.9, 700.2, 1480.1, 5.5])
    cuts = cut_tile(tile, pd.DataFrame({'ra': sky.ra.deg, 'dec': sky.dec.deg}), size)
    for i in range(4):
        theirs = Cutout2D(whole.flux[0], sky[i], size, wcs=tile.wcs, mode='partial', fill_value=np.nan)
        assert np.array_equal(cuts.flux[i][0], theirs.data, equal_nan=True)
        there = theirs.wcs.pixel_to_world([0, size - 1, 5], [0, 7, size - 1])
        assert np.allclose(cuts.wcs(i).world_to_pixel(there), [[0, size - 1, 5], [0, 7, size - 1]], atol=1e-3)


def test_kids_viking_opens_in_one_line():
    folder = sample_data('kids-viking-tile')
    if folder is None:
        pytest.skip('shared/data/kids-viking-tile is not here')
    table = pd.read_csv(folder/'sources_sep.csv')[['x', 'y', 'mag']]
    cs = open_tiles(folder, table[table.mag < 20], 64, survey='kids-viking', bands=['r', 'Ks'])
    whole = read_tile(folder, survey='kids-viking', bands=['r', 'Ks'])
    assert cs.bands == ('r', 'Ks') and cs.unit == 'nanomaggy' and whole.shape == (2, 2600, 2600)
    inside = np.flatnonzero(cs.meta.x.between(40, 2560) & cs.meta.y.between(40, 2560))[:20]
    for i in inside:
        x0, y0 = (int(np.floor(v - 31.5 + 0.5)) for v in (cs.meta.x.iloc[i], cs.meta.y.iloc[i]))
        assert np.array_equal(cs.flux[int(i)], whole.flux[:, y0:y0 + 64, x0:x0 + 64])
