"""Prepare a caption file for training, in a separate process, and print the seconds and the peak memory in MB.

python -m benchmarks.start_up recipe ANNOTATIONS
python -m benchmarks.start_up project FOLDER CACHE
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

from benchmarks.recipe import Captions
from data_loader import CaptionDataset


def peak_megabytes() -> float:
    """Return the peak resident memory of this process."""
    about = Path("/proc/self/status")
    own = re.search(r"VmHWM:\s*(\d+) kB", about.read_text()) if about.exists() else None
    if own:  # on Linux, the value of getrusage starts with the memory of the parent process
        return int(own[1]) / 1000
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main(which: str, *paths: Path) -> None:
    """Prepare the captions as the recipe or as the project does."""
    start = time.perf_counter()
    if which == "recipe":
        Captions(paths[0], Path())
    else:
        CaptionDataset(paths[0], cache=paths[1])
    print(time.perf_counter() - start, peak_megabytes())


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
