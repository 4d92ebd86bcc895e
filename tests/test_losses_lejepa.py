"""The statistic of LeJEPA against numpy and against the integral itself, done by scipy."""
import numpy as np
import pytest
import torch
from scipy.integrate import quad

from galaxy_ssl.draws import Draws
from galaxy_ssl.lejepa import LeJEPA, epps_pulley, shared_directions, sigreg
from galaxy_ssl.methods import check_batch

RNG = np.random.default_rng(0)
SAMPLES = {'normal': RNG.normal(size=200), 'shifted': RNG.normal(size=200) + 0.7, 'wide': 3*RNG.normal(size=50), 'two lumps': np.repeat([-1., 1.2], 30), 'one point': np.zeros(20)}


def gap(t, x):
    """Squared distance of the characteristic functions, weighted, at every t."""
    return np.abs(np.exp(1j*np.multiply.outer(t, x)).mean(-1) - np.exp(-t**2/2))**2*np.exp(-t**2/2)


@pytest.mark.parametrize('name', SAMPLES)
def test_statistic_is_the_integral(name):
    x = SAMPLES[name]
    exact = len(x)*quad(lambda t: gap(np.float64(t), x), -12, 12, epsabs=1e-10, limit=400)[0]
    assert epps_pulley(torch.tensor(x), knots=801, reach=12.).item() == pytest.approx(exact, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize('name', SAMPLES)
def test_quadrature_is_that_of_numpy(name):
    x = SAMPLES[name]
    t = np.linspace(-3, 3, 33)
    assert epps_pulley(torch.tensor(x)).item() == pytest.approx(len(x)*np.trapezoid(gap(t, x), t), rel=1e-5, abs=1e-5)


def test_regulariser_is_the_mean_over_directions_and_views():
    z, directions = torch.randn(40, 3, 6), shared_directions(Draws(1), 40, 50, 6)
    t = np.linspace(-3, 3, 33)
    each = [40*np.trapezoid(gap(t, (z[:, v] @ u).double().numpy()), t) for v in range(3) for u in directions]
    assert sigreg(z, directions).item() == pytest.approx(np.mean(each), rel=1e-5)


def test_loss_is_both_terms():
    torch.manual_seed(0)
    method = LeJEPA(n_bands=3, size=32, preset='micro', weight=0.1, out=8, directions=20).eval()
    batch = check_batch(8, 3, (32, 32), views=2, local=4, local_size=method.local_size)
    out = method({**batch, 'draws': Draws(2)})
    z = torch.stack([method.head(method.encoder(v)) for v in (*batch['views'], *batch['local'])])
    prediction = sum(((zv - (z[0] + z[1])/2)**2).mean() for zv in z)/6
    statistic = np.mean([sigreg(zv, shared_directions(Draws(2), 8, 20, 8)).item() for zv in z])
    assert out['prediction'].item() == pytest.approx(prediction.item(), rel=1e-5)
    assert out['loss'].item() == pytest.approx(0.9*prediction.item() + 0.1*statistic, rel=1e-5)
