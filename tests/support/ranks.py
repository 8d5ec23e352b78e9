"""Several processes that train one model."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
END = """
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""
"""How a rank ends: threads of torch's process group may abort the interpreter's own
exit ("terminate called without an active exception"), and that says nothing of ours."""


def on_ranks(code, folder, *arguments, ranks=2, **environment):
    """Run a program on several ranks of gloo; return what each wrote.

    Args:
        code: The program: ``rank`` is known, and the process group is there.
        folder: An empty one, where the ranks meet.
        *arguments: Are ``sys.argv[1:]``.
        ranks: How many.
        **environment: Variables that each of them has beside the process's own.

    Returns:
        Of each rank what it wrote to stdout, and to stderr.
    """
    start = f"""
import os, sys, torch, torch.distributed as dist
rank = int(os.environ["RANK"])
meet = "file://{folder / "rendezvous"}"
dist.init_process_group("gloo", init_method=meet, rank=rank, world_size={ranks})
"""
    kept = {k: v for k, v in os.environ.items() if k != "GRADWATCH_DIR"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", start + code + END, *map(str, arguments)],
            env={**kept, "RANK": str(rank), "OMP_NUM_THREADS": "1", **environment},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate(timeout=120) for process in processes]
    assert [p.returncode for p in processes] == [0] * ranks, said
    return said
