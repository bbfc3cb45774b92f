"""The serving engine of the embedded cloud: a simulated vLLM, and real vLLM on the CPU."""
