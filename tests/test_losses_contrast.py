"""Losses of two views against lightly's, values and gradients, and over the rows of two processes."""
import os

import jobs
import pytest
import torch
import torch.distributed as dist

from galaxy_ssl.contrast import ntxent, vicreg_terms

lightly = pytest.importorskip('lightly.loss')


def pair(n=12, dim=7, seed=0):
    """Outputs for two views, of which the second is a noisy first, with uneven lengths and an offset."""
    a, b = torch.randn(2, n, dim, generator=torch.Generator().manual_seed(seed))
    return 2*a + .3, a + .5*b


def vicreg(a, b):
    terms = vicreg_terms(a, b)
    return 25*terms['invariance'] + 25*terms['variance'] + terms['covariance']


def with_gradient(loss, a, b):
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    value = loss(a, b)
    return value.detach(), *torch.autograd.grad(value, (a, b))


@pytest.mark.parametrize('n, dim', [(2, 3), (12, 7), (64, 128)])
@pytest.mark.parametrize('temperature', [.05, .2, 1.])
def test_ntxent_is_that_of_lightly(n, dim, temperature):
    theirs = lightly.NTXentLoss(temperature=temperature)
    for got, want in zip(with_gradient(lambda a, b: ntxent(a, b, temperature), *pair(n, dim)), with_gradient(theirs, *pair(n, dim))):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('n, dim', [(2, 3), (12, 7), (64, 128)])
def test_vicreg_is_that_of_lightly(n, dim):
    for got, want in zip(with_gradient(vicreg, *pair(n, dim)), with_gradient(lightly.VICRegLoss(), *pair(n, dim))):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_losses_are_computed_in_float32_under_autocast():
    a, b = pair(64, 32)
    with torch.autocast('cpu', torch.bfloat16):
        mixed = ntxent(a, b, .05), vicreg(a, b)
    for got, want in zip(mixed, (ntxent(a, b, .05), vicreg(a, b))):
        assert got.dtype == torch.float32 and torch.equal(got, want)


@pytest.mark.parametrize('loss', [ntxent, vicreg])
def test_objects_that_are_all_alike_have_finite_losses_and_gradients(loss):
    for a in (torch.zeros(6, 4), torch.ones(6, 4), torch.full((6, 4), 1e-8)):
        value, *grads = with_gradient(loss, a, a)
        assert value.isfinite() and all(g.isfinite().all() and g.abs().max() < 1e4 for g in grads)


@pytest.mark.parametrize('loss', [ntxent, vicreg])
def test_the_order_of_the_objects_does_not_matter(loss):
    a, b = pair()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(loss(a[order], b[order]), loss(a, b))


def share(out):
    """One of two processes: losses, and gradients of its rows as they enter an average over processes."""
    rank = int(os.environ['RANK'])
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    a, b = (x[rank::2] for x in pair())
    torch.save([with_gradient(loss, a, b) for loss in (ntxent, vicreg)], f'{out}{rank}.pt')
    dist.destroy_process_group()


def test_two_processes_have_the_loss_of_one_and_the_negatives_of_both(tmp_path):
    for p in jobs.start(share, str(tmp_path/'rank'), world=2):
        p.join(120)
        assert p.exitcode == 0
    got = [torch.load(tmp_path/f'rank{r}.pt', weights_only=True) for r in (0, 1)]
    for k, loss in enumerate((ntxent, vicreg)):
        want = with_gradient(loss, *pair())
        for r in (0, 1):
            torch.testing.assert_close(got[r][k][0], want[0])
            for mine, whole in zip(got[r][k][1:], want[1:]):
                torch.testing.assert_close(mine/2, whole[r::2])
