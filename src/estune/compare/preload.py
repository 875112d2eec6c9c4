"""What the server of training processes loads once: everything heavy that a run imports."""

import contextlib
import importlib

for name in (
    "estune.train.trainer",
    "estune.engines.hf.engine",
    "estune.baselines.trainer",
    "estune.monitor.report.plots",
):
    importlib.import_module(name)
with contextlib.suppress(ImportError):  # a comparison of ES alone needs no TRL
    for name in ("estune.baselines.policy_gradient", "estune.baselines.rejection"):
        importlib.import_module(name)
