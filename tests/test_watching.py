"""What watches a training: it changes nothing, survives an interruption, and runs in the first process only."""
import json
import sys
from types import SimpleNamespace

import jobs
import numpy as np
import pytest
from common import TINY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from galaxy_ssl.callbacks import Callback, WandB
from galaxy_ssl.cli import main
from galaxy_ssl.methods import METHODS, method_settings
from galaxy_ssl.runs import read_log
from galaxy_ssl.synthetic import synthetic_cutouts
from galaxy_ssl.train import TrainConfig, train, watchers

WATCHED = dict(probe_every=1, gauge_every=1, figure_every=0)


@pytest.fixture(scope='module')
def labelled(tmp_path_factory):
    path = tmp_path_factory.mktemp('labelled')/'labelled.h5'
    synthetic_cutouts(36, size=20, seed=9).save(path)
    return path


def config(out, method='mae', **changes):
    settings = {k: v for k, v in {'patch': 4, 'preset': 'micro', 'dim': 48, 'depth': 1}.items() if k in method_settings(method)}
    return TrainConfig(**{**TINY, 'method': method, 'settings': settings, 'out': str(out), 'epochs': 2, 'log_every': 1, **changes})


class StopEvery(Callback):
    """Ask to stop after some steps, as Ctrl-C does."""

    def __init__(self, n):
        self.n = n

    def on_step(self, trainer, images):
        trainer.stop.asked = trainer.step % self.n == 0


@pytest.mark.parametrize('method', [m for m in ('mae', 'vae', 'simclr', 'byol') if m in METHODS])
def test_watching_changes_no_bit(galaxies, labelled, tmp_path, method):
    watched = train(config(tmp_path/'watched', method, probe=(f'{labelled}:z_true,kind',), **WATCHED), galaxies)
    alone = train(config(tmp_path/'alone', method), galaxies, callbacks=[])
    for name in ('model.safetensors', 'best.safetensors'):
        assert (tmp_path/'watched'/name).read_bytes() == (tmp_path/'alone'/name).read_bytes()
    ours, theirs = (read_log(r.folder/'log.jsonl') for r in (watched, alone))
    plain = [{k: v for k, v in r.items() if not k.startswith(('probe/', 'gauge/'))} for r in ours]
    assert plain == theirs and any('probe/kind/knn/untrained' in r for r in ours) and any('gauge/rankme' in r for r in ours)
    for name in ['training', 'reconstruction'][:1 + hasattr(watched.method, 'reconstruct')]:
        assert (tmp_path/'watched'/'figures'/f'{name}.png').stat().st_size > 5000


def test_resumed_again_and_again_the_log_is_the_same(galaxies, labelled, tmp_path):
    def cfg(out):
        return config(tmp_path/out, probe=(f'{labelled}:z_true,kind',), **WATCHED)
    train(cfg('whole'), galaxies)
    for _ in range(4):
        run = train(cfg('pieces'), galaxies, callbacks=[*watchers(cfg('pieces')), StopEvery(2)])
    assert run.finished
    for name in ('log.jsonl', 'model.safetensors'):
        assert (tmp_path/'whole'/name).read_bytes() == (tmp_path/'pieces'/name).read_bytes()


def test_the_settings_of_watching_may_change_on_resume(galaxies, labelled, tmp_path):
    half = train(config(tmp_path/'run', epochs=2), galaxies, callbacks=[StopEvery(3)])
    assert not half.finished
    assert train(config(tmp_path/'run', epochs=2, probe=(f'{labelled}:kind',), **WATCHED), galaxies).finished
    assert any('probe/kind/linear' in r for r in read_log(tmp_path/'run'/'log.jsonl'))


