"""The batch script of `galaxy_ssl slurm`, run by bash with stand-ins for SLURM's commands: two nodes on this machine, and the signal before the time limit."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from common import FLAGS
from safetensors.torch import load_file

from galaxy_ssl.runs import load_resume
from galaxy_ssl.slurm import write_slurm
from galaxy_ssl.synthetic import synthetic_cutouts
from galaxy_ssl.train import TrainConfig, train
from common import TINY

STAND_INS = {
    'scontrol': 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$PLACE/requeued"; fi',
    # each node is the command once more, in a session of its own; options of srun begin with --
    'srun': 'while [[ "$1" == --* ]]; do shift; done\nfor node in $(seq "$NODES"); do setsid "$@" & echo $! >> "$PLACE/sessions"; done\nfor job in $(jobs -p); do wait $job || code=$?; done\nexit ${code:-0}',
    # every process of the job gets the signal, as on a cluster
    'scancel': 'for s in $(cat "$PLACE/sessions"); do kill "-${1#--signal=}" $s $(pgrep -P $s); done',
}


@pytest.fixture
def cluster(tmp_path):
    """Environment of a job with two nodes, one process each."""
    bin = tmp_path/'bin'
    bin.mkdir()
    for name, text in STAND_INS.items():
        (bin/name).write_text(f'#!/bin/bash\n{text}\n')
        (bin/name).chmod(0o755)
    synthetic_cutouts(40, size=16).save(tmp_path/'cutouts.h5')
    root = str(Path(__file__).parent.parent)
    return {**os.environ, 'PATH': f'{bin}:{Path(sys.executable).parent}:{os.environ["PATH"]}', 'PLACE': str(tmp_path), 'NODES': '2', 'PYTHONPATH': root,
            'SLURM_JOB_ID': str(os.getpid()), 'SLURM_JOB_NODELIST': 'localhost', 'OMP_NUM_THREADS': '1'}


def script(tmp_path, **changes):
    words = ['--data', str(tmp_path/'cutouts.h5'), '--out', str(tmp_path/'run'), '--val-fraction', '0.25', *FLAGS]
    words[words.index('--epochs') + 1] = str(changes.pop('epochs', 1))
    return write_slurm(tmp_path/'train.slurm', words, nodes=2, gpus=0, cpus=1, setup=':', restarts=0)


def test_two_nodes_meet_and_train(cluster, tmp_path):
    done = subprocess.run(['bash', str(script(tmp_path))], env=cluster, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = train(TrainConfig(**{**TINY, 'data': str(tmp_path/'cutouts.h5'), 'out': str(tmp_path/'alone')}), callbacks=[])
    theirs = load_file(tmp_path/'run'/'model.safetensors')
    assert all((theirs[k] - v).abs().max() < 1e-4 for k, v in alone.method.state_dict().items())
    assert not (tmp_path/'requeued').exists()


def test_before_the_time_limit_it_saves_stops_and_queues_again(cluster, tmp_path):
    batch = subprocess.Popen(['bash', str(script(tmp_path, epochs=2000))], env=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = tmp_path/'run'/'log.jsonl'
    limit = time.monotonic() + 240
    while time.monotonic() < limit and not (log.exists() and log.stat().st_size) and batch.poll() is None:
        time.sleep(0.5)
    batch.send_signal(signal.SIGUSR1)
    said = batch.communicate(timeout=240)[0]
    assert batch.returncode == 0, said[-3000:]
    assert (tmp_path/'requeued').read_text() == f'requeue {cluster["SLURM_JOB_ID"]}\n'
    assert 'Stopped and saved at step' in said
    step = load_resume(tmp_path/'run'/'resume.pt')['step']
    assert step > 0 and f'Stopped and saved at step {step} of' in said
