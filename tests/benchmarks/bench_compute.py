"""G1 to G4: a training step of the masked autoencoder. G11, G11b: extraction, from pixels and from a file to a table.

Between the baseline and ours stand the same number of operations as bare matrix products: the ceiling on this machine. Where
its ratio lies below a goal, that goal cannot be reached here, and the ratio of ours to the ceiling is what is left to judge.

On a Zen 4 core (AVX-512 in halves, avx512_bf16, no AMX) both libraries are within 15 % of the processor's float32 peak: products reach
84-94 GFLOP/s by default, 96-103 by oneDNN, 185-205 in bf16. The goals were set on a Zen 5 core, where the three are 102, 213 and 449.
"""
import copy
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from harness import Case, Skip, benchmark
from lightly.models import utils
from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
from textbook import TextbookMAE
from timm.models.vision_transformer import VisionTransformer

from galaxy_ssl.batch import fit_preprocess
from galaxy_ssl.cutouts import open_cutouts
from galaxy_ssl.draws import Draws, draws_of
from galaxy_ssl.embed import embed_batch, embed_cutouts
from galaxy_ssl.methods import make_method
from galaxy_ssl.nets import vit_dims
from galaxy_ssl.optim import make_optimizer
from galaxy_ssl.precision import describe, exact_matmul, native_bf16, scope
from galaxy_ssl.runs import Run
from galaxy_ssl.synthetic import synthetic_cutouts

B, BANDS, SIZE, PATCH, RATIO = 16, 5, 64, 8, 0.75
MODEL = dict(n_bands=BANDS, size=SIZE, patch=PATCH, preset='small', mask_ratio=RATIO)
BASE = dict(n_bands=3, size=224, patch=16, preset='base', mask_ratio=RATIO)  # the published ViT-B/16
STEP, LIGHT_STEP, EMBED, BASE_STEP = 12.34, 2.99, 2.85, 58.68  # GFLOP per image of the textbook graph: training, with the light decoder, embedding, training `BASE`


class LightlyMAE(torch.nn.Module):
    """lightly's parts, put together as its documentation does."""

    def __init__(self):
        super().__init__()
        vit = VisionTransformer(img_size=SIZE, patch_size=PATCH, in_chans=BANDS, embed_dim=384, depth=12, num_heads=6, num_classes=0)
        self.tokens = vit.patch_embed.num_patches + 1
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder = MAEDecoderTIMM(in_chans=BANDS, num_patches=self.tokens - 1, patch_size=PATCH, embed_dim=384, decoder_embed_dim=512, decoder_depth=8,
                                      decoder_num_heads=16, mlp_ratio=4.0)

    def forward(self, image):
        keep, hide = utils.random_token_mask(size=(len(image), self.tokens), mask_ratio=RATIO, device=image.device)
        x = self.decoder.embed(self.backbone.encode(images=image, idx_keep=keep))
        full = utils.repeat_token(self.decoder.mask_token, (len(image), self.tokens))
        x = self.decoder.decode(utils.set_at_index(full, keep, x.type_as(full)))
        target = utils.get_at_index(utils.patchify(image, PATCH), hide - 1)
        return F.mse_loss(self.decoder.predict(utils.get_at_index(x, hide)), target)


def products(gflop, precision, images=B):
    """As many operations as one batch needs, as bare matrix products of the decoder's largest size."""
    rows, inner, columns = 1040, 512, 2048
    x, w = torch.randn(rows, inner), torch.randn(columns, inner)
    if precision == 'bf16':
        x, w = x.bfloat16(), w.bfloat16()

    def run():
        with torch.inference_mode(), scope('cpu', precision, mixed=False):
            for _ in range(round(gflop*images*1e9/(2*rows*inner*columns))):
                F.linear(x, w)
    return run


def stepper(loss, optimizer, forward=nullcontext, backward=nullcontext):
    """One optimiser step, as a function."""
    def run():
        with forward():
            value = loss()
        with backward():
            value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return run


