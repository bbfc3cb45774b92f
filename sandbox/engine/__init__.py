"""The serving engine of the embedded cloud: a simulated vLLM 0.32, and real vLLM on the CPU behind the same command.

    python -m sandbox.engine serve [--real-vllm-python PYTHON --] ARGUMENTS OF THE CONTAINER

Simulated: vLLM's command line, its checks of weights and memory with its messages, its start-up log, the OpenAI routes
that we use, its metrics, and an engine with continuous batching (`latency`) on one step clock. Not simulated: the
model. Answers are canned sentences in the model's own tokens, as long as asked; equal requests get equal answers.

Environment, besides what a pod gets (`STORAGE_EMULATOR_HOST`, `HF_ENDPOINT`, `SANDBOX_IDENTITY`, `SANDBOX_GPU`,
`SANDBOX_GPU_COUNT`, `SANDBOX_HOST_PORT`):

- `SANDBOX_ENGINE_LATENCY`: a preset of `latency.PRESETS`, or JSON that replaces fields of one;
- `SANDBOX_ENGINE_LOAD_BYTES_PER_S`: how fast weights load (default: `startup.DEFAULT_LOAD_BYTES_PER_S`);
- `SANDBOX_ENGINE_TRUTH`: a JSON Lines file to which each finished request's true times are appended, in seconds of
  `time.monotonic` (one clock for all processes of a machine): `received_s`, `scheduled_s`, and `token_s`, when each
  token was written. `id` is the answer's; with an `X-Request-Id` header its end is the client's choice.
"""
