"""Commands that we print or promise are run as printed."""
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from galaxy_ssl.demo import demo, next_commands
from galaxy_ssl.synthetic import synthetic_cutouts
from galaxy_ssl.table import EmbeddingTable
from galaxy_ssl.train import TrainConfig

ROOT = Path(__file__).parent.parent


def shell(command, cwd):
    """Run a printed command with the tools of this environment."""
    words = shlex.split(command)
    words[0] = str(Path(sys.executable).with_name(words[0]))
    path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    if words[0].endswith('galaxy_ssl') and not Path(words[0]).exists():
        words[:1] = [sys.executable, '-m', 'galaxy_ssl.cli']
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': path}, timeout=300)
    assert done.returncode == 0, f'{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}'
    return done.stdout


def readme_commands():
    """The galaxy_ssl and torchrun lines of the README."""
    blocks = re.findall(r'```sh\n(.*?)```', (ROOT/'README.md').read_text(), re.S)
    return [line for block in blocks for line in block.splitlines() if line.startswith(('galaxy_ssl', 'torchrun'))]


def smaller(command):
    """The same command at toy size."""
    command = re.sub(r'--nproc-per-node \d+', '--nproc-per-node 2', command)
    if ' train ' in command or 'galaxy_ssl.train' in command:
        command = re.sub(r'--epochs \d+|--size \d+|--set \S+', '', command)
        command += ' --epochs 1 --size 32 --batch-size 16 --set preset=micro'
    return command + ' --passes 400' if command.split()[1] == 'demo' else command


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    """A folder with the cutouts that the README talks about."""
    folder = tmp_path_factory.mktemp('desk')
    synthetic_cutouts(64, size=64, seed=9).save(folder/'cutouts.h5')
    return folder


def test_readme_has_commands():
    assert len(readme_commands()) >= 4


def test_readme_commands_run_in_order(desk):
    for command in readme_commands():
        shell(smaller(command), desk)
    assert len(EmbeddingTable.load(desk/'table.parquet')) == 64
    assert (desk/'galaxy_ssl_demo'/'report.html').exists()


def test_the_demo_ends_with_three_commands_that_work(tmp_path, capsys):
    demo(out=tmp_path/'demo', passes=700)
    printed = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip().startswith(('galaxy_ssl', 'torchrun'))]
    cfg = TrainConfig(size=32, settings={'patch': 4})
    assert printed == next_commands(tmp_path/'demo', cfg)
    for command in printed:
        shell(re.sub(r'--epochs \d+', '--epochs 1', command), tmp_path)


def test_help_fits_a_screen_and_a_typo_names_the_nearest():
    for words in ([], ['demo', '--help'], ['embed', '--help']):
        done = subprocess.run([sys.executable, '-m', 'galaxy_ssl.cli', *words], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and len(done.stdout.splitlines()) <= 50, words
    done = subprocess.run([sys.executable, '-m', 'galaxy_ssl.cli', 'trian'], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0 and "Did you mean 'train'" in done.stderr
