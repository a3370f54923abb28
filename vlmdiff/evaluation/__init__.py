"""How well anomaly maps and scores tell defects from normal: metrics, curves, the report."""

from vlmdiff.evaluation.aupro import aupro
from vlmdiff.evaluation.streaming import StreamingMetrics

__all__ = ["StreamingMetrics", "aupro"]
