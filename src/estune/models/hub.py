"""Uploads a finished model to the hub; the repository is created before the run begins.

The upload holds the model with tokenizer, configuration and code, the model card, and the journal that rebuilds the
weights. The journal names the run's model, data and rewards. Checkpoints, completions, evaluated rows and metrics are
not uploaded.
"""

from __future__ import annotations

from pathlib import Path

from estune.errors import UserError

# Patterns of the uploaded files, and of the folders and files that are left out.
FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "*.jinja",
         "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.spm",
         "configuration_*.py", "modeling_*.py", "tokenization_*.py", "README.md", "journal.jsonl"]  # fmt: skip
FOLDERS = ["checkpoint-*", "completions/*", "eval/*", "plots/*", "base/*", "tensorboard/*", "wandb/*", ".*"]


def client_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that the hub's client raises if the hub refuses a request or does not answer.

    Versions of the client use different HTTP libraries. The base classes of the client's own error include the
    library's base class.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # ValueError: the name of the repository is not valid
    return (*HfHubHTTPError.__bases__, HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError)


def repository_of(hub_model_id: str | None, run_dir: str | Path | None) -> str:
    """Return the name of a run's repository: ``hub_model_id``, or else the run directory's name."""
    return hub_model_id or Path(str(run_dir)).name


def open_repository(repo_id: str, private: bool) -> str:
    """Create the repository if it does not exist; return its full name.

    The hub's client finds the token itself (``HF_TOKEN``).

    Raises:
        UserError: the hub does not answer, or refuses the request.
    """
    import huggingface_hub

    try:
        return str(huggingface_hub.HfApi().create_repo(repo_id, private=private, exist_ok=True).repo_id)
    except client_errors() as error:
        raise UserError(
            f"push_to_hub cannot open {repo_id} on the hub: {' '.join(str(error).split())[:300]}"
        ) from error


def push(run_dir: Path, repo_id: str, commit_message: str = "Model tuned by estune") -> str:
    """Upload a finished run's model in one commit; return the commit's URL.

    Raises:
        UserError: the upload failed; the run directory still holds the model.
    """
    import huggingface_hub

    try:
        commit = huggingface_hub.HfApi().upload_folder(
            repo_id=repo_id,
            folder_path=run_dir,
            allow_patterns=FILES,
            ignore_patterns=FOLDERS,
            commit_message=commit_message,
        )
    except client_errors() as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the model is in {run_dir}, but its upload to {repo_id} failed ({reason}); the same command with --resume "
            "tries again"
        ) from error
    return str(commit)
