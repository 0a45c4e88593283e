"""Two processes of a script, as torchrun starts them, that meet through a file and need no port."""

import json
import os
import subprocess
import sys


def on_two_ranks(script, folder, **env):
    """Run ``script folder`` as rank 0 and 1; give back what each has written to its file there."""
    processes = []
    for rank in range(2):
        of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        command = [sys.executable, str(script), str(folder)]
        with (folder / f"{rank}.err").open("w") as err:
            processes.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, "OMP_NUM_THREADS": "1", **of_rank, **env},
                    stdout=err,
                    stderr=err,
                )
            )
    try:
        for rank, process in enumerate(processes):
            assert process.wait(timeout=400) == 0, (folder / f"{rank}.err").read_text()[-4000:]
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
