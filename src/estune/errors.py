"""The one exception that means "the user gave something estune cannot use"."""


class UserError(Exception):
    """Bad input or an unusable environment, told in one clear sentence.

    The command line prints it as ``estune: error: <sentence>`` and exits with status 2; from Python it propagates.
    """
