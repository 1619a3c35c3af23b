"""Under its former name until pages 06 and 07 ask the door."""

from lib.stages.quantize.weights import predictions

__all__ = ["predictions"]