AUTOCAST = partial(scope, 'cpu', 'bf16')


def book_and_ours(decoder='original', model=MODEL, images=B):
    """Loss functions of the textbook and of ours, their modules, and whether they are one (with the published decoder)."""
    torch.manual_seed(0)
    n_bands, size, patch = (model[k] for k in ('n_bands', 'size', 'patch'))
    method = make_method('mae', **model, decoder=decoder)
    book = TextbookMAE(size, patch, n_bands, *vit_dims(model['preset']), 512, 8, 16, RATIO)
    image = torch.randn(images, n_bands, size, size)
    batch = {'image': image, 'bad': torch.zeros_like(image, dtype=torch.bool)}
    noise = draws_of({'draws': Draws(0, 'bench')}, 'cpu').uniform(images, (size//patch)**2)
    ours = lambda: method({**batch, 'draws': Draws(0, 'bench')})['loss']
    textbook = lambda: book(image, noise)
    book.load_state_dict(make_method('mae', **model, decoder='original').state_dict() if decoder != 'original' else method.state_dict())
    note = ''
    if decoder == 'original':
        with torch.no_grad(), exact_matmul():
            a, b = float(textbook()), float(ours())
        assert abs(a - b) <= 1e-5*abs(a), f'the losses differ: {a} and {b}'
        note = f'loss of the textbook {a:.7f}, of ours {b:.7f} (same weights and mask). '
    adamw = lambda m: torch.optim.AdamW(m.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.05)
    return image, (textbook, adamw(book)), (ours, make_optimizer(method, 1e-5, 0.05)), note


@benchmark('G1')
def mae_step_fp32():
    """A float32 step against the textbook and lightly."""
    image, book, ours, note = book_and_ours()
    light = LightlyMAE()
    yield Case(f'MAE step, ViT-S/8, 64 px, 5 bands, decoder 512x8, fp32, batch {B}', {
        'textbook fp32': stepper(*book), 'lightly fp32': stepper(lambda: light(image), torch.optim.AdamW(light.parameters(), lr=1e-5)),
        'ceiling: products alone, fp32': products(STEP, 'fp32'), 'ours fp32': stepper(*ours, exact_matmul, exact_matmul)},
        items=B, floor=1.6, goal=1.9, rounds=5, note=note + describe('cpu', 'fp32'))


@benchmark('G2')
def mae_step_bf16():
    """A mixed-precision step against the textbook in float32, and in mixed precision."""
    if not native_bf16():
        raise Skip('this processor does not multiply bfloat16')
    _, book, ours, note = book_and_ours()
    yield Case(f'MAE step, the same, bf16, batch {B}', {
        'textbook fp32': stepper(*book), 'ceiling: products alone, bf16': products(STEP, 'bf16'), 'ours bf16': stepper(*ours, AUTOCAST, exact_matmul)},
        items=B, floor=2.5, goal=3.0, rounds=5, note=note + describe('cpu', 'bf16'))
    yield Case('MAE step, both bf16', {'textbook bf16': stepper(*book, AUTOCAST), 'ours bf16': stepper(*ours, AUTOCAST, exact_matmul)},
               items=B, floor=1.15, goal=1.3, rounds=5)


@benchmark('G3')
def mae_step_base():
    """The published ViT-B/16 at 224 pixels, in float32 and in mixed precision, against the textbook in float32."""
    for precision, floor, goal in (('fp32', 1.5, 1.9), ('bf16', 2.0, 2.5)):
        if precision == 'bf16' and not native_bf16():
            return
        _, book, ours, note = book_and_ours(model=BASE, images=2)
        yield Case(f'MAE step, ViT-B/16, 224 px, 3 bands, decoder 512x8, {precision}, batch 2', {
            'textbook fp32': stepper(*book), f'ceiling: products alone, {precision}': products(BASE_STEP, precision, 2),
            f'ours {precision}': stepper(*ours, AUTOCAST if precision == 'bf16' else exact_matmul, exact_matmul)},
            items=2, floor=floor, goal=goal, rounds=3, note=note + describe('cpu', precision))


@benchmark('G4')
def mae_step_light():
    """The decoder that is the default, in mixed precision, against the published one in float32; its score: decoder_probe.py."""
    if not native_bf16():
        raise Skip('this processor does not multiply bfloat16')
    _, book, ours, _ = book_and_ours('light')
    yield Case(f'MAE step, default decoder 192x4 bf16 beside 512x8 fp32, batch {B}', {
        'textbook 512x8 fp32': stepper(*book), 'ceiling: products of 192x4 alone, bf16': products(LIGHT_STEP, 'bf16'),
        'ours 192x4 bf16': stepper(*ours, AUTOCAST, exact_matmul)}, items=B, floor=5, goal=7.5, rounds=5, note=describe('cpu', 'bf16'))


def model_only(method, image, bad, precision):
    """Embed one batch, as a function."""
    def run():
        with torch.inference_mode(), scope('cpu', precision, mixed=False):
            return embed_batch(method, image, bad)
    return run


def cosine(x, y):
    """Smallest cosine between rows."""
    return float(F.cosine_similarity(x.double(), y.double()).min())


@benchmark('G11')
def extraction():
    """Embedding against timm's network of the same size; the numbers against our own in float64."""
    torch.manual_seed(0)
    vit = timm.create_model('vit_small_patch16_224', img_size=SIZE, patch_size=PATCH, in_chans=BANDS, num_classes=0).eval()
    method = make_method('mae', **MODEL).eval()
    image = torch.randn(B, BANDS, SIZE, SIZE)
    bad = torch.zeros_like(image, dtype=torch.bool)
    exact = embed_batch(copy.deepcopy(method).double(), image, bad)

    def timm_fp32():
        with torch.no_grad():
            vit(image)
    for precision, floor, goal in (('fp32', 1.5, 1.8), ('bf16', 2.8, 3.8)):
        if precision == 'bf16' and not native_bf16():
            return
        ours = model_only(method if precision == 'fp32' else copy.deepcopy(method).bfloat16(), image, bad, precision)
        yield Case(f'embedding, ViT-S/8, 64 px, 5 bands, {precision}, batch {B}', {
            'timm fp32, no_grad': timm_fp32, f'ceiling: products alone, {precision}': products(EMBED, precision), f'ours {precision}': ours},
            items=B, floor=floor, goal=goal, note=f'smallest cosine to float64: {cosine(ours(), exact):.6f}. {describe("cpu", precision, mixed=False)}')


@benchmark('G11b')
def end_to_end():
    """From a file to a table on disk, against the network alone on the same pixels in memory."""
    n = 256
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'cutouts.h5'
        synthetic_cutouts(n, size=SIZE).save(path)
        cs = open_cutouts(path)
        pre = fit_preprocess(cs, size=SIZE)
        method = make_method('mae', n_bands=len(cs.bands), size=SIZE, patch=PATCH, preset='small').eval()
        run = Run(None, {'method': 'mae', 'settings': method.settings, 'unit': cs.unit}, method, pre)
        batch = pre({'flux': torch.from_numpy(np.asarray(cs.flux[:])), 'bad': torch.zeros(cs.flux.shape, dtype=torch.bool)})
        for precision in ('fp32', 'bf16') if native_bf16() else ('fp32',):
            network = method if precision == 'fp32' else copy.deepcopy(method).bfloat16()
            table = partial(embed_cutouts, run, open_cutouts(path), precision=precision, out=Path(folder)/'t.parquet', progress=False, device='cpu')
            yield Case(f'file to table, {n} cutouts, ViT-S/8, {precision}', {
                'the network alone': model_only(network, batch['image'], batch['bad'], precision), 'file to table on disk': table},
                items=n, floor=0.90, goal=0.97, rounds=3, note=describe('cpu', precision, mixed=False))
