"""kill -9 at random moments: nothing corrupt is left, and what is resumed equals what was never disturbed, byte for byte."""
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import embedding, finish, kill, start, training, wait_for

from galaxy_ssl.core import CutoutError
from galaxy_ssl.runs import load_resume, load_run, read_config
from galaxy_ssl.synthetic import synthetic_cutouts
from galaxy_ssl.table import EmbeddingTable

ROOT = Path(__file__).parent.parent
KILLS = 20
CONFIG = dict(size=16, epochs=60, batch_size=8, save_every=2, log_every=3, val_fraction=0.2, settings={'patch': 4, 'preset': 'micro', 'dim': 48, 'depth': 2})


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp('data')/'cutouts.h5'
    synthetic_cutouts(80, size=20, seed=4).save(path)
    return path


def visible(folder):
    """Name -> bytes of every file that is not a leftover temporary."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and not p.name.startswith('.')}


def loads(folder):
    """Every file of a run folder is whole: it loads, or it is not there yet."""
    if (folder/'config.json').exists():
        read_config(folder)
    if (folder/'resume.pt').exists():
        load_resume(folder/'resume.pt')
    if (folder/'model.safetensors').exists():
        load_run(folder)
    if (folder/'best.safetensors').exists():
        load_run(folder, 'best')


@pytest.mark.parametrize('world', [1, 2])
def test_training_killed_at_20_random_moments(data, tmp_path, world):
    moments = random.Random(world)
    finish(start(training, {**CONFIG, 'out': str(tmp_path/'calm')}, data, world=world))
    calm = visible(tmp_path/'calm')
    folder = tmp_path/'killed'
    killed = 0
    while killed < KILLS:
        job = start(training, {**CONFIG, 'out': str(folder)}, data, world=world)
        if moments.random() < 0.8:  # most moments lie in the training itself, some in the start
            before = (folder/'log.jsonl').stat().st_size if (folder/'log.jsonl').exists() else 0
            wait_for(lambda: (folder/'log.jsonl').exists() and (folder/'log.jsonl').stat().st_size != before, job)
        time.sleep(moments.uniform(0, 0.4))
        killed += kill(job)
        loads(folder)
        if all(p.exitcode == 0 for p in job):
            same(visible(folder), calm)
            shutil.rmtree(folder)
    finish(start(training, {**CONFIG, 'out': str(folder)}, data, world=world))
    same(visible(folder), calm)
    assert not list(folder.glob('.*.tmp'))


def same(found, expected):
    """The same files with the same bytes; wall-clock speed, the folder's own name and torch's archive aside."""
    assert found.keys() == expected.keys()
    for name in ('model.safetensors', 'best.safetensors', 'log.jsonl', 'split.parquet'):
        assert found[name] == expected[name], name


def test_embedding_killed_at_20_random_moments(data, tmp_path):
    moments = random.Random(0)
    finish(start(training, {**CONFIG, 'epochs': 2, 'out': str(tmp_path/'run')}, data))
    big = tmp_path/'big.h5'
    synthetic_cutouts(1500, size=20, seed=5).save(big)
    finish(start(embedding, tmp_path/'run', big, tmp_path/'calm.parquet', 16))
    calm = (tmp_path/'calm.parquet').read_bytes()
    out, parts = tmp_path/'killed.parquet', tmp_path/'killed.parquet.parts'
    killed = 0
    while killed < KILLS:
        job = start(embedding, tmp_path/'run', big, out, 16)
        wait_for(lambda: parts.exists(), job)
        time.sleep(moments.uniform(0, 0.25))
        killed += kill(job)
        for p in parts.glob('part-*.parquet') if parts.exists() else []:
            assert len(EmbeddingTable.load(p)) in (16, 1500 % 16)
        if out.exists():
            assert out.read_bytes() == calm
            out.unlink()
    finish(start(embedding, tmp_path/'run', big, out, 16))
    assert out.read_bytes() == calm
    assert not parts.exists()


def test_a_second_training_in_the_same_folder_is_refused(data, tmp_path):
    job = start(training, {**CONFIG, 'out': str(tmp_path/'run')}, data)
    wait_for(lambda: (tmp_path/'run'/'log.jsonl').exists(), job)
    try:
        with pytest.raises(CutoutError, match=f'in use by pid {job[0].pid}'):
            training({**CONFIG, 'out': str(tmp_path/'run')}, data)
    finally:
        kill(job)


def test_workers_die_with_a_killed_torchrun(data, tmp_path):
    command = [str(Path(sys.executable).with_name('torchrun')), '--nproc-per-node', '2', '--master-port', '29613', '-m', 'galaxy_ssl.train', '--data', str(data),
               '--out', str(tmp_path/'run'), '--size', '16', '--epochs', '100000', '--batch-size', '8', '--set', 'patch=4', 'preset=micro']
    with open(tmp_path/'out.txt', 'w') as out:
        launcher = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env={**os.environ, 'PYTHONPATH': str(ROOT)})
        lock = tmp_path/'run'/'.lock'
        until = time.monotonic() + 120
        while not (tmp_path/'run'/'log.jsonl').exists() and launcher.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        worker = int(lock.read_text())
        launcher.kill()
        launcher.wait()
    until = time.monotonic() + 10
    while alive(worker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(worker), (tmp_path/'out.txt').read_text()[-2000:]


def alive(pid):
    """Whether a process still runs (one that waits to be collected does not)."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rsplit(')')[1].split()[0] != 'Z'
    except FileNotFoundError:
        return False
