"""Answers prompts with vLLM for `leaving.py`: JOB.json {model, prompts (chats), tokens} -> ANSWERS.json (texts)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Answer the job's prompts greedily in float32."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM, SamplingParams

    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    llm = LLM(job["model"], dtype="float32", enforce_eager=True, max_model_len=1024)
    greedy = SamplingParams(temperature=0.0, max_tokens=job["tokens"])
    texts = [output.outputs[0].text for output in llm.chat(job["prompts"], greedy)]
    Path(sys.argv[2]).write_text(json.dumps(texts), encoding="utf-8")


if __name__ == "__main__":
    main()
