"""Public names of the noise (`estune.es.noise`)."""

from estune.es.noise import *  # noqa: F403
from estune.es.noise import __all__ as __all__
