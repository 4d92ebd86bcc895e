"""Every layout that opens without conversion: the real thing is written, and the same pixels, labels, positions and masks come back."""
import io
import json
import pickle
import resource
import subprocess
import sys
import textwrap
import warnings
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.table import Table
from PIL import Image

from galaxy_ssl.core import CutoutError, sample_data
from galaxy_ssl.cutouts import LAYOUTS, CutoutSet, open_cutouts
from galaxy_ssl.layouts import GALAXY10_DECALS

N = 6
RNG = np.random.default_rng(0)
FLUX = RNG.normal(size=(N, 3, 10, 12)).astype(np.float32)
FLUX[2, 1, 4, 5] = np.nan
BYTES = RNG.integers(0, 255, (N, 16, 16, 3), dtype=np.uint8)
RA, DEC = np.linspace(10, 11, N), np.linspace(-1, 1, N)
BIG = [2**60 + k for k in range(N)]
IDS = [str(v) for v in BIG]
BAD = RNG.random((N, 3, 10, 12)) < 0.1
IVAR = RNG.uniform(1, 2, (N, 3, 10, 12)).astype(np.float32)
RGB = BYTES.transpose(0, 3, 1, 2).astype(np.float32)


def h5(path, attrs=(), **data):
    with h5py.File(path, 'w') as f:
        for k, v in data.items():
            f[k] = v
        f.attrs.update(attrs)
    return path


def native(d):
    cs = CutoutSet(FLUX, {'id': IDS, 'ra': RA, 'dec': DEC, 'label': list('ESESES')}, ('g', 'r', 'z'), 'legacy-dr9-south', 0.262, bad=BAD, ivar=IVAR)
    return cs.save(d/'native.h5'), {}, {'flux': FLUX, 'ids': IDS, 'ra': RA, 'bad': BAD, 'ivar': IVAR, 'label': list('ESESES')}


def jpeg(image):
    out = io.BytesIO()
    Image.fromarray(image).save(out, 'JPEG', quality=100, subsampling=0)
    return out.getvalue(), np.asarray(Image.open(io.BytesIO(out.getvalue()))).transpose(2, 0, 1)


def jpeg_bytes(d):
    blobs, pixels = zip(*(jpeg(x) for x in BYTES))
    path = h5(d/'jpegs.h5', {'label_names': json.dumps(['E', 'S'])}, jpeg_bytes=np.frombuffer(b''.join(blobs), np.uint8),
              offsets=np.cumsum([0, *map(len, blobs)]), label=np.arange(N) % 2, objid_dr7=BIG)
    return path, {}, {'flux': np.stack(pixels), 'ids': IDS, 'label': list('ESESES'), 'bands': ('R', 'G', 'B')}


def galaxy10(d):
    images = np.zeros((N, 256, 256, 3), np.uint8)
    images[:, :16, :16] = BYTES
    path = h5(d/'Galaxy10_DECals.h5', images=images, ans=np.arange(N).astype(np.uint8), ra=RA, dec=DEC, redshift=RA/100, pxscale=np.full(N, 0.262))
    return path, {}, {'flux': images.transpose(0, 3, 1, 2), 'ra': RA, 'label': list(GALAXY10_DECALS[:N]), 'pixscale': 0.262, 'bands': ('R', 'G', 'B')}


def galaxy_mnist(d):
    path = h5(d/'test_dataset.hdf5', images=BYTES, labels=np.arange(N, dtype=np.uint8) % 4)
    return path, {}, {'flux': RGB, 'label': ['smooth_round', 'smooth_cigar', 'edge_on_disk', 'unbarred_spiral', 'smooth_round', 'smooth_cigar'],
                      'ids': [f'test_dataset_{k:06d}' for k in range(N)], 'bands': ('R', 'G', 'B')}


