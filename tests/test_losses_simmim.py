"""Masked methods against references that are not ours: losses in plain numpy, scipy's spherical harmonics, lightly's masked autoencoder."""
import json
import warnings

import jobs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import sph_harm_y
from timm.models.vision_transformer import VisionTransformer

from galaxy_ssl.draws import Draws
from galaxy_ssl.methods import check_batch, make_method
from galaxy_ssl.sky_token import sky_harmonics
from galaxy_ssl.synthetic import synthetic_cutouts

MICRO = dict(preset='micro', depth=2)


def drawn(batch, *keys):
    """The batch with fresh draws."""
    return {**batch, 'draws': Draws(0, *keys)}


def numpy_loss(image, bad, hidden, pred, patch, norm_pix, loss):
    """Mean error over hidden valid pixels, square by square."""
    image = np.where(bad, np.nan, image).astype(np.float64)
    errors = []
    n, c, h, w = image.shape
    for i in range(n):
        for y in range(0, h, patch):
            for x in range(0, w, patch):
                at = (i, slice(None), slice(y, y + patch), slice(x, x + patch))
                square = image[at].copy()
                groups = {'joint': [slice(None)], 'per_band': [slice(b, b + 1) for b in range(c)], False: []}[norm_pix]
                for g in groups:
                    good = square[g][np.isfinite(square[g])]
                    if len(good):
                        spread = good.var(ddof=1) if len(good) > 1 else 0.
                        square[g] = (square[g] - good.mean())/np.sqrt(spread + 1e-6)
                use = hidden[at] & ~bad[at]
                errors.append((pred[at].astype(np.float64) - square)[use])
    e = np.abs(np.concatenate(errors))
    return {'l1': e, 'mse': e**2, 'huber': np.where(e < 1, e**2/2, e - 0.5)}[loss].mean()


@pytest.mark.parametrize('loss', ['l1', 'mse', 'huber'])
@pytest.mark.parametrize('norm_pix', ['joint', 'per_band', False])
@pytest.mark.parametrize('mask_bands, mask_ratio, mask_patch', [('shared', 0.6, None), ('per_band', [0, 0.9], 4)])
def test_simmim_loss_is_that_of_numpy(loss, norm_pix, mask_bands, mask_ratio, mask_patch):
    torch.manual_seed(0)
    method = make_method('simmim', n_bands=3, size=(16, 32), loss=loss, norm_pix=norm_pix, mask_bands=mask_bands, mask_ratio=mask_ratio,
                         mask_patch=mask_patch, **MICRO).eval()
    method.fill.data.normal_()
    batch = check_batch(5, 3, (16, 32), damaged=True)
    image, bad = batch['image'], batch['bad']
    with torch.no_grad():
        ours = float(method(drawn(batch, 'loss'))['loss'])
        hidden = method.reconstruct(drawn(batch, 'loss'))['hidden']
        fill = np.tile(method.fill.numpy(), (1, *method.mask_grid))
        seen = np.where(hidden | bad, fill, image.numpy())
        pred = method.predict(method.encoder.tokens(torch.from_numpy(seen)))
    expected = numpy_loss(image.numpy(), bad.numpy(), hidden.numpy(), pred.numpy(), method.mask_patch, norm_pix, loss)
    assert ours == pytest.approx(expected, rel=1e-5)


def test_simmim_head_is_the_published_one():
    """A convolution with kernel 1 and a pixel shuffle, with the same weights in the order of the shuffle."""
    torch.manual_seed(0)
    method = make_method('simmim', n_bands=3, size=32, **MICRO)
    s, c, dim = method.encoder.stride, 3, method.embed_dim
    conv = torch.nn.Conv2d(dim, c*s*s, 1)
    conv.weight.data = method.head.weight.data.view(s*s, c, dim, 1, 1).transpose(0, 1).flatten(0, 1)
    conv.bias.data = method.head.bias.data.view(s*s, c).T.flatten()
    tokens = torch.randn(2, 1 + 16, dim)
    theirs = F.pixel_shuffle(conv(tokens[:, 1:].transpose(1, 2).unflatten(-1, (4, 4))), s)
    torch.testing.assert_close(method.predict(tokens), theirs, atol=1e-5, rtol=0)


def test_simmim_encoder_is_timms():
    """The embedding of timm's network with the same weights."""
    torch.manual_seed(0)
    method = make_method('simmim', n_bands=3, size=32, **MICRO).eval()
    vit = VisionTransformer(img_size=32, patch_size=8, in_chans=3, embed_dim=96, depth=2, num_heads=3, num_classes=0).eval()
    state = {k.removeprefix('encoder.body.'): v for k, v in method.state_dict().items() if k.startswith('encoder.')}
    vit.load_state_dict(state, strict=True)
    image = check_batch(4, 3, (32, 32))['image']
    with torch.no_grad():
        torch.testing.assert_close(method.embed(image), vit.forward_features(image)[:, 1:].mean(1), atol=1e-5, rtol=0)


