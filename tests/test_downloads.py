"""Downloads against a server on this machine that does what networks do. Nothing here leaves the machine."""
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import resource
import signal
import socket
import tarfile
import threading
import time
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from galaxy_ssl import cli, datasets, net
from galaxy_ssl.core import CutoutError
from galaxy_ssl.datasets import DATASETS, DataFile, Dataset, cache_folder, download
from galaxy_ssl.net import Patience, get, get_bytes

HDF5 = b'\x89HDF\r\n\x1a\n'
BODY = HDF5 + bytes(range(256))*4000
OTHER = HDF5 + b'x'*(len(BODY) - len(HDF5))
SHA = 'sha256:' + hashlib.sha256(BODY).hexdigest()
MD5 = 'md5:' + hashlib.md5(BODY, usedforsecurity=False).hexdigest()
QUICK = Patience(connect=1, read=1, total=8, retries=3, backoff=0.01)
SPAWN = multiprocessing.get_context('fork')


class Handler(BaseHTTPRequestHandler):
    """Answers from `server.script`: one step per request, the last one for ever after."""
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def do_GET(self):
        s = self.server
        with s.guard:
            step = s.script[min(len(s.asked), len(s.script) - 1)]
            s.asked.append({'range': self.headers.get('Range'), 'if-range': self.headers.get('If-Range'), 'path': self.path})
        self.close_connection = True
        step(self)


def answer(status=200, body=b'', **headers):
    """A step: this status, these headers (underscores are hyphens), this body."""
    def step(h):
        h.send_response(status)
        for k, v in {'Content-Length': len(body), 'Connection': 'close', **headers}.items():
            if v is not None:
                h.send_header(k.replace('_', '-'), str(v))
        h.end_headers()
        h.wfile.write(body)
    return step


def file(body=BODY, etag='"a"', ranges=True, stop=None, length=True, obey=True, pause=0):
    """A step: the file as a good server sends it, or with what goes wrong."""
    def step(h):
        asked, condition = h.headers.get('Range'), h.headers.get('If-Range')
        start = int(asked[6:-1]) if asked and ranges and (not obey or condition in (None, etag)) else 0
        if start >= len(body):
            return answer(416, Content_Range=f'bytes */{len(body)}')(h)
        h.send_response(206 if start else 200)
        if start:
            h.send_header('Content-Range', f'bytes {start}-{len(body) - 1}/{len(body)}')
        if etag:
            h.send_header('ETag', etag)
        if length:
            h.send_header('Content-Length', str(len(body) - start))
        h.end_headers()
        sent = body[start:stop]
        for i in range(0, len(sent), 2**15):
            h.wfile.write(sent[i:i + 2**15])
            time.sleep(pause)
    return step


def hang(h):
    h.server.free.wait(5)


def reset(h):
    """Close with RST instead of an answer."""
    h.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\x01\0\0\0\0\0\0\0')
    h.connection.close()


@pytest.fixture
def serve():
    """serve(step, step, ...) -> the server's address; what was asked is in serve.asked."""
    servers = []

    def make(*script):
        server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        server.script, server.asked, server.guard, server.free = script, [], threading.Lock(), threading.Event()
        server.handle_error = lambda *_: None
        threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True).start()
        servers.append(server)
        make.asked = server.asked
        return f'http://127.0.0.1:{server.server_port}/x.h5'
    yield make
    for server in servers:
        server.free.set()
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def quick(request):
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < 6, f'{request.node.name} took {took:.1f} s'


def fetch(url, path, **options):
    return get(url, path, **{'progress': False, 'patience': QUICK, **options})


def left_over(folder):
    """Names in a folder, but for the locks."""
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith('.lock'))


