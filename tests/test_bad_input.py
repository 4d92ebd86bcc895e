"""Fault -> promised behaviour, through the public doors: the right error, naming the file or object, and nothing lost."""
import json
import os
import pickle
import re
import resource
import shutil
import signal
import tempfile
import warnings
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from astropy.io import fits
from jobs import finish, start

from galaxy_ssl import cli
from galaxy_ssl.config import make_config
from galaxy_ssl.core import CutoutError, run_lock
from galaxy_ssl.cutouts import CutoutSet, open_cutouts
from galaxy_ssl.embed import embed_cutouts
from galaxy_ssl.probe import compare, probe_score
from galaxy_ssl.runs import load_resume, load_run, save_resume, save_weights
from galaxy_ssl.synthetic import synthetic_cutouts
from galaxy_ssl.table import EmbeddingTable
from galaxy_ssl.train import TrainConfig, train

TINY = dict(size=16, epochs=1, batch_size=8, val_fraction=0.25, device='cpu', settings={'patch': 4, 'preset': 'micro', 'dim': 48, 'depth': 2})
FLAGS = ['--size', '16', '--epochs', '1', '--batch-size', '8', '--device', 'cpu', '--set', 'patch=4', 'preset=micro', 'dim=48', 'depth=2']


def fit(cs, out, **changes):
    return train(TrainConfig(**{**TINY, 'out': str(out), **changes}), cs, callbacks=[])


def embed(run, cs, **options):
    return embed_cutouts(run, cs, progress=False, device='cpu', **options)


def like(cs, flux=None, **changes):
    """The same set with something changed."""
    given = dict(meta=cs.meta, bands=cs.bands, survey=cs.survey, pixscale=cs.pixscale, unit=cs.unit)
    return CutoutSet(cs.flux[:] if flux is None else flux, **{**given, **changes})


def contents(folder):
    """Name -> bytes of every file below a folder, the lock aside."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file() and p.name != '.lock'}


@pytest.fixture(scope='module')
def galaxies():
    return synthetic_cutouts(40, size=20, seed=1)


@pytest.fixture(scope='module')
def trained(galaxies, tmp_path_factory):
    """A run folder, not to be changed."""
    return fit(galaxies, tmp_path_factory.mktemp('run')/'mae').folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of the run folder, to be damaged."""
    return shutil.copytree(trained, tmp_path/'run')


@pytest.fixture
def good(galaxies, trained, tmp_path):
    """Suffix -> a whole file of that kind."""
    galaxies.save(tmp_path/'good.h5')
    embed(trained, galaxies).save(tmp_path/'good.parquet')
    header = fits.Header({'BANDS': 'g,r,z', 'BUNIT': 'nanomaggy'})
    fits.writeto(tmp_path/'good.fits', galaxies.flux[0], header)
    return {s: tmp_path/f'good{s}' for s in ('.h5', '.parquet', '.fits')}


# Files that are not what their name says.

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


@pytest.mark.parametrize('suffix', DOORS)
@pytest.mark.parametrize('fault', FAULTS)
def test_a_file_of_the_wrong_kind(suffix, fault, tmp_path):
    make, message = FAULTS[fault]
    make(tmp_path/f'bad{suffix}')
    with pytest.raises(CutoutError, match=message) as error:
        DOORS[suffix](tmp_path/f'bad{suffix}')
    assert f'bad{suffix}' in str(error.value)


@pytest.mark.parametrize('suffix', DOORS)
def test_a_file_cut_off_anywhere(suffix, good, tmp_path):
    """Refused by name; only in the padding of a FITS file there is nothing to lose, and a warning."""
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


# Bands.

@pytest.mark.parametrize('wanted', [('g', 'Y'), ('gr',)])
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


@pytest.mark.parametrize('where', SPELT)
def test_a_misspelt_setting_is_refused_with_the_nearest_name(where, good, tmp_path, command):
    words, wrong, right = SPELT[where]
    code, said = command('train', '--data', good['.h5'], '--out', tmp_path/'run', *words(tmp_path))
    assert code != 0 and wrong in said and right in said.replace(wrong, '')
    assert not (tmp_path/'run').exists() or not contents(tmp_path/'run')


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


def test_a_run_folder_in_use_names_its_owner(folder, galaxies):
    before = contents(folder)
    with run_lock(folder), pytest.raises(CutoutError, match=f'run folder in use by pid {os.getpid()}'):
        fit(galaxies, folder)
    assert contents(folder) == before


# Places that cannot be written to.

WRITERS = {
    'cutouts': lambda cs, run, out: cs.save(out),
    'table': lambda cs, run, out: embed(run, cs).save(out),
    'embed': lambda cs, run, out: embed(run, cs, out=out),
    'train': lambda cs, run, out: fit(cs, out),
}


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


@pytest.mark.parametrize('writer', ['cutouts', 'table', 'embed'])
def test_out_is_a_folder_where_a_file_is_written(writer, galaxies, trained, tmp_path):
    (tmp_path/'out.parquet').mkdir()
    with pytest.raises(CutoutError, match=r'out\.parquet: is a folder'):
        WRITERS[writer](galaxies, trained, tmp_path/'out.parquet')
    assert not contents(tmp_path)


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


@pytest.mark.parametrize('job, name', [(save_cutouts, 'cutouts.h5'), (save_table, 'table.parquet'), (save_checkpoint, 'resume.pt'), (save_model, 'model.safetensors')])
def test_a_full_disk_leaves_the_old_file(job, name, tmp_path):
    (tmp_path/'work').mkdir()
    (tmp_path/'work'/name).write_bytes(b'what was there before')
    (process,) = start(on_a_full_disk, job, tmp_path/'work', tmp_path/'said')
    process.join(60)
    assert process.exitcode == 1
    assert re.match(rf'27 .*{tmp_path}/work/{name}: no room to write it .*MB free', (tmp_path/'said').read_text())
    assert contents(tmp_path/'work') == {name: b'what was there before'}


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
