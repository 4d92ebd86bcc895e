"""Weights of other codes under their published names, files that must not run, and runs that start from them."""
import json
import os
import re
import subprocess
import sys
import zipfile

import pytest
import timm
import torch
from common import fit
from safetensors.torch import save_file
from torch import nn

from galaxy_ssl.checkpoint import read_checkpoint
from galaxy_ssl.core import CutoutError
from galaxy_ssl.encoders import Encoder
from galaxy_ssl.export import export
from galaxy_ssl.frozen import Frozen, timm_args
from galaxy_ssl.mae import MAE
from galaxy_ssl.methods import METHODS, make_method
from galaxy_ssl.runs import load_run, save_weights, write_config
from galaxy_ssl.synthetic import synthetic_cutouts
from galaxy_ssl.weights import start_from

DIM, DEPTH, HEADS = 48, 2, 3


def vit(**options):
    """A network of timm with random weights everywhere, positions and scales too."""
    net = timm.create_model('vit_tiny_patch16_224', **{**dict(img_size=32, patch_size=8, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, num_classes=0), **options}).eval()
    torch.manual_seed(1)
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    return net


def ours(n_bands=3, size=32, **options):
    return Encoder(n_bands=n_bands, size=size, **{**dict(dim=DIM, depth=DEPTH, heads=HEADS), **options}).eval()


def under(prefix, state):
    return {prefix + k: v.clone() for k, v in state.items()}


def beit_names(state, scaled):
    """The names of BEiT and of SimMIM's vision transformer: separate biases, gamma_1 and gamma_2."""
    out = {}
    for k, v in state.items():
        if k.endswith('attn.qkv.bias'):
            out[k.replace('qkv.bias', 'q_bias')], out[k.replace('qkv.bias', 'v_bias')] = v[:DIM].clone(), v[2*DIM:].clone()
        else:
            out[re.sub(r'ls([12])\.gamma', r'gamma_\1', k) if scaled else k] = v.clone()
    return out


# 1. Published names, function for function.

def published(kind):
    """A checkpoint laid out as its authors do, and the network that it is of."""
    if kind == 'mae':
        net = vit()
        return net, {'model': net.state_dict() | {'mask_token': torch.zeros(1, 1, 32), 'decoder_embed.weight': torch.zeros(32, DIM), 'decoder_blocks.0.norm1.weight': torch.ones(32)}}
    if kind == 'dino':
        net = vit()
        student = {k: torch.zeros_like(v) for k, v in net.state_dict().items()}
        head = {'head.mlp.0.weight': torch.zeros(8, DIM), 'head.last_layer.weight_g': torch.ones(8, 1)}
        return net, {'student': under('module.backbone.', student) | under('module.', head), 'teacher': under('backbone.', net.state_dict()) | head,
                     'optimizer': {'state': {}, 'param_groups': [{'lr': 1e-3}]}, 'epoch': 100, 'dino_loss': {'center': torch.zeros(1, 8)}}
    if kind == 'dinov2':
        net = vit(init_values=1e-5)
        return net, under('', net.state_dict()) | {'mask_token': torch.zeros(1, DIM)}
    if kind == 'dinov2 in training':
        net = vit(init_values=1e-5)
        chunked = {re.sub(r'blocks\.(\d+)', r'blocks.0.\1', k): v for k, v in net.state_dict().items()}
        return net, {'teacher': under('backbone.', chunked) | {'dino_head.mlp.0.weight': torch.zeros(8, DIM)}}
    if kind == 'simmim vit':
        net = vit(init_values=0.1)
        for block in net.blocks:
            nn.init.zeros_(block.attn.qkv.bias[DIM:2*DIM])
        return net, {'model': under('encoder.', beit_names(net.state_dict(), True)) | {'encoder.mask_token': torch.zeros(1, 1, DIM), 'decoder.0.weight': torch.zeros(9, DIM, 1, 1)}}
    if kind == 'lightning':
        net = vit()
        return net, {'state_dict': under('net.encoder.', net.state_dict()) | {'net.head.weight': torch.zeros(2, DIM)}, 'epoch': 3, 'callbacks': {}, 'hyper_parameters': {'lr': 1.}}
    if kind == 'compiled and parallel':
        net = vit()
        return net, under('module._orig_mod.', net.state_dict())
    if kind == 'moco v3':
        net = vit()
        other = {k: torch.zeros_like(v) for k, v in net.state_dict().items()}
        return net, {'state_dict': under('module.momentum_encoder.', other) | under('module.base_encoder.', net.state_dict())}
    raise KeyError(kind)


