"""A set much larger than memory: opened in seconds, trained on in bounded memory. The file is sparse: its pixels take no room until written."""
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

N, SHAPE = 2_400_000, (5, 64, 64)  # 197 GB

MAKE = """
import sys
import numpy as np
import pandas as pd
from galaxy_ssl.cutouts import CutoutSet, Pixels
from galaxy_ssl.native import _skeleton
path, n, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(0)
meta = pd.DataFrame({'id': np.char.add('J', np.arange(n).astype('U7')), 'ra': rng.uniform(150, 160, n), 'dec': rng.uniform(-5, 5, n)})
cs = CutoutSet(Pixels(None, (n, 5, size, size)), meta, 'grizy', survey='hsc', pixscale=0.168)
offset = _skeleton(cs, path, {'flux': np.dtype(np.float32)})['flux']
block = rng.normal(size=(64, 5, size, size)).astype(np.float32)
with open(path, 'r+b') as f:
    for first in np.linspace(0, n - 64, 20).astype(int):
        f.seek(offset + int(first)*block[0].nbytes)
        f.write(block)
"""

USE = """
import json, re, sys, time
from pathlib import Path
def anonymous():
    "Megabytes of memory of this process that are not pages of files."
    return int(re.search(r'RssAnon:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])/1024
path, out = sys.argv[1], sys.argv[2]
import torch
from galaxy_ssl.batch import Loader
from galaxy_ssl.callbacks import Callback
from galaxy_ssl.cutouts import open_cutouts
from galaxy_ssl.train import TrainConfig, Trainer
from galaxy_ssl.world import StopFlag, join_world
torch.set_num_threads(1)
said = {'start': anonymous()}
clock = time.process_time()
cs = open_cutouts(path)
said.update(n=len(cs), open_s=time.process_time() - clock, opened=anonymous())
class Watch(Callback):
    seen = []
    def on_step(self, trainer, images):
        self.seen.append(anonymous())
        trainer.stop.asked = len(self.seen) == 60
cfg = TrainConfig(out=out, size=64, batch_size=64, val_fraction=0.02, device='cpu', save_every=10**6,
                  settings={'patch': 16, 'preset': 'micro', 'dim': 48, 'depth': 1})
clock = time.process_time()
Path(out).mkdir()
with join_world('cpu') as world, StopFlag() as stop:
    trainer = Trainer(cfg, cs, world, stop, [Watch()])
    trainer.build()
    said.update(build_s=time.process_time() - clock, built=anonymous(), train=len(trainer.train_set), val=len(trainer.val_set))
    clock = time.process_time()
    trainer.fit()
said.update(steps=trainer.step, fit_s=time.process_time() - clock, peak=max(Watch.seen), early=max(Watch.seen[:20]), late=max(Watch.seen[-20:]))
print(json.dumps(said))
"""


def child(code, *args):
    """Run `code` in a Python of its own; what it prints last."""
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code), *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1:] or ['']


@pytest.fixture
def huge(tmp_path):
    """A native file of 200 GB that takes 300 MB of the disk."""
    if not Path('/proc/self/status').exists():
        pytest.skip('needs /proc to measure memory')
    path = tmp_path/'huge.h5'
    with open(path, 'wb') as f:
        try:
            f.truncate(200*10**9)
        except OSError as e:
            pytest.skip(f'this disk cannot hold a sparse file of 200 GB ({e.strerror})')
        if path.stat().st_blocks*512 > 10**6:
            pytest.skip('this disk does not keep files sparse')
    child(MAKE, path, N, SHAPE[-1])
    assert path.stat().st_size > 196e9 and path.stat().st_blocks*512 < 1e9
    yield path
    path.unlink()


def test_a_set_of_200_gb_opens_in_seconds_and_trains_in_bounded_memory(huge, tmp_path):
    said = json.loads(child(USE, huge, tmp_path/'run')[0])
    print(said)
    assert said['n'] == N == said['train'] + said['val'] and said['val'] > 0.005*N
    assert said['open_s'] < 12, 'seconds of processor time to open 2.4 million objects'
    assert said['steps'] == 60
    assert said['peak'] < 1500, 'megabytes, of which the catalogue takes a few hundred and torch two hundred'
    assert said['late'] < said['early'] + 30, 'memory does not grow with the steps'
