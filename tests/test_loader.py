"""What a loader promises: every row once, batches that stay what they were, files that may change or vanish under it."""
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galaxy_ssl.batch import Buffers, Loader, load_batch
from galaxy_ssl.core import CutoutError
from galaxy_ssl.cutouts import CutoutSet, Pixels, open_cutouts
from galaxy_ssl.rows import MappedRows, join_rows, leased

FLUX = np.random.default_rng(0).normal(size=(300, 3, 40, 40)).astype(np.float32)


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    """A file whose batches are large enough for the memory map."""
    return CutoutSet(FLUX).save(tmp_path_factory.mktemp('loader')/'cs.h5')


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from(['keep', 'drop', 'view', 'numpy', 'release'])), max_size=25))
def test_a_batch_that_is_held_is_never_overwritten(steps):
    cs, buffers = CutoutSet(FLUX[:60, :, :8, :8]), Buffers(keep=3)
    held = []
    for first, what in steps:
        rows = np.arange(first, first + 1 + first % 7)
        batch = load_batch(cs, rows, (), buffers)
        np.testing.assert_array_equal(batch['flux'].numpy(), FLUX[rows, :, :8, :8])
        assert not batch['bad'].any()
        batch['bad'][:] = first % 2 == 0
        if what == 'release':
            held.clear()
        elif what != 'drop':
            last = batch['flux'][-1:, 1:]
            kept = {'keep': batch['flux'], 'view': last, 'numpy': last.numpy()}[what]
            held.append((kept, FLUX[rows, :, :8, :8] if what == 'keep' else FLUX[rows[-1:], 1:, :8, :8], batch['bad'] if what == 'keep' else None, first))
        for kept, flux, bad, k in held:
            np.testing.assert_array_equal(np.asarray(kept), flux)
            assert bad is None or bad.all() == bad.any() == (k % 2 == 0)
    assert len(buffers._blocks) <= 3


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4), st.integers(0, 3), st.integers(0, 5), st.booleans())
def test_every_row_once_per_epoch_the_same_for_any_number_of_processes(n, n_blocks, world, seed, epoch, blocked):
    blocks = np.random.default_rng(n).integers(0, n_blocks, n) if blocked else None
    cs = CutoutSet(np.zeros((n, 1, 1, 1), np.float32))
    cs.flux = Pixels(cs.flux.read, cs.shape, blocks=blocks)
    one = Loader(cs, 8, seed, drop_last=False)
    many = [Loader(cs, 8, seed, rank, world, drop_last=False) for rank in range(world)]
    assert sorted(np.concatenate([one.rows(epoch, k) for k in range(len(one))])) == list(range(n))
    for k in range(len(one)):
        met = np.full(len(one.rows(epoch, k)), -1)
        for rank, loader in enumerate(many):
            met[rank::world] = loader.rows(epoch, k)
        assert met.tolist() == one.rows(epoch, k).tolist()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 299), min_size=1, max_size=120), st.sampled_from([None, [0], [2, 0], [0, 1, 2]]), st.booleans(), st.sampled_from(['f4', '>f4', 'f2', 'f8']))
def test_rows_from_a_file_are_the_rows_of_the_array(tmp_path_factory, rows, bands, joined, kind):
    where = tmp_path_factory.mktemp('raw')/'raw.bin'
    where.write_bytes(b'abc' + FLUX.astype(kind).tobytes())
    px = Pixels(MappedRows(where, 3, FLUX.shape, kind), FLUX.shape)
    px = (join_rows([px.view(slice(100)), px.view(slice(100, None))]) if joined else px).view(bands=bands)
    np.testing.assert_array_equal(px[rows], FLUX.astype(kind).astype(np.float32)[rows][:, bands or [0, 1, 2]])
    where.unlink()


READ = """
import sys
from contextlib import contextmanager
import numpy as np
import galaxy_ssl.rows as rows
from galaxy_ssl.cutouts import open_cutouts
if sys.argv[2] == 'no lease':
    @contextmanager
    def leased(fd):
        yield False
    rows.leased = leased
px = open_cutouts(sys.argv[1]).flux
wanted = np.random.default_rng(0).integers(0, len(px), 3000)
out = rows.page_aligned((3000, *px.shape[1:]), np.float32)
while True:
    px.into(wanted, out)
    print('.', flush=True)
"""


