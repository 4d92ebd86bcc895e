"""Every way to store an image in FITS, written by astropy or fitsio and read back; the fast path against astropy; real files."""
import bz2
import gzip
import resource
import warnings
from multiprocessing import get_context

import fitsio
import numpy as np
import pandas as pd
import pytest
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.nddata import CCDData, StdDevUncertainty
from astropy.utils.exceptions import AstropyWarning
from astropy.wcs import WCS
from hypothesis import given, settings
from hypothesis import strategies as st

from galaxy_ssl.core import CutoutError, sample_data
from galaxy_ssl.cutouts import open_cutouts
from galaxy_ssl.fits import find_image, read_fits, read_pixels
from galaxy_ssl.folders import read_fits_folder

RNG = np.random.default_rng(0)
PLANE = RNG.normal(size=(37, 50)).astype(np.float32)
CUBE = RNG.normal(size=(3, 37, 50)).astype(np.float32)
COUNTS = RNG.integers(0, 100, (37, 50))


def sky(shape=(37, 50), ra=150.0, dec=2.0, scale=0.262, angle=0.3, **more):
    """A header with a rotated TAN projection."""
    c, s = np.cos(angle)*scale/3600, np.sin(angle)*scale/3600
    h = fits.Header({'CTYPE1': 'RA---TAN', 'CTYPE2': 'DEC--TAN', 'CRVAL1': ra, 'CRVAL2': dec, 'CRPIX1': shape[1]/2 + 3, 'CRPIX2': shape[0]/2 - 4,
                     'CD1_1': -c, 'CD1_2': s, 'CD2_1': s, 'CD2_2': c})
    h.update(more)
    return h


# Pixels: every type, scaling, packing and place in the file.

def simple(x, **cards):
    return lambda p: fits.writeto(p, x, fits.Header(cards))


def scaled(stored, **cards):
    """Integers with scaling cards."""
    def write(p):
        hdu = fits.PrimaryHDU(stored)
        hdu.header.update(cards)
        hdu.writeto(p)
    return write


def packed(codec, x, **options):
    return lambda p: fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(x, compression_type=codec, **options)]).writeto(p)


def by_fitsio(x, **options):
    return lambda p: fitsio.write(str(p), x, **options)


def extension(x, name='SCI'):
    return lambda p: fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU.from_columns([fits.Column('a', 'E', array=np.ones(7))]), fits.ImageHDU(x, name=name)]).writeto(p)


