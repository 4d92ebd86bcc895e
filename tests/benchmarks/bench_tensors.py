"""G9: turn, mirror, shift and crop whole batches; G10: stretch them. Beside the usual ways, image by image, with the same work done by each."""
import numpy as np
import torch
from harness import Case, benchmark

from galaxy_ssl.augment import AugmentConfig, augment
from galaxy_ssl.draws import Draws
from galaxy_ssl.stretch import make_stretch

JITTER = 7  # pixels


def sky(n, bands, size):
    """Discs on noise (n, bands, size, size) float32, nanomaggy."""
    rng = np.random.default_rng(0)
    r = np.hypot(*(np.mgrid[:size, :size] - (size - 1)/2))
    light = np.exp(-r/rng.uniform(3, 9, (n, bands, 1, 1)))*rng.lognormal(-2, 1, (n, bands, 1, 1))
    return (light + rng.normal(0, .005, light.shape)).astype(np.float32)


def by_skimage(images, size, rng):
    """Mirror, turn by any angle and crop with jitter, one image (H,W,C) after the other, as published recipes for survey images do (arXiv:2110.00023)."""
    from skimage.transform import rotate
    out = []
    for im in images:
        im = im[::-1] if rng.random() < .5 else im
        im = im[:, ::-1] if rng.random() < .5 else im
        im = rotate(im, 360*rng.random(), order=1)
        y, x = (im.shape[0] - size)//2 + rng.integers(-JITTER, JITTER + 1, 2)
        out.append(im[y:y + size, x:x + size])
    return np.stack(out)


def by_torchvision(images, size, transform, rng):
    """The same by torchvision's v2 transforms, one image (C,H,W) after the other."""
    from torchvision.transforms.v2 import functional as v2
    out = []
    for im in images:
        im = transform(im)
        y, x = (im.shape[-1] - size)//2 + rng.integers(-JITTER, JITTER + 1, 2)
        out.append(v2.crop(im, int(y), int(x), size, size))
    return torch.stack(out)


@benchmark('G9')
def turning():
    """Mirror, rotation by any angle (bilinear), jitter, crop."""
    from torchvision.transforms import InterpolationMode, v2
    transform = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), v2.RandomRotation(180, InterpolationMode.BILINEAR)])
    rng = np.random.default_rng(0)
    cfg = AugmentConfig(rotate=True, jitter=JITTER)
    for n, bands, wide, size in ((64, 3, 152, 96), (128, 5, 80, 64)):
        flux = torch.from_numpy(sky(n, bands, wide))
        last = np.ascontiguousarray(flux.permute(0, 2, 3, 1).numpy())
        clean = torch.zeros(flux.shape, dtype=torch.bool)
        ours = {'augment, one batch': lambda: augment(flux, clean, cfg, Draws(0), size)}
        skimage = {'scikit-image, per image': lambda: by_skimage(last, size, rng)}
        vision = {'torchvision v2, per image': lambda: by_torchvision(flux, size, transform, rng)}
        what = f'mirror + rotate + jitter + crop, {bands}x{wide}x{wide} -> {size}'
        yield Case(f'{what}, beside scikit-image', skimage | ours, items=n, floor=3, goal=4.5)
        yield Case(f'{what}, beside torchvision', vision | ours, items=n, floor=1.7, goal=2.5)
        broken = flux.clone()
        broken[:, :, 40, 40] = torch.nan
        yield Case(f'{what}: what bad pixels in every image cost', {'augment, clean': ours['augment, one batch'],
                   'augment, a bad pixel in every band': lambda: augment(broken, ~broken.isfinite(), cfg, Draws(0), size)}, items=n)
        yield Case(f'mirror + quarter turns + jitter + crop (exact), {bands}x{wide}x{wide} -> {size}',
                   {'augment, rotate=True': ours['augment, one batch'], 'augment': lambda: augment(flux, clean, AugmentConfig(jitter=JITTER), Draws(0), size)}, items=n)


def dr2_rgb(im, scales, m=.03, Q=20):
    """The look of the Legacy Survey viewer for one image (C,H,W): arcsinh of the mean intensity, colours kept."""
    v = [s*b + m for s, b in zip(scales, im)]
    total = sum(np.maximum(0, b) for b in v)/len(v)
    f = np.arcsinh(Q*total)/np.sqrt(Q)
    total += (total == 0)*1e-6
    return np.stack([np.clip(b*f/total, 0, 1) for b in v])


@benchmark('G10')
def stretching():
    """The joint stretch beside its formula image by image, and the arcsinh beside torch's."""
    flux = torch.from_numpy(sky(128, 3, 152))
    joint = make_stretch('dr2_rgb', scales=(6., 3.4, 2.2)).fit(flux.numpy())
    each = make_stretch('asinh').fit(flux.numpy())
    level, scale, norm = (t[:, None, None] for t in (each.level, each.sigma*each.softening, each.norm))
    images = flux.numpy()
    assert np.allclose(joint(flux)[0], dr2_rgb(images[0], (6., 3.4, 2.2)), atol=1e-6)
    yield Case('dr2_rgb, 3x152x152', {'the formula in numpy, per image': lambda: np.stack([dr2_rgb(im, (6., 3.4, 2.2)) for im in images]),
               'Stretch, one batch': lambda: joint(flux)}, items=len(flux), floor=1.2, goal=1.4)
    yield Case('asinh, 3x152x152', {'torch.asinh, one batch': lambda: torch.asinh((flux - level)/scale)/norm,
               'Stretch, one batch': lambda: each(flux)}, items=len(flux), floor=10, goal=25)
