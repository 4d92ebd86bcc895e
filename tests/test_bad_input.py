"""Trainings, embeddings and run folders given what they cannot use: the right error, naming the object, and nothing lost."""
import json
import os
import pickle
import re

import numpy as np
import pandas as pd
import pytest
import torch
from common import TINY, contents, embed, fit, like

from galaxy_ssl.core import CutoutError, run_lock
from galaxy_ssl.cutouts import CutoutSet, open_cutouts
from galaxy_ssl.probe import compare, probe_score
from galaxy_ssl.runs import load_run
from galaxy_ssl.table import EmbeddingTable

# Bands.

@pytest.mark.parametrize('wanted', [('g', 'Y'), ('gx',)])
@pytest.mark.parametrize('suffix', ['.h5', '.fits'])
def test_wrong_band_names_list_wanted_and_found(suffix, wanted, good):
    with pytest.raises(CutoutError, match='wanted.*found.*g.*r.*z'):
        open_cutouts(good[suffix], bands=wanted)


@pytest.mark.parametrize('bands', [('g', 'r'), ('g', 'r', 'i', 'z'), ('g', 'g', 'r')])
def test_wrong_band_count_is_refused(bands, galaxies):
    with pytest.raises(CutoutError, match='bands.*3 bands'):
        like(galaxies, bands=bands)


def test_bands_in_another_order_are_the_same_object(galaxies, trained, tmp_path):
    turned = like(galaxies, galaxies.flux[:][:, [2, 0, 1]], bands=('z', 'g', 'r')).save(tmp_path/'turned.h5')
    assert open_cutouts(turned).bands == ('g', 'r', 'z')
    assert np.array_equal(embed(trained, open_cutouts(turned)).X, embed(trained, galaxies).X)


def test_a_band_the_run_needs_is_missing(galaxies, trained):
    with pytest.raises(CutoutError, match=r"wanted \('g', 'r', 'z'\), found \('g', 'r'\)"):
        embed(trained, galaxies.select(('g', 'r')))


def test_a_band_too_many_is_left_out(galaxies, trained):
    flux = np.concatenate([galaxies.flux[:], np.full((40, 1, 20, 20), 9.)], 1)
    assert np.array_equal(embed(trained, like(galaxies, flux, bands=('g', 'r', 'z', 'i'))).X, embed(trained, galaxies).X)


# Pixels.

def test_a_set_without_a_valid_pixel_is_refused(galaxies, trained, tmp_path):
    empty = like(galaxies, np.full(galaxies.shape, np.nan))
    with pytest.raises(CutoutError, match='no valid pixel'):
        fit(empty, tmp_path/'run')
    with pytest.raises(CutoutError, match='40 .*valid pixel'):
        embed(trained, empty)
    assert not contents(tmp_path/'run')


def test_an_object_without_a_valid_pixel_is_set_aside_and_reported(galaxies, trained, tmp_path):
    flux = galaxies.flux[:]
    flux[[3, 30]] = np.nan
    lost = [galaxies.ids[i] for i in (3, 30)]
    others = [i for i in galaxies.ids if i not in lost]
    table = embed(trained, like(galaxies, flux), out=tmp_path/'t.parquet', shard_size=8)
    assert table.ids == others and table.info['n_bad'] == 2 and table.info['bad_ids'] == lost
    assert pd.read_csv(tmp_path/'t.bad.csv').id.tolist() == lost
    np.testing.assert_allclose(table.X, embed(trained, galaxies)[others].X, atol=1e-5)


def test_training_goes_on_beside_objects_without_a_valid_pixel(galaxies, tmp_path):
    flux = galaxies.flux[:]
    flux[::7] = np.nan
    run = fit(like(galaxies, flux), tmp_path/'run', log_every=1, batch_size=2)
    assert np.isfinite(run.log().loss.dropna()).all() and run.log().val_loss.notna().any()


