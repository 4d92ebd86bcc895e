"""The leaderboard: it can be stopped anywhere and goes on to the same numbers; what is stored is whole; nothing tested on was learnt from."""
import hashlib
import json
import os
import re
import signal
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from galaxy_ssl.bench import bench
from galaxy_ssl.callbacks import ProgressBar
from galaxy_ssl.catalogs import split_groups
from galaxy_ssl.cli import main
from galaxy_ssl.core import sample_data
from galaxy_ssl.leaderboard import read_results, show_table
from galaxy_ssl.recipes import Recipe
from galaxy_ssl.synthetic import synthetic_cutouts
from galaxy_ssl.table import EmbeddingTable
from galaxy_ssl.tasks import TASKS, Task, learning_set, read_sets, score_table, task_rows, twins

RESULTS = sorted((Path(__file__).parent.parent/'benchmarks'/'results').glob('*/*.json'))
TOY_TASKS = {'kind': Task('toy', 'class', lambda m: m['kind'], 'kind'), 'size': Task('toy', 'regression', lambda m: m['r_half_arcsec'], 'half-light radius')}
RECIPES = {'mae': Recipe(settings={'dim': 24, 'depth': 1, 'heads': 1, 'patch': 4}, train={'precision': 'fp32', 'batch_size': 16}), 'pixels': Recipe('pixels', seeds=1)}


@pytest.fixture(scope='module')
def toy():
    cs = synthetic_cutouts(160, size=16, kinds=('elliptical', 'spiral'), seed=3)
    cs.meta['split'] = split_groups(cs.meta, fractions=(.5, .2, .3)).to_numpy()
    return cs


def fill(toy, folder, methods=('mae', 'pixels'), **options):
    return bench(methods, budget=240, seeds=1, out=folder/'results', work=folder/'work', size=16, recipes=RECIPES, sets={'toy': toy}, tasks=TOY_TASKS, device='cpu', **options)


def scores(folder):
    return {(c['line'], c['task']): (c['key'], c['scores']) for c in read_results(folder/'results')}


class Stops:
    """A function that is interrupted the second time."""

    def __init__(self, f):
        self.f, self.calls = f, 0

    def __call__(self, *args, **options):
        self.calls += 1
        if self.calls == 2:
            raise KeyboardInterrupt
        return self.f(*args, **options)


def test_stopped_while_training_and_while_scoring_then_resumed(toy, tmp_path):
    fill(toy, tmp_path/'whole')

    def stop(self, trainer, images):
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with patch.object(ProgressBar, 'on_step', stop), pytest.raises(KeyboardInterrupt, match='Run the same command again'):
        fill(toy, tmp_path/'parts')
    assert not read_results(tmp_path/'parts'/'results')
    with patch('galaxy_ssl.bench.score_table', Stops(score_table)), pytest.raises(KeyboardInterrupt):
        fill(toy, tmp_path/'parts')
    assert set(scores(tmp_path/'parts')) == {('mae', 'kind')}
    assert [p.parent.name.split('-')[0] for p in fill(toy, tmp_path/'parts')] == ['mae', 'pixels', 'pixels']
    assert scores(tmp_path/'parts') == scores(tmp_path/'whole')


def test_the_order_of_galaxies_and_the_other_tasks_change_nothing(toy, tmp_path):
    fill(toy, tmp_path/'a', ['pixels'])
    turned = toy[::-1]
    bench(['pixels'], seeds=1, out=tmp_path/'b'/'results', work=tmp_path/'b'/'work', size=16, recipes=RECIPES, sets={'toy': turned}, tasks={'size': TOY_TASKS['size']})
    a, b = (scores(tmp_path/k)['pixels', 'size'][1] for k in 'ab')
    assert abs(a[0]['score'] - b[0]['score']) < 0.02


def test_labels_that_say_nothing_score_at_chance(toy):
    meta = toy.meta.assign(coin=np.random.default_rng(1).integers(0, 2, len(toy)).astype(str))
    table = EmbeddingTable(np.random.default_rng(0).normal(size=(len(toy), 6)), meta)
    for r in score_table(table, Task('toy', 'class', lambda m: m['coin'], 'a coin'), few=(10,)):
        assert abs(r['score'] - .5) < .2, r


def test_the_command_line_shows_a_table(toy, tmp_path, capsys):
    fill(toy, tmp_path)
    main(['bench', '--show', '--out', str(tmp_path/'results'), '--probe', 'knn'])
    shown = capsys.readouterr().out
    assert 'pixels' in shown and 'kind' in shown and re.search(r'0\.\d{3} \[0\.\d{3}, [01]\.\d{3}\]', shown)
    with pytest.raises(SystemExit, match="Did you mean 'mae'"):
        main(['bench', '--methods', 'mea'])
    with pytest.raises(SystemExit, match="Did you mean 'gz1'"):
        main(['bench', '--tasks', 'gz2'])


@pytest.mark.skipif(sample_data('gz1-sdss') is None or sample_data('efigi-sdss') is None, reason='shared/data/gz1-sdss and efigi-sdss are not installed')
def test_nothing_tested_on_is_learnt_from():
    sets = read_sets(16)
    learn = learning_set(sets, TASKS)
    ids = set(learn.ids)
    assert len(ids) == len(learn)
    pixels = {hashlib.sha256(learn.flux[[k]].tobytes()).digest() for k in range(len(learn))}
    for name, cs in sets.items():
        rows = np.flatnonzero(cs.meta.split != 'train')
        assert not ids & {f'{name}/{i}' for i in cs.meta.index[rows]}
        same = [cs.ids[k] for k in rows if hashlib.sha256(cs.flux[[k]].tobytes()).digest() in pixels]
        assert not same, f'{name}: {same[:5]} are learnt from under another id'
    assert not {i.removeprefix('gz1/') for i in ids} & (twins('gz1') | set(sets['hart16'].ids if 'hart16' in sets else ()))
    for task in TASKS.values():
        if task.set in sets:
            assert min(len(task_rows(sets[task.set], task)[s]) for s in ('train', 'val', 'test')) >= 30


@pytest.mark.skipif(not RESULTS, reason='benchmarks/results holds no cell')
def test_stored_cells_are_whole():
    for path in RESULTS:
        text = path.read_text()
        cell = json.loads(text)
        assert path.parent.name == f"{cell['line']}-{cell['key']}" and path.stem == f"{cell['task']}-seed{cell['seed']}"
        assert len(cell['truth']) == cell['n']['test'] and all(len(r['predictions']) == cell['n']['test'] for r in cell['scores'] if 'predictions' in r)
        assert all(r['low'] <= r['score'] <= r['high'] for r in cell['scores'] if r['n_labels'] is None), path
        assert not re.search(r'/(root|home|work|tmp|Users)/', text), f'{path} names a path of one machine'
    assert len(show_table(read_results(RESULTS[0].parent.parent)))
