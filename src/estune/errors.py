"""The exception that means "the user gave something estune cannot use", and what keeps a run from going on."""


class UserError(Exception):
    """Bad input or an unusable environment, told in one clear sentence.

    The command line prints it as ``estune: error: <sentence>`` and exits with status 2; from Python it propagates.
    """


class Hindered(UserError):
    """What keeps a run from going on and is none of its doing.

    Another process that holds it, a full disk, options or data that a resume cannot change. A comparison stops at it,
    where an error of the run itself is one of its rows.
    """