def hsc(d):
    path = h5(d/'hsc.h5', cutouts=FLUX, ra=RA.astype(np.float32), dec=DEC.astype(np.float32), zspec=(RA/10).astype(np.float32), **{'class': np.float32([0, 1, 2, 0, 1, 2])})
    return path, {'bands': ['g', 'z', 'r']}, {'flux': FLUX[:, [0, 2, 1]], 'ra': RA.astype(np.float32), 'z_spec': (RA/10).astype(np.float32),
                                              'class': ['galaxy', 'qso', 'star']*2}


def unions(d):
    flux = np.repeat(FLUX, 2, axis=1)[:, :5]
    return h5(d/'cutout.stacks.ugriz.lsb.10x12.0.h5', images=flux), {}, {'flux': flux, 'bands': tuple('ugriz')}


def stein(d):
    images = RNG.normal(size=(N, 3, 152, 152)).astype(np.float32)
    path = h5(d/'south_000.h5', images=images, ra=RA, dec=DEC, flux=FLUX[:, :, 0, 0], ebv=RA)
    return path, {}, {'flux': images, 'ra': RA, 'ebv': RA, 'flux_z': FLUX[:, 2, 0, 0], 'pixscale': 0.262, 'unit': 'nanomaggy', 'survey': 'legacy-dr9-south'}


def big_endian_float64_last(d):
    return h5(d/'last.h5', {'bands': 'r,g,z'}, flux=np.moveaxis(np.repeat(FLUX, 2, 2), 1, -1).astype('>f8')), {}, {'flux': np.repeat(FLUX, 2, 2)[:, [1, 0, 2]]}


def gzipped(d):
    path = d/'gzip.h5'
    with h5py.File(path, 'w') as f:
        f.create_dataset('images', data=FLUX, chunks=(2, 1, 10, 12), compression='gzip', shuffle=True)
        f.attrs['bands'] = json.dumps(['g', 'r', 'z'])
        f['object_id'] = BIG
    return path, {}, {'flux': FLUX, 'ids': IDS}


def multimodal_h5(d):
    (d/'healpix=1').mkdir()
    h5(d/'healpix=1'/'001-of-001.hdf5', image_band=np.array([['hsc-z', 'hsc-g', 'hsc-r']]*N, 'S5'), image_array=FLUX, image_ivar=IVAR, image_mask=~BAD,
       image_psf_fwhm=np.full((N, 3), 0.7), image_scale=np.full((N, 3), 0.168), object_id=BIG, ra=RA, dec=DEC)
    return d, {}, {'flux': FLUX[:, [1, 2, 0]], 'bad': BAD[:, [1, 2, 0]], 'ivar': IVAR[:, [1, 2, 0]], 'ids': IDS, 'ra': RA, 'pixscale': 0.168,
                   'bands': ('HSC-G', 'HSC-R', 'HSC-Z')}


def multimodal_parquet(d):
    images = [{'band': ['f090w', 'f444w', 'f200w'], 'flux': FLUX[i].tolist(), 'ivar': IVAR[i].tolist(), 'mask': (~BAD[i]).tolist(),
               'psf_fwhm': [0.03, 0.06, 0.14], 'scale': [0.04]*3} for i in range(N)]
    pq.write_table(pa.table({'image': images, 'object_id': IDS, 'ra': RA, 'dec': DEC}), d/'train.parquet', row_group_size=2)
    return d/'train.parquet', {}, {'flux': FLUX[:, [0, 2, 1]], 'bad': BAD[:, [0, 2, 1]], 'ids': IDS, 'ra': RA, 'pixscale': 0.04,
                                   'bands': ('f090w', 'f200w', 'f444w')}


def npy(d):
    np.save(d/'a.npy', FLUX)
    return d/'a.npy', {'bands': ['z', 'r', 'g']}, {'flux': FLUX[:, ::-1], 'ids': [f'a_{k:06d}' for k in range(N)]}


def npy_rgb(d):
    np.save(d/'rgb.npy', BYTES)
    return d/'rgb.npy', {}, {'flux': RGB, 'bands': ('R', 'G', 'B'), 'unit': 'display'}


