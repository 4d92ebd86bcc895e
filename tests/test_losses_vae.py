"""The terms of the variational autoencoder against torch.distributions and plain numpy; free bits over two processes."""
import os

import jobs
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributions import Independent, Normal, kl_divergence

from galaxy_ssl.draws import Draws
from galaxy_ssl.methods import check_batch
from galaxy_ssl.vae import VAE, active_units, gaussian_nll, kl_normal

LIKELIHOODS = {'learned': {}, 'fixed': {'sigma': 0.3}, 'per band': {'likelihood': 'noise', 'noise': [0.1, 0.4, 0.9]}}


def made(**settings):
    torch.manual_seed(0)
    return VAE(n_bands=3, size=(24, 17), width=8, latent=6, **settings)


@pytest.mark.parametrize('how', LIKELIHOODS)
def test_both_terms_are_those_of_torch_distributions(how):
    vae = made(**LIKELIHOODS[how]).eval()
    with torch.no_grad():
        if how == 'learned':
            vae.free_log_sigma.fill_(-0.07)
        batch = check_batch(8, 3, (24, 17), damaged=True)
        out = vae({**batch, 'draws': Draws(3)})
        mu, logvar = vae.encode(batch['image'], batch['bad'])
        posterior = Normal(mu, (logvar/2).exp())
        z = mu + posterior.scale*Draws(3).normal(8, 6)
        sigma = {'learned': [np.exp(-0.7)], 'fixed': [0.3], 'per band': [0.1, 0.4, 0.9]}[how]
        pixels = Normal(vae.decode(z).double(), torch.tensor(sigma, dtype=torch.float64)[:, None, None])
        recon = -(pixels.log_prob(batch['image'].double())*~batch['bad']).sum((1, 2, 3)).mean()
        kl = kl_divergence(Independent(posterior, 1), Independent(Normal(torch.zeros(6), torch.ones(6)), 1)).mean()
    assert float(out['recon']) == pytest.approx(float(recon), rel=1e-5)
    assert float(out['kl']) == pytest.approx(float(kl), rel=1e-5)
    assert float(out['loss']) == pytest.approx(float(recon + kl)/(3*24*17), rel=1e-5)


def test_both_terms_are_those_of_numpy():
    rng = np.random.default_rng(0)
    recon, image = rng.normal(size=(2, 5, 4, 8, 8)).astype(np.float32)
    valid, sigma = rng.random((5, 4, 8, 8)) < 0.8, np.array([0.1, 0.5, 1, 3])
    each = 0.5*((recon.astype(float) - image)/sigma[:, None, None])**2 + np.log(sigma*np.sqrt(2*np.pi))[:, None, None]
    ours = gaussian_nll(*map(torch.from_numpy, (recon, image, valid)), torch.tensor(np.log(sigma), dtype=torch.float32))
    np.testing.assert_allclose(ours, np.where(valid, each, 0).sum((1, 2, 3)), rtol=1e-5)
    mu, logvar = rng.normal(size=(2, 50, 6))
    np.testing.assert_allclose(kl_normal(torch.tensor(mu), torch.tensor(logvar)), -0.5*(1 + logvar - mu**2 - np.exp(logvar)), rtol=1e-10)
    np.testing.assert_array_equal(active_units(torch.tensor(0.2*mu)), (0.2*mu).var(0) > 0.01)


def test_values_of_bad_pixels_and_of_a_missing_band_cannot_be_told():
    vae = made(likelihood='noise', noise=[0.1, 0.4, 0.9]).eval()
    batch = check_batch(8, 3, (24, 17), damaged=True)
    with torch.no_grad():
        clean, wild = (vae({**batch, 'image': batch['image'].masked_fill(batch['bad'], v), 'draws': Draws(1)}) for v in (0., float('nan')))
    assert all(torch.equal(clean[k], wild[k]) for k in clean)


def step(vae, rank=0, world=1):
    """Loss terms and gradients of one batch of 8, or of this process's share of it."""
    batch = {k: v[rank::world] for k, v in check_batch(8, 3, (24, 17)).items() if torch.is_tensor(v)}
    out = vae.train()({**batch, 'draws': Draws(5, rank=rank, world=world)})
    out['loss'].backward()
    return {k: float(v.detach()) for k, v in out.items()}, [p.grad for p in vae.parameters()]


def free_vae():
    return made(free_bits=0.07, warmup=0.)


def start_share(out):
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    terms, grads = step(free_vae(), int(os.environ['RANK']), 2)
    for g in grads:
        dist.all_reduce(g)
    torch.save({'terms': terms, 'grads': [g/2 for g in grads]}, f'{out}{os.environ["RANK"]}.pt')
    dist.destroy_process_group()


def test_free_bits_of_two_processes_are_those_of_one(tmp_path):
    for p in jobs.start(start_share, str(tmp_path/'rank'), world=2):
        p.join(300)
        assert p.exitcode == 0
    both = [torch.load(tmp_path/f'rank{r}.pt', weights_only=True) for r in (0, 1)]
    terms, grads = step(free_vae())
    for k in ('loss', 'recon', 'kl'):
        assert (both[0]['terms'][k] + both[1]['terms'][k])/2 == pytest.approx(terms[k], rel=1e-5)
    assert both[0]['terms']['active_units'] == both[1]['terms']['active_units'] == terms['active_units']
    for one, shared in zip(grads, both[0]['grads']):
        torch.testing.assert_close(one, shared, rtol=1e-4, atol=1e-6)


def test_free_bits_bind_here():
    """Some latents are below the free bits, some above: or the test before would show nothing."""
    kl = kl_normal(*free_vae().encode(check_batch(8, 3, (24, 17))['image'])).mean(0)
    assert (kl < 0.07).any() and (kl > 0.07).any()
