"""One Prefect task per step: name, retries, timeout, artifact."""