def test_harmonics_are_those_of_scipy():
    rng = np.random.default_rng(0)
    ra, dec = rng.uniform(0, 360, 200), np.degrees(np.arcsin(rng.uniform(-1, 1, 200)))
    ra[:4], dec[:4] = [0, 359.999, 12, 200], [90, -90, 0, 0]
    ours = sky_harmonics(torch.from_numpy(ra), torch.from_numpy(dec)).numpy()
    for l in range(5):
        for m in range(-l, l + 1):
            theirs = sph_harm_y(l, abs(m), np.radians(90 - dec), np.radians(ra))*(-1)**m  # without the alternating sign
            real = theirs.real if m == 0 else np.sqrt(2)*(theirs.real if m > 0 else theirs.imag)
            np.testing.assert_allclose(ours[:, l*l + l + m], real, atol=1e-10)


@pytest.mark.parametrize('norm_pix', [True, False])
def test_mae_is_lightlys(norm_pix):
    """Loss, prediction and every gradient of a masked autoencoder put together from lightly's parts, with the same weights and mask."""
    pytest.importorskip('lightly')
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    torch.manual_seed(0)
    method = make_method('mae', n_bands=3, size=32, patch=8, norm_pix=norm_pix, decoder=[64, 2, 4], **MICRO)
    vit = VisionTransformer(img_size=32, patch_size=8, in_chans=3, embed_dim=96, depth=2, num_heads=3, num_classes=0)
    backbone = MaskedVisionTransformerTIMM(vit=vit)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        decoder = MAEDecoderTIMM(num_patches=16, patch_size=8, in_chans=3, embed_dim=96, decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=4)
    state = method.state_dict()
    theirs = ('decoder_', 'mask_token')
    vit.load_state_dict({k: v for k, v in state.items() if not k.startswith(theirs)}, strict=True)
    decoder.load_state_dict({k: v for k, v in state.items() if k.startswith(theirs)}, strict=True)

    batch = check_batch(4, 3, (32, 32))
    image = batch['image']
    order = Draws(0, 'twin').uniform(4, 16).argsort(1) + 1
    n_visible = 16 - method.n_hidden
    keep, hide = F.pad(order[:, :n_visible], (1, 0)), order[:, n_visible:]
    x = decoder.embed(backbone.encode(images=image, idx_keep=keep))
    x = utils.set_at_index(utils.repeat_token(decoder.mask_token, (4, 17)), keep, x)
    pred = decoder.predict(utils.get_at_index(decoder.decode(x), hide))
    target = utils.get_at_index(utils.patchify(image, 8), hide - 1)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True))/(target.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = F.mse_loss(pred, target)

    ours = method(drawn(batch, 'twin'))['loss']
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    ours.backward()
    grads = {**dict(vit.named_parameters()), **dict(decoder.named_parameters())}
    for name, p in method.named_parameters():
        torch.testing.assert_close(p.grad, grads[name].grad, atol=1e-4*float(p.grad.abs().max()), rtol=0)


def test_simmim_on_two_processes_ends_where_one_does(tmp_path):
    """With masks per band, a drawn ratio, damaged pixels and positions: all that the processes have to agree on."""
    cs = synthetic_cutouts(24, size=32, seed=3)
    flux = np.array(cs.flux[:])
    flux[::3, :, :, 10:20] = np.nan
    flux[5, 1] = np.nan
    type(cs)(flux, bands=cs.bands, meta=cs.meta, survey=cs.survey, pixscale=cs.pixscale).save(tmp_path/'x.h5')
    logs = []
    for world in (1, 2):
        config = dict(method='simmim', out=str(tmp_path/str(world)), size=32, epochs=2, batch_size=8, val_fraction=0, device='cpu', log_every=1,
                      settings=dict(MICRO, mask_bands='per_band', mask_ratio=[0, 0.9], sky=True))
        for p in jobs.start(jobs.training, config, str(tmp_path/'x.h5'), world=world):
            p.join(240)
            assert p.exitcode == 0
        rows = [json.loads(line) for line in (tmp_path/str(world)/'log.jsonl').read_text().splitlines()]
        logs.append([(r['loss'], r['hidden']) for r in rows if 'loss' in r])
    one, two = map(np.array, logs)
    assert len(one) == 6 and len(set(one[:, 1])) > 3
    np.testing.assert_allclose(one, two, rtol=1e-4)
