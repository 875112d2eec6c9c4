"""The finished model on the hub: the repository is made before the run begins, the files go there when it is done.

What goes: the model with its tokenizer, configuration and code, the card, and the journal that rebuilds it, which names
model, data and rewards as the run was given them. What stays: checkpoints, completions, evaluated rows, metrics.
"""

from __future__ import annotations

from pathlib import Path

from estune.errors import UserError

FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "*.jinja",
         "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.spm",
         "configuration_*.py", "modeling_*.py", "tokenization_*.py", "README.md", "journal.jsonl"]  # fmt: skip
FOLDERS = ["checkpoint-*", "completions/*", "eval/*", "plots/*", "base/*", "tensorboard/*", "wandb/*", ".*"]


def client_errors() -> tuple[type[Exception], ...]:
    """Return what the hub's client raises where the hub refuses, or does not answer.

    Its HTTP library changes with its version, so that library's own base class is taken from the client's.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    return (*HfHubHTTPError.__bases__, HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError)  # the last: names


def repository_of(hub_model_id: str | None, run_dir: str | Path | None) -> str:
    """Return the repository that a run is uploaded to: ``hub_model_id``, or by default the run directory's name."""
    return hub_model_id or Path(str(run_dir)).name


def open_repository(repo_id: str, private: bool) -> str:
    """Make the repository, or find it; return its full name. The token is the hub client's own (``HF_TOKEN``).

    Raises:
        UserError: the hub does not answer, or does not let us.
    """
    import huggingface_hub

    try:
        return str(huggingface_hub.HfApi().create_repo(repo_id, private=private, exist_ok=True).repo_id)
    except client_errors() as error:
        raise UserError(f"push_to_hub cannot open {repo_id}: {' '.join(str(error).split())[:300]}") from error


def push(run_dir: Path, repo_id: str) -> str:
    """Upload a finished run's model in one commit; return the commit's address.

    Raises:
        UserError: the upload failed; the model is in the run directory all the same.
    """
    import huggingface_hub

    try:
        done = huggingface_hub.HfApi().upload_folder(
            repo_id=repo_id, folder_path=run_dir, allow_patterns=FILES, ignore_patterns=FOLDERS,
            commit_message="Model tuned by estune",
        )  # fmt: skip
    except client_errors() as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the model is in {run_dir}, but its upload to {repo_id} failed ({reason}); the same command "
                        "with --resume tries again") from error  # fmt: skip
    return str(done)
