"""G5: a training step of the 100 M-parameter Swin U-Net at 128 px, against the network written out layer by layer.

The textbook makes a map of 96 numbers per pixel on the way in and on the way out, copies tokens into windows before every product,
adds position bias and mask one after the other, and is trained by Adam, one tensor after another. It has the same weights, and the same picture comes out.
The ceiling is the step's own matrix products in the linear layers of its blocks, with nothing between them.
"""
from functools import partial

import torch
import torch.nn.functional as F
from bench_compute import AUTOCAST, stepper
from harness import Case, benchmark
from torch import nn

from galaxy_ssl.draws import Draws
from galaxy_ssl.lvm import LVM, lvm_shape
from galaxy_ssl.optim import make_optimizer
from galaxy_ssl.precision import describe, exact_matmul, native_bf16, scope

B, SIZE, BANDS = 2, 128, 3


def windows(x, w):
    """(B,H,W,D) into (B*n, w*w, D)."""
    b, h, v, d = x.shape
    return x.view(b, h//w, w, v//w, w, d).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, w*w, d)


def unwindows(x, w, h, v):
    """The inverse of `windows`."""
    return x.view(-1, h//w, v//w, w, w, x.shape[-1]).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, h, v, x.shape[-1])


class Layer(nn.Module):
    """One Swin layer as in arXiv:2103.14030: attention in windows with explicit products, then a perceptron."""

    def __init__(self, dim, grid, heads, window, shifted):
        super().__init__()
        self.grid, self.heads, self.window = grid, heads, min(window, grid)
        self.shift = self.window//2 if shifted and grid > window else 0
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3*dim), nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.zeros((2*self.window - 1)**2, heads))
        self.fc1, self.fc2 = nn.Linear(dim, 4*dim), nn.Linear(4*dim, dim)
        w = torch.stack(torch.meshgrid(*[torch.arange(self.window)]*2, indexing='ij')).flatten(1)
        apart = w[:, :, None] - w[:, None] + self.window - 1
        self.register_buffer('index', apart[0]*(2*self.window - 1) + apart[1])
        self.register_buffer('mask', self.make_mask())

    def make_mask(self):
        """-100 between tokens of a shifted window that are no neighbours in the image."""
        if not self.shift:
            return None
        cut = (torch.arange(self.grid) >= self.grid - self.window).long() + (torch.arange(self.grid) >= self.grid - self.shift)
        region = windows((3*cut[:, None] + cut)[None, ..., None], self.window)[..., 0]
        return (region[:, None] != region[:, :, None])*-100.

    def attend(self, x):
        n, t, d = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.heads, d//self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q*(d//self.heads)**-0.5) @ k.transpose(-2, -1)
        scores = scores + self.table[self.index.view(-1)].view(t, t, -1).permute(2, 0, 1).contiguous()[None]
        if self.mask is not None:
            m = len(self.mask)
            scores = (scores.view(n//m, m, self.heads, t, t) + self.mask[None, :, None]).view(n, self.heads, t, t)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, d))

    def forward(self, x):
        b, t, d = x.shape
        y = self.norm1(x).view(b, self.grid, self.grid, d)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = unwindows(self.attend(windows(y, self.window)), self.window, self.grid, self.grid)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + y.view(b, t, d)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Halve(nn.Module):
    """Patch merging: four neighbours side by side, normalised, mapped to twice the length."""

    def __init__(self, dim):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4*dim), nn.Linear(4*dim, 2*dim, bias=False)

    def forward(self, x):
        b, t, d = x.shape
        x = x.view(b, round(t**0.5), -1, d)
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.reduction(self.norm(x.view(b, -1, 4*d)))


class Up(nn.Module):
    """Dual up-sampling of arXiv:2202.14009, on images, channels first."""

    def __init__(self, dim, out, factor):
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=1, bias=False)
        self.sharp = nn.Sequential(conv(dim, out*factor**2), nn.PReLU(), nn.PixelShuffle(factor), conv(out, out))
        self.smooth = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.PReLU(), nn.Upsample(scale_factor=factor, mode='bilinear'), conv(dim, out))
        self.mix = conv(2*out, out)

    def forward(self, x):
        b, t, d = x.shape
        x = x.view(b, round(t**0.5), -1, d).permute(0, 3, 1, 2)
        return self.mix(torch.cat([self.sharp(x), self.smooth(x)], 1))


