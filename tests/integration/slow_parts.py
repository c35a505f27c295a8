"""For experimental.custom_import: data that stalls and saves that last, as the environment says.

STALL="RANK:DOCUMENTS"   on this rank, data stops to come for good after so many documents
SLOW_SAVE="SECONDS"      each file of a checkpoint takes so long to reach the disk
"""

import os
import time

from trainer.data.datasets import DatasetRow
from trainer.data.documents import Document


def documents(path, order):
    rank, after = (int(part) for part in os.environ.get("STALL", "-1:0").split(":"))
    for number in range(order.start, 100_000):
        if str(rank) == os.environ.get("RANK") and number >= after:
            time.sleep(3600)
        yield Document(f"document {number}", f"the number {number} has the square {number * number}. " * 40)


DATASETS = {"stalling": DatasetRow("documents that may stop to come", documents, lambda path: None)}

if "SLOW_SAVE" in os.environ:
    _fsync = os.fsync

    def _slow_fsync(descriptor):
        time.sleep(float(os.environ["SLOW_SAVE"]))
        _fsync(descriptor)

    os.fsync = _slow_fsync