@pytest.mark.parametrize('kind', ['mae', 'dino', 'dinov2', 'dinov2 in training', 'simmim vit', 'lightning', 'compiled and parallel', 'moco v3'])
def test_published_names_give_the_same_function(kind, tmp_path):
    net, checkpoint = published(kind)
    torch.save(checkpoint, tmp_path/'theirs.pth')
    mine = ours()
    report = start_from(mine, tmp_path/'theirs.pth')
    assert report.found == 1 and not report.missing and not report.differs
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(mine.tokens(image), net.forward_features(image), atol=1e-5, rtol=1e-4)


def test_no_bias_table_is_dropped_in_silence(tmp_path):
    """SimMIM's and BEiT's vision transformers add position biases inside attention: our blocks cannot."""
    for extra in ('rel_pos_bias.relative_position_bias_table', 'blocks.0.attn.relative_position_bias_table'):
        torch.save({'model': under('encoder.', vit().state_dict()) | {f'encoder.{extra}': torch.zeros(52, HEADS)}}, tmp_path/'simmim.pth')
        with pytest.raises(CutoutError, match=f'{extra}: only in the source'):
            start_from(ours(), tmp_path/'simmim.pth')
        assert start_from(ours(), tmp_path/'simmim.pth', partial=True).found == 1


def test_swin_of_microsoft_is_that_of_timm(tmp_path):
    """Their stages end with the downsampling that timm's next stage begins with, and they store what can be computed."""
    mine = Encoder(n_bands=3, size=64, arch='swin', preset='micro', patch=4).eval()
    theirs = Encoder(n_bands=3, size=64, arch='swin', preset='micro', patch=4).eval().body.net
    state = {re.sub(r'^layers\.1\.downsample', 'layers.0.downsample', k): v for k, v in theirs.state_dict().items()}
    state |= {'layers.0.blocks.0.attn.relative_position_index': torch.zeros(64, 64, dtype=torch.long), 'layers.0.blocks.1.attn_mask': torch.zeros(4, 64, 64)}
    torch.save({'model': under('encoder.', state) | {'encoder.mask_token': torch.zeros(1, 1, 32)}}, tmp_path/'swin.pth')
    report = start_from(mine, tmp_path/'swin.pth')
    assert report.found == 1 and not report.missing
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(mine.body.net.forward_features(image), theirs.forward_features(image))


@pytest.mark.parametrize('arch', ['test_convnext', 'test_resnet', 'test_efficientnet', 'test_vit'])
def test_networks_of_timm_take_their_own_weights(arch, tmp_path):
    theirs = timm.create_model(arch, num_classes=5).eval()
    if arch == 'test_vit':
        theirs = timm.create_model(arch, num_classes=5, img_size=64).eval()
    torch.save({'state_dict': under('encoder.', theirs.state_dict())}, tmp_path/'zoobot.ckpt')
    mine = Encoder(n_bands=3, size=64, arch=arch).eval()
    report = start_from(mine, tmp_path/'zoobot.ckpt')
    assert report.found == 1 and not report.missing
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(mine.body.net.forward_features(image), theirs.forward_features(image))
    grey = Encoder(n_bands=5, size=64, arch=arch).eval()
    start_from(grey, tmp_path/'zoobot.ckpt', bands='ugriz', given_bands='RGB')
    one = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(grey.body.net.forward_features(one.expand(-1, 5, -1, -1)), theirs.forward_features(one.expand(-1, 3, -1, -1)), atol=1e-3, rtol=1e-3)