def npz(d):
    np.savez(d/'a.npz', images=FLUX, bad=BAD, ivar=IVAR, bands=['g', 'r', 'z'], id=IDS, ra=RA, dec=DEC, label=list('ESESES'))
    return d/'a.npz', {}, {'flux': FLUX, 'bad': BAD, 'ivar': IVAR, 'ids': IDS, 'ra': RA, 'label': list('ESESES')}


def npz_packed(d):
    np.savez_compressed(d/'a.npz', images=FLUX, bad=BAD, bands=['g', 'r', 'z'], id=IDS)
    return d/'a.npz', {}, {'flux': FLUX, 'bad': BAD, 'ids': IDS}


def png(d):
    for k, x in zip(IDS, BYTES):
        Image.fromarray(x).save(d/f'{k}.png')
    return d, {}, {'flux': RGB, 'ids': IDS, 'bands': ('R', 'G', 'B'), 'unit': 'display'}


def jpg(d):
    blobs, pixels = zip(*(jpeg(x) for x in BYTES))
    for k, b in zip(IDS, blobs):
        (d/f'{k}.jpeg').write_bytes(b)
    return d, {}, {'flux': np.stack(pixels), 'ids': IDS, 'bands': ('R', 'G', 'B')}


def grey16(d):
    for k, x in zip(IDS, BYTES):
        Image.fromarray(x[..., 0].astype(np.uint16)*200).save(d/f'{k}.png')
    return d, {}, {'flux': RGB[:, :1]*200, 'ids': IDS, 'bands': ('grey',)}


WRITERS = [native, jpeg_bytes, galaxy10, galaxy_mnist, hsc, unions, stein, big_endian_float64_last, gzipped, multimodal_h5, multimodal_parquet, npy, npy_rgb,
           npz, npz_packed, png, jpg, grey16]


@pytest.fixture(params=WRITERS, ids=lambda w: w.__name__)
def written(request, tmp_path):
    (tmp_path/'set').mkdir()
    return request.param(tmp_path/'set')


def test_every_layout_gives_back_what_was_written(written):
    path, options, truth = written
    cs = open_cutouts(path, **options)
    assert cs.bands == truth.get('bands', ('g', 'r', 'z'))
    assert np.array_equal(cs.flux[:], truth['flux'].astype(np.float32), equal_nan=True)
    assert cs.flux[0].dtype == np.dtype('float32') and cs.flux[0].dtype.isnative
    for name in ('bad', 'ivar'):
        if name in truth:
            assert np.array_equal(getattr(cs, name)[[4, 1]], truth[name][[4, 1]]), name
    for name in ('pixscale', 'unit', 'survey'):
        if name in truth:
            assert getattr(cs, name) == (pytest.approx(truth[name]) if name == 'pixscale' else truth[name])
    if 'ids' in truth:
        assert cs.ids == truth['ids']
    for column in set(truth) - {'flux', 'bands', 'bad', 'ivar', 'ids', 'pixscale', 'unit', 'survey'}:
        found = cs.meta[column].tolist()
        assert found == list(truth[column]) if isinstance(found[0], str) else np.allclose(found, truth[column])


def test_every_layout_reads_any_rows_lazily_and_travels(written):
    path, options, truth = written
    cs = open_cutouts(path, **options)
    rows = [5, 0, 3, 3]
    for some in (cs, pickle.loads(pickle.dumps(cs))):
        assert np.array_equal(some.flux[rows], truth['flux'][rows].astype(np.float32), equal_nan=True)
        assert np.array_equal(some[[4, 2]].flux[:], truth['flux'][[4, 2]].astype(np.float32), equal_nan=True)
    assert cs.select(cs.bands[-1:]).flux[rows].shape[1] == 1


def test_every_layout_survives_the_native_file(written, tmp_path):
    path, options, truth = written
    cs = open_cutouts(path, **options)
    back = open_cutouts(cs.save(tmp_path/'back.h5'))
    assert np.array_equal(back.flux[:], cs.flux[:], equal_nan=True) and back.bands == cs.bands
    assert back.ids == cs.ids and list(back.meta.columns) == list(cs.meta.columns)