GOOD_IN_THE_END = {
    'plain': ([file()], 1),
    'cut, then the rest': ([file(stop=300_000), file()], 2),
    'cut three times': ([file(stop=100_000), file(stop=400_000), file(stop=700_000), file()], 4),
    'cut, server without ranges': ([file(stop=300_000, ranges=False), file(ranges=False)], 2),
    'cut, no ETag, no date': ([file(stop=300_000, etag=None), file(etag=None)], 2),
    'changed, server says so': ([file(body=HDF5 + b'old'*90_000, etag='"old"', stop=200_000), file()], 2),
    'changed, server goes on regardless': ([file(body=HDF5 + b'old'*90_000, etag='"old"', stop=200_000), file(obey=False), file()], 3),
    'changed, same length, server goes on regardless': ([file(body=OTHER, etag='"old"', stop=200_000), file(obey=False), file()], 3),
    'changed, same weak ETag': ([file(body=OTHER, etag='W/"a"', stop=200_000), file(etag='W/"a"')], (2, 3)),
    'shrunk below what came': ([file(body=HDF5 + b'old'*900_000, etag='"old"', stop=2_000_000), file(obey=False), file()], 3),
    '429 with Retry-After': ([answer(429, Retry_After='0'), file()], 2),
    '503 with a date': ([answer(503, Retry_After=formatdate(time.time() - 5, usegmt=True)), file()], 2),
    '503 twice': ([answer(503), answer(503), file()], 3),
    'reset': ([reset, file()], 2),
    'no length, whole': ([file(length=False)], 1),
    'empty, then whole': ([answer(200), file()], 2),
}


@pytest.mark.parametrize('name', GOOD_IN_THE_END)
@pytest.mark.parametrize('checksum', [None, SHA, MD5])
def test_the_right_bytes_come_in_the_end(serve, tmp_path, name, checksum):
    script, requests = GOOD_IN_THE_END[name]
    path = fetch(serve(*script), tmp_path/'deep'/'x.h5', checksum=checksum)
    assert path.read_bytes() == BODY
    assert len(serve.asked) == (requests if isinstance(requests, int) else requests[checksum is not None])
    assert left_over(tmp_path/'deep') == ['x.h5']


def test_only_the_rest_is_asked_for_and_only_if_it_is_the_same_file(serve, tmp_path):
    fetch(serve(file(stop=300_000), file()), tmp_path/'x.h5')
    assert serve.asked[1] == {'range': 'bytes=300000-', 'if-range': '"a"', 'path': '/x.h5'}


def test_without_a_proof_of_sameness_nothing_is_glued(serve, tmp_path):
    fetch(serve(file(stop=300_000, etag=None), file(etag=None)), tmp_path/'x.h5')
    assert serve.asked[1]['range'] is None
    fetch(serve(file(stop=300_000, etag=None), file(etag=None)), tmp_path/'y.h5', checksum=SHA)
    assert serve.asked[1]['range'] == 'bytes=300000-'


def test_halves_of_two_files_are_found_by_the_checksum(serve, tmp_path):
    path = fetch(serve(file(body=OTHER, etag=None, stop=300_000), file(etag=None)), tmp_path/'x.h5', checksum=SHA)
    assert path.read_bytes() == BODY
    assert [a['range'] for a in serve.asked] == [None, 'bytes=300000-', None]


@pytest.mark.parametrize('checksum', [None, SHA])
def test_a_process_killed_after_the_last_byte_fetches_nothing_again(serve, tmp_path, checksum):
    url = serve(file())
    (tmp_path/'x.h5.part').write_bytes(BODY)
    (tmp_path/'x.h5.part.json').write_text(json.dumps({'url': url, 'total': len(BODY), 'same': '"a"'}))
    assert fetch(url, tmp_path/'x.h5', checksum=checksum).read_bytes() == BODY
    assert [a['range'] for a in serve.asked] == [f'bytes={len(BODY)}-'] and left_over(tmp_path) == ['x.h5']


@pytest.mark.parametrize('note', ['', '[]', '{"url": 3}', None])
def test_a_part_that_says_nothing_of_itself_is_not_gone_on_from(serve, tmp_path, note):
    (tmp_path/'x.h5.part').write_bytes(OTHER[:5000])
    if note is not None:
        (tmp_path/'x.h5.part.json').write_text(note)
    assert fetch(serve(file()), tmp_path/'x.h5').read_bytes() == BODY and left_over(tmp_path) == ['x.h5']