def test_bands_are_matched_by_name_not_by_place(tmp_path):
    net = vit()
    torch.save(net.state_dict(), tmp_path/'a.pth')
    mine = ours()
    start_from(mine, tmp_path/'a.pth', bands=('B', 'G', 'R'), given_bands=('R', 'G', 'B'))
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(mine.tokens(image.flip(1)), net.forward_features(image), atol=1e-5, rtol=1e-4)
    assert 'taken in order' in ' '.join(start_from(ours(), tmp_path/'a.pth', bands='grz').notes)


@pytest.mark.parametrize('change, complaint', [
    (dict(n_bands=4), '3 bands to 4'), (dict(size=64), '4x4 to 8x8'), (dict(patch=4, size=16), '8x8 px to 4x4')])
def test_strict_means_nothing_is_adapted(change, complaint, tmp_path):
    torch.save(vit().state_dict(), tmp_path/'a.pth')
    with pytest.raises(CutoutError, match=complaint):
        start_from(ours(**change), tmp_path/'a.pth', adapt=False)
    start_from(ours(**change), tmp_path/'a.pth')


@pytest.mark.parametrize('change', [dict(depth=1), dict(depth=3), dict(dim=96)])
def test_another_architecture_is_refused_with_the_list(change, tmp_path):
    torch.save(vit().state_dict(), tmp_path/'a.pth')
    mine = ours(**change)
    before = {k: v.clone() for k, v in mine.state_dict().items()}
    with pytest.raises(CutoutError, match='weights do not fit: .*; and .* more'):
        start_from(mine, tmp_path/'a.pth')
    assert all(torch.equal(before[k], v) for k, v in mine.state_dict().items()), 'a refused source must leave the network alone'


# 2. Files.

class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('zipped', [True, False])
def test_no_code_runs_without_trust(zipped, tmp_path):
    path = tmp_path/'zoobot.ckpt'
    torch.save({'state_dict': under('encoder.', vit().state_dict()), 'hyper_parameters': Bomb(tmp_path/'harm')}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CutoutError, match='mkdir' if zipped else 'Python objects that run code') as e:
        start_from(ours(), path)
    assert '--trust' in str(e.value) and not (tmp_path/'harm').exists()
    start_from(ours(), path, trust=True)
    assert (tmp_path/'harm').exists()


def test_a_bomb_under_any_name_is_not_run(tmp_path):
    for name in ('model.safetensors', 'weights.bin', 'a.pt', 'noextension'):
        torch.save({'w': Bomb(tmp_path/'harm')}, tmp_path/name)
        with pytest.raises(CutoutError):
            read_checkpoint(tmp_path/name)
    assert not (tmp_path/'harm').exists()


def test_every_truncation_is_one_clear_error(tmp_path):
    state = {'blocks.0.norm1.weight': torch.arange(400.)}
    torch.save(state, tmp_path/'a.pth')
    torch.save(state, tmp_path/'old.pth', _use_new_zipfile_serialization=False)
    save_file(state, tmp_path/'a.safetensors')
    for name in ('a.pth', 'old.pth', 'a.safetensors'):
        whole = (tmp_path/name).read_bytes()
        for cut in [1, 2, 7, 9, 40, 100, len(whole)//2, len(whole) - 1]:
            (tmp_path/f'cut_{name}').write_bytes(whole[:cut])
            with pytest.raises(CutoutError, match=f'cut_{name}'):
                read_checkpoint(tmp_path/f'cut_{name}')


@pytest.mark.parametrize('content, said', [
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n', 'Git LFS pointer'), (b'<!doctype html><title>Sign in</title>', 'a web page'),
    (b'{"error":"Repository not found"}', 'an error message'), (b'', 'empty')])
def test_stand_ins_are_named(content, said, tmp_path):
    for name in ('a.pth', 'a.safetensors', 'a.ckpt'):
        (tmp_path/name).write_bytes(content)
        with pytest.raises(CutoutError, match=said):
            start_from(ours(), tmp_path/name)


def test_the_wrong_kind_of_zip_is_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path/'a.pth', 'w') as z:
        z.writestr('readme.txt', 'hello')
    with pytest.raises(CutoutError, match='not a checkpoint'):
        read_checkpoint(tmp_path/'a.pth')


