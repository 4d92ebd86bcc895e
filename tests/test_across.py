"""Sums, rows and batch norms over processes: values and gradients of two equal those of one."""
import jobs
import pytest
import torch
import torch.distributed as dist

from galaxy_ssl.across import BatchNormAcross, alone, gather_rows, mean_across, n_processes, sum_across


def rows():
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(1))*3 + 2


def network():
    torch.manual_seed(2)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), BatchNormAcross(4), torch.nn.Linear(4, 3))


def coupled(net, x, rank=0, world=1):
    """A loss that compares all rows, and one that means over a part of them, of a network with batch norm."""
    z = net(x[rank::world])
    everyone = gather_rows(z)
    kept = (z[:, 0] > 0).float()
    return (everyone @ everyone.T).logsumexp(1).mean() + mean_across((z[:, 1]*kept).sum(), kept.sum()), everyone


def shared(rank, out):
    """One of two processes: gradients as DDP would average them, and what was gathered."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    net = network()
    loss, everyone = coupled(net, rows(), rank, 2)
    loss.backward()
    grads = [p.grad for p in net.parameters()]
    for g in grads:
        dist.all_reduce(g)
    with alone():
        one = n_processes()
    loss = loss.detach()
    dist.all_reduce(loss)
    torch.save({'loss': loss/2, 'grads': [g/2 for g in grads], 'rows': everyone.detach(), 'buffers': dict(net[1].named_buffers()),
                'sum': sum_across(torch.ones(2)*(rank + 1)), 'alone': one, 'together': n_processes()}, f'{out}{rank}.pt')
    dist.destroy_process_group()


def start_shared(out):
    import os
    shared(int(os.environ['RANK']), out)


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    out = str(tmp_path_factory.mktemp('across')/'rank')
    for p in jobs.start(start_shared, out, world=2):
        p.join(120)
        assert p.exitcode == 0
    return [torch.load(f'{out}{r}.pt', weights_only=True) for r in (0, 1)]


def test_two_processes_give_the_loss_and_the_gradients_of_one(both):
    net = network()
    loss, everyone = coupled(net, rows())
    loss.backward()
    for got in both:
        torch.testing.assert_close(got['loss'], loss.detach())
        torch.testing.assert_close(got['rows'], everyone.detach())
        for g, p in zip(got['grads'], net.parameters()):
            torch.testing.assert_close(g, p.grad)
        for name, buffer in net[1].named_buffers():
            torch.testing.assert_close(got['buffers'][name], buffer)
        assert got['sum'].tolist() == [3, 3]
        assert (got['alone'], got['together']) == (1, 2)


def test_norms_shared_between_gpus_keep_the_activations_of_timm():
    from galaxy_ssl.encoders import Encoder
    from galaxy_ssl.trainer import convert_sync_batchnorm
    torch.manual_seed(0)
    net, x = Encoder(n_bands=3, size=64, arch='efficientnet_b0').eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = net(x)
        convert_sync_batchnorm(net)
        assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in net.modules())
        torch.testing.assert_close(net.eval()(x), before)