def test_a_short_body_without_a_length_is_found_by_the_checksum_or_the_size(serve, tmp_path):
    for options in (dict(checksum=SHA), dict(size=len(BODY)), dict(checksum=MD5, size=len(BODY))):
        (tmp_path/'x.h5').unlink(missing_ok=True)
        assert fetch(serve(file(stop=300_000, length=False), file()), tmp_path/'x.h5', **options).read_bytes() == BODY


FAILS = {
    'HTML with 200': ([answer(body=b'\n <!doctype HTML><title>Sign in</title>')], {}, 'sent an HTML page.*browser', 1),
    'HTML with 200, any name': ([answer(body=b'<html><body>down</body></html>')], {'magic': b''}, 'sent an HTML page', 1),
    'JSON instead of HDF5': ([answer(body=b'{"error": "quota exceeded"}')], {}, 'starts with b.{"error.*HDF', 1),
    'short body': ([file(stop=300_000, etag=None)], {}, r'cut after 300,000 of 1,024,008 bytes; 4 tries.*Try again later', 4),
    'wrong checksum': ([file()], {'checksum': 'md5:0123'}, r'md5 of its 1,024,008 bytes is [0-9a-f]{32}, 0123 was expected', 1),
    'wrong checksum, no length': ([file(length=False)], {'checksum': 'md5:0123'}, 'md5 of the 1,024,008 bytes that came is wrong', 4),
    'other size': ([file()], {'size': 7}, 'offers 1,024,008 bytes, 7 were expected', 1),
    'above the cap, announced': ([file()], {'max_bytes': 1000}, 'more than the 1,000 allowed', 1),
    'above the cap, unannounced': ([file(length=False)], {'max_bytes': 1000}, 'more than the 1,000 bytes allowed', 1),
    'gone': ([answer(404)], {}, 'HTTP 404 Not Found. Check the address', 1),
    'forbidden': ([answer(403)], {}, 'HTTP 403 Forbidden. Log in', 1),
    'always 503': ([answer(503)], {}, 'HTTP 503 Service Unavailable; 4 tries', 4),
    'asks to wait an hour': ([answer(429, Retry_After='3600')], {}, r'HTTP 429.*asks to wait 3600 s, beyond the 8 s given', 1),
    'always reset': ([reset], {}, 'Connection(Reset|)Error.*4 tries', 4),
    'redirects for ever': ([answer(302, Location='/x.h5')], {}, 'redirects without end', 31),
}


@pytest.mark.parametrize('name', FAILS)
def test_what_cannot_succeed_says_why_and_leaves_nothing(serve, tmp_path, name):
    script, options, message, requests = FAILS[name]
    url = serve(*script)
    with pytest.raises(CutoutError, match=message) as e:
        fetch(url, tmp_path/'x.h5', **options)
    assert url in str(e.value) and len(serve.asked) == requests
    assert [n for n in left_over(tmp_path) if '.part' not in n] == []
    if name != 'short body':
        assert left_over(tmp_path) == []


@pytest.mark.parametrize('read', [0.25, 30])
def test_a_server_that_hangs_meets_the_deadline(serve, tmp_path, read):
    began = time.monotonic()
    with pytest.raises(CutoutError, match='(?i)timed out.*beyond the 0.6 s'):
        fetch(serve(hang), tmp_path/'x.h5', patience=Patience(read=read, total=0.6, backoff=0.01, retries=99))
    assert time.monotonic() - began < 1.5


def test_plain_bytes_are_asked_for_and_packed_ones_refused(serve, tmp_path):
    def step(h):
        packs = 'gzip' in h.headers.get('Accept-Encoding', '') or 'stubborn' in h.path
        answer(body=gzip.compress(BODY) if packs else BODY, Content_Encoding='gzip' if packs else None)(h)
    url = serve(step)
    assert fetch(url, tmp_path/'x.h5').read_bytes() == BODY
    with pytest.raises(CutoutError, match='sent compressed .gzip. though plain bytes were asked for'):
        fetch(f'{url}?stubborn', tmp_path/'y.h5')


