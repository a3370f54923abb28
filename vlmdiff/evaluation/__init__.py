"""How well anomaly maps and scores tell defects from normal: metrics, curves, the report."""

from vlmdiff.evaluation.aupro import aupro, pro_curve

__all__ = ["aupro", "pro_curve"]