@pytest.mark.parametrize('lease', ['lease', 'no lease'])
@pytest.mark.parametrize('size', [0, 2**20, 5*2**20])
def test_a_file_truncated_while_it_is_read_is_an_error_that_names_it(path, tmp_path, lease, size):
    victim = tmp_path/'victim.h5'
    victim.write_bytes(path.read_bytes())
    child = subprocess.Popen([sys.executable, '-c', textwrap.dedent(READ), str(victim), lease], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(5):
        assert child.stdout.readline(), 'it reads'
    time.sleep(0.023)  # now it is in the middle of a gather
    os.truncate(victim, size)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 1, (child.returncode, said[-500:])
    assert 'CutoutError' in said.splitlines()[-1] and 'victim.h5: truncated' in said.splitlines()[-1]


def test_a_file_copied_over_while_it_is_read_is_an_error_and_a_touched_one_is_not(path, tmp_path):
    victim = tmp_path/'victim.h5'
    victim.write_bytes(path.read_bytes())
    cs = open_cutouts(victim)
    np.testing.assert_array_equal(cs.flux[[7, 3]], FLUX[[7, 3]])
    time.sleep(0.02)
    os.utime(victim)
    np.testing.assert_array_equal(cs.flux[[7, 3]], FLUX[[7, 3]])
    time.sleep(0.02)
    CutoutSet(-FLUX).save(tmp_path/'other.h5')
    victim.write_bytes((tmp_path/'other.h5').read_bytes())
    with pytest.raises(CutoutError, match='victim.h5: overwritten while it was in use'):
        cs.flux[[7, 3]]


def test_a_file_that_was_replaced_or_removed_stays_what_it_was(path, tmp_path):
    victim = tmp_path/'victim.h5'
    victim.write_bytes(path.read_bytes())
    cs = open_cutouts(victim)
    cs.flux[0]
    CutoutSet(-FLUX).save(victim)
    np.testing.assert_array_equal(cs.flux[100:200], FLUX[100:200])
    victim.unlink()
    np.testing.assert_array_equal(cs.flux[200:], FLUX[200:])
    with pytest.raises(CutoutError, match='victim.h5'):
        _moved(tmp_path)(np.array([0]))


def _moved(folder):
    """Rows of a file that vanished before it was first read."""
    (folder/'victim.h5').write_bytes(bytes(64))
    rows = MappedRows(folder/'victim.h5', 0, (4, 4), np.float32)
    (folder/'victim.h5').unlink()
    return rows


def test_many_files_need_few_open_ones(tmp_path):
    parts = []
    for k in range(130):
        (tmp_path/f'{k}.bin').write_bytes(FLUX[k].tobytes())
        parts.append(Pixels(MappedRows(tmp_path/f'{k}.bin', 0, (1, 3, 40, 40), np.float32), (1, 3, 40, 40)))
    before = len(os.listdir('/proc/self/fd')) if os.path.exists('/proc/self/fd') else 0
    np.testing.assert_array_equal(join_rows(parts)[::-1], FLUX[129::-1])
    if before:
        assert len(os.listdir('/proc/self/fd')) <= before + 101


def test_a_lease_ends_even_if_ctrl_c_comes_as_it_begins(path, monkeypatch):
    ask = fcntl.fcntl

    def interrupted(fd, command, *value):
        answer = ask(fd, command, *value)
        if value == (fcntl.F_RDLCK,):
            raise KeyboardInterrupt
        return answer

    fd = os.open(path, os.O_RDONLY)
    monkeypatch.setattr(fcntl, 'fcntl', interrupted)
    with pytest.raises(KeyboardInterrupt), leased(fd):
        pass
    assert ask(fd, fcntl.F_GETLEASE) == fcntl.F_UNLCK
    os.close(fd)


def test_a_forked_process_has_its_own_lock_and_lease(path):
    cs, rows = open_cutouts(path), np.random.default_rng(0).permutation(300)
    load_batch(cs, rows)
    file = cs.flux.read._opened
    with file.lock, leased(file.fd) as granted:  # as if another thread of ours were reading
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', DeprecationWarning)
            child = os.fork()
        if child == 0:
            signal.alarm(20)
            same = np.array_equal(load_batch(cs, rows)['flux'].numpy(), FLUX[rows])
            os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not granted or fcntl.fcntl(file.fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK
