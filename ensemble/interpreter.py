"""How Python itself behaves in a process that answers."""

import gc
import sys

SWITCH_INTERVAL_S = 0.5e-3


def settle_interpreter() -> None:
    """When a process has all that it keeps for good.

    No collection of cycles looks at that any more: a full one took 90 ms in the scheduler and in `preprocess`, 200,000
    objects, in which nothing else runs there. And a thread that computes lets others go on after half a millisecond,
    not after 5: with each response the sender lets go of the interpreter, and had to wait so long to get it back.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