INT16 = COUNTS.astype(np.int16)
HOLES = INT16.copy()
HOLES[2, 3] = -999
VARIANTS = {  # name -> writer, truth, tolerance
    'f4': (simple(PLANE), PLANE, 0), 'f8': (simple(PLANE.astype('f8')), PLANE, 0), 'cube': (simple(CUBE), CUBE, 0), 'one plane': (simple(PLANE[None]), PLANE[None], 0),
    '4-D': (simple(CUBE[None]), CUBE, 0), '5-D': (simple(CUBE[None, None]), CUBE, 0), 'NaN': (simple(np.where(COUNTS > 50, PLANE, np.nan)), np.where(COUNTS > 50, PLANE, np.nan), 0),
    'u1': (simple(COUNTS.astype('u1')), COUNTS, 0), 'i1': (simple((COUNTS - 50).astype('i1')), COUNTS - 50, 0), 'i2': (simple(INT16), COUNTS, 0), 'i4': (simple(COUNTS.astype('i4')), COUNTS, 0),
    'i8': (simple(COUNTS.astype('i8')), COUNTS, 0), 'u2': (simple((COUNTS + 65000).astype('u2')), COUNTS + 65000, 0), 'u4': (simple((COUNTS + 2**31).astype('u4')), COUNTS + 2**31, 1e-7),
    'u8': (simple(COUNTS.astype('u8') + np.uint64(2**63)), COUNTS + 2.0**63, 1e-7), 'scaled': (scaled(INT16, BSCALE=0.5, BZERO=-3.0), COUNTS*0.5 - 3, 1e-7),
    'scaled f4': (scaled(PLANE, BSCALE=2.0, BZERO=1.0), PLANE*2 + 1, 1e-6), 'blank': (scaled(HOLES, BLANK=-999, BSCALE=0.25), np.where(HOLES == -999, np.nan, HOLES*0.25), 1e-7),
    'extension': (extension(PLANE), PLANE, 0), 'many cards': (simple(PLANE, **{f'KEY{i}': i for i in range(150)}), PLANE, 0),
    'RICE int': (packed('RICE_1', INT16), COUNTS, 0), 'RICE float': (packed('RICE_1', PLANE, quantize_level=64), PLANE, 0.05), 'GZIP_1': (packed('GZIP_1', PLANE, quantize_level=0), PLANE, 0),
    'GZIP_2': (packed('GZIP_2', PLANE, quantize_level=0), PLANE, 0), 'GZIP cube': (packed('GZIP_2', CUBE, quantize_level=0), CUBE, 0), 'HCOMPRESS': (packed('HCOMPRESS_1', INT16), COUNTS, 0),
    'PLIO': (packed('PLIO_1', INT16), COUNTS, 0), 'PLIO by fitsio': (by_fitsio(INT16, compress='PLIO'), COUNTS, 0), 'RICE by fitsio': (by_fitsio(COUNTS.astype('i4'), compress='RICE'), COUNTS, 0),
    'HCOMPRESS by fitsio': (by_fitsio(COUNTS.astype('i4'), compress='HCOMPRESS'), COUNTS, 0), 'u2 by fitsio': (by_fitsio((COUNTS + 65000).astype('u2')), COUNTS + 65000, 0),
    'GZIP_2 by fitsio': (by_fitsio(PLANE, compress='GZIP_2', qlevel=0), PLANE, 0), 'cube by fitsio': (by_fitsio(CUBE), CUBE, 0),
}


@pytest.mark.parametrize('stream', ['', '.gz', '.bz2'])
@pytest.mark.parametrize('variant', VARIANTS)
def test_the_same_pixels_come_back(variant, stream, tmp_path):
    write, truth, tolerance = VARIANTS[variant]
    path = tmp_path/'a.fits'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', AstropyWarning)
        write(path)
    if stream:
        body = path.read_bytes()
        path = tmp_path/f'a.fits{stream}'
        path.write_bytes({'.gz': gzip.compress, '.bz2': bz2.compress}[stream](body))
    image, _ = find_image(path)
    for x in (read_pixels(path), read_fits(path)[0], image.read().reshape(np.shape(truth))):
        assert x.dtype == np.float32 and x.dtype.isnative and x.shape == np.shape(truth)
        np.testing.assert_allclose(x, np.asarray(truth, dtype=np.float32), rtol=tolerance, atol=tolerance)
    with fits.open(path) as f:
        known = next(h.data for h in f if h.is_image and h.data is not None)
    np.testing.assert_allclose(read_pixels(path), known.astype(np.float32).reshape(np.shape(truth)), rtol=1e-6)


DTYPES = ['u1', 'i2', 'i4', 'i8', 'f4', 'f8', 'u2', 'u4']


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(1, 9), min_size=2, max_size=3), dtype=st.sampled_from(DTYPES), scale=st.sampled_from([None, 1.0, 0.5, -2.0, 1e-3]), zero=st.sampled_from([None, 0.0, 7.5]),
       blank=st.booleans(), where=st.integers(0, 2), checksum=st.booleans(), cards=st.integers(0, 80), seed=st.integers(0, 99))
