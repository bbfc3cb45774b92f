"""How long a transfer takes by the model of its scaling, and what bounds it: links, connections, pods.

    python tests/benchmarks/transfer_scaling.py

Arithmetic, not a measurement: the rates are the planning figures of `rollout.transfer.Links`. Prints a markdown table.
"""

from __future__ import annotations

from transfer_harness import table

from rollout.model import ModelFile
from rollout.transfer import predict_transfer

SHARD_BYTES = 4_300_000_000
MODELS = {"52 GB": 12, "700 GB": 163, "1.3 TB": 302}
"""Size, and shards of 4.3 GB."""
PODS = (1, 2, 4, 8, 16, 32)
CONNECTIONS = 32


def main() -> None:
    rows = []
    for name, shards in MODELS.items():
        files = [
            ModelFile(path=f"model-{number:05d}.safetensors", size_bytes=SHARD_BYTES, sha256="0" * 64)
            for number in range(shards)
        ]
        for pods in PODS:
            forecast = predict_transfer(files, pods=pods, connections=CONNECTIONS)
            rows.append(
                (
                    name,
                    pods,
                    f"{forecast.seconds / 60:.1f}",
                    f"{forecast.bytes_per_s / 1e9:.1f}",
                    f"{forecast.largest_share_bytes / 1e9:.0f}",
                    forecast.bound_by,
                )
            )
    print(f"{CONNECTIONS} connections for each pod, shards of {SHARD_BYTES / 1e9:g} GB.\n")
    print(table(("Weights", "pods", "minutes", "GB/s", "largest share, GB", "bound by"), rows))


if __name__ == "__main__":
    main()