def test_too_many_objects_without_a_valid_pixel_stop_the_job(galaxies, trained, tmp_path):
    flux = galaxies.flux[:]
    flux[:11] = np.nan
    with pytest.raises(CutoutError, match='11 of 40 .*max_bad=0.01'):
        embed(trained, like(galaxies, flux), out=tmp_path/'t.parquet')
    assert len(embed(trained, like(galaxies, flux), max_bad=0.5)) == 29


@pytest.mark.parametrize('value', [0., -3.5, 1e9])
def test_constant_images_train_and_embed(value, galaxies, tmp_path):
    cs = like(galaxies, np.full(galaxies.shape, value))
    run = fit(cs, tmp_path/'run', log_every=1)
    assert np.isfinite(run.log().loss.dropna()).all() and np.isfinite(embed(run, cs).X).all()


def test_zero_cutouts_are_refused(galaxies):
    for flux in (np.zeros((0, 3, 20, 20)), np.zeros((4, 3, 0, 20))):
        with pytest.raises(CutoutError, match='zero cutouts or pixels'):
            CutoutSet(flux)
    with pytest.raises(CutoutError, match='selection is empty'):
        galaxies[galaxies.meta.ra > 999]


def test_duplicate_ids_are_refused_and_named(galaxies):
    with pytest.raises(CutoutError, match="2 duplicate ids, first: .'twin'"):
        CutoutSet(np.zeros((4, 1, 8, 8)), {'id': ['twin', 'a', 'twin', 'twin']})
    with pytest.raises(CutoutError, match="1 duplicate ids, first: .'twin'"):
        EmbeddingTable(np.zeros((3, 2)), {'id': ['twin', 'a', 'twin']})


# Labels.

def test_labels_that_are_missing_are_left_out_and_counted(galaxies, trained):
    table = embed(trained, galaxies)
    y = galaxies.meta.z_true.where(np.arange(40) % 4 > 0)
    got = probe_score(table, y, cv=3)
    assert (got.n, got.n_dropped) == (30, 10) and np.isfinite(got.score)
    assert set(got.predictions.index) == set(y.index[y.notna()])


@pytest.mark.parametrize('y, message', [(['spiral']*40, "all 40 labels are the same: 'spiral'"), ([np.nan]*40, 'none of the 40 objects has a label'),
                                        (['a']*39 + ['b'], "class 'b' has 1 objects"), (['a', 'b'], '2 labels for 40 objects')], ids=['one class', 'no labels', 'one of a class', 'too few'])
@pytest.mark.parametrize('score', [probe_score, lambda t, y, cv: compare({'a': t}, y, cv=cv)], ids=['probe_score', 'compare'])
def test_labels_nothing_can_be_learnt_from(score, y, message, galaxies, trained):
    with pytest.raises(CutoutError, match=message):
        score(embed(trained, galaxies), np.array(y, dtype=object), cv=3)


# Run folders.

def test_a_run_without_weights_yet(folder):
    for name in ('model.safetensors', 'best.safetensors'):
        (folder/name).unlink()
        with pytest.raises(CutoutError, match=f'run: has no {name} yet'):
            load_run(folder, 'last' if name.startswith('model') else 'best')


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(CutoutError, match='not a run folder'):
        load_run(tmp_path)
    (tmp_path/'config.json').write_text('{"epochs": 3}')
    with pytest.raises(CutoutError, match=r'config\.json: not the config.json of a run'):
        load_run(tmp_path)


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_a_run_file_cut_off_anywhere(name, folder, galaxies):
    whole = (folder/name).read_bytes()
    for at in [0, *np.random.default_rng(0).integers(1, len(whole) - 1, 20)]:
        (folder/name).write_bytes(whole[:at])
        with pytest.raises(CutoutError, match=re.escape(name)):
            load_run(folder)
        before = contents(folder)
        if name == 'config.json':
            with pytest.raises(CutoutError, match=re.escape(name)):
                fit(galaxies, folder)
            assert contents(folder) == before


