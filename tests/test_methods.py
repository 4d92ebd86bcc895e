"""Every method of the registry: the contract, two processes against one, and an interruption in the middle of an epoch."""
import json

import jobs
import numpy as np
import pytest
import torch

from galaxy_ssl.augment import AugmentConfig
from galaxy_ssl.callbacks import Callback
from galaxy_ssl.draws import Draws
from galaxy_ssl.methods import METHODS, _batch_for, check_batch, check_method, make_method, method_settings
from galaxy_ssl.synthetic import synthetic_cutouts

SMALL = {'patch': 8, 'preset': 'micro'}


def settings_of(name):
    """Small settings, as far as the method has them."""
    known = method_settings(name)
    chosen = {k: v for k, v in SMALL.items() if k in known and (name, k) != ('lvm', 'patch')}  # its bottom would be a single token
    return {**chosen, 'settings': SMALL} if name == 'hybrid' else chosen


def config(name, out, **changes):
    return dict(method=name, out=str(out), size=32, epochs=2, batch_size=8, val_fraction=0.3, device='cpu', log_every=1, save_every=1000, lr=1e-3,
                settings=settings_of(name), **changes)


QUIET = dict(recipe='plain', augment=AugmentConfig(rotate=True, crop=.3, gain=.03, blur=1.))  # pixel noise is drawn by each process for itself


@pytest.fixture(scope='module')
def forty(tmp_path_factory):
    """Forty galaxies in a file, half of them with a label."""
    cs = synthetic_cutouts(40, size=40, seed=3)
    cs.meta['label'] = np.where(np.arange(40) % 4, np.arange(40) % 2, np.nan)
    path = tmp_path_factory.mktemp('forty')/'forty.h5'
    cs.save(path)
    return path


@pytest.mark.parametrize('n_bands', [3, 5])
@pytest.mark.parametrize('name', METHODS)
def test_contract(name, n_bands):
    torch.manual_seed(0)
    report = check_method(name, n_bands=n_bands, size=32, **settings_of(name))
    assert set(report) >= {'gradients', 'bad pixels', 'embed', 'bfloat16', 'learning'}


@pytest.mark.parametrize('name', ['simclr', 'moco', 'byol', 'vicreg', 'dino', 'lejepa'])
def test_no_trained_parameter_has_a_gradient_of_mere_rounding(name):
    """A bias that a batch norm takes away again has one, and Adam would walk it off at full speed."""
    torch.manual_seed(0)
    method = make_method(name, n_bands=3, size=32, **settings_of(name)).train()
    method.after_step(5, 10)
    batch = check_batch(32, views=method.views, local=method.local_views, local_size=method.local_size, labels=method.label_columns)
    method(batch)['loss'].backward()
    size = {k: p.grad.abs().max().item() for k, p in method.named_parameters() if p.requires_grad}
    small = {k: v for k, v in size.items() if v < 1e-4*max(size.values())}
    assert not small


class StopOnce(Callback):
    """Ask to stop after one step, as Ctrl-C does."""

    def __init__(self, at):
        self.at = at

    def on_step(self, trainer, images):
        trainer.stop.asked = trainer.step == self.at


def weights(run):
    return {k: v.clone() for k, v in run.method.state_dict().items()}


def losses(folder):
    rows = [json.loads(line) for line in (folder/'log.jsonl').read_text().splitlines()]
    return [r['loss'] for r in rows if 'loss' in r], [r['val_loss'] for r in rows if 'val_loss' in r]


@pytest.mark.parametrize('name', METHODS)
def test_interrupted_in_the_middle_of_an_epoch_and_resumed_it_ends_in_the_same_bits(name, forty, tmp_path):
    from galaxy_ssl.cutouts import open_cutouts
    from galaxy_ssl.train import TrainConfig, train
    cs = open_cutouts(forty)
    whole = train(TrainConfig(**config(name, tmp_path/'whole')), cs, callbacks=[])
    cfg = TrainConfig(**config(name, tmp_path/'pieces'))
    assert not train(cfg, cs, callbacks=[StopOnce(2)]).finished
    pieces = train(cfg, cs, callbacks=[])
    assert pieces.finished
    a, b = weights(whole), weights(pieces)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a), [k for k in a if not torch.equal(a[k], b[k])][:5]
    assert losses(tmp_path/'whole') == losses(tmp_path/'pieces')


@pytest.mark.parametrize('name', METHODS)
def test_two_processes_end_where_one_does(name, forty, tmp_path):
    for world in (1, 2):
        for p in jobs.start(jobs.training, config(name, tmp_path/str(world), **QUIET), str(forty), world=world):
            p.join(240)
            assert p.exitcode == 0
    one, two = (losses(tmp_path/w) for w in '12')
    assert len(one[0]) == len(two[0]) > 4
    np.testing.assert_allclose(one[0][0], two[0][0], rtol=1e-5)
    # Later ones drift: Adam turns the rounding noise of gradients that are zero, such as those of key biases, into steps of full length.
    np.testing.assert_allclose(one[0], two[0], rtol=1e-2)
    np.testing.assert_allclose(one[1], two[1], rtol=2e-2)


def rows(value, part):
    """Every second object of a value of a batch."""
    if isinstance(value, list) and torch.is_tensor(value[0]):
        return [v[part] for v in value]
    return value[part] if torch.is_tensor(value) or isinstance(value, list) else value


def gradients(name, rank=0, world=1):
    """Loss and gradients of this process's share of a batch."""
    torch.manual_seed(0)
    method = make_method(name, n_bands=3, size=32, **settings_of(name)).train()
    batch = {k: rows(v, slice(rank, None, world)) for k, v in _batch_for(method, 16, damaged=True).items()}
    loss = method({**batch, 'draws': Draws(0, 'both', rank=rank, world=world)})['loss']
    loss.backward()
    return loss.detach(), {k: p.grad for k, p in method.named_parameters() if p.requires_grad}


def shared_gradients(out):
    """Of all methods, as one of two processes, averaged as DistributedDataParallel does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo')
    rank, found = torch.distributed.get_rank(), {}
    for name in METHODS:
        loss, grads = gradients(name, rank, 2)
        for g in (loss, *grads.values()):
            torch.distributed.all_reduce(g)
        found[name] = loss/2, {k: g/2 for k, g in grads.items()}
    torch.save(found, f'{out}{rank}.pt')
    torch.distributed.destroy_process_group()


@pytest.fixture(scope='module')
def averaged(tmp_path_factory):
    out = str(tmp_path_factory.mktemp('gradients')/'rank')
    for p in jobs.start(shared_gradients, out, world=2):
        p.join(240)
        assert p.exitcode == 0
    return torch.load(f'{out}0.pt', weights_only=True)


@pytest.mark.parametrize('name', METHODS)
def test_gradients_of_two_processes_average_to_those_of_one(name, averaged):
    loss, grads = gradients(name)
    two, averages = averaged[name]
    torch.testing.assert_close(two, loss, rtol=1e-5, atol=1e-6)
    whole = torch.stack([g.norm() for g in grads.values()]).norm()
    for k, g in grads.items():
        assert (averages[k] - g).norm() <= 1e-2*g.norm() + 1e-5*whole, k
