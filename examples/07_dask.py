# /// script
# requires-python = ">=3.12"
# dependencies = ["ase-uq[mace]", "distributed"]
# ///
"""A finished trajectory, scored in shards by the workers of a Dask cluster, and made one file again.

    python examples/07_dask.py             four shards on two workers of this machine
    python examples/07_dask.py --quick     one worker, and a few frames, to see that everything is installed

On a cluster with a queue, `dask_jobqueue.SLURMCluster` takes the place of `LocalCluster`; see `cluster_of`. What a
worker that was killed has scored stays on the disk: whoever gets its shard next goes on from there.

The folder --out (default: scored) receives the shards, scored.xyz and scored.csv.
"""

# %% Frames, a potential and its uncertainty model: here those of the package
import argparse
from contextlib import suppress
from pathlib import Path

from ase.io import read, write
from distributed import Client, LocalCluster, as_completed

from ase_uq import embedded, score
from ase_uq.scoring.shards import Shard, merge_shards

MODEL, UQ = "embedded:mace", embedded.path("mace.uq.safetensors")


# %% What a worker does: one shard, which another worker may have begun
def scored(frames: Path, shard: Shard, folder: Path) -> Path:
    out = folder / f"part_{shard.number}.xyz"
    with suppress(FileExistsError):  # it is there, and complete
        score(frames, MODEL, UQ, out=out, shard=shard, progress=False)
    return out


# %% The workers: one process for each device, since a potential uses all of it
def cluster_of(n_workers: int) -> LocalCluster:
    # With a queue, from the package dask-jobqueue; job_extra_directives are lines of the job's script:
    #     cluster = SLURMCluster(cores=1, processes=1, memory="16GB", walltime="01:00:00",
    #                            job_extra_directives=["--gpus=1"])
    #     cluster.scale(jobs=8)
    return LocalCluster(n_workers=n_workers, threads_per_worker=1, dashboard_address=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one worker and a few frames")
    parser.add_argument("--out", type=Path, default=Path("scored"), help="folder for everything that is made")
    arguments = parser.parse_args()
    folder = arguments.out.resolve()  # workers may run elsewhere
    folder.mkdir(exist_ok=True)
    frames = folder / "finished.xyz"
    write(frames, read(embedded.path("test_900K.xyz"), ":70" if arguments.quick else ":"))

    n_shards = 2 if arguments.quick else 4
    with cluster_of(1 if arguments.quick else 2) as cluster, Client(cluster) as client:
        tasks = [client.submit(scored, frames, Shard(i, n_shards), folder) for i in range(1, n_shards + 1)]
        for task in as_completed(tasks):
            print(f"scored {task.result().name}")
        parts = client.gather(tasks)

    # %% One file, to the last byte that of a run without shards
    print(merge_shards(parts, out=folder / "scored.xyz", csv=folder / "scored.csv", overwrite=True).summary())


if __name__ == "__main__":  # the workers of this machine import this file
    main()
