"""What the server of training processes loads once: everything heavy that a run imports."""

import contextlib

import estune.baselines.ground
import estune.engines.hf
import estune.trainer  # noqa: F401

with contextlib.suppress(ImportError):  # a comparison of ES alone needs no TRL
    import estune.baselines.policy_gradient
    import estune.baselines.rejection
