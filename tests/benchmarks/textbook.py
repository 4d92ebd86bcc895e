"""A masked autoencoder as the paper describes it (arXiv:2111.06377, sec. 3), without any thought of speed: the baseline."""
import torch
from timm.models.vision_transformer import Block
from torch import nn

NORM = 1e-6  # epsilon of the layer norms


class TextbookMAE(nn.Module):
    """Encoder on the visible patches, decoder on all of them in reading order, loss on the hidden ones; unfused attention."""

    def __init__(self, size, patch, n_bands, dim, depth, heads, small, n_blocks, n_heads, mask_ratio):
        super().__init__()
        self.patch, self.n_visible = patch, round((size//patch)**2*(1 - mask_ratio))
        norm = lambda d, **kw: nn.LayerNorm(d, eps=NORM, **kw)
        block = lambda d, h: Block(d, h, qkv_bias=True, norm_layer=norm)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(n_bands, dim, patch, patch)
        n = (size//patch)**2
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, dim)), nn.Parameter(torch.zeros(1, n + 1, dim), requires_grad=False)
        self.blocks, self.norm = nn.ModuleList(block(dim, heads) for _ in range(depth)), norm(dim)
        self.decoder_embed = nn.Linear(dim, small)
        self.mask_token, self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1, small)), nn.Parameter(torch.zeros(1, n + 1, small), requires_grad=False)
        self.decoder_blocks, self.decoder_norm = nn.ModuleList(block(small, n_heads) for _ in range(n_blocks)), norm(small)
        self.decoder_pred = nn.Linear(small, patch**2*n_bands)
        for b in [*self.blocks, *self.decoder_blocks]:
            b.attn.fused_attn = False

    def encode(self, image, noise):
        """Tokens of the visible patches, the mask (1 = hidden), and the order that undoes the shuffle."""
        x = self.patch_embed.proj(image).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        shuffle = torch.argsort(noise, dim=1)
        restore = torch.argsort(shuffle, dim=1)
        keep = shuffle[:, :self.n_visible, None].expand(-1, -1, x.shape[2])
        mask = torch.ones_like(noise)
        mask[:, :self.n_visible] = 0
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([first, torch.gather(x, 1, keep)], 1)
        for b in self.blocks:
            x = b(x)
        return self.norm(x), torch.gather(mask, 1, restore), restore

    def decode(self, latent, restore):
        """Pixels of every patch."""
        x = self.decoder_embed(latent)
        hidden = self.mask_token.expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], hidden], 1)
        patches = torch.gather(patches, 1, restore[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], 1) + self.decoder_pos_embed
        for b in self.decoder_blocks:
            x = b(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward(self, image, noise):
        """Mean squared error of the hidden patches, each scaled to mean 0 and variance 1."""
        latent, mask, restore = self.encode(image, noise)
        pred = self.decode(latent, restore)
        b, c, h, w = image.shape
        p = self.patch
        target = image.reshape(b, c, h//p, p, w//p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p*p*c)
        mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        error = (pred - (target - mean)/(var + 1e-6)**0.5).square().mean(-1)
        return (error*mask).sum()/mask.sum()
