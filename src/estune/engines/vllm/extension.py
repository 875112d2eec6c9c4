"""The part of the engine that runs in vLLM's workers: it writes members into the worker's weights.

vLLM mixes `WorkerExtension` into its worker class. All arguments and results are numbers, strings, lists and dicts, so
that they reach a worker in another process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from estune.engines.hf.working_model import ModelWeights
from estune.engines.vllm import shared_memory, table
from estune.engines.vllm.members import MemberBatch
from estune.engines.vllm.shared_memory import PerturbationMessage, perturbation_of
from estune.errors import UserError


class WorkerExtension:
    """Methods that vLLM adds to its worker; the engine calls them with ``collective_rpc``."""

    model_runner: Any

    def estune_open(
        self, address: Mapping[str, Any], kinds: Mapping[str, str], num_threads: int, architecture: str
    ) -> dict[str, Any]:
        """Map theta, find the table, verify it by value, and write theta into the worker's weights.

        Args:
            address: the message of `shared_memory.Address`.
            kinds: of every stored tensor: embedding, matrix, norm or bias.
            num_threads: threads of the noise kernels.
            architecture: the model's name, for messages.

        Returns:
            ``error``: the reason why the model cannot be used, or None; ``ranges``: which part of every stored tensor
            this rank holds; ``dtypes``: of every stored tensor.
        """
        theta = shared_memory.attach(shared_memory.Address.of(address), num_threads)
        stored = {s.name: table.Stored(tuple(s.shape), kinds[s.name], s.perturbed) for s in theta.specs}
        model = self.model_runner.get_model()
        try:
            bound = table.bind(model, stored, architecture)
            caches = [cache for cache in getattr(self.model_runner, "kv_caches", []) if isinstance(cache, torch.Tensor)]
            table.verify(model, bound, lambda name: torch.from_numpy(theta.arrays[name]), caches, architecture)
        except UserError as error:
            return {"error": str(error)}
        device = next(model.parameters()).device
        self.estune_weights = ModelWeights(bound, theta, device, stays_on_host=True)
        self.estune_theta = theta
        self.estune_batch = MemberBatch(self.model_runner, bound, theta)
        return {
            "error": None,
            "ranges": table.ranges_of(bound),
            "dtypes": {b.name: str(b.dtype).removeprefix("torch.") for b in bound},
        }

    def estune_hold(self, message: PerturbationMessage | None) -> float:
        """Write a member, or theta, into the weights; return the seconds that this took."""
        return self.estune_weights.hold(perturbation_of(message))

    def estune_moved(self) -> None:
        """Take note that theta has changed in its shared memory."""
        self.estune_theta.version += 1
        self.estune_weights.forget()

    def estune_cosine(self, message: PerturbationMessage) -> dict[str, float]:
        """Return `ModelWeights.perturb_cosine`."""
        perturbation = perturbation_of(message)
        assert perturbation is not None
        return self.estune_weights.perturb_cosine(perturbation)

    def estune_uncovered(self) -> list[str]:
        """Return why members cannot share a forward pass: the first parameters without a rule."""
        return self.estune_batch.uncovered

    def estune_members(self, messages: Sequence[PerturbationMessage]) -> None:
        """Compute the factors of a group's members; a request's ``extra_args`` says which member answers it."""
        self.estune_batch.set_members([p for p in map(perturbation_of, messages) if p is not None])

    def estune_shared_files(self) -> list[str]:
        """Return the files in ``/dev/shm`` through which the ranks of this engine talk; all ranks have opened them."""
        ident = os.environ.get("VLLM_DIST_IDENT", "")
        is_ours = ident.startswith("vllm_dist_")
        return [str(path) for path in Path("/dev/shm").iterdir() if is_ours and path.name.startswith(ident)]

    def estune_unsound(self) -> list[int]:
        """Return the rows whose logits held NaN or infinity since the last call."""
        return self.estune_batch.take_unsound()