def test_a_server_that_drips_meets_the_deadline_and_what_came_stays(serve, tmp_path):
    began = time.monotonic()
    with pytest.raises(CutoutError, match='still sending after .* bytes, beyond the 0.5 s'):
        fetch(serve(file(pause=0.1)), tmp_path/'x.h5', patience=Patience(read=5, total=0.5))
    assert time.monotonic() - began < 1.5
    kept = (tmp_path/'x.h5.part').stat().st_size
    assert 0 < kept < len(BODY) and (tmp_path/'x.h5.part').read_bytes() == BODY[:kept]
    assert fetch(serve(file()), tmp_path/'x.h5').read_bytes() == BODY


@pytest.mark.parametrize('url', ['http://127.0.0.1:9/x.h5', 'http://no-such-host.invalid/x.h5'])
def test_offline_is_said_in_seconds(tmp_path, url):
    began = time.monotonic()
    with pytest.raises(CutoutError, match='not reached.*Offline'):
        get(url, tmp_path/'x.h5', progress=False, patience=Patience(backoff=0.2))
    assert time.monotonic() - began < 3


def test_a_long_download_over_a_bad_line_goes_on_as_long_as_it_moves(serve, tmp_path):
    steps = [file(stop=n) for n in range(100_000, 1_000_000, 100_000)]
    assert fetch(serve(*steps, file()), tmp_path/'x.h5', patience=Patience(retries=1, backoff=0.001)).read_bytes() == BODY
    assert len(serve.asked) == 10


def test_the_proxy_of_the_environment_is_used(serve, tmp_path, monkeypatch):
    monkeypatch.setenv('http_proxy', serve(file()).removesuffix('/x.h5'))
    monkeypatch.setenv('no_proxy', '')
    assert fetch('http://archive.invalid/x.h5', tmp_path/'x.h5').read_bytes() == BODY
    assert serve.asked[0]['path'] == 'http://archive.invalid/x.h5'


def test_a_small_answer_in_memory_has_the_same_guards(serve):
    assert get_bytes(serve(answer(503), file()), params={'ra': 1.5}, patience=QUICK) == BODY
    assert serve.asked[0]['path'] == '/x.h5?ra=1.5'
    for script, message in ((answer(body=b'<html>'), 'HTML'), (file(stop=9), 'cut after 9'), (answer(400, b'no'), 'HTTP 400'), (reset, '4 tries')):
        with pytest.raises(CutoutError, match=message):
            get_bytes(serve(script), patience=QUICK)


def wait_for(what, seconds=4):
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, 'waited in vain'
        time.sleep(0.01)


def in_process(url, path, **options):
    """`fetch` in a process of its own, which ends with 0 or, after Ctrl-C, 130."""
    def run():
        try:
            fetch(url, path, **options)
        except KeyboardInterrupt:
            os._exit(130)
        except CutoutError as e:
            path.with_suffix('.said').write_text(str(e))
            os._exit(1)
        os._exit(0)
    p = SPAWN.Process(target=run)
    p.start()
    return p