@pytest.mark.parametrize('size', [7, 9, 20])
def test_every_layout_can_be_cut_or_padded(written, size):
    path, options, truth = written
    cs = open_cutouts(path, size=size, **options)
    x = truth['flux'].astype(np.float32)
    assert cs.shape == (*x.shape[:2], size, size)
    y0, x0 = ((n - size)//2 for n in x.shape[2:])
    y, xx = np.mgrid[:size, :size] + np.array([y0, x0])[:, None, None]
    inside = (y >= 0) & (y < x.shape[2]) & (xx >= 0) & (xx < x.shape[3])
    expected = np.where(inside, x[:, :, y.clip(0, x.shape[2] - 1), xx.clip(0, x.shape[3] - 1)], np.nan)
    assert np.array_equal(cs.flux[:], expected, equal_nan=True)
    if cs.bad is not None:
        assert cs.bad[:][:, :, ~inside].all()


def test_wrong_band_names_and_numbers_are_errors(written):
    path, options, truth = written
    with pytest.raises(CutoutError, match='wanted|names given|no band|one object'):
        open_cutouts(path, **{**options, 'bands': ['g', 'nonsense']})


@pytest.mark.parametrize('writer', [hsc, gzipped, npy, npz, multimodal_parquet, galaxy_mnist], ids=lambda w: w.__name__)
def test_parts_become_one_set_with_unique_stable_ids(writer, tmp_path):
    for k in 'abc':
        (tmp_path/k).mkdir()
    paths = [writer(tmp_path/k)[0] for k in 'abc']
    options, truth = writer(tmp_path/'a')[1:]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        cs = open_cutouts(paths, **options)
        turned = open_cutouts(paths[::-1], **options)
    assert len(cs) == 3*N and cs.meta.index.is_unique
    assert np.array_equal(cs.flux[[N + 1, 0, 2*N + 5]], truth['flux'][[1, 0, 5]].astype(np.float32), equal_nan=True)
    assert sorted(turned.ids) == sorted(cs.ids)
    assert np.array_equal(turned[[cs.ids[N + 1]]].flux[0], cs.flux[N + 1], equal_nan=True)


@pytest.mark.parametrize('what', ['bands', 'size', 'pixscale', 'unit'])
def test_parts_that_do_not_fit_are_named(what, tmp_path):
    one = CutoutSet(FLUX, {'id': IDS}, ('g', 'r', 'z'), pixscale=0.262)
    other = {'bands': CutoutSet(FLUX, {'id': IDS}, ('g', 'r', 'i'), pixscale=0.262), 'size': one.fit(8), 'unit': CutoutSet(FLUX, {'id': IDS}, ('g', 'r', 'z'), pixscale=0.262, unit='count'),
             'pixscale': CutoutSet(FLUX, {'id': IDS}, ('g', 'r', 'z'), pixscale=0.3)}[what]
    one.save(tmp_path/'first.h5')
    other.save(tmp_path/'second.h5')
    with pytest.raises(CutoutError, match=rf'{what} differ.* in first, .* in second'):
        open_cutouts(tmp_path)


def test_one_bad_part_in_many_is_listed(tmp_path):
    for k in range(40):
        np.save(tmp_path/f'{k:02d}.npy', FLUX[:2])
    (tmp_path/'07.npy').write_bytes((tmp_path/'07.npy').read_bytes()[:200])
    with pytest.warns(UserWarning, match='1 of 40 files cannot be read'):
        cs = open_cutouts(f'{tmp_path}/*.npy', bands=['g', 'r', 'z'])
    assert len(cs) == 78 and cs.bad_files.path.tolist() == [str(tmp_path/'07.npy')] and 'truncated' in cs.bad_files.reason[0]
    with pytest.raises(CutoutError, match='07.npy: truncated'):
        open_cutouts(f'{tmp_path}/*.npy', bands=['g', 'r', 'z'], strict=True)


def test_what_else_lies_in_a_folder_does_not_hide_its_cutouts(tmp_path):
    path, _, truth = png(tmp_path)
    pd.DataFrame({'id': IDS, 'kind': list('ABCDEF')}).to_parquet(tmp_path/'labels.parquet')
    (tmp_path/'old').mkdir()
    native(tmp_path/'old')
    cs = open_cutouts(tmp_path, catalog=tmp_path/'labels.parquet')
    assert cs.bands == ('R', 'G', 'B') and cs.meta['kind'].tolist() == list('ABCDEF')


def test_more_parts_than_files_may_be_open(tmp_path):
    for k in range(300):
        np.save(tmp_path/f'{k:03d}.npy', BYTES[:1] if k else BYTES[1:2])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    cs = open_cutouts(tmp_path)
    resource.setrlimit(resource.RLIMIT_NOFILE, (250, hard))
    try:
        flux = np.stack([cs.flux[i] for i in range(len(cs))])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert np.array_equal(flux[0], RGB[1]) and (flux[1:] == RGB[0]).all()


def write_catalog(rows, path):
    if path.suffix == '.csv':
        rows.to_csv(path, index=False)
    elif path.suffix == '.parquet':
        rows.to_parquet(path)
    else:
        Table.from_pandas(rows).write(path, format={'.ecsv': 'ascii.ecsv', '.fits': 'fits', '.vot': 'votable'}[path.suffix])
    return path


@pytest.mark.parametrize('suffix', ['.csv', '.parquet', '.ecsv', '.fits', '.vot'])
@pytest.mark.parametrize('writer', [gzipped, npz, png], ids=lambda w: w.__name__)
def test_a_catalogue_of_any_format_beside_any_layout(writer, suffix, tmp_path):
    (tmp_path/'set').mkdir()
    path, options, truth = writer(tmp_path/'set')
    rows = pd.DataFrame({'objID': BIG[::-1], 'RA': RA[::-1], 'DEC': DEC[::-1], 'kind': list('FEDCBA'), 'specobjid': [v + 100 for v in BIG[::-1]]})
    cs = open_cutouts(path, catalog=write_catalog(rows, tmp_path/f'cat{suffix}'), **options)
    assert cs.meta['kind'].tolist() == list('ABCDEF') and np.allclose(cs.meta.ra, RA)
    assert [int(v) for v in cs.meta.specobjid] == [v + 100 for v in BIG]


def test_zoobot_catalogues_and_positions(tmp_path):
    (tmp_path/'set').mkdir()
    path, _, _ = png(tmp_path/'set')
    votes = pd.DataFrame({'id_str': IDS[::-1], 'file_loc': [f'/far/{i}.png' for i in IDS[::-1]], 'smooth': np.arange(N)/10})
    assert open_cutouts(path, catalog=votes).meta.smooth.tolist() == [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    assert open_cutouts(path, catalog=votes.assign(id_str=list('uvwxyz'))).meta.smooth.tolist() == [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    assert open_cutouts(path, catalog=votes.drop(columns='id_str')).meta.smooth.tolist() == [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    path, options, _ = stein(tmp_path)
    sky = pd.DataFrame({'source_id': list('uvwxyz'), 'ra': RA[::-1], 'dec': DEC[::-1] + 0.5/3600, 'z': np.arange(N)/10})
    with pytest.warns(UserWarning, match='6 of 6 objects are matched by position'):
        cs = open_cutouts(path, catalog=sky, **options)
    assert cs.meta.z.tolist() == [0.5, 0.4, 0.3, 0.2, 0.1, 0.0] and cs.meta.catalog_id.tolist() == list('zyxwvu') and np.allclose(cs.meta.dec, DEC)


def hostile(d):
    """name -> (path, what the error says)."""
    (d/'secret').write_bytes(b'x'*4000)
    with h5py.File(d/'link.h5', 'w') as f:
        f['images'] = h5py.ExternalLink(str(d/'other.h5'), 'images')
    with h5py.File(d/'external.h5', 'w') as f:
        f.create_dataset('images', (5, 3, 5, 5), np.uint8, external=[(str(d/'secret'), 0, 4000)])
    with h5py.File(d/'claim.h5', 'w') as f:
        f.create_dataset('images', (10**6, 1, 10**3, 10**3), np.float32, chunks=(1, 1, 10**3, 10**3))
    with h5py.File(d/'flat.h5', 'w') as f:
        f.create_dataset('cutouts', (10**6, 1, 10**3, 10**3), np.float32)
    with h5py.File(d/'column.h5', 'w') as f:
        f['images'] = FLUX
        f.create_dataset('label', (N, 10**12), np.float32, chunks=(1, 10**6))
    h5(d/'idnan.h5', images=FLUX, id=np.array([1, 2, 3, 4, 5, np.nan]))
    h5(d/'twice.h5', images=FLUX, id=[1, 1, 2, 3, 4, 5])
    h5(d/'text.h5', images=np.full((2, 3, 4, 4), b'a', 'S1'))
    h5(d/'named.h5', {'bands': '["g"]'}, images=FLUX)
    np.save(d/'pickle.npy', np.array([{}], object), allow_pickle=True)
    np.savez(d/'pickle.npz', images=np.array([{}], object))
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {'descr': '<f4', 'fortran_order': False, 'shape': (10**6, 1, 10**3, 10**3)})
    (d/'claim.npy').write_bytes(head.getvalue() + bytes(99))
    with zipfile.ZipFile(d/'bomb.npz', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('images.npy', head.getvalue() + bytes(10**7))
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {'descr': '<f4', 'fortran_order': False, 'shape': (3000, 1, 1000, 1000)})
    with zipfile.ZipFile(d/'big.npz', 'w', zipfile.ZIP_DEFLATED) as z, z.open('images.npy', 'w', force_zip64=True) as f:
        f.write(head.getvalue())
        for _ in range(120):
            f.write(bytes(10**6))
    Image.new('L', (20, 20)).save(d/'huge.png')
    body = bytearray((d/'huge.png').read_bytes())
    body[16:24] = (10**5).to_bytes(4, 'big')*2
    (d/'huge.png').write_bytes(body)
    (d/'cut.h5').write_bytes((d/'idnan.h5').read_bytes()[:-500])
    (d/'set.hdf5.gz').write_bytes(b'\x1f\x8b' + bytes(50))
    (d/'page.parquet').write_bytes(b'PAR1' + bytes(50))
    return {'link.h5': 'links to another file', 'external.h5': 'live in another file', 'claim.h5': 'claims 1,000,000,000,000 values', 'flat.h5': '0 bytes are stored|truncated',
            'column.h5': '0 bytes are stored', 'idnan.h5': 'floating point', 'twice.h5': 'duplicate ids', 'text.h5': 'unknown layout', 'named.h5': 'the file names 1',
            'pickle.npy': 'Python objects', 'pickle.npz': 'Python objects', 'claim.npy': 'truncated', 'bomb.npz': 'claims 4,000,000', 'big.npz': 'claims 12,000,000',
            'huge.png': 'too many pixels|not a readable|truncated', 'cut.h5': 'truncated', 'set.hdf5.gz': 'gunzip', 'page.parquet': 'unreadable Parquet'}


def test_hostile_files_are_errors_in_bounded_memory(tmp_path):
    cases = hostile(tmp_path)
    code = textwrap.dedent('''
        import json, resource, sys, warnings
        warnings.simplefilter('ignore')
        from galaxy_ssl.core import CutoutError
        from galaxy_ssl.cutouts import open_cutouts
        import galaxy_ssl.folders, galaxy_ssl.layouts, galaxy_ssl.arrays, galaxy_ssl.pictures, galaxy_ssl.multimodal
        from PIL import Image
        said = {}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name in json.loads(sys.argv[2]):
            try:
                open_cutouts(f'{sys.argv[1]}/{name}')
                said[name] = 'opened'
            except CutoutError as e:
                said[name] = str(e)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(json.dumps([said, grown/1024]))
    ''')
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path), json.dumps(list(cases))], capture_output=True, text=True, timeout=120,
                          cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    said, grown = json.loads(done.stdout)
    for name, message in cases.items():
        assert any(m in said[name] for m in message.split('|')), f'{name}: {said[name]}'
        assert name in said[name]
    assert grown < 100, f'{grown:.0f} MB'


def test_truncation_anywhere_is_an_error_or_the_same_pixels(tmp_path):
    for writer in (gzipped, npz, npy, multimodal_parquet):
        (tmp_path/writer.__name__).mkdir()
        path, options, truth = writer(tmp_path/writer.__name__)
        body = path.read_bytes()
        for cut in np.linspace(1, len(body) - 1, 12).astype(int):
            short = tmp_path/f'short{path.suffix}'
            short.write_bytes(body[:cut])
            with pytest.raises(CutoutError):
                open_cutouts(short, **options).flux[:]


REAL = [
    ('gz1-sdss/gz1_sdss_160_public.h5', 4663, '588848901537202306', ('label', 'elliptical')),
    ('efigi-sdss/efigi_sdss_88_public.h5', 3083, None, ('T', None)),
    ('gz2-hart16-sdss/gz2_hart16_208_public.h5', 704, None, ('gz2_class', None)),
    ('gzdecals-rings/gzdecals_rings_160_public.h5', 329, None, ('ring', None)),
    ('cfhtls-lenses/cfhtls_spacewarps_161_public.h5', 272, None, ('expert_grade', None)),
    ('hsc-scarlet-blends/hsc_cosmos.npz', 1, 'hsc_cosmos_000000', None),
    ('hsc-scarlet-blends/hsc_cosmos_35.npz', 1, 'hsc_cosmos_35_000000', None),
    ('sdss-image-spectrum/images', 20, '1237648721217716541', None),
    ('decals-grz-fits', 20, None, None),
]
ID_OF = {'gz1': 'objid_dr7', 'gz2': 'objid_dr7', 'efigi': 'pgc', 'gzdecals': 'iauname', 'cfhtls': 'zooid'}


@pytest.mark.parametrize('name,n,first,label', REAL, ids=[r[0].split('/')[0] + r[0][-6:] for r in REAL])
def test_real_files_open_in_one_line(name, n, first, label):
    path = sample_data(name)
    if path is None:
        pytest.skip(f'the sample set {name} is not in shared/data')
    cs = open_cutouts(path)
    assert len(cs) == n and cs.meta.index.is_unique and np.isfinite(cs.flux[:2]).any()
    assert first is None or cs.ids[0] == first
    if label is not None:
        assert label[0] in cs.meta and (label[1] is None or label[1] in set(cs.meta[label[0]]))
    key = ID_OF.get(name.split('-')[0])
    if key is not None:
        with h5py.File(path) as f:
            values = f[key][:]
            own = [v.decode() if isinstance(v, bytes) else str(v) for v in values]
            assert cs.ids == own
            if 'ra' in f:
                assert np.array_equal(cs.meta.ra, f['ra'][:]) and np.array_equal(cs.meta.dec, f['dec'][:])
            if 'images' in f:
                assert np.array_equal(cs.flux[[5, 2]], f['images'][:6].transpose(0, 3, 1, 2)[[5, 2]])


def test_mapped_layouts_read_only_the_rows_asked_for(tmp_path):
    """A sparse file of 40 GB opens at once and a batch costs its own bytes."""
    shape = (200_000, 1, 224, 224)
    with open(tmp_path/'sparse.npy', 'wb') as f:
        np.lib.format.write_array_header_1_0(f, {'descr': '<f4', 'fortran_order': False, 'shape': shape})
        f.truncate(f.tell() + int(np.prod(shape))*4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cs = open_cutouts(tmp_path/'sparse.npy', bands=['r'])
    assert not cs.flux[RNG.integers(0, shape[0], 64)].any()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1024 < 250


def test_every_registered_layout_is_written_here():
    written = {'native', 'jpeg-bytes', 'rgb-stack', 'flux-stack', 'multimodal', 'npy', 'npz', 'pictures', 'fits'}
    assert set(LAYOUTS) >= written