def test_a_flipped_bit_in_the_weights_is_noticed(folder, trained):
    """Sixty flips: each is an error that names the file, or lies where it changes no weight."""
    whole, truth = (folder/'model.safetensors').read_bytes(), load_run(trained).method.state_dict()
    start = 8 + int.from_bytes(whole[:8], 'little')
    rng = np.random.default_rng(0)
    for at in [*rng.integers(start, len(whole), 40), *rng.integers(0, start, 20)]:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.integers(8)
        (folder/'model.safetensors').write_bytes(flipped)
        try:
            found = load_run(folder).method.state_dict()
        except CutoutError as e:
            assert 'model.safetensors' in str(e) and (at < start or 'sha256 mismatch' in str(e))
        else:
            assert at < start and all(torch.equal(found[k], v) for k, v in truth.items())


def test_weights_of_another_network_are_refused_with_what_differs(folder):
    config = json.loads((folder/'config.json').read_text())
    config['settings']['depth'] = 1
    (folder/'config.json').write_text(json.dumps(config))
    with pytest.raises(CutoutError, match=r'model\.safetensors: weights of another model: \d+ differences.*unexpected'):
        load_run(folder)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), 'w')


DAMAGE = {
    'empty': lambda p, marker: p.write_bytes(b''),
    'cut off': lambda p, marker: p.write_bytes(p.read_bytes()[:5000]),
    'bit flipped': lambda p, marker: p.write_bytes(p.read_bytes()[:9000] + bytes([p.read_bytes()[9000] ^ 1]) + p.read_bytes()[9001:]),
    'with code': lambda p, marker: torch.save({'step': Payload(marker)}, p),
    'a pickle': lambda p, marker: p.write_bytes(pickle.dumps(Payload(marker))),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_runs_no_code(damage, folder, galaxies, tmp_path):
    DAMAGE[damage](folder/'resume.pt', tmp_path/'marker')
    before = contents(folder)
    with pytest.raises(CutoutError, match=r'resume\.pt') as error:
        fit(galaxies, folder)
    assert 'weights_only' not in str(error.value)
    assert contents(folder) == before and not (tmp_path/'marker').exists()
    assert len(embed(load_run(folder), galaxies)) == 40


def test_the_payload_of_this_test_is_live(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path/'marker'))).close()
    assert (tmp_path/'marker').exists()


@pytest.mark.parametrize('changes, message', [(dict(bands=('g', 'r')), 'bands'), (dict(lr=1e-2), 'lr: 0.001 there, 0.01 here'), (dict(seed=1), 'seed: 0 there, 1 here'),
                                              (dict(settings={**TINY['settings'], 'mask_ratio': 0.5}), 'settings')], ids=lambda v: '' if isinstance(v, str) else str(v))
def test_a_run_folder_with_other_settings_is_not_resumed(changes, message, folder, galaxies):
    before = contents(folder)
    with pytest.raises(CutoutError, match=f'holds a run with other settings.*{message}.*overwrite'):
        fit(galaxies, folder, **changes)
    assert contents(folder) == before


def test_a_run_folder_of_other_pixels_is_not_resumed(folder, galaxies):
    before = contents(folder)
    with pytest.raises(CutoutError, match='other statistics of the training split'):
        fit(like(galaxies, galaxies.flux[:]*3), folder)
    assert contents(folder) == before


def test_an_unfinished_run_of_an_older_release_is_resumed(folder, galaxies):
    config = json.loads((folder/'config.json').read_text())
    for saved in (config['train']['augment'], config['preprocess']['augment']):
        for name in ('redden', 'dust_table', 'psf_table', 'noise_table'):
            del saved[name]
    del config['preprocess']['conditions'], config['compute']
    (folder/'config.json').write_text(json.dumps(config))
    assert fit(galaxies, folder).finished


def test_a_run_folder_in_use_names_its_owner(folder, galaxies):
    before = contents(folder)
    with run_lock(folder), pytest.raises(CutoutError, match=f'run folder in use by pid {os.getpid()}'):
        fit(galaxies, folder)
    assert contents(folder) == before
