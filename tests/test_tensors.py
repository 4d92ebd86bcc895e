"""Every stretch and the published augmentations from the command line's words to an embedding."""
import json

import numpy as np
import pytest
import torch

from galaxy_ssl.callbacks import plot_reconstruction
from galaxy_ssl.config import make_config, parse_args
from galaxy_ssl.core import CutoutError
from galaxy_ssl.embed import embed_cutouts
from galaxy_ssl.runs import load_run
from galaxy_ssl.stretch import STRETCHES
from galaxy_ssl.synthetic import synthetic_cutouts
from galaxy_ssl.train import TrainConfig, train

MICRO = {'patch': 4, 'preset': 'micro', 'dim': 48, 'depth': 2}
TINY = dict(method='mae', size=32, epochs=1, batch_size=8, val_fraction=0.2, seed=1, device='cpu', log_every=1, settings=MICRO)
SOUTH = 'legacy-dr9-south'


@pytest.fixture(scope='module')
def galaxies():
    """Twenty-four drawn galaxies, one of them with a dead column."""
    cs = synthetic_cutouts(24, size=48, seed=5)
    flux = np.array(cs.flux[:])
    flux[3, :, :, 20] = np.nan
    return type(cs)(flux, bands=cs.bands, meta=cs.meta, survey=cs.survey, pixscale=cs.pixscale)


def fit(cs, out, **kw):
    """Train for a few steps."""
    return train(TrainConfig(**{**TINY, **kw}, out=str(out)), cs, callbacks=[])


@pytest.mark.parametrize('stretch', [*STRETCHES, 'percentile:per_image=true', 'mtf:per_image=true,background=0.125', 'asinh:softening=10'])
def test_a_stretch_trains_draws_and_embeds(galaxies, tmp_path, stretch):
    run = fit(galaxies, tmp_path/'run', stretch=stretch)
    rows = [json.loads(line) for line in (tmp_path/'run'/'log.jsonl').read_text().splitlines()]
    assert rows and all(np.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    table = embed_cutouts(load_run(tmp_path/'run'), galaxies, progress=False)
    assert len(table.X) == 24 and np.isfinite(table.X).all()
    alone = embed_cutouts(run, galaxies[[3, 7]], batch_size=1, progress=False)
    np.testing.assert_allclose(alone.X, table.X[[3, 7]], atol=1e-5)
    figure = plot_reconstruction(run, galaxies[:3])
    figure.canvas.draw()


def test_published_augmentations_train(galaxies, tmp_path):
    words = ['--data', 'x.h5', '--augment.dust-table', SOUTH, '--augment.psf-table', SOUTH, '--augment.noise-table', SOUTH, '--augment.redden', '0.2',
             '--augment.rotate', '--stretch', 'log:softening=2']
    config = parse_args(words)
    assert config.augment.psf_table == SOUTH and config.augment.redden == 0.2
    run = fit(galaxies, tmp_path/'run', augment=config.augment, stretch=config.stretch)
    assert run.preprocess.here.sky_sigma is not None
    assert load_run(tmp_path/'run').preprocess.config() == run.preprocess.config()


def test_an_unknown_table_is_refused_in_a_config():
    with pytest.raises(CutoutError, match='psf_table.*Known: legacy-dr9-south'):
        make_config({'augment': {'psf_table': 'sdss-typo'}})


def test_display_composites_refuse_what_needs_flux(tmp_path):
    rgb = np.random.default_rng(0).uniform(0, 255, (24, 3, 48, 48)).astype(np.float32)
    cs = type(synthetic_cutouts(1, size=32))(rgb, bands=('R', 'G', 'B'), survey='display', unit='display')
    config = make_config({'augment': {'redden': 0.3}})
    with pytest.raises(CutoutError, match='display composites'):
        fit(cs, tmp_path/'run', augment=config.augment)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('stretch', STRETCHES)
def test_an_accelerator_gives_the_same_image(galaxies, stretch):
    from galaxy_ssl.batch import fit_preprocess, load_batch, to_device
    pre = fit_preprocess(galaxies, size=32, stretch=stretch)
    batch = load_batch(galaxies, range(24))
    here = pre(batch)['image']
    there = pre.cuda()(to_device(batch, 'cuda'))['image'].cpu()
    torch.testing.assert_close(there, here, rtol=2e-6, atol=2e-6)
