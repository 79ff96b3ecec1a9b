"""From a caption file to ready to train, in a process of its own: prints seconds and peak memory in MB.

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
    """The most memory that this process has held, resident."""
    about = Path("/proc/self/status")
    own = re.search(r"VmHWM:\s*(\d+) kB", about.read_text()) if about.exists() else None
    if own:  # on Linux getrusage's begins with what the process that started this one held
        return int(own[1]) / 1000
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main(which: str, *paths: Path) -> None:
    """Get ready as the recipe does or as the project does."""
    start = time.perf_counter()
    if which == "recipe":
        Captions(paths[0], Path())
    else:
        CaptionDataset(paths[0], cache=paths[1])
    print(time.perf_counter() - start, peak_megabytes())


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
