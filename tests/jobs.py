"""Jobs that tests start in processes of their own, so that they can be killed."""
import contextlib
import io
import multiprocessing
import os
import signal
import socket
import time

METHOD = multiprocessing.get_context('forkserver')
METHOD.set_forkserver_preload(['galaxy_ssl.train', 'galaxy_ssl.embed'])


def training(config, data):
    """Train quietly on a file of cutouts."""
    import torch
    torch.set_num_threads(1)
    from galaxy_ssl.cutouts import open_cutouts
    from galaxy_ssl.train import TrainConfig, train
    with contextlib.redirect_stdout(io.StringIO()):
        train(TrainConfig(**config), open_cutouts(data), callbacks=[])


def watched(config, data, seen, watch):
    """Train quietly with what watches a training by default, which marks its process."""
    import torch
    torch.set_num_threads(1)
    from pathlib import Path

    from galaxy_ssl.callbacks import Callback
    from galaxy_ssl.cutouts import open_cutouts
    from galaxy_ssl.train import TrainConfig, train, watchers

    class Mark(Callback):
        def on_epoch(self, trainer):
            (Path(seen)/f'rank{os.environ["RANK"]}').touch()

    cfg = TrainConfig(**config)
    with contextlib.redirect_stdout(io.StringIO()):
        train(cfg, open_cutouts(data), callbacks=[*watchers(cfg), Mark()] if watch else [])


def embedding(run, data, out, shard_size):
    """Embed quietly into a file."""
    import torch
    torch.set_num_threads(1)
    from galaxy_ssl.cutouts import open_cutouts
    from galaxy_ssl.embed import embed_cutouts
    embed_cutouts(run, open_cutouts(data), out=out, shard_size=shard_size, batch_size=16, progress=False)


def ranked(rank, world, port, job, args):
    """Run a job as one of several processes that torchrun would have started."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    job(*args)


def start(job, *args, world=1):
    """Start a job in `world` processes."""
    if world == 1:
        processes = [METHOD.Process(target=job, args=args)]
    else:
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        processes = [METHOD.Process(target=ranked, args=(r, world, port, job, args)) for r in range(world)]
    for p in processes:
        p.start()
    return processes


def finish(processes, timeout=300):
    """Wait until all processes end; fail unless they end well."""
    for p in processes:
        p.join(timeout)
        assert p.exitcode == 0, f'a job ended with {p.exitcode}'


def kill(processes):
    """kill -9, all at once; whether they were still at work."""
    alive = [p.is_alive() for p in processes]
    for p in processes:
        if p.is_alive():
            os.kill(p.pid, signal.SIGKILL)
    for p in processes:
        p.join(10)
    return all(alive)


def wait_for(condition, processes, timeout=60):
    """Wait until a condition holds or a process ends."""
    until = time.monotonic() + timeout
    while not condition() and all(p.is_alive() for p in processes) and time.monotonic() < until:
        time.sleep(0.002)
