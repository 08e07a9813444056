"""torchrun without its traceback.

python -m llm_jepa.large.launch --nproc_per_node 8 finetune.py …
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code of the first process that failed; 128 + N if signal N ended it, as in a shell."""
    try:
        torchrun(argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"launch.py: process {rank} ended with exit code {failure.exitcode}, see above", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
