"""Numbers of the survey records against real pixels: noise per pixel, zero point, pixel scale."""
import numpy as np
import pytest

from galaxy_ssl.core import sample_data
from galaxy_ssl.fits import read_fits
from galaxy_ssl.lookalike import clipped_sigma
from galaxy_ssl.surveys import get_survey
from galaxy_ssl.units import flux_to_mag

# GAMA catalogue id -> total r magnitude of a Sersic fit (Lange et al. 2015, MNRAS 447, 2603; table ExampleInit of the R package ProFit, two halves added)
GAMA = {'G265911': 16.08, 'G266033': 16.64, 'G267489': 16.63, 'G267525': 18.14, 'G278109': 15.04, 'G279148': 16.95}


def sample(name):
    """A sample folder, or the test is skipped."""
    folder = sample_data(name)
    if folder is None:
        pytest.skip(f'{name} is not installed')
    return folder


def image(path):
    """Pixels (bands,y,x) of a FITS file."""
    x = read_fits(path)[0]
    return x if x.ndim == 3 else x[None]


def test_noise_of_the_legacy_surveys():
    sigma = np.median([clipped_sigma(image(p)) for p in sorted(sample('decals-grz-fits').glob('*.fits'))], 0)
    s = get_survey('legacy-dr9-south')
    assert np.allclose(sigma, [s.sky_sigma[b] for b in 'grz'], rtol=0.03)


@pytest.mark.parametrize('band', ['g', 'r'])
def test_noise_of_sdss(band):
    path = next(sample('sdss-frame-ugriz').glob(f'frame-{band}-*'))
    assert np.allclose(clipped_sigma(image(path)[:, ::3, ::3]), get_survey('sdss').sky_sigma[band], rtol=0.03)


@pytest.mark.parametrize('name', GAMA)
def test_zero_point_of_kids(name):
    folder = sample('gama-kids-sdss-pairs')/'KiDS'
    flux, seg = (image(folder/f'{name}{kind}.fits')[0] for kind in ('fitim', 'segim'))
    mine = seg == seg[seg.shape[0]//2, seg.shape[1]//2]
    total = flux[mine].sum()*get_survey('kids-viking').to_unit('r')
    assert abs(flux_to_mag(total) - GAMA[name]) < 0.2


def test_noise_of_kids_is_what_its_depth_says():
    noise = []
    for path in sorted((sample('gama-kids-sdss-pairs')/'KiDS').glob('*fitim.fits')):
        seg = image(path.with_name(path.name.replace('fitim', 'segim')))
        noise.append(clipped_sigma(np.where(seg > 0, np.nan, image(path)))[0])
    s = get_survey('kids-viking')
    assert np.allclose(np.median(noise)*s.to_unit('r'), s.sky_sigma['r'], rtol=0.2)
