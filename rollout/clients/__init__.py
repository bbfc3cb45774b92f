"""Side effects, one module per server: frozen values in and out, `rollout.errors` raised, no Prefect."""
