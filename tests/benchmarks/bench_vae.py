"""G6: a training step of the published convolutional autoencoder, 3 bands of 256 px, batch 4.

The baseline is that network as the paper's code builds it, with float32, the default memory layout, pixel repetition as a layer of its own
and plain Adam. Ours has the same weights and draws the same images; before timing, images and likelihood are compared. The ceiling is what our
convolutions alone take, forward and backward, each on its own input, without rectifiers, pooling, likelihood or optimiser.
"""
from functools import partial

import torch
import torch.nn.functional as F
from bench_compute import stepper
from harness import Case, Skip, benchmark
from torch import nn

from galaxy_ssl.convs import fold_kernel
from galaxy_ssl.draws import Draws
from galaxy_ssl.methods import make_method
from galaxy_ssl.optim import make_optimizer
from galaxy_ssl.precision import describe, exact_matmul, native_bf16, scope

B, BANDS, SIZE, LATENT = 4, 3, 256, 40


class TextbookVAE(nn.Module):
    """Encoder and decoder as described in arXiv:2303.08627, layer by layer; squared errors and divergence summed."""

    def __init__(self):
        super().__init__()
        down = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.MaxPool2d(2), nn.LeakyReLU())
        up = lambda a, b: nn.Sequential(nn.Upsample(scale_factor=2), nn.ConvTranspose2d(a, b, 3, stride=2, padding=1, output_padding=1), nn.LeakyReLU())
        self.encoder = nn.Sequential(down(BANDS, 32), down(32, 64), down(64, 128))
        self.mu, self.logvar, self.tail = nn.Linear(2048, LATENT), nn.Linear(2048, LATENT), nn.Linear(LATENT, 2048)
        self.decoder = nn.Sequential(up(128, 64), up(64, 32), up(32, 32), nn.Conv2d(32, BANDS, 3, padding=1))

    def copy(self, method):
        """Take the weights of ours."""
        self.encoder.load_state_dict(method.encoder.state_dict())
        theirs = dict(zip(self.decoder.state_dict(), method.decoder.state_dict().values()))
        self.decoder.load_state_dict(theirs)
        for layer, rows in ((self.mu, slice(0, LATENT)), (self.logvar, slice(LATENT, None))):
            layer.load_state_dict({k: v[rows] for k, v in method.head.state_dict().items()})
        self.tail.load_state_dict(method.tail.state_dict())

    def forward(self, image, noise):
        """Sum of squared errors and of the divergence."""
        h = self.encoder(image).flatten(1)
        mu, logvar = self.mu(h), self.logvar(h)
        drawn = self.decoder(self.tail(mu + (0.5*logvar).exp()*noise).view(-1, 128, SIZE//64, SIZE//64))
        return F.mse_loss(drawn, image, reduction='sum') - 0.5*(1 + logvar - mu.square() - logvar.exp()).sum()


def book_and_ours():
    """Loss functions and optimisers of the textbook and of ours, with the same weights, and what their losses are."""
    torch.manual_seed(0)
    method = make_method('vae', n_bands=BANDS, size=SIZE, arch='published', sigma=0.5**0.5, warmup=0.).train()
    book = TextbookVAE()
    book.copy(method)
    image = torch.randn(B, BANDS, SIZE, SIZE)
    batch = {'image': image, 'bad': torch.zeros_like(image, dtype=torch.bool)}
    noise = Draws(0, 'bench').normal(B, LATENT)
    textbook = lambda: book(image, noise)
    ours = lambda: method({**batch, 'draws': Draws(0, 'bench')})['loss']
    with torch.no_grad():
        constant = 0.5*torch.log(torch.tensor(torch.pi)).item()*image.numel()  # of a normal distribution with variance 1/2
        a, b = float(textbook()), float(ours())*image.numel() - constant
    assert abs(a - b) <= 1e-4*abs(a), f'the losses differ: {a} and {b}'
    return (textbook, torch.optim.Adam(book.parameters(), lr=1e-5)), (ours, make_optimizer(method, 1e-5, 0.)), f'loss of the textbook {a:.1f}, of ours {b:.1f} (same weights and draws). '


def convolutions(precision):
    """The convolutions of our graph alone, forward and backward."""
    dtype = torch.bfloat16 if precision == 'bf16' else torch.float32
    layers = [(BANDS, 32, SIZE, 2), (32, 64, SIZE//4, 2), (64, 128, SIZE//16, 2), (128, 64, SIZE//64, -4), (64, 32, SIZE//16, -4), (32, 32, SIZE//4, -4), (32, BANDS, SIZE, 1)]
    jobs = []
    for k, (n_in, n_out, side, stride) in enumerate(layers):
        x = torch.randn(B, n_in, side, side).to(dtype, memory_format=torch.channels_last).requires_grad_(k > 0)
        w = torch.randn(n_in, n_out, 3, 3) if stride < 0 else torch.randn(n_out, n_in, 3, 3)
        w = (fold_kernel(w) if stride < 0 else w).to(dtype, memory_format=torch.channels_last).requires_grad_()
        conv = partial(F.conv_transpose2d, x, w, None, 4, 1, 1) if stride < 0 else partial(F.conv2d, x, w, None, stride, 1)
        jobs.append((conv, [w, x] if k else [w], torch.ones_like(conv())))

    def run():
        for conv, wanted, grad in jobs:
            torch.autograd.grad(conv(), wanted, grad)
    return run


@benchmark('G6')
def vae_step():
    """float32, then mixed precision, against the textbook in float32."""
    book, ours, note = book_and_ours()
    what = f'VAE step, published network, {SIZE} px, {BANDS} bands, batch {B}'
    yield Case(f'{what}, fp32', {'textbook fp32': stepper(*book), 'ceiling: convolutions alone, fp32': convolutions('fp32'),
                                 'ours fp32': stepper(*ours, exact_matmul, exact_matmul)}, items=B, floor=1.6, goal=1.85, note=note + describe('cpu', 'fp32'))
    if not native_bf16():
        raise Skip('this processor does not multiply bfloat16')
    yield Case(f'{what}, bf16', {'textbook fp32': stepper(*book), 'ceiling: convolutions alone, bf16': convolutions('bf16'),
                                 'ours bf16': stepper(*ours, partial(scope, 'cpu', 'bf16'), exact_matmul)}, items=B, floor=2.8, goal=3.3, note=describe('cpu', 'bf16'))
