"""Several processes: collective operations over ranks, and models sharded by FSDP2."""

from rlmt.distributed.fsdp2 import FSDP2

__all__ = ["FSDP2"]
