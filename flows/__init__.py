"""Prefect flows over the stages that dvc.yaml declares."""

from vlmdiff.core.network import ask_loopback_directly

ask_loopback_directly()
