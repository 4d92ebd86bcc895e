"""G5: a training step of the 100 M-parameter Swin U-Net at 128 px, against the network written out layer by layer.

The textbook makes a map of 96 numbers per pixel on the way in and on the way out, copies tokens into windows before every product,
adds position bias and mask one after the other, and is trained by Adam, one tensor after another. It has the same weights, and the same picture comes out.
As in bench_compute.py, the ceiling is the same number of operations as bare matrix products.
"""
from functools import partial

import torch
import torch.nn.functional as F
from bench_compute import AUTOCAST, stepper
from harness import Case, Skip, benchmark
from torch import nn

from galaxy_ssl.draws import Draws
from galaxy_ssl.optim import make_optimizer
from galaxy_ssl.precision import describe, exact_matmul, native_bf16, scope
from galaxy_ssl.swin import SWIN_PRESETS, SwinUNet

B, SIZE, BANDS = 2, 128, 3
STEP = 47.9  # GFLOP per image of the textbook graph, training


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
        self.merge_norm = nn.ModuleList(nn.LayerNorm(4*d) for d in dims[:-1])
        self.merge = nn.ModuleList(nn.Linear(4*d, 2*d, bias=False) for d in dims[:-1])
        self.norm, self.up_norm = nn.LayerNorm(dims[-1]), nn.LayerNorm(dim)
        self.rise = nn.ModuleList(Up(2*d, d, 2) for d in dims[:-1])
        self.join = nn.ModuleList(nn.Linear(2*d, d) for d in dims[:-1])
        self.head, self.out = Up(dim, dim, patch), nn.Conv2d(dim, BANDS, 1)

    def halve(self, k, x):
        b, t, d = x.shape
        x = x.view(b, round(t**0.5), -1, d)
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1).view(b, -1, 4*d)
        return self.merge[k](self.merge_norm[k](x))

    def forward(self, image):
        x, entered = self.embed_norm(self.embed(self.first(image)).flatten(2).transpose(1, 2)), []
        for k, layers in enumerate(self.down):
            entered.append(x)
            x = layers(x)
            if k < len(self.merge):
                x = self.halve(k, x)
        x = self.norm(x)
        for k in reversed(range(len(self.up))):
            x = self.rise[k](x).flatten(2).transpose(1, 2)
            x = self.up[k](self.join[k](torch.cat([x, entered[k]], -1)))
        return self.out(self.head(self.up_norm(x)))

    def take(self, ours):
        """The weights of our network."""
        own = list(self.children())
        assert own
        state = ours.state_dict()
        names = {'first': 'stem.first', 'embed': 'stem.proj', 'embed_norm': 'stem.norm', 'out': 'head.out'}
        inner = {'qkv': 'attn.qkv', 'proj': 'attn.proj', 'table': 'attn.relative_position_bias_table', 'fc1': 'mlp.fc1', 'fc2': 'mlp.fc2'}
        branch = {'sharp.0': 'sharp_in.0', 'sharp.1': 'sharp_in.1', 'sharp.3': 'sharp_out', 'smooth.0': 'smooth_in.0', 'smooth.1': 'smooth_in.1', 'smooth.3': 'smooth_out'}
        for name, p in self.named_parameters():
            head, *rest = name.split('.')
            if head in names:
                key = '.'.join([names[head], *rest])
            elif head in ('down', 'up'):
                key = '.'.join([head, *rest[:2], inner.get(rest[2], rest[2]), *rest[3:]])
            elif head == 'merge':
                key = f'merge.{rest[0]}.reduction.weight'
            elif head == 'merge_norm':
                key = f'merge.{rest[0]}.norm.{rest[1]}'
            elif head in ('rise', 'head'):
                key = name
                for theirs, mine in branch.items():
                    key = key.replace(f'.{theirs}.', f'.{mine}.')
            else:
                key = name
            value = state.pop(key)
            if '.sharp.0.' in f'.{name}' or name.endswith('sharp.0.weight'):  # theirs: channel, then place; ours: place, then channel
                factor = 4 if head == 'rise' else (value.shape[0]//value.shape[1])
                value = value.unflatten(0, (factor, -1)).transpose(0, 1).flatten(0, 1)
            p.data.copy_(value.reshape(p.shape))
        assert not state, f'weights left over: {sorted(state)[:5]}'
        return self