@pytest.mark.parametrize('sign, code', [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_stopped_process_leaves_a_part_that_the_next_goes_on_from(serve, tmp_path, sign, code):
    path, part = tmp_path/'x.h5', tmp_path/'x.h5.part'
    url = serve(file(pause=0.05), file())
    p = in_process(url, path)
    wait_for(lambda: part.exists() and part.stat().st_size > 60_000)
    os.kill(p.pid, sign)
    p.join(5)
    assert p.exitcode == code and not path.exists()
    kept = part.stat().st_size
    assert fetch(url, path).read_bytes() == BODY
    assert serve.asked[1]['range'] == f'bytes={kept}-' and left_over(tmp_path) == ['x.h5']


def test_two_processes_fetch_once(serve, tmp_path):
    url = serve(file(pause=0.01))
    both = [in_process(url, tmp_path/'x.h5') for _ in range(2)]
    for p in both:
        p.join(10)
    assert [p.exitcode for p in both] == [0, 0] and len(serve.asked) == 1
    assert (tmp_path/'x.h5').read_bytes() == BODY


def test_a_full_disk_is_said_and_what_came_is_used_later(serve, tmp_path):
    url = serve(file(), file())
    def small():
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
        fetch(url, tmp_path/'x.h5')
    def run():
        try:
            small()
        except CutoutError as e:
            os.write(said, str(e).encode())
            os._exit(1)
        os._exit(0)
    read, said = os.pipe()
    p = SPAWN.Process(target=run)
    p.start()
    p.join(10)
    assert p.exitcode == 1
    assert 'no room to write it (400,000 bytes came). Free some space and call again' in os.read(read, 10_000).decode()
    assert fetch(url, tmp_path/'x.h5').read_bytes() == BODY
    assert serve.asked[1]['range'] == 'bytes=400000-'


def test_a_disk_too_small_is_said_before_the_first_byte(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(net.shutil, 'disk_usage', lambda _: SimpleNamespace(free=1_000))
    with pytest.raises(CutoutError, match='1 MB are to come, 0 MB are free.*choose another folder'):
        fetch(serve(file()), tmp_path/'x.h5')
    assert left_over(tmp_path) == []


@pytest.fixture
def toy(serve, tmp_path, monkeypatch):
    """A data set of one file, served here, and a cache of its own."""
    monkeypatch.setenv('GALAXY_SSL_CACHE', str(tmp_path/'cache'))
    def make(*script, packed='', checksum=SHA):
        address = serve(*script)
        monkeypatch.setitem(DATASETS, 'toy', Dataset('toy', (DataFile('x.h5', address + packed, checksum),), 'none', 'arXiv:0', 'here'))
        return address
    return make


def test_a_data_set_is_fetched_once(toy, serve, tmp_path):
    toy(file())
    path = download('toy', progress=False, patience=QUICK)
    assert path == cache_folder()/'x.h5' == tmp_path/'cache'/'x.h5' and path.read_bytes() == BODY
    assert download('toy') == path and len(serve.asked) == 1
    assert left_over(path.parent) == ['x.h5', 'x.h5.sha256']


def test_the_record_is_read_by_sha256sum(toy, tmp_path):
    toy(file())
    path = download('toy', progress=False)
    assert path.with_name('x.h5.sha256').read_text().splitlines()[1] == f'{SHA[7:]}  x.h5'
    assert os.system(f'cd {path.parent} && sha256sum --quiet -c x.h5.sha256') == 0


def test_a_kept_file_is_not_read_again_to_be_trusted(toy, monkeypatch):
    toy(file())
    download('toy', progress=False)
    monkeypatch.setattr(datasets, 'file_digest', lambda *_: pytest.fail('read again'))
    download('toy')


@pytest.mark.parametrize('checksum', [SHA, MD5, None])
def test_a_file_put_there_by_hand_is_held_against_the_published_checksum(toy, serve, tmp_path, checksum):
    toy(file(), checksum=checksum)
    (tmp_path/'hand').mkdir()
    (tmp_path/'hand'/'x.h5').write_bytes(BODY)
    download('toy', tmp_path/'hand')
    assert serve.asked == []
    (tmp_path/'hand'/'x.h5').write_bytes(BODY[:-1])
    with pytest.raises(CutoutError, match='not the file that was downloaded.*Delete it, and download it again'):
        download('toy', tmp_path/'hand')


def test_a_mirror_is_asked_under_the_name_of_the_file(toy, serve, monkeypatch, tmp_path):
    address = toy(file())
    monkeypatch.setitem(DATASETS, 'toy', Dataset('toy', (DataFile('x.h5', 'https://archive.invalid/files/other.h5', SHA),), '', '', ''))
    download('toy', base_url=address.replace('/x.h5', '/our/'), progress=False)
    monkeypatch.setenv('GALAXY_SSL_MIRROR', address.removesuffix('/x.h5'))
    download('toy', tmp_path/'b', progress=False)
    assert [a['path'] for a in serve.asked] == ['/our/x.h5', '/x.h5']


def test_a_packed_file_is_unpacked_and_two_processes_share_it(toy, serve, tmp_path):
    packed = gzip.compress(BODY)
    toy(file(body=packed, pause=0.05), packed='.gz', checksum='sha256:' + hashlib.sha256(packed).hexdigest())
    both = [SPAWN.Process(target=download, args=('toy',), kwargs={'progress': False}) for _ in range(2)]
    for p in both:
        p.start()
    for p in both:
        p.join(10)
    assert [p.exitcode for p in both] == [0, 0] and len(serve.asked) == 1
    assert (tmp_path/'cache'/'x.h5').read_bytes() == BODY and left_over(tmp_path/'cache') == ['x.h5', 'x.h5.sha256']


def tar(*members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w:gz') as t:
        for name, link in members:
            info = tarfile.TarInfo(name)
            if link:
                info.type, info.linkname = tarfile.SYMTYPE, link
            info.size = 0 if link else 4
            t.addfile(info, io.BytesIO(b'data'))
    return out.getvalue()


@pytest.mark.parametrize('members', [[('ok', None), ('../evil', None)], [('a/../../evil', None)], [('out', '/etc'), ('out/evil', None)], [('up', '..'), ('up/evil', None)]])
def test_a_hostile_archive_writes_nothing(toy, tmp_path, members):
    toy(file(body=tar(*members)), packed='.tar.gz', checksum=None)
    with pytest.raises(CutoutError, match='must not be unpacked'):
        download('toy', progress=False)
    assert not list(tmp_path.rglob('evil')) and not list(tmp_path.rglob('ok'))


def test_an_archive_of_many_files_becomes_a_folder(toy, serve, tmp_path):
    toy(file(body=tar(('a/x', None), ('y', None))), packed='.tar.gz', checksum=None)
    path = download('toy', progress=False)
    assert path.is_dir() and (path/'a'/'x').read_bytes() == b'data' and download('toy') == path and len(serve.asked) == 1


def test_a_cache_that_cannot_be_written(toy, tmp_path, monkeypatch):
    toy(file())
    (tmp_path/'cache').write_text('a file where the folder should be')
    with pytest.raises(CutoutError, match='cannot be written.*Choose another folder'):
        download('toy', progress=False)


def test_a_shared_cache_is_read_without_writing(toy, tmp_path, monkeypatch):
    toy(file())
    path = download('toy', progress=False)
    os.utime(path, ns=(1, 1))
    before = path.with_name('x.h5.sha256').read_text()
    monkeypatch.setattr(datasets.os, 'access', lambda *_: False)
    monkeypatch.setattr(datasets, 'take_turns', lambda *_: pytest.fail('wants to write'))
    assert download('toy') == path and path.with_name('x.h5.sha256').read_text() == before


def test_the_command_downloads_and_lists(toy, tmp_path, capsys):
    toy(file())
    cli.main(['download', 'toy', '--to', str(tmp_path/'here')])
    assert str(tmp_path/'here'/'x.h5') in capsys.readouterr().out
    cli.main(['download'])
    said = capsys.readouterr().out
    assert all(name in said for name in DATASETS)
    with pytest.raises(SystemExit, match="Did you mean 'gz-desi'"):
        cli.main(['download', 'gz-dessi'])


def test_a_set_of_several_files_is_a_list_in_a_folder_of_its_own(serve, monkeypatch, tmp_path):
    packed = gzip.compress(BODY)
    mirror = serve(file(body=packed)).removesuffix('/x.h5')
    files = tuple(DataFile(f.name, f.url, 'md5:' + hashlib.md5(packed, usedforsecurity=False).hexdigest()) for f in DATASETS['galaxymnist'].files)
    monkeypatch.setitem(DATASETS, 'galaxymnist', replace(DATASETS['galaxymnist'], files=files))
    paths = download('galaxymnist', tmp_path, base_url=mirror, progress=False)
    assert [str(p.relative_to(tmp_path)) for p in paths] == ['galaxymnist/train_dataset.hdf5', 'galaxymnist/test_dataset.hdf5']
    assert [a['path'] for a in serve.asked] == ['/galaxymnist/train_dataset.hdf5.gz', '/galaxymnist/test_dataset.hdf5.gz']
    assert all(p.read_bytes() == BODY for p in paths)