def test_the_fast_path_is_astropy(tmp_path_factory, shape, dtype, scale, zero, blank, where, checksum, cards, seed):
    """Any simple image, anywhere in a file, through all doors."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 50, shape).astype(dtype) if dtype[0] == 'f' else rng.integers(0, 200, shape).astype(dtype)
    header = fits.Header({f'K{i}': f"it's {i}" for i in range(cards)})
    hdus = [fits.PrimaryHDU()] + [fits.ImageHDU(rng.normal(size=(2, 3)), name=f'X{i}') for i in range(where)]
    image = fits.ImageHDU(x, header, name='WANTED') if where else fits.PrimaryHDU(x, header)
    if dtype[0] != 'u' or dtype == 'u1':
        image.header.update({k: v for k, v in {'BSCALE': scale, 'BZERO': zero}.items() if v is not None})
        if blank and dtype[0] != 'f':
            image.header['BLANK'] = int(x.flat[0]) or 1  # astropy takes BLANK = 0 for none
    path = tmp_path_factory.mktemp('any')/'a.fits'
    fits.HDUList([*hdus, image] if where else [image]).writeto(path, checksum=checksum)
    key = 'wanted' if where else None
    with fits.open(path) as f:
        known = f['WANTED' if where else 0].data.astype(np.float32)
    image, cards = find_image(path, key)
    for y in (read_pixels(path, key), read_fits(path, key)[0], image.read().reshape(known.shape), image.read(np.empty(image.shape, np.float32)).reshape(known.shape)):
        np.testing.assert_allclose(y, known, rtol=2e-6, atol=1e-6)
    found = read_fits(path, key)[1]
    assert all(cards.get(k) == found[k] for k in found if k not in ('COMMENT', 'HISTORY', ''))


def claim(path, said):
    """Read a file that claims 10^12 pixels with little memory."""
    used = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
    try:
        read_pixels(path)
    except CutoutError as e:
        said.send(str(e))


@pytest.mark.parametrize('how', ['plain', 'gzip', 'sparse'])
def test_a_claim_of_a_million_million_pixels_is_refused(how, tmp_path):
    head = fits.Header([('SIMPLE', True), ('BITPIX', -32), ('NAXIS', 2), ('NAXIS1', 10**6), ('NAXIS2', 10**6)]).tostring().encode()
    path = tmp_path/'huge.fits'
    path.write_bytes(gzip.compress(head + bytes(10**6)) if how == 'gzip' else head)
    if how == 'sparse':
        try:
            with open(path, 'r+b') as f:
                f.truncate(2880 + 4*10**12)
        except OSError:
            pytest.skip('this disk has no sparse files of 4 TB')
    context = get_context('fork')
    hear, said = context.Pipe(False)
    child = context.Process(target=claim, args=(path, said))
    child.start()
    child.join(30)
    assert child.exitcode == 0 and 'claims 1,000,000,000,000 pixels (4,000.0 GB)' in hear.recv()


# The sky.

STEP = {'CDELT1': -0.262/3600, 'CDELT2': 0.262/3600}


def cropped(h, *keys):
    h = h.copy()
    for k in keys:
        del h[k]
    return h


CD = ('CD1_1', 'CD1_2', 'CD2_1', 'CD2_2')
SKIES = {
    'CD': sky(), 'RA 0': sky(ra=0.00001), 'RA 360': sky(ra=359.99999), 'south': sky(dec=-89.0), 'pole': sky(dec=89.9999), 'FK5': sky(RADESYS='FK5', EQUINOX=2000.0),
    'PC': cropped(sky(PC1_1=0.6, PC1_2=-0.8, PC2_1=0.8, PC2_2=0.6, **STEP), *CD), 'CROTA': cropped(sky(CROTA2=25.0, **STEP), *CD), 'CDELT': cropped(sky(**STEP), *CD),
    'SIP': sky(CTYPE1='RA---TAN-SIP', CTYPE2='DEC--TAN-SIP', A_ORDER=2, B_ORDER=2, A_2_0=2e-4, B_1_1=-3e-4),
    'PV': sky(CTYPE1='RA---TPV', CTYPE2='DEC--TPV', PV1_1=1.0, PV2_1=1.0, PV1_4=0.3, PV2_6=0.2), 'SIN': sky(CTYPE1='RA---SIN', CTYPE2='DEC--SIN'),
    'galactic': sky(CTYPE1='GLON-TAN', CTYPE2='GLAT-TAN'),
    'spectral': cropped(sky(WCSAXES=3, CTYPE3='WAVE', CUNIT3='nm', CRVAL3=500.0, CRPIX3=1.0, CDELT3=5.0, PC1_1=1.0, **STEP), *CD),
}


@pytest.mark.parametrize('size', [None, 41])
@pytest.mark.parametrize('kind', SKIES)
def test_the_sky_survives_open_and_save(kind, size, tmp_path):
    """Through file, set, native file and back: below 0.1 px of what astropy makes of the original header."""
    header = SKIES[kind].copy()
    header['BANDS'] = 'grz'
    (tmp_path/'folder').mkdir()
    fits.writeto(tmp_path/'folder'/'a.fits', CUBE, header)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', AstropyWarning)
        truth = WCS(header, naxis=2)
        cs = open_cutouts(read_fits_folder(tmp_path/'folder', size=size).save(tmp_path/'a.h5'))
    x, y = np.array([0, 49, 20, 3]), np.array([0, 2, 36, 30])
    dy, dx = (0, 0) if size is None else ((37 - size)//2, (50 - size)//2)
    places = truth.pixel_to_world(x, y)
    assert np.abs(np.array(cs.wcs(0).world_to_pixel(places)) - [x - dx, y - dy]).max() < 1e-3
    middle = truth.pixel_to_world(24.5, 18).icrs
    assert SkyCoord(cs.meta.ra.iloc[0], cs.meta.dec.iloc[0], unit='deg').separation(middle).arcsec < 0.026
    assert abs(cs.pixscale/0.262 - 1) < 0.01


def test_bright_sources_of_a_sloan_frame_are_where_its_catalogue_says():
    folder = sample_data('sdss-frame-ugriz')
    if folder is None:
        pytest.skip('no sample data')
    cs = read_fits_folder([folder/'frame-r-002583-2-0136.fits.bz2'])
    assert cs.bands == ('r',) and cs.unit == 'nanomaggy' and abs(cs.pixscale - 0.396) < 0.001
    table = pd.read_csv(folder/'sources_sep.csv')
    flux = cs.flux[0][0]
    bright = table[table.flag == 0].nlargest(100, 'flux')
    x, y = cs.wcs(0).world_to_pixel(SkyCoord(bright.ra, bright.dec, unit='deg'))
    assert np.abs([x - bright.x, y - bright.y]).max() < 0.1
    away = []
    for u, v in zip(x, y):
        i, j = int(round(float(v))), int(round(float(u)))
        if 8 < i < flux.shape[0] - 9 and 8 < j < flux.shape[1] - 9:
            part = np.clip(flux[i - 5:i + 6, j - 5:j + 6] - np.median(flux), 0, None)
            gy, gx = np.mgrid[i - 5:i + 6, j - 5:j + 6]
            away.append(np.hypot((part*gx).sum()/part.sum() - u, (part*gy).sum()/part.sum() - v)*cs.pixscale)
    assert len(away) > 30 and np.median(away) < 0.3


# Masks, noise, PSF: as their makers write them.

FLAGS = np.where(COUNTS > 90, 4, 0).astype(np.int32)
SIGMA = (1 + COUNTS/50).astype(np.float32)
STAR = np.exp(-4*np.log(2)*np.add(*np.square(np.mgrid[-10:11, -10:11]))/4.0**2).astype(np.float32)


def hst(p):
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(PLANE, sky(FILTER='F814W'), name='SCI'), fits.ImageHDU(SIGMA, name='ERR'), fits.ImageHDU(FLAGS, name='DQ')]).writeto(p)


def jwst(p):
    bits = np.where(FLAGS > 0, 1, 2).astype(np.uint32) + np.uint32(2**30)
    fits.HDUList([fits.PrimaryHDU(header=fits.Header({'TELESCOP': 'JWST', 'FILTER': 'F200W'})), fits.ImageHDU(PLANE, sky(), name='SCI'), fits.ImageHDU(SIGMA, name='ERR'),
                  fits.ImageHDU(bits, name='DQ'), fits.ImageHDU(SIGMA, name='WHT')]).writeto(p)


def hsc(p):
    mask = np.where(FLAGS > 0, 1, 32).astype(np.int32)
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(PLANE, sky(), name='IMAGE'), fits.ImageHDU(mask, fits.Header({'MP_BAD': 0, 'MP_SAT': 1, 'MP_DETECTED': 5}), name='MASK'),
                  fits.ImageHDU(SIGMA**2, name='VARIANCE')]).writeto(p)


def ccddata(p):
    CCDData(PLANE, unit='adu', wcs=WCS(sky()), mask=FLAGS > 0, uncertainty=StdDevUncertainty(SIGMA)).write(p)


def legacy(p):
    fits.HDUList([fits.PrimaryHDU(PLANE[None], sky(BANDS='r')), fits.ImageHDU(SIGMA[None]**-2.0, name='INVVAR'), fits.ImageHDU(FLAGS, name='MASKBITS'), fits.ImageHDU(STAR, name='PSF')]).writeto(p)


@pytest.mark.parametrize('maker', [hst, jwst, hsc, ccddata, legacy])
def test_mask_and_noise_as_their_makers_write_them(maker, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        maker(tmp_path/'a.fits')
        cs = open_cutouts(read_fits_folder([tmp_path/'a.fits'], bands=None if maker in (hst, legacy) else ('r',)).save(tmp_path/'a.h5'))
    assert np.array_equal(cs.flux[0][0], PLANE)
    assert np.array_equal(cs.bad[0][0], FLAGS > 0)
    np.testing.assert_allclose(cs.ivar[0][0], SIGMA**-2.0, rtol=1e-5)
    assert maker is not legacy or abs(cs.psf_fwhm[0, 0]/(4*0.262) - 1) < 0.02


NAMES = {'under': '{i}_{b}.fits', 'minus': '{i}-{b}.fits', 'folder': '{b}/{i}.fits', 'own folder': '{i}/{b}.fits', 'packed': '{i}_{b}.fits.gz', 'first': '{b}_{i}.fits',
         'HSC': '2-cutout-HSC-{B}-98{i}.fits', 'Legacy': 'legacysurvey-{i}-image-{b}.fits', 'capitals': '{i}_{B}.fits'}


@pytest.mark.parametrize('style', NAMES)
def test_one_file_per_band_whatever_the_names(style, tmp_path):
    for i in range(3):
        for k, b in enumerate('grz'):
            path = tmp_path/'d'/NAMES[style].format(i=f'n{i}', b=b, B=b.upper())
            path.parent.mkdir(parents=True, exist_ok=True)
            fits.writeto(path, CUBE[k] + i, sky())
    cs = open_cutouts(tmp_path/'d')
    assert len(cs) == 3 and [b.lower()[-1] for b in cs.bands] == ['g', 'r', 'z'] and len(cs.bad_files) == 0
    assert all(f'n{i}' in name for i, name in enumerate(cs.ids))
    assert np.array_equal(cs.flux[:], CUBE + np.float32([0, 1, 2])[:, None, None, None])


def test_one_bad_file_in_many_is_named_and_survived(tmp_path):
    for i in range(300):
        fits.writeto(tmp_path/f'g{i:03d}.fits', CUBE[:, :4, :4], fits.Header({'BANDS': 'grz'}))
    (tmp_path/'g123.fits').write_bytes((tmp_path/'g123.fits').read_bytes()[:3000])
    with pytest.warns(UserWarning, match='1 of 300 files'):
        cs = open_cutouts(tmp_path)
    assert len(cs) == 299 and 'g123.fits' in cs.bad_files.path[0] and 'truncated' in cs.bad_files.reason[0]
    with pytest.raises(CutoutError, match='g123.fits'):
        open_cutouts(tmp_path, strict=True)


@pytest.mark.parametrize('what, change, message', [('size', {'OBJECT': 'low'}, 'files of different size'), ('scale', dict(scale=0.3), 'pixel scales from 0.2620 to 0.3000'),
                                                   ('unit', dict(BUNIT='adu'), 'files of different unit'), ('bands', dict(BANDS='gri'), 'files of different bands')])
def test_mixed_files_are_named_both(what, change, message, tmp_path):
    for name, more in {'one': {}, 'two': change}.items():
        fits.writeto(tmp_path/f'{name}.fits', CUBE[:, :30] if 'OBJECT' in more else CUBE, sky(**{'BANDS': 'grz', 'BUNIT': 'nanomaggy', **more}))
    with pytest.raises(CutoutError, match=message) as error:
        open_cutouts(tmp_path)
    assert 'one.fits' in str(error.value) and 'two.fits' in str(error.value)
