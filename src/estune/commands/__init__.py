"""The subcommands of `estune`, one file each."""
