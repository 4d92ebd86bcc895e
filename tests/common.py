"""What several test files use: tiny trainings, look-alike sets, the contents of a folder."""
from pathlib import Path

from galaxy_ssl.cutouts import CutoutSet
from galaxy_ssl.embed import embed_cutouts
from galaxy_ssl.train import TrainConfig, train

TINY = dict(size=16, epochs=1, batch_size=8, val_fraction=0.25, device='cpu', settings={'patch': 4, 'preset': 'micro', 'dim': 48, 'depth': 2})
FLAGS = ['--size', '16', '--epochs', '1', '--batch-size', '8', '--device', 'cpu', '--set', 'patch=4', 'preset=micro', 'dim=48', 'depth=2']


def fit(cs, out, **changes):
    return train(TrainConfig(**{**TINY, 'out': str(out), **changes}), cs, callbacks=[])


def embed(run, cs, **options):
    return embed_cutouts(run, cs, progress=False, device='cpu', **options)


def like(cs, flux=None, **changes):
    """The same set with something changed."""
    given = dict(meta=cs.meta, bands=cs.bands, survey=cs.survey, pixscale=cs.pixscale, unit=cs.unit)
    return CutoutSet(cs.flux[:] if flux is None else flux, **{**given, **changes})


def contents(folder):
    """Name -> bytes of every file below a folder, the lock aside."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file() and p.name != '.lock'}
