"""How near sparse attention stays to dense attention: `python -m benchmarks.fidelity`. README.md of the folder above says more."""
