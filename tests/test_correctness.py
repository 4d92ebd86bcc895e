"""What other tools get wrong, line by line of the design's list (section 5), through the public doors."""
import importlib
import inspect
import json
import os
import pkgutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from astropy.io import fits
from astropy.wcs import WCS
from jobs import embedding, finish, start, training
from torch import nn

import galaxy_ssl
from galaxy_ssl.augment import AugmentConfig, augment
from galaxy_ssl.batch import Loader, load_batch
from galaxy_ssl.callbacks import Callback
from galaxy_ssl.core import CutoutError
from galaxy_ssl.cutouts import CutoutSet, open_cutouts
from galaxy_ssl.demo import probe_table
from galaxy_ssl.draws import Draws
from galaxy_ssl.embed import embed_cutouts
from galaxy_ssl.methods import METHODS, SSLMethod, make_method
from galaxy_ssl.online import OnlineProbe
from galaxy_ssl.probe import compare, pixel_pca, probe_score
from galaxy_ssl.runs import load_run, load_weights
from galaxy_ssl.search import SimilarityIndex
from galaxy_ssl.synthetic import synthetic_cutouts
from galaxy_ssl.table import EmbeddingTable
from galaxy_ssl.tiles import cut_tile, read_tile
from galaxy_ssl.train import TrainConfig, TrainingError, train

MICRO = {'patch': 4, 'preset': 'micro', 'dim': 48, 'depth': 2}
TINY = dict(size=16, epochs=2, batch_size=8, val_fraction=0.25, device='cpu', log_every=1, settings=MICRO)
STRONG = dict(d4=True, rotate=True, jitter=2, zoom=0.2, noise=2, blur=1, drop_bands=0.3)


def fit(cs, out, callbacks=(), **changes):
    """Train a tiny network, quietly."""
    return train(TrainConfig(**{**TINY, 'out': str(out), **changes}), cs, callbacks=callbacks)


def embed(run, cs, **options):
    return embed_cutouts(run, cs, progress=False, **{'device': 'cpu', **options})


def like(cs, flux, **changes):
    """The same set with other pixels."""
    given = dict(meta=cs.meta, bands=cs.bands, survey=cs.survey, pixscale=cs.pixscale, unit=cs.unit)
    return CutoutSet(flux, **{**given, **changes})


@pytest.fixture(scope='module')
def galaxies():
    return synthetic_cutouts(48, size=20, seed=1)


@pytest.fixture(scope='module')
def run(galaxies, tmp_path_factory):
    """A trained network."""
    return fit(galaxies, tmp_path_factory.mktemp('run')/'mae')


@pytest.fixture(scope='module')
def data(galaxies, tmp_path_factory):
    """The galaxies in a file."""
    return galaxies.save(tmp_path_factory.mktemp('data')/'galaxies.h5')