def test_two_processes_are_watched_by_the_first(galaxies, labelled, tmp_path):
    galaxies.save(tmp_path/'all.h5')
    for name, probe in (('watched', (f'{labelled}:kind',)), ('alone', ())):
        cfg = config(tmp_path/name, batch_size=8, probe=probe, probe_every=1, gauge_every=1 if probe else 0, figure_every=0)
        jobs.finish(jobs.start(jobs.watched, vars(cfg), str(tmp_path/'all.h5'), str(tmp_path), bool(probe), world=2))
    assert [p.name for p in tmp_path.glob('rank*')] == ['rank0']
    assert (tmp_path/'watched'/'model.safetensors').read_bytes() == (tmp_path/'alone'/'model.safetensors').read_bytes()
    rows = [r for r in read_log(tmp_path/'watched'/'log.jsonl') if 'probe/kind/linear' in r]
    assert [r['epoch'] for r in rows] == [1, 2] and all(np.isfinite(r['gauge/rankme']) for r in rows)


def test_speed_and_memory_are_written_down(galaxies, tmp_path):
    run = train(config(tmp_path/'run'), galaxies, callbacks=[])
    rows = read_log(run.folder/'speed.jsonl')
    assert [r['step'] for r in rows] == [r['step'] for r in read_log(run.folder/'log.jsonl') if 'loss' in r]
    assert all(r['images_per_s'] > 0 and 0 <= r['waiting'] <= 1 and 0.05 < r['rss_gb'] < 20 for r in rows)


def test_tensorboard_has_scalars_and_figures(galaxies, labelled, tmp_path):
    train(config(tmp_path/'run', track=('tensorboard',), probe=(f'{labelled}:z_true',), **WATCHED), galaxies)
    tags = EventAccumulator(str(tmp_path/'run'/'tensorboard')).Reload().Tags()
    assert set(tags['images']) == {'training', 'reconstruction'}
    assert {'loss', 'val_loss', 'lr', 'images_per_s', 'rss_gb', 'gauge/rankme', 'probe/z_true/linear', 'probe/z_true/linear/pixels', 'probe/z_true/nmad'} <= set(tags['scalars'])


def test_weights_and_biases_gets_rows_in_order_and_figures(galaxies, tmp_path, monkeypatch):
    sent = []
    session = SimpleNamespace(log=lambda values, step: sent.append((step, values)), finish=lambda: sent.append('finished'))
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=lambda **_: session, Image=lambda fig: ('image', fig)))
    cfg = config(tmp_path/'run', **WATCHED)
    train(cfg, galaxies, callbacks=[*watchers(cfg), WandB()])
    assert sent[-1] == 'finished'
    steps = [s for s, _ in sent[:-1]]
    assert steps == sorted(steps)
    keys = {k for _, values in sent[:-1] for k in values}
    assert {'loss', 'training', 'reconstruction', 'images_per_s', 'gauge/spread'} <= keys


def test_the_command_line_names_probes(galaxies, labelled, tmp_path):
    galaxies.save(tmp_path/'all.h5')
    words = ['train', '--data', str(tmp_path/'all.h5'), '--out', str(tmp_path/'run'), '--size', '16', '--epochs', '1', '--batch-size', '8', '--device', 'cpu',
             '--set', 'patch=4', 'preset=micro', 'dim=48', 'depth=1']
    with pytest.raises(SystemExit, match="'kinds' is not in the catalogue. Did you mean 'kind'"):
        main([*words, '--probe', f'{labelled}:kinds'])
    main([*words, '--probe', f'{labelled}:z_true,kind'])
    rows = [json.loads(line) for line in (tmp_path/'run'/'log.jsonl').read_text().splitlines()]
    assert {'probe/z_true/linear', 'probe/kind/knn/pixels'} <= set(rows[-1])


def test_throughput_from_the_command_line(galaxies, tmp_path, capsys):
    galaxies.save(tmp_path/'all.h5')
    main(['throughput', '--data', str(tmp_path/'all.h5'), '--size', '16', '--batch-size', '8', '--device', 'cpu', '--steps', '1', '--set', 'patch=4', 'preset=micro', 'dim=48', 'depth=1'])
    said = capsys.readouterr().out
    assert 'images/s' in said and '-bound: ' in said
    with pytest.raises(SystemExit, match='not a run folder'):
        main(['throughput', str(tmp_path)])
