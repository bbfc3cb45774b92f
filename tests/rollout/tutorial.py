"""What the tutorial itself says, for the tests that hold us to it."""

from __future__ import annotations

TUTORIAL_ARGUMENTS = (
    "--host=0.0.0.0",
    "--port=8080",
    "--model=gs://gemma-4-26b-it",
    "--tensor-parallel-size=1",
    "--max-num-seqs=128",
    "--gpu-memory-utilization=0.9",
    "--limit_mm_per_prompt.image=1",
    "--enable-auto-tool-choice",
    "--tool-call-parser=gemma4",
    "--reasoning-parser=gemma4",
)
"""vLLM's arguments of its Deployment."""