def test_offline_names_need_no_network(tmp_path):
    """One error at once, from a fresh process that may not use the network."""
    code = ("from galaxy_ssl.encoders import Encoder\nfrom galaxy_ssl.weights import start_from\n"
            "start_from(Encoder(n_bands=3, size=64, arch='convnext_nano'), 'hf_hub:mwalmsley/zoobot-encoder-convnext_nano')")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path)})
    assert 'CutoutError: hf_hub:mwalmsley/zoobot-encoder-convnext_nano: model.safetensors or pytorch_model.bin' in done.stderr and str(tmp_path) in done.stderr


# 3. Runs.

@pytest.fixture(scope='module')
def cs():
    return synthetic_cutouts(32, size=16)


def test_a_run_starts_from_weights_and_never_needs_them_again(cs, tmp_path):
    first = fit(cs, tmp_path/'first')
    started = fit(cs, tmp_path/'second', init=str(tmp_path/'first'), epochs=2, lr=1e-9)
    key = 'blocks.0.attn.qkv.weight'
    torch.testing.assert_close(started.method.state_dict()[key], first.method.state_dict()[key], atol=1e-6, rtol=0)
    said = json.loads((tmp_path/'second'/'config.json').read_text())
    assert said['init']['found'] == 1 and said['train']['init'] == str(tmp_path/'first')
    (tmp_path/'first').rename(tmp_path/'gone')
    assert load_run(tmp_path/'second').finished and fit(cs, tmp_path/'second', init=str(tmp_path/'first'), epochs=2, lr=1e-9).finished
    with pytest.raises(CutoutError, match='init'):
        fit(cs, tmp_path/'second', epochs=2, lr=1e-9)
    with pytest.raises(CutoutError, match='no such file or folder'):
        fit(cs, tmp_path/'third', init=str(tmp_path/'first'))
    assert not (tmp_path/'third'/'config.json').exists()


def test_an_interrupted_run_that_started_from_weights_resumes_to_the_bit(cs, tmp_path):
    from galaxy_ssl.callbacks import Callback
    from galaxy_ssl.train import TrainConfig, train
    from common import TINY

    class Stop(Callback):
        def on_step(self, trainer, images):
            trainer.stop.asked = trainer.step == 2

    fit(cs, tmp_path/'first')
    whole = fit(cs, tmp_path/'whole', init=str(tmp_path/'first'), epochs=2)
    cfg = TrainConfig(**{**TINY, 'out': str(tmp_path/'pieces'), 'init': str(tmp_path/'first'), 'epochs': 2})
    assert not train(cfg, cs, callbacks=[Stop()]).finished
    (tmp_path/'first').rename(tmp_path/'gone')
    pieces = train(cfg, cs, callbacks=[])
    assert all(torch.equal(a, b) for a, b in zip(whole.method.state_dict().values(), pieces.method.state_dict().values()))


@pytest.mark.parametrize('method, expected', [('dino', 'teacher'), ('byol', 'student'), ('moco', 'student'), ('hybrid', 'ssl')])
def test_of_a_run_the_encoder_it_embeds_with_is_taken(method, expected, tmp_path):
    made = make_method(method, n_bands=3, size=32)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.add_(1. if name.startswith('teacher') else 0.5)
    write_config(tmp_path/'run', {'method': method, 'settings': made.settings, 'preprocess': {}, 'bands': list('grz')})
    save_weights(tmp_path/'run'/'model.safetensors', made.state_dict())
    fresh = make_method('mae', n_bands=3, size=32)
    assert start_from(fresh, tmp_path/'run', bands='grz').found == 1
    source = [v for k, v in made.state_dict().items() if k.startswith(expected) and k.endswith('blocks.0.attn.qkv.weight')][0]
    assert torch.equal(fresh.state_dict()['blocks.0.attn.qkv.weight'], source)
    both = make_method('dino', n_bands=3, size=32)
    start_from(both, tmp_path/'run', bands='grz')
    filled = [v for k, v in both.state_dict().items() if k.endswith('blocks.0.attn.qkv.weight')]
    assert len(filled) == 2 and all(torch.equal(v, source) for v in filled)