class Frail(SSLMethod):
    """A network with batch statistics and dropout that can be told to fail or to get worse; it notes what it is shown."""
    shown = []

    def __init__(self, *, n_bands, size, worse_after=10**9, poison=''):
        super().__init__(n_bands=n_bands, size=size, worse_after=worse_after, poison=poison)
        self.embed_dim = 8
        self.encoder = nn.Sequential(nn.Conv2d(n_bands, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.decoder = nn.ConvTranspose2d(8, n_bands, 4, 4)

    def forward(self, batch):
        Frail.shown.append((self.training, list(batch['id']), batch['image'].clone()))
        loss = ((self.decoder(self.encoder(batch['image'])) - batch['image'])*~batch['bad']).square().mean()
        return {'loss': loss*torch.nan if self.training and self.settings['poison'] in batch['id'] else loss}

    def embed(self, image, bad, pool='mean'):
        return self.encoder(image).mean((2, 3))

    @torch.no_grad()
    def after_step(self, step, total):
        if step > self.settings['worse_after']:
            self.decoder.bias += 1


def know_frail():
    METHODS['frail'] = f'{__name__}:Frail'
    Frail.shown.clear()


@pytest.fixture
def frail():
    know_frail()
    yield Frail
    del METHODS['frail']


# Line 1: the sky survives cutting, reading, saving, augmenting back.

PLACES = {'north': (150.1, 33., 0., -1), 'south': (52.3, -62.4, 0., -1), 'wrap': (0., -1.2, 0., -1), 'turned': (359.999, 20., 33., -1), 'mirrored': (10., -30., 120., 1)}
SCALE = 0.4  # arcsec per pixel


def tilted_wcs(ra, dec, angle, parity):
    """A WCS whose reference pixel is not the middle."""
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ['RA---TAN', 'DEC--TAN']
    wcs.wcs.crval = [ra, dec]
    wcs.wcs.crpix = [30.5, 61.25]
    wcs.wcs.cd = SCALE/3600*np.array([[c, -s], [s, c]]) @ np.diag([parity, 1])
    return wcs


def numbered(shape):
    """An image in which every pixel says where it is: 1000 y + x."""
    y, x = np.mgrid[:shape[0], :shape[1]]
    return (1000*y + x).astype(np.float32)


def pixels_off(found, truth, x0, y0, shape):
    """Largest distance on the sky, in pixels, over the corners of a cutout whose first pixel is (x0, y0) of `truth`."""
    x, y = np.array([0, shape[1] - 1, 0, shape[1] - 1]), np.array([0, 0, shape[0] - 1, shape[0] - 1])
    return (found.pixel_to_world(x, y).separation(truth.pixel_to_world(x + x0, y + y0)).arcsec/SCALE).max()


@pytest.fixture(params=PLACES)
def tile(request, tmp_path):
    """A FITS tile, 90 high and 140 wide, and its WCS."""
    wcs = tilted_wcs(*PLACES[request.param])
    header = wcs.to_header()
    header.update(BANDS='g,r,z', BUNIT='nanomaggy')
    fits.writeto(tmp_path/'tile.fits', np.stack([numbered((90, 140))]*3), header)
    return tmp_path/'tile.fits', wcs


def test_line01_sky_survives_tile_cut_save_open(tile, tmp_path):
    path, wcs = tile
    x, y = np.array([20., 131.3, 70.6, 12., 100.]), np.array([12., 80.2, 44.8, 77., 30.])
    sky = wcs.pixel_to_world(x, y)
    cut = cut_tile(read_tile(path), {'id': list('abcde'), 'ra': sky.ra.deg, 'dec': sky.dec.deg}, size=21)
    cs = open_cutouts(cut.save(tmp_path/'cut.h5')).select(['z', 'g'])[['e', 'a', 'd', 'b', 'c']]
    for i, name in enumerate(cs.ids):
        k = 'abcde'.index(name)
        y0, x0 = divmod(int(cs.flux[i][0, 10, 10]), 1000)
        assert pixels_off(cs.wcs(i), wcs, x0 - 10, y0 - 10, (21, 21)) < 0.01
        assert abs(x0 - x[k]) <= 0.5 and abs(y0 - y[k]) <= 0.5, 'the object is in the middle pixel'
        assert (cs.meta.ra[name], cs.meta.dec[name]) == (sky.ra.deg[k], sky.dec.deg[k])


@pytest.mark.parametrize('place', PLACES)
def test_line01_sky_survives_a_folder_of_non_square_fits(place, tmp_path):
    wcs = tilted_wcs(*PLACES[place])
    (tmp_path/'fits').mkdir()
    for name, (y0, x0) in {'a': (5, 70), 'b': (40, 3)}.items():
        header = wcs[y0:y0 + 17, x0:x0 + 30].to_header()
        header.update(BANDS='g,r', BUNIT='nanomaggy')
        fits.writeto(tmp_path/'fits'/f'{name}.fits', np.stack([numbered((90, 140))[y0:y0 + 17, x0:x0 + 30]]*2), header)
    cs = open_cutouts(open_cutouts(tmp_path/'fits').save(tmp_path/'all.h5'))
    assert cs.shape == (2, 2, 17, 30)
    for i in range(2):
        y0, x0 = divmod(int(cs.flux[i][0, 0, 0]), 1000)
        assert pixels_off(cs.wcs(i), wcs, x0, y0, (17, 30)) < 0.01
        middle = wcs.pixel_to_world(x0 + 14.5, y0 + 8)
        assert cs[i].wcs.pixel_to_world(14.5, 8).separation(middle).arcsec < 0.01*SCALE
        assert abs((cs.meta.ra.iloc[i] - middle.ra.deg + 180) % 360 - 180) < 1e-6
        assert abs(cs.meta.dec.iloc[i] - middle.dec.deg) < 1e-6


@pytest.mark.parametrize('ra, dec', [(150., 2.), (0.00001, -45.), (359.99999, 80.)])
def test_line01_without_a_header_north_is_up_and_east_is_left(ra, dec, tmp_path):
    cs = CutoutSet(np.ones((1, 1, 11, 21)), {'id': ['a'], 'ra': [ra], 'dec': [dec]}, ['r'], pixscale=SCALE)
    wcs = open_cutouts(cs.save(tmp_path/'a.h5')).wcs(0)
    middle, up, left = wcs.pixel_to_world([10, 10, 5], [5, 10, 5])
    assert middle.ra.deg == pytest.approx(ra, abs=1e-9) and middle.dec.deg == pytest.approx(dec, abs=1e-9)
    assert middle.position_angle(up).wrap_at('180d').deg == pytest.approx(0, abs=0.1)
    assert middle.position_angle(left).deg == pytest.approx(90, abs=0.1)
    assert [middle.separation(o).arcsec for o in (up, left)] == pytest.approx([5*SCALE]*2, rel=1e-4)


def test_line01_mirrors_and_turns_can_be_undone(tile):
    path, _ = tile
    cs = cut_tile(read_tile(path), {'x': np.linspace(20, 110, 40), 'y': np.linspace(20, 70, 40)}, size=15)
    batch = load_batch(cs, range(40))
    batch['bad'][:, 1, 2, 9] = True
    made, bad = augment(batch['flux'], batch['bad'], AugmentConfig(), Draws(0, 'turn'), 15)
    turns = [lambda a, k=k, f=f: np.rot90(a[..., ::-1] if f else a, k, axes=(-2, -1)) for f in (0, 1) for k in range(4)]
    used = set()
    for before, flag, after, gone in zip(batch['flux'].numpy(), batch['bad'].numpy(), made.numpy(), bad.numpy()):
        fits_it = [n for n, turn in enumerate(turns) if np.array_equal(turn(before)[0], after[0])]
        assert len(fits_it) == 1, 'the first band, without bad pixels, is turned or mirrored exactly'
        assert np.array_equal(turns[fits_it[0]](flag), gone), 'the bad pixels turn with the sky'
        used.update(fits_it)
    assert len(used) == 8


# Line 2: one bad pixel is one bad pixel.

SPOILT = {'nan': np.nan, 'inf': np.inf, 'minus inf': -np.inf, 'saturated': 3e38}


def spoil(cs, value):
    """The same galaxies, one pixel of the third spoilt."""
    flux = cs.flux[:]
    flux[2, 1, 9, 7] = value
    return like(cs, flux)


def loss_and_gradients(run, cs, flagged=False):
    """Loss and gradients of one training pass over eight objects."""
    batch = load_batch(cs, range(8))
    batch['bad'][2, 1, 9, 7] |= flagged
    run.method.zero_grad(set_to_none=True)
    loss = run.method({**run.preprocess(batch), 'draws': Draws(0, 'mask')})['loss']
    loss.backward()
    grads = torch.cat([p.grad.flatten() for p in run.method.parameters() if p.requires_grad])
    run.method.zero_grad(set_to_none=True)
    return loss.item(), grads


@pytest.mark.parametrize('kind', SPOILT)
def test_line02_a_spoilt_pixel_changes_only_its_own_pixel_of_the_image(run, galaxies, kind):
    clean, spoilt = (run.preprocess(load_batch(cs, range(8))) for cs in (galaxies, spoil(galaxies, SPOILT[kind])))
    assert torch.nonzero(clean['image'] != spoilt['image']).tolist() == [[2, 1, 7, 5]]  # 20 px cutout, middle 16
    assert spoilt['image'].isfinite().all()
    assert torch.nonzero(spoilt['bad']).tolist() == ([] if kind == 'saturated' else [[2, 1, 7, 5]])


@pytest.mark.parametrize('kind', SPOILT)
def test_line02_a_spoilt_pixel_leaves_loss_and_gradients_finite(run, galaxies, kind):
    loss, grads = loss_and_gradients(run, spoil(galaxies, SPOILT[kind]))
    assert np.isfinite(loss) and grads.isfinite().all() and grads.any()


@pytest.mark.parametrize('kind', SPOILT)
def test_line02_the_value_of_a_flagged_pixel_does_not_matter(run, galaxies, kind):
    loss, grads = loss_and_gradients(run, galaxies, flagged=True)
    other_loss, other_grads = loss_and_gradients(run, spoil(galaxies, SPOILT[kind]), flagged=True)
    assert loss == other_loss and torch.equal(grads, other_grads)


@pytest.mark.parametrize('kind', SPOILT)
def test_line02_batch_mates_of_a_spoilt_pixel_keep_their_embedding(run, galaxies, kind):
    clean, spoilt = embed(run, galaxies[:8]).X, embed(run, spoil(galaxies, SPOILT[kind])[:8]).X
    others = np.arange(8) != 2
    assert np.array_equal(clean[others], spoilt[others]) and np.isfinite(spoilt).all()


def test_line02_training_on_spoilt_pixels_stays_finite(galaxies, tmp_path):
    flux = galaxies.flux[:]
    for i, value in enumerate([*SPOILT.values()]*12):
        flux[i, i % 3, 10, 10] = value
    run = fit(like(galaxies, flux), tmp_path/'run', augment=AugmentConfig(**STRONG))
    log = run.log()
    assert log.loss.notna().sum() == log.step.max() and log.val_loss.notna().sum() == 2
    assert np.isfinite(log[['loss', 'val_loss']].fillna(0)).all(axis=None)
    assert all(p.isfinite().all() for p in run.method.parameters())


def test_line02_a_missing_band_stays_missing(run, galaxies, tmp_path):
    flux = galaxies.flux[:]
    flux[5, 1] = np.nan
    cs = open_cutouts(like(galaxies, flux).save(tmp_path/'gap.h5'))
    assert np.isnan(cs.flux[5][1]).all() and np.isfinite(cs.flux[5][[0, 2]]).all()
    batch = run.preprocess(load_batch(cs, [4, 5]))
    assert batch['bad'][1, 1].all() and batch['bad'].sum() == 16*16 and not batch['image'][1, 1].any()
    X, before = embed(run, cs).X, embed(run, galaxies).X
    assert np.isfinite(X).all() and (X != before).any(1).nonzero()[0].tolist() == [5]


def test_line02_a_band_without_a_file_is_missing_from_its_cutouts(tmp_path):
    header = tilted_wcs(10, 10, 0, -1).to_header()
    fits.writeto(tmp_path/'g.fits', numbered((50, 50)), header)
    with pytest.warns(UserWarning, match='no file for band r'):
        tile = read_tile({'g': tmp_path/'g.fits'}, bands=('g', 'r'))
    cs = open_cutouts(cut_tile(tile, {'x': [25.], 'y': [25.]}, size=9).save(tmp_path/'a.h5'))
    assert cs.bands == ('g', 'r') and cs[0].bad[1].all() and not cs[0].bad[0].any()


# Line 3: one object, one embedding.

def test_line03_embedding_is_deterministic(run, galaxies):
    assert np.array_equal(embed(run, galaxies).X, embed(load_run(run.folder), galaxies).X)


def test_line03_embedding_sees_every_patch(run, galaxies):
    flux = np.repeat(galaxies.flux[:1], 17, 0)
    for k in range(16):
        y, x = 2 + 4*(k//4), 2 + 4*(k % 4)
        flux[k + 1, :, y:y + 4, x:x + 4] += 1
    X = embed(run, CutoutSet(flux, bands=galaxies.bands)).X
    assert (np.abs(X[1:] - X[0]).max(1) > 1e-4).all()


def test_line03_embedding_does_not_depend_on_the_mask(run, galaxies):
    method = make_method('mae', **{**run.method.settings, 'mask_ratio': 0.25}).eval()
    method.load_state_dict(run.method.state_dict())
    batch = run.preprocess(load_batch(galaxies, range(48)))
    with torch.inference_mode():
        assert np.array_equal(method.embed(batch['image'], batch['bad']).numpy(), embed(run, galaxies).X)


@pytest.mark.parametrize('batch_size', [1, 7, 48, 500])
def test_line03_embedding_is_the_same_for_any_batch_size(run, galaxies, batch_size):
    np.testing.assert_allclose(embed(run, galaxies, batch_size=batch_size).X, embed(run, galaxies).X, atol=1e-5)


def test_line03_embedding_follows_the_object_through_a_shuffle(run, galaxies):
    order = np.random.default_rng(0).permutation(48)
    shuffled = embed(run, galaxies[order], batch_size=9)
    assert shuffled.ids == [galaxies.ids[i] for i in order]
    np.testing.assert_allclose(shuffled[galaxies.ids].X, embed(run, galaxies).X, atol=1e-5)


def test_line03_embedding_does_not_depend_on_batch_mates(run, galaxies):
    flux = galaxies.flux[:]
    flux[1:] = np.random.default_rng(0).normal(0, 1e6, flux[1:].shape)
    assert np.array_equal(embed(run, like(galaxies, flux)).X[0], embed(run, galaxies).X[0])


def test_line03_embedding_is_the_same_in_shards(run, galaxies, tmp_path):
    embed(run, galaxies, out=tmp_path/'shards', shard_size=11)
    table = EmbeddingTable.load(tmp_path/'shards')
    assert len(list((tmp_path/'shards').glob('part-*.parquet'))) == 5 and table.ids == galaxies.ids
    np.testing.assert_allclose(table.X, embed(run, galaxies).X, atol=1e-5)


def test_line03_embedding_is_the_same_on_two_processes(run, galaxies, data, tmp_path):
    finish(start(embedding, run.folder, data, tmp_path/'two.parquet', 10, world=2))
    table = EmbeddingTable.load(tmp_path/'two.parquet')
    assert table.ids == galaxies.ids and np.array_equal(table.meta.ra, galaxies.meta.ra)
    np.testing.assert_allclose(table.X, embed(run, galaxies).X, atol=1e-5)


# Line 4: frozen means frozen; best is a copy.

def test_line04_embedding_and_probing_change_nothing(galaxies, tmp_path, frail):
    run = fit(galaxies, tmp_path/'run', method='frail', settings={})
    before = {k: v.clone() for k, v in run.method.state_dict().items()}
    run.method.train()
    probe_score(embed(run, like(galaxies, galaxies.flux[:] + 5)), galaxies.meta.z_true.to_numpy(), cv=3)
    assert not any(m.training for m in run.method.modules())
    assert all(torch.equal(v, before[k]) for k, v in run.method.state_dict().items())
    assert any('running_mean' in k for k in before)


def test_line04_an_online_probe_leaves_the_training_alone(galaxies, tmp_path, frail):
    for name, callbacks in {'watched': [OnlineProbe(galaxies, 'z_true', every=1)], 'alone': []}.items():
        torch.manual_seed(0)  # of the dropout
        fit(galaxies, tmp_path/name, callbacks, method='frail', settings={}, val_fraction=0)
    weights = [(tmp_path/name/'model.safetensors').read_bytes() for name in ('watched', 'alone')]
    assert weights[0] == weights[1]


class Snapshots(Callback):
    """A copy of the weights after every epoch."""

    def __init__(self):
        self.taken = []

    def on_epoch(self, trainer):
        self.taken.append({k: v.clone() for k, v in trainer.run.method.state_dict().items()})


def test_line04_best_weights_are_a_copy(galaxies, tmp_path, frail):
    snapshots = Snapshots()
    run = fit(galaxies, tmp_path/'run', [snapshots], method='frail', epochs=5, settings={'worse_after': 10})
    best = int(run.log().val_loss.dropna().reset_index(drop=True).idxmin())
    assert best < 4, 'training on has made the network worse'
    kept = load_weights(run.folder/'best.safetensors')
    assert all(torch.equal(kept[k], v) for k, v in snapshots.taken[best].items())
    assert not torch.equal(kept['decoder.bias'], snapshots.taken[-1]['decoder.bias'])
    assert torch.equal(load_run(run.folder).method.decoder.bias, snapshots.taken[-1]['decoder.bias'])


# Line 5: validation is clean.

def split_of(run):
    return pd.read_parquet(run.folder/'split.parquet')['split']


def test_line05_validation_is_never_augmented(galaxies, tmp_path, frail):
    run = fit(galaxies, tmp_path/'run', method='frail', settings={}, augment=AugmentConfig(**STRONG))
    split, plain = split_of(run), {}
    for i in range(48):
        plain[galaxies.ids[i]] = run.preprocess(load_batch(galaxies, [i]))['image'][0]
    for in_training, ids, images in frail.shown:
        assert {split[i] for i in ids} == {'train' if in_training else 'val'}
        same = [torch.equal(plain[i], image) for i, image in zip(ids, images)]
        assert not any(same) if in_training else all(same)
    assert {t for t, _, _ in frail.shown} == {True, False}


def test_line05_statistics_come_from_the_training_split_only(galaxies, run, tmp_path):
    flux = galaxies.flux[:]
    held_out = (split_of(run) == 'val').to_numpy()
    flux[held_out] = flux[held_out]*1e4 + 777
    other = fit(like(galaxies, flux), tmp_path/'run')
    assert 0 < held_out.sum() < 48 and (split_of(other) == split_of(run)).all()
    assert other.config['preprocess'] == run.config['preprocess']
    assert (tmp_path/'run'/'model.safetensors').read_bytes() == (run.folder/'model.safetensors').read_bytes()


def test_line05_neighbours_on_the_sky_never_straddle_the_split(galaxies, tmp_path):
    rng = np.random.default_rng(3)
    ra, dec = rng.uniform(0, 360, 24), rng.uniform(-80, 80, 24)
    ra[:4], dec[4:8] = 1e-5, 89.9999
    twin_ra = (ra - 0.5/3600/np.cos(np.radians(dec))) % 360  # half an arcsecond west: the first four lie across RA 0
    meta = pd.DataFrame({'id': [f'{t}{i}' for t in 'ab' for i in range(24)], 'ra': [*ra, *twin_ra], 'dec': [*dec, *dec]})
    for seed in range(3):
        split = split_of(fit(like(galaxies, galaxies.flux, meta=meta), tmp_path/str(seed), seed=seed, epochs=1, val_fraction=0.4))
        assert set(split) == {'train', 'val'}
        assert all(split[f'a{i}'] == split[f'b{i}'] for i in range(24))


def test_line05_objects_without_coordinates_are_split_too(galaxies, tmp_path):
    nowhere = like(galaxies, galaxies.flux, meta=galaxies.meta.assign(ra=np.nan, dec=np.nan))
    split = split_of(fit(nowhere, tmp_path/'run', epochs=1))
    assert 0 < (split == 'val').sum() < 24 and split.index.tolist() == galaxies.ids


# Line 6: nothing of the caller's is changed.

MODULES = [m.name for m in pkgutil.iter_modules(galaxy_ssl.__path__)]


def functions_of(module):
    """Every function and method that a module defines, patched ones included."""
    for name, thing in vars(module).items():
        if inspect.isfunction(thing) and thing.__module__ == module.__name__:
            yield name, thing
        elif inspect.isclass(thing) and thing.__module__ == module.__name__:
            for key, member in vars(thing).items():
                member = getattr(member, '__func__', member)
                if inspect.isfunction(member):
                    yield f'{name}.{key}', member


@pytest.mark.parametrize('module', MODULES)
def test_line06_no_mutable_defaults(module):
    for name, function in functions_of(importlib.import_module(f'galaxy_ssl.{module}')):
        for p in inspect.signature(function).parameters.values():
            assert not isinstance(p.default, (list, dict, set, bytearray, np.ndarray, pd.DataFrame)), f'{module}.{name}({p.name})'


def test_line06_the_callers_pixels_and_catalogue_are_not_touched(galaxies, tmp_path):
    flux, bad = galaxies.flux[:], np.zeros(galaxies.shape, bool)
    flux[3, 0, 4, 4] = np.nan
    meta, before = galaxies.meta.copy(), flux.copy()
    flux.setflags(write=False)
    bad.setflags(write=False)
    cs = like(galaxies, flux, meta=meta, bad=bad)
    cs.save(tmp_path/'a.h5')
    run = fit(cs, tmp_path/'run', augment=AugmentConfig(**STRONG))
    pixel_pca(cs)
    embed(run, cs.join_catalog(pd.DataFrame({'id': meta.index, 'colour': 1.0})))
    assert np.array_equal(flux, before, equal_nan=True) and not bad.any()
    pd.testing.assert_frame_equal(meta, galaxies.meta)


def test_line06_the_callers_vectors_and_labels_are_not_touched(run, galaxies, tmp_path):
    X, y = embed(run, galaxies).X.copy(), galaxies.meta.z_true.to_numpy().copy()
    X.setflags(write=False)
    y.setflags(write=False)
    meta, x_before, y_before = galaxies.meta.copy(), X.copy(), y.copy()
    table = EmbeddingTable(X, meta)
    table.save(tmp_path/'t.parquet')
    compare({'a': table, 'b': X}, y, cv=3)
    for whiten in (False, True):
        SimilarityIndex(whiten=whiten).fit(table).query(ids=table.ids[:2], k=3)
    assert np.array_equal(X, x_before) and np.array_equal(y, y_before)
    assert np.array_equal(table.X, x_before)
    pd.testing.assert_frame_equal(meta, galaxies.meta)


# Line 7: any size, patch and number of bands; a mismatch is an error before the first step.

@pytest.mark.parametrize('size, patch, bands', [(16, 4, 'g'), (20, 5, 'gr'), (24, 8, 'griz'), (32, 16, 'ugriz'), (15, 3, 'zu')])
def test_line07_any_size_patch_and_bands(size, patch, bands, tmp_path):
    cs = synthetic_cutouts(16, size=32, survey='sdss', seed=2)
    run = fit(cs, tmp_path/'run', bands=tuple(bands), size=size, epochs=1, settings={**MICRO, 'patch': patch})
    table = embed(load_run(run.folder), cs)
    assert set(run.bands) == set(bands) and table.X.shape == (16, 48) and np.isfinite(table.X).all()


def test_line07_cutouts_need_not_be_square(galaxies, tmp_path):
    cs = like(galaxies, galaxies.flux[:][:, :, :17])
    assert cs.shape[2:] == (17, 20)
    assert embed(fit(cs, tmp_path/'run', epochs=1), cs).X.shape == (48, 48)


MISMATCHES = {
    'patch': (dict(settings={**MICRO, 'patch': 5}), 'patch.*5 px does not divide'),
    'size': (dict(size=24), '24 px.*20x20'),
    'field': (dict(field=32), '32 px.*20x20'),
    'band': (dict(bands=('g', 'Y')), "wanted .'g', 'Y'.*found"),
    'method': (dict(method='mea'), "mea.*Did you mean 'mae'"),
    'setting': (dict(settings={'mask_ration': 0.5}), "mask_ration.*Did you mean 'mask_ratio'"),
    'value': (dict(settings={**MICRO, 'mask_ratio': 1.5}), 'mask_ratio|hide'),
    'heads': (dict(settings={**MICRO, 'heads': 5}), 'heads 5'),
    'stretch': (dict(stretch='asin'), "asin.*Did you mean 'asinh'"),
    'parts': (dict(accum=3), 'not a multiple of accum'),
    'epochs': (dict(epochs=0), 'epochs.*less than 1'),
}


@pytest.mark.parametrize('what', MISMATCHES)
def test_line07_a_mismatch_is_an_error_before_the_first_step(what, galaxies, tmp_path):
    changes, message = MISMATCHES[what]
    with pytest.raises(CutoutError, match=message):
        fit(galaxies, tmp_path/'run', **changes)
    assert not [p.name for p in (tmp_path/'run').glob('*') if p.name != '.lock'], 'nothing was written'


# Line 8: gradients arrive; a loss that is not finite stops the run.

@pytest.mark.parametrize('changes', [{}, {'norm_pix': False}, {'mask_ratio': 0.5}, {'depth': 1}, {'decoder': (32, 2, 2)}, {'patch': 8, 'mask_ratio': 0.75}], ids=str)
@pytest.mark.parametrize('n_bad', [0, 3, 8])
def test_line08_gradient_reaches_every_trainable_parameter(run, galaxies, changes, n_bad):
    method = make_method('mae', n_bands=3, size=16, **{**MICRO, **changes}).train()
    batch = load_batch(galaxies, range(8))
    batch['bad'][:n_bad] = True
    method({**run.preprocess(batch), 'draws': Draws(0, 'mask')})['loss'].backward()
    grads = {k: p.grad for k, p in method.named_parameters() if p.requires_grad}
    assert not [k for k, g in grads.items() if g is None or not g.isfinite().all()]
    assert n_bad == 8 or not [k for k, g in grads.items() if not g.any()]


def test_line08_unused_parameters_are_not_looked_for():
    sources = [Path(m.module_finder.path)/f'{m.name}.py' for m in pkgutil.iter_modules(galaxy_ssl.__path__)]
    assert not [p.name for p in sources if 'find_unused_parameters' in p.read_text()]
    assert any('DistributedDataParallel' in p.read_text() for p in sources)


def poisoned(cs):
    """The row of an object met at step 7 of the first epoch, in batches of four."""
    return Loader(cs, 4, seed=0).order(0)[30]


def test_line08_a_loss_that_is_not_finite_stops_and_names_step_and_ids(galaxies, tmp_path, frail):
    settings = {'poison': galaxies.ids[poisoned(galaxies)]}
    with pytest.raises(TrainingError) as error:
        fit(galaxies, tmp_path/'run', method='frail', settings=settings, batch_size=4, val_fraction=0, save_every=1, epochs=1)
    assert 'nan at step 7 ' in str(error.value) and settings['poison'] in str(error.value) and 'run' in str(error.value)
    kept = load_run(tmp_path/'run')
    assert all(v.isfinite().all() for v in kept.method.state_dict().values())
    assert kept.log().step.tolist() == [1, 2, 3, 4, 5, 6, 7] and np.isfinite(kept.log().loss).all()


def frail_training(config, data):
    know_frail()
    training(config, data)


def test_line08_a_loss_that_is_not_finite_on_one_process_stops_both(galaxies, data, tmp_path):
    settings = {'poison': galaxies.ids[poisoned(galaxies)]}
    config = {**TINY, 'method': 'frail', 'settings': settings, 'batch_size': 4, 'val_fraction': 0, 'save_every': 1, 'out': str(tmp_path/'run')}
    for p in (both := start(frail_training, config, data, world=2)):
        p.join(60)
    assert [p.exitcode for p in both] == [1, 1]
    know_frail()
    assert all(v.isfinite().all() for v in load_run(tmp_path/'run').method.state_dict().values())
    del METHODS['frail']


# Line 9: resuming is exact.

class StopAt(Callback):
    """Press Ctrl-C after this step."""

    def __init__(self, step):
        self.step = step

    def on_step(self, trainer, images):
        if trainer.step == self.step:
            signal.raise_signal(signal.SIGINT)


EVENTFUL = {**TINY, 'epochs': 8, 'accum': 2, 'log_every': 3, 'save_every': 5, 'augment': AugmentConfig(**STRONG)}


def stopping(config, data, step):
    """Train until it is interrupted."""
    torch.set_num_threads(1)
    train(TrainConfig(**config), open_cutouts(data), callbacks=[StopAt(step)])


def result(folder):
    return {n: (folder/n).read_bytes() for n in ('model.safetensors', 'best.safetensors', 'log.jsonl')}


@pytest.fixture(scope='module')
def unbroken(data, tmp_path_factory):
    """What an undisturbed training gives on one process and on two, and how many steps it takes."""
    folder = tmp_path_factory.mktemp('unbroken')
    for world in (1, 2):
        finish(start(stopping, {**EVENTFUL, 'out': str(folder/str(world))}, data, -1, world=world))
    steps = [json.loads(line)['step'] for line in (folder/'1'/'log.jsonl').read_text().splitlines()]
    return {world: result(folder/str(world)) for world in (1, 2)}, max(steps)


@pytest.mark.parametrize('stops', [(1,), (5,), (3, 4, 7, 14, -1)], ids=str)
def test_line09_resuming_is_exact(unbroken, data, tmp_path, stops):
    expected, last = unbroken
    for step in stops:
        stopping({**EVENTFUL, 'out': str(tmp_path/'run')}, data, step % last)
        log = (tmp_path/'run'/'log.jsonl')
        assert not log.exists() or b'"step": %d,' % last not in log.read_bytes(), 'it did stop'
    stopping({**EVENTFUL, 'out': str(tmp_path/'run')}, data, 0)
    assert result(tmp_path/'run') == expected[1]


def test_line09_resuming_is_exact_on_two_processes(unbroken, data, tmp_path):
    expected, last = unbroken
    for step in (3, 14):  # two processes agree to stop at the next tenth step
        finish(start(stopping, {**EVENTFUL, 'out': str(tmp_path/'run')}, data, step, world=2))
        assert b'"step": %d,' % last not in (tmp_path/'run'/'log.jsonl').read_bytes(), 'it did stop'
    finish(start(stopping, {**EVENTFUL, 'out': str(tmp_path/'run')}, data, 0, world=2))
    assert result(tmp_path/'run') == expected[2]


# Line 10: no score without its control.

def test_line10_a_comparison_carries_controls_and_intervals(run, galaxies):
    table, untrained = embed(run, galaxies), embed(run.untrained(), galaxies)
    got = compare({'trained': table, 'untrained': untrained, 'pixels': pixel_pca(galaxies)}, galaxies.meta.z_true, control='untrained', cv=3, repeats=3)
    assert got.index.tolist() == ['trained', 'untrained', 'pixels'] and (got.n == 48).all()
    assert (got.low < got['mean']).all() and (got['mean'] < got.high).all()
    assert got.loc['untrained', 'difference'] == 0 and got.loc['trained', 'difference'] != 0
    assert (got.difference_low <= got.difference).all() and (got.difference <= got.difference_high).all()


def test_line10_the_table_of_the_demo_carries_controls_and_intervals(run, galaxies):
    got = probe_table(galaxies, embed(run, galaxies), embed(run.untrained(), galaxies), ['z_true', 'mag_r'])
    assert got.predicts.value_counts().to_dict() == {'z_true': 3, 'mag_r': 3}
    assert set(got.representation) == {'pre-trained', 'untrained encoder', 'pixel PCA'}
    assert (got.low < got['mean']).all() and (got['mean'] < got.high).all()


def test_line10_the_untrained_control_is_untrained(run, galaxies):
    one, again, other = (run.untrained(seed).method.state_dict() for seed in (0, 0, 1))
    trained, moves = run.method.state_dict(), 'blocks.0.attn.qkv.weight'
    assert torch.equal(one[moves], again[moves]) and not torch.equal(one[moves], other[moves])
    assert not torch.equal(one[moves], trained[moves])
    assert embed(run.untrained(), galaxies).info['untrained'] is True and embed(run, galaxies).info['untrained'] is False


def test_line10_the_online_probe_logs_its_controls(galaxies, tmp_path):
    rows = fit(galaxies, tmp_path/'run', [OnlineProbe(galaxies, 'z_true', every=1)]).log().dropna(subset='probe/z_true/linear')
    assert len(rows) == 2 and set(rows['probe/z_true/metric']) == {'r2'}
    for probe in ('probe/z_true/linear', 'probe/z_true/knn'):
        for control in (f'{probe}/untrained', f'{probe}/pixels'):
            assert rows[control].nunique() == 1 and np.isfinite(rows[control]).all() and not (rows[control] == rows[probe]).any()


# Line 12: two processes do the work of one.

def watched(config, data, seen):
    """Train, and write down the ids of every batch this process gets."""
    room = importlib.import_module('galaxy_ssl.trainer')
    to_device, ids = room.to_device, []
    room.to_device = lambda batch, device: ids.append(batch['id']) or to_device(batch, device)
    training(config, data)
    Path(f'{seen}.{os.environ.get("RANK", "0")}').write_text(json.dumps(ids))


def test_line12_two_processes_see_every_object_once(galaxies, data, tmp_path):
    finish(start(watched, {**TINY, 'val_fraction': 0, 'out': str(tmp_path/'run')}, data, tmp_path/'seen', world=2))
    ranks = [json.loads((tmp_path/f'seen.{r}').read_text()) for r in range(2)]
    for epoch in range(2):
        met = [i for batches in ranks for batch in batches[6*epoch:6*epoch + 6] for i in batch]
        assert sorted(met) == sorted(galaxies.ids)
    assert {len(batch) for batches in ranks for batch in batches} == {4}


def test_line12_validation_counts_every_object_once(data, tmp_path):
    finish(start(watched, {**TINY, 'out': str(tmp_path/'run')}, data, tmp_path/'seen', world=2))
    met = Counter(i for r in range(2) for batch in json.loads((tmp_path/f'seen.{r}').read_text()) for i in batch)
    split = pd.read_parquet(tmp_path/'run'/'split.parquet')['split']
    assert {met[i] for i in split.index[split == 'val']} == {TINY['epochs']}
    assert max(met[i] for i in split.index[split == 'train']) == TINY['epochs']


def test_line12_two_processes_train_the_same_network_as_one(data, tmp_path):
    for world in (1, 2):
        finish(start(training, {**TINY, 'epochs': 3, 'out': str(tmp_path/str(world))}, data, world=world))
    one, two = (load_run(tmp_path/str(w)) for w in (1, 2))
    for (name, a), b in zip(one.method.state_dict().items(), two.method.state_dict().values()):
        if name.endswith('qkv.bias'):  # attention ignores the bias of the keys: rounding alone moves it
            a, b = (t.unflatten(0, (3, -1))[[0, 2]] for t in (a, b))
        assert (a - b).abs().max() < 1e-5, name
    np.testing.assert_allclose(two.log().loss.dropna(), one.log().loss.dropna(), rtol=1e-5)
    np.testing.assert_allclose(two.log().val_loss.dropna(), one.log().val_loss.dropna(), rtol=1e-5)