class TextbookSUNet(nn.Module):
    """Convolutions, patch embedding, four stages down, dual up-sampling and three stages up with skips, 1x1 convolution."""

    def __init__(self, patch, window, dim, depths, heads, **_):
        super().__init__()
        n, grid, dims = len(depths), SIZE//patch, [dim*2**k for k in range(len(depths))]
        stage = lambda k: nn.Sequential(*(Layer(dims[k], grid >> k, heads[k], window, i % 2) for i in range(depths[k])))
        self.first, self.embed = nn.Conv2d(BANDS, dim, 3, padding=1), nn.Conv2d(dim, dim, patch, patch)
        self.embed_norm = nn.LayerNorm(dim)
        self.down, self.up = nn.ModuleList(stage(k) for k in range(n)), nn.ModuleList(stage(k) for k in range(n - 1))
        self.merge = nn.ModuleList(Halve(d) for d in dims[:-1])
        self.norm, self.up_norm = nn.LayerNorm(dims[-1]), nn.LayerNorm(dim)
        self.rise = nn.ModuleList(Up(2*d, d, 2) for d in dims[:-1])
        self.join = nn.ModuleList(nn.Linear(2*d, d) for d in dims[:-1])
        self.head, self.out = Up(dim, dim, patch), nn.Conv2d(dim, BANDS, 1)

    def forward(self, image):
        x, entered = self.embed_norm(self.embed(self.first(image)).flatten(2).transpose(1, 2)), []
        for k, layers in enumerate(self.down):
            entered.append(x)
            x = layers(x)
            if k < len(self.merge):
                x = self.merge[k](x)
        x = self.norm(x)
        for k in reversed(range(len(self.up))):
            x = self.rise[k](x).flatten(2).transpose(1, 2)
            x = self.up[k](self.join[k](torch.cat([x, entered[k]], -1)))
        return self.out(self.head(self.up_norm(x)))

    def take(self, ours):
        """The weights of our network, every one of them."""
        state = ours.state_dict()
        for name, p in self.named_parameters():
            key = '.'.join(OURS.get(part, part) for part in name.split('.'))
            for theirs, mine in BRANCHES.items():
                key = key.replace(theirs, mine)
            value = state.pop(key)
            if name.endswith('sharp.0.weight'):  # outputs there: channel by channel, ours: place by place
                n = len(value)//value.shape[1]
                value = value.unflatten(0, (4 if n == 2 else n, -1)).transpose(0, 1).flatten(0, 1)
            p.data.copy_(value.reshape(p.shape))
        assert not state, f'weights left over: {sorted(state)[:5]}'
        return self


OURS = {'first': 'stem.first', 'embed': 'stem.proj', 'embed_norm': 'stem.norm', 'out': 'head.out', 'qkv': 'attn.qkv', 'proj': 'attn.proj',
        'table': 'attn.relative_position_bias_table', 'fc1': 'mlp.fc1', 'fc2': 'mlp.fc2'}
BRANCHES = {'.sharp.3.': '.sharp_out.', '.sharp.': '.sharp_in.', '.smooth.3.': '.smooth_out.', '.smooth.': '.smooth_in.'}


def products(precision):
    """The matrix products of the linear layers in the blocks alone, forward and backward: nine tenths of the operations."""
    shape = lvm_shape('original')
    jobs = []
    for k, depth in enumerate(shape['depths']):
        dim, rows = shape['dim']*2**k, B*(SIZE//shape['patch']//2**k)**2
        times = depth*(1 if k == len(shape['depths']) - 1 else 2)
        for inner, outer in ((dim, 3*dim), (dim, dim), (dim, 4*dim), (4*dim, dim)):
            made = [torch.randn(s) for s in ((rows, inner), (outer, inner), (rows, outer))]
            jobs += [[m.bfloat16() for m in made] if precision == 'bf16' else made]*times

    def run():
        with torch.inference_mode(), scope('cpu', precision, mixed=False):
            for x, w, g in jobs:
                F.linear(x, w), g @ w, g.T @ x
    return run


def both():
    """The textbook and ours with the same weights, as losses and optimisers; their pictures have to be one."""
    torch.manual_seed(0)
    method = LVM(n_bands=BANDS, size=SIZE, preset='original', drop_path=0.)
    book = TextbookSUNet(**lvm_shape('original')).take(method.net)
    image = torch.randn(B, BANDS, SIZE, SIZE)
    batch = {'image': image, 'bad': torch.zeros_like(image, dtype=torch.bool)}
    with torch.no_grad(), exact_matmul():
        far = float((book(image) - method.restore(image)).abs().max())
    assert far < 1e-4, f'the pictures differ by {far}'
    textbook = (lambda: F.l1_loss(book(image), image)), torch.optim.Adam(book.parameters(), lr=1e-5)
    ours = (lambda: method({**batch, 'draws': Draws(0, 'bench')})['loss']), make_optimizer(method, 1e-5, 0.05)
    return textbook, ours, f'pictures differ by {far:.0e} (same weights). '


@benchmark('G5')
def lvm_step():
    """A step with masks, loss and the trainer's optimiser, in float32 and mixed precision, against the textbook in float32."""
    book, ours, note = both()
    name = f'Swin U-Net step, 100 M parameters, {SIZE} px, batch {B}'
    yield Case(f'{name}, fp32', {'textbook fp32': stepper(*book), 'ceiling: products of the blocks alone, fp32': products('fp32'),
                                 'ours fp32': stepper(*ours, exact_matmul, exact_matmul)}, items=B, floor=1.4, goal=1.65, rounds=3, note=note + describe('cpu', 'fp32'))
    if native_bf16():
        yield Case(f'{name}, bf16', {'textbook fp32': stepper(*book), 'ceiling: products of the blocks alone, bf16': products('bf16'),
                                     'textbook bf16': stepper(*book, AUTOCAST), 'ours bf16': stepper(*ours, AUTOCAST, exact_matmul)},
                   items=B, floor=1.9, goal=2.2, rounds=3, note=note + describe('cpu', 'bf16'))