def test_a_method_without_a_plain_encoder_starts_from_its_own_run(tmp_path):
    made = make_method('lvm', n_bands=3, size=32)
    write_config(tmp_path/'run', {'method': 'lvm', 'settings': made.settings, 'preprocess': {}, 'bands': list('grz')})
    save_weights(tmp_path/'run'/'model.safetensors', made.state_dict())
    fresh = make_method('lvm', n_bands=3, size=32)
    start_from(fresh, tmp_path/'run', bands='grz')
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), fresh.state_dict().values()))
    with pytest.raises(CutoutError, match='net.head.out.weight'):
        start_from(make_method('lvm', n_bands=4, size=32), tmp_path/'run', bands='griz')
    report = start_from(make_method('lvm', n_bands=4, size=32), tmp_path/'run', bands='griz', partial=True)
    assert report.adapted['net.stem.first.weight'] == '3 bands to 4'


# 4. Export.

@pytest.mark.parametrize('size, options', [(32, dict(preset='micro')), ((32, 48), dict(preset='micro')), (32, dict(arch='swin', preset='micro', patch=4)), (64, dict(arch='test_convnext')),
                                           (64, dict(arch='test_resnet')), (64, dict(arch='test_vit'))])
def test_timm_makes_the_same_network(size, options):
    frozen = Frozen(n_bands=5, size=size, **options).eval()
    arch, args = timm_args(frozen)
    twin = timm.create_model(arch, **json.loads(json.dumps(args))).eval()
    twin.load_state_dict(frozen.state_dict())
    image = torch.randn(2, 5, *frozen.encoder.size)
    with torch.no_grad():
        expected = frozen.encoder.tokens(image)
        found = twin.forward_features(image)
    if found.ndim == 4:
        found = (found if frozen.encoder.arch == 'swin' else found.permute(0, 2, 3, 1)).flatten(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('method', list(METHODS))
def test_every_method_is_exported_and_embeds_the_same(method, cs, tmp_path):
    """Those with a plain encoder load in timm; the others are exported whole."""
    from galaxy_ssl.batch import fit_preprocess
    from galaxy_ssl.runs import Run
    cs = synthetic_cutouts(8, size=32)
    made = make_method(method, n_bands=3, size=32).eval()
    pre = fit_preprocess(cs, 32)
    config = {'method': method, 'settings': made.settings, 'preprocess': pre.config(), 'bands': list(cs.bands), 'survey': cs.survey, 'unit': cs.unit, 'pixscale': 0.262, 'n_train': 8}
    folder = export(Run(None, config, made, pre), tmp_path/'out')
    again = load_run(folder)
    image = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again.method.embed(image), made.embed(image), atol=1e-5, rtol=1e-4)
    said = json.loads((folder/'config.json').read_text())
    if 'architecture' in said:
        twin = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        assert twin.num_features == said['num_features'] == made.embed_dim
    assert said['method'] == ('frozen' if 'architecture' in said else method)
    if method not in ('lvm', 'vae'):
        assert 'architecture' in said, f'{method} has a plain encoder: timm should load it'


def test_an_exported_mae_is_timms_transformer(tmp_path, cs):
    run = fit(cs, tmp_path/'run')
    folder = export(tmp_path/'run', tmp_path/'published')
    twin = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(twin.forward_features(image), run.method.tokens(image)[0], atol=1e-5, rtol=1e-4)
    fresh = MAE(n_bands=2, size=32, patch=4, dim=48, depth=2)
    assert start_from(fresh, folder, bands=('g', 'z')).found == 1
